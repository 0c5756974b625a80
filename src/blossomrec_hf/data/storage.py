"""Built sequences -> Arrow, in memory or in a folder that `datasets` loads."""

import json
import uuid
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features

from ..utils.files import recover_folder, report_leftovers, require_folder
from .event_table import FEATURES_FILE, METADATA_FILE, TOKENIZER_FILES, USERS_A_BATCH, EventTable
from .filters import FilterReport
from .item_features import feature_columns, item_features, save_item_features
from .splits import repeat_share


_FILE_BYTES = 1 << 28


def _info(schema: pa.Schema, report: FilterReport) -> DatasetInfo:
    return DatasetInfo(description=str(report), features=Features.from_arrow_schema(schema))


def to_dataset(tables: Iterable[pa.Table], report: FilterReport) -> Dataset:
    """The rows as a `Dataset` in memory."""
    table = pa.concat_tables(tables)
    return Dataset(table, info=_info(table.schema, report))


def write_dataset(folder: Path, tables: Iterable[pa.Table], report: FilterReport) -> None:
    """
    Writes the rows to the empty `folder` as `Dataset.save_to_disk` lays them out, in files of about `_FILE_BYTES`:
    `save_to_disk` itself would need a Dataset first, and so write everything twice.
    """
    written, tables = [], iter(tables)
    for table in tables:
        schema, size = table.schema, 0
        written.append(folder / f"data-{len(written):05d}.arrow")
        with pa.OSFile(str(written[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while table is not None:
                writer.write_table(table, max_chunksize=USERS_A_BATCH)
                size += table.nbytes
                table = next(tables, None) if size < _FILE_BYTES else None
    names = [f"data-{number:05d}-of-{len(written):05d}.arrow" for number in range(len(written))]
    for path, name in zip(written, names):
        path.rename(folder / name)
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


def load_folder(folder: str | Path) -> Dataset:
    """
    The rows that `build_sequences` wrote to `folder`.

    Raises:
        ValueError: for a damaged folder.
        OSError: if a file of it cannot be opened.
    """
    recover_folder(folder)
    try:
        return Dataset.load_from_disk(str(folder))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"The data set in {folder} is damaged ({error}); build it again.") from error


def export_folder(folder: str | Path, path: str | Path) -> None:
    """
    Writes a prepared data set to one `.safetensors` file, see [`~blossomrec_hf.data.EventTable.save`].

    Args:
        folder: from [`~blossomrec_hf.data.build_sequences`], with the tokenizer.
        path: the file.

    Raises:
        ValueError: if `folder` has no data set, or a damaged one.
    """
    folder = Path(folder)
    recover_folder(folder)
    for name in ("state.json", *TOKENIZER_FILES):
        if not (folder / name).is_file():
            raise ValueError(
                f"`data` is {folder}, which is no folder of a prepared data set: it has no {name}. Write it with "
                "`blossomrec prepare`."
            )
    table = EventTable.from_dataset(load_folder(folder))
    report = FilterReport.load(folder)
    share = None if report is None else report.repeat_share
    table.repeat_share = repeat_share(table) if share is None else share
    names = [name for name in (*TOKENIZER_FILES, METADATA_FILE) if (folder / name).is_file()]
    table.files = {name: (folder / name).read_bytes() for name in names}
    if METADATA_FILE in names:
        items = pl.read_parquet(folder / METADATA_FILE, glob=False)
        if feature_columns(items):
            num_items = table.tokenizer().num_items
            table.files[FEATURES_FILE] = save_item_features(item_features(items, num_items))
    table.save(path)


def check_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """
    Refuses, before any work, an output folder that exists or that cannot be made; reports what killed builds left next to
    it.

    Raises:
        ValueError: if `output_dir`, or one of its parents, is a file, or if it has files that are no data set.
        FileExistsError: if `output_dir` exists and `overwrite` is not set.
    """
    require_folder(output_dir)
    recover_folder(output_dir)
    report_leftovers(output_dir)
    if output_dir.exists() and not overwrite:
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} is there already; pass overwrite=True (--overwrite) or another name."
        )
    if output_dir.exists() and not (output_dir / "state.json").is_file() and any(output_dir.iterdir()):
        raise ValueError(
            f"output_dir {str(output_dir)!r} has files, but no data set that could be overwritten; give another name."
        )
