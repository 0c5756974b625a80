"""The steps of build_sequences on Apache Spark, for logs that one machine is too small for: `pip install blossomrec-hf[spark]`."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_folder, recover_folder, require_folder
from .build import NUM_SPECIAL, check_arguments
from .filters import FilterReport
from .formats import find_columns
from .ingest import Interactions, as_integers, clean_batches, latest_time, time_unit
from .readers import open_log
from .storage import check_output_dir, load_folder, with_ends, write_dataset


if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

_ROWS_BITS = 40  # of a row's place: 2⁴⁰ rows a file, 2²³ files


def build_sequences_on_spark(
    source: str,
    output_dir: str | Path,
    *,
    spark: "SparkSession",
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
    min_rating: float | None = None,
    deduplicate: Literal["none", "first", "last"] = "none",
    k_core: int | tuple[int, int] = 1,
    min_history: int = 1,
    max_history: int | None = None,
    on_bad_rows: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
) -> tuple[Dataset, BlossomRecTokenizer]:
    """
    [`build_sequences`] on a Spark cluster: same arguments, same steps, same result to the byte.

    Users' histories are made and ordered by the executors; the driver holds the catalogue, and writes the Dataset.

    Args:
        source (`str`): a Parquet file or folder that the executors can read; files count in name order. Other formats:
            [`partition_log`] first.
        output_dir: as for `build_sequences`, on the driver's disk.
        spark (`SparkSession`): 3.5 or later.

    Raises:
        as `build_sequences`; bad rows are counted, not named by line.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as f

    user_core, item_core = (k_core, k_core) if isinstance(k_core, int) else k_core
    check_arguments(deduplicate, on_bad_rows, user_core, item_core, min_history, max_history)
    output_dir = Path(output_dir)
    check_output_dir(output_dir, overwrite=overwrite)
    names = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    report = FilterReport(Path(source).name, "parquet")
    log = _read(spark, source, names, with_rating=min_rating is not None)
    log = _clean(log, report, on_bad_rows).localCheckpoint()
    report.read(log.count())
    if min_rating is not None:
        log = log.filter(f.col("rating") >= min_rating).drop("rating").localCheckpoint()
        report.add(f"rating >= {min_rating:g}", *_totals(log))
    users = log.groupBy("user").agg(f.min("place").alias("user_place")).localCheckpoint()
    items = log.groupBy("item").agg(f.min("place").alias("item_place")).localCheckpoint()

    order = [f.col(name) for name in ("timestamp", "place") if name in log.columns]
    if deduplicate != "none":
        along = order if deduplicate == "first" else [column.desc() for column in order]
        number = f.row_number().over(Window.partitionBy("user", "item").orderBy(*along))
        log = log.withColumn("number", number).filter("number = 1").drop("number").localCheckpoint()
        report.add(f"deduplicate, {deduplicate} stays", *_totals(log))
    if (user_core, item_core) != (1, 1):
        log = _k_core(log, user_core, item_core)
        report.add(f"k-core {user_core}, {item_core}", *_totals(log))
    if min_history > 1 or max_history is not None:
        whole = Window.partitionBy("user")
        log = log.withColumn("length", f.count("*").over(whole)).filter(f.col("length") >= min_history)
        if max_history is not None:
            from_end = f.row_number().over(whole.orderBy(*(column.desc() for column in order)))
            log = log.withColumn("from_end", from_end).filter(f.col("from_end") <= max_history).drop("from_end")
        log = log.drop("length").localCheckpoint()
        report.add(f"history {min_history} to {max_history or 'any'}", *_totals(log))
    report.add("kept", *_totals(log))

    every_item = items.join(log.groupBy("item").count(), "item", "left").fillna(0, ["count"])
    every_item = every_item.orderBy(f.col("count").desc(), "item_place").select("item", "count")
    catalogue = pl.from_arrow(_collect(every_item))
    # Of all items that the log shows, kept or not: so their type is the one that build_sequences finds.
    ids = as_integers(catalogue["item"])
    kept = catalogue["count"] > 0
    item_type = "int" if ids.dtype.is_integer() else "str"
    tokenizer = BlossomRecTokenizer.from_items(ids.filter(kept).to_list(), item_type=item_type)
    numbered = catalogue.filter(kept).select("item").with_row_index("id", NUM_SPECIAL)
    vocabulary = spark.createDataFrame(numbered.select("item", "id").rows(), ["item", "id"])
    vocabulary = vocabulary.withColumn("id", f.col("id").cast("int"))

    events = f.sort_array(f.collect_list(f.struct(*order, "id")))
    rows = log.join(f.broadcast(vocabulary), "item").groupBy("user").agg(events.alias("events"))
    columns = [f.col("user").alias("user_id"), f.col("events.id").alias("input_ids")]
    if "timestamp" in log.columns:
        columns.append(f.col("events.timestamp").alias("timestamps"))
    rows = rows.join(users, "user").orderBy("user_place").select(*columns)
    if dict(users.dtypes)["user"] == "string":
        plain = f.coalesce(f.expr("cast(try_cast(user as bigint) as string) = user"), f.lit(False))
        if users.filter(~plain).isEmpty():
            rows = rows.withColumn("user_id", f.col("user_id").cast("bigint"))

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".blossomrec-", dir=output_dir.parent))
    try:
        rows.write.parquet(str((scratch / "rows").resolve()))
        with atomic_folder(output_dir) as built:
            write_dataset(built, _user_rows(scratch / "rows"), report)
            tokenizer.save_pretrained(built)
            report.measure_repeats(Dataset.load_from_disk(str(built)))
            report.save(built)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_folder(output_dir), tokenizer


def _read(spark: "SparkSession", source: str, names: dict[str, str | None], *, with_rating: bool) -> "DataFrame":
    """user, item, rating and timestamp where wanted and known, and `place`: where in the log a row stands."""
    from pyspark.sql import functions as f

    raw = spark.read.parquet(source)
    found = find_columns(raw.columns, names, source)
    if with_rating and "rating" not in found:
        raise ValueError(f"min_rating is given, but {source} has no rating known; name its column with rating=…")
    if not with_rating:
        found.pop("rating", None)
    types = dict(raw.dtypes)
    columns = []
    for ours, theirs in found.items():
        column, kind = f.col(f"`{theirs}`"), types[theirs]
        whole = kind in ("tinyint", "smallint", "int", "bigint")
        if ours in ("user", "item"):
            if not whole and kind != "string":
                raise ValueError(f"column of {ours} ids has type {kind}; ids may be integers or strings.")
            column = column.cast("bigint" if whole else "string")
        elif kind.startswith("timestamp"):
            column = f.unix_micros(column.cast("timestamp"))
        else:
            column = column.cast("bigint" if whole else "double")
        columns.append(column.alias(ours))
    if "row" in raw.columns:
        return raw.select(*columns, f.col("row").cast("bigint").alias("place"))
    files = sorted(row[0] for row in raw.select("_metadata.file_path").distinct().collect())
    number = f.array_position(f.array(*map(f.lit, files)), f.col("_metadata.file_path")) - 1
    place = f.shiftleft(number, _ROWS_BITS) + f.col("_metadata.row_index")
    return raw.select(*columns, place.alias("place"))


def _clean(log: "DataFrame", report: FilterReport, on_bad_rows: str) -> "DataFrame":
    from pyspark.sql import functions as f

    good = f.lit(True)
    for name in log.columns:
        good = good & f.col(name).isNotNull()
    if dict(log.dtypes).get("rating") == "double":
        good = good & ~f.isnan("rating")
    if "timestamp" in log.columns:
        middle = log.select(f.percentile_approx("timestamp", 0.5)).first()[0]
        report.time_unit = None if middle is None else time_unit(middle)
        good = good & f.coalesce(f.col("timestamp").between(0, latest_time(report.time_unit)), f.lit(False))
        if dict(log.dtypes)["timestamp"] == "double":
            whole = log.filter(good & (f.col("timestamp") != f.floor("timestamp"))).isEmpty()
            log = log.withColumn("timestamp", f.col("timestamp").cast("bigint")) if whole else log
    bad = log.filter(~good).count()
    if bad and on_bad_rows == "fail":
        raise ValueError(
            f"{report.source}: {bad} rows without a usable user, item, rating or time. Correct the log, or pass "
            'on_bad_rows="skip" to drop and count them.'
        )
    report.bad_rows = bad
    return log.filter(good)


def _k_core(log: "DataFrame", user_core: int, item_core: int) -> "DataFrame":
    from pyspark.sql import functions as f

    log = log.localCheckpoint()
    before, after = -1, log.count()
    while before != after:
        strong_users = log.groupBy("user").count().filter(f.col("count") >= user_core).select("user")
        strong_items = log.groupBy("item").count().filter(f.col("count") >= item_core).select("item")
        log = log.join(strong_users, "user", "left_semi").join(strong_items, "item", "left_semi").localCheckpoint()
        before, after = after, log.count()
    return log


def _totals(log: "DataFrame") -> tuple[int, int, int]:
    from pyspark.sql import functions as f

    return tuple(log.agg(f.count("*"), f.countDistinct("user"), f.countDistinct("item")).first())


def _collect(frame: "DataFrame") -> pa.Table:
    """A small frame on the driver. `toPandas` would turn integers with gaps into floats."""
    rows = frame.collect()
    return pa.table({name: pa.array([row[name] for row in rows]) for name in frame.columns})


def _user_rows(folder: Path) -> Iterator[pa.Table]:
    """Spark's ordered output, a file after another, in the types of `build_sequences`."""
    types: dict[str, Any] = {"user_id": None, "input_ids": pa.list_(pa.int32()), "timestamps": None}
    for path in sorted(folder.glob("part-*.parquet")):
        table = pq.read_table(path, partitioning=None)
        if not table.num_rows:
            continue
        columns = {}
        for name in filter(table.column_names.__contains__, types):
            column = table[name].combine_chunks()
            if pa.types.is_list(column.type):  # the fields of Spark's lists are called otherwise
                column = pa.ListArray.from_arrays(column.offsets, column.values)
            columns[name] = column
        yield with_ends(pa.table(columns), np.diff(columns["input_ids"].offsets.to_numpy()))


def partition_log(
    source: Any,
    folder: str | Path,
    num_partitions: int,
    *,
    with_rating: bool = False,
    on_bad_rows: Literal["fail", "skip"] = "fail",
    **columns: Any,
) -> None:
    """
    Writes a log of any format that `open_log` reads as Parquet shards by the hash of the user, in bounded memory:
    `user`, `item`, `timestamp` where known, `rating` if asked for, and `row`, the place in the log, by which
    [`build_sequences_on_spark`] keeps file order.

    Args:
        folder: must not be there; it appears complete or not at all.
        num_partitions (`int`): shards; all events of a user are in one.
        columns: `format`, `user`, … as for `open_log`.
    """
    folder = Path(folder)
    require_folder(folder)
    recover_folder(folder)
    if folder.exists():
        raise FileExistsError(f"folder {str(folder)!r} is there already; take another name.")
    if num_partitions < 1:
        raise ValueError(f"num_partitions is {num_partitions}; it may be 1 or more.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = open_log(source, **columns)
    if with_rating and not log.has_rating:
        raise ValueError(f"with_rating is given, but {log.name} has no rating known; name its column with rating=…")
    numeric = ["rating"] * with_rating + ["timestamp"] * log.has_timestamp
    writers: dict[int, pq.ParquetWriter] = {}
    first = 0
    scratch = tempfile.TemporaryDirectory(prefix=".blossomrec-", dir=folder.parent, ignore_cleanup_errors=True)
    with scratch, atomic_folder(folder) as built:
        for batch in clean_batches(log, numeric, Interactions(Path(scratch.name)), on_bad_rows):
            place = pl.int_range(first, first + batch.height, dtype=pl.Int64)
            batch = batch.with_columns(row=place, shard=pl.col("user").hash(seed=0) % num_partitions)
            first += batch.height
            for (shard,), rows in batch.partition_by("shard", as_dict=True, maintain_order=True).items():
                table = rows.drop("shard").to_arrow()
                if shard not in writers:
                    writers[shard] = pq.ParquetWriter(built / f"part-{shard:05d}.parquet", table.schema)
                writers[shard].write_table(table.cast(writers[shard].schema))
        for writer in writers.values():
            writer.close()
