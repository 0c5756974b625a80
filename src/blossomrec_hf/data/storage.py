"""Built sequences -> Arrow, in memory or in a folder that `datasets` loads."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from .filters import FilterReport
from .partitions import Partition, runs


_ROWS_A_BATCH = 5_000  # what a random access by row has to look at


def _tables(parts: list[Partition], user_ids: pl.Series, vocabulary: np.ndarray) -> Iterator[pa.Table]:
    """One Arrow table a part, one row a user."""
    id_type = pa.int64() if user_ids.dtype.is_integer() else pa.string()
    for part in parts:
        columns = part.load()
        starts, lengths = runs(columns["user"])
        offsets = pa.array(np.append(starts, columns["user"].size), pa.int32())
        rows = {
            "user_id": user_ids[columns["user"][starts]].to_arrow().cast(id_type),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(vocabulary[columns["item"]])),
        }
        if "time" in columns:
            rows["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(columns["time"]))
        for name, held_out in (("train_end", 2), ("validation_end", 1), ("test_end", 0)):
            rows[name] = pa.array(np.maximum(lengths - held_out, 0), pa.int32())
        yield pa.table(rows)


def _info(schema: pa.Schema, report: FilterReport) -> DatasetInfo:
    return DatasetInfo(description=str(report), features=Features.from_arrow_schema(schema))


def to_dataset(parts: list[Partition], user_ids: pl.Series, vocabulary: np.ndarray, report: FilterReport) -> Dataset:
    """The rows as a `Dataset` in memory."""
    table = pa.concat_tables(_tables(parts, user_ids, vocabulary))
    return Dataset(table, info=_info(table.schema, report))


def write_rows(
    folder: Path, parts: list[Partition], user_ids: pl.Series, vocabulary: np.ndarray, report: FilterReport
) -> None:
    """
    Writes the rows to `folder` as `Dataset.save_to_disk` lays them out, an Arrow file a part: `save_to_disk` itself
    would need a Dataset first, and so write everything twice.
    """
    folder.mkdir()
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, table in zip(names, _tables(parts, user_ids, vocabulary)):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_ROWS_A_BATCH)
        schema = table.schema
    _info(schema, report).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": uuid.uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def replace_folder(built: Path, target: Path) -> None:
    """Puts the complete folder `built` in the place of `target`, which may be there."""
    old = None
    if target.exists():
        old = built.with_name("replaced")
        os.rename(target, old)
    os.rename(built, target)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
