"""A log of any format as Parquet shards of whole users, for `build_sequences_on_spark`."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from ..utils.files import atomic_folder, make_scratch, recover_folder, report_leftovers, require_folder
from .ingest import Interactions, clean_batches
from .options import LogOptions, parse_options
from .readers import open_log
from .text_files import BadRows


def partition_log(
    source: Any, folder: str | Path, num_partitions: int, *, with_rating: bool = False, **options: Any
) -> None:
    """
    Writes a log of any format as Parquet shards by the hash of the user, in bounded memory.

    The columns are `user`, `item`, `timestamp` if the log has times, `event_type` and `weight` if the options name them,
    `rating` if `with_rating` is set, `part` of a given split, and `row`, the position in the log, by which
    [`~blossomrec_hf.data.build_sequences_on_spark`] keeps file order.

    Args:
        source: see [`~data.readers.open_log`].
        folder (`str` or `Path`): a folder that does not exist yet. It is written completely or not at all.
        num_partitions (`int`): number of shards; all events of a user are in one.
        options: fields of [`~data.options.LogOptions`].

    Raises:
        ValueError: as [`~blossomrec_hf.data.build_sequences`].
        FileExistsError: if `folder` exists.
    """
    folder = Path(folder)
    (reading,) = parse_options(options, LogOptions)
    require_folder(folder)
    recover_folder(folder)
    if folder.exists():
        raise FileExistsError(f"folder {str(folder)!r} exists already; give another name.")
    if num_partitions < 1:
        raise ValueError(f"num_partitions is {num_partitions}; it may be 1 or more.")
    report_leftovers(folder)
    log = open_log(source, reading)
    if with_rating:
        log.require("rating", "with_rating is given")
    roles = ["rating"] * with_rating
    roles += [role for role in ("timestamp", "event_type", "weight", "part") if role in log.parts[0].types]
    writers: dict[int, pq.ParquetWriter] = {}
    first = 0
    with ExitStack() as stack:
        scratch = make_scratch(folder)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        built = stack.enter_context(atomic_folder(folder))
        for batch in clean_batches(log, roles, Interactions(scratch, BadRows(skip=reading.on_bad_rows == "skip"))):
            place = pl.int_range(first, first + batch.height, dtype=pl.Int64)
            batch = batch.with_columns(row=place, shard=pl.col("user").hash(seed=0) % num_partitions)
            batch = batch.with_columns(pl.col(pl.Categorical).cast(pl.String))
            first += batch.height
            for (shard,), rows in batch.partition_by("shard", as_dict=True, maintain_order=True).items():
                table = rows.drop("shard").to_arrow()
                if shard not in writers:
                    writers[shard] = pq.ParquetWriter(
                        built / f"part-{shard:05d}.parquet", table.schema, write_page_checksum=True
                    )
                writers[shard].write_table(table.cast(writers[shard].schema))
        for writer in writers.values():
            writer.close()
