"""build_sequences on Apache Spark, for logs that are too large for one machine: `pip install blossomrec-hf[spark]`."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_folder, make_scratch
from .build import open_items, row_filters
from .columns import ROLES, find_columns, no_times_note
from .event_table import USERS_A_BATCH
from .filters import FilterReport
from .ids import BLANKS, EXACT, EXPONENT, FLOAT, MISSING_IDS, as_integers, exponent_error, floats_note
from .metadata import write_item_metadata
from .options import EventOptions, FilterOptions, ItemOptions, LogOptions, parse_options
from .readers import check_given, given_note
from .rows import EventColumns, RowMaker
from .splits import PARTS
from .storage import check_output_dir, load_folder, write_dataset
from .text_files import BadRows
from .time_units import latest_time, time_unit


if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

logger = logging.getLogger(__name__)

_ROWS_BITS, _PLACE_BITS = 40, 61  # of a row's place in a source: 2⁴⁰ rows a file, 2²¹ files


def build_sequences_on_spark(
    source: str | Mapping[str, str],
    output_dir: str | Path,
    *,
    spark: "SparkSession",
    items: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Dataset, BlossomRecTokenizer]:
    """
    Builds item-id sequences on a Spark cluster. Options, steps and result are those of [`build_sequences`], to the byte.

    The executors make and order the histories. The driver has the catalog in memory and writes the Dataset.

    Args:
        source (`str`): a Parquet file or folder that the executors can read; files count in the order of their names. For a
            given split, a mapping of `train`, `validation` and `test` to one of these each. [`~blossomrec_hf.data.partition_log`] converts
            other formats, and times that are texts.
        output_dir (`str` or `Path`): folder for the result, on the driver's disk.
        spark (`SparkSession`): version 3.5 or later.
        items (*optional*): the item table, as in [`build_sequences`]; the driver reads it.
        overwrite (`bool`): replace an existing `output_dir`.
        options: `user`, `item`, `timestamp`, `rating`, `event_type`, `weight`, `keep_na_ids`, `on_bad_rows`, and the fields
            of [`~data.options.EventOptions`], [`~data.options.FilterOptions`] and [`~data.options.ItemOptions`].

    Raises:
        ValueError: as [`build_sequences`]; bad rows are counted, not named by line.
        FileExistsError: if `output_dir` exists and `overwrite` is not set.
    """
    from pyspark.sql import functions as f

    reading, events, filters, features = parse_options(options, LogOptions, EventOptions, FilterOptions, ItemOptions)
    unread = ("format", "time_format", "columns", "separator", "quoting", "encoding")
    if given := [name for name in unread if getattr(reading, name) is not None]:
        raise ValueError(
            f"{given[0]} is given, but Spark reads plain Parquet; write the log with partition_log first."
        )
    output_dir = Path(output_dir)
    check_output_dir(output_dir, overwrite=overwrite)
    table = open_items(items, features, reading.item)
    sources = check_given(source) if isinstance(source, Mapping) else {"": source}
    report = FilterReport(Path(next(iter(sources.values()))).name, "parquet")
    log, types = _ingest(spark, sources, reading, filters, events, report)
    columns = EventColumns(events, report.time_unit, types)
    users = log.groupBy("user").agg(f.min("place").alias("user_place")).localCheckpoint()
    catalog = log.groupBy("item").agg(f.min("place").alias("item_place")).localCheckpoint()
    log = _select(log, filters, events, report)
    tokenizer, vocabulary = _number_items(spark, log, catalog)
    metadata = None if table is None else table.align(tokenizer)
    report.note([] if table is None else table.notes(metadata))
    rows = _histories(log, users, vocabulary, types)
    scratch = make_scratch(output_dir)
    try:
        rows.write.parquet(str((scratch / "rows").resolve()))
        with atomic_folder(output_dir) as built:
            write_dataset(built, _user_rows(scratch / "rows", columns, report), report)
            tokenizer.save_pretrained(built)
            write_item_metadata(built, metadata)
            report.measure_repeats(Dataset.load_from_disk(str(built)))
            report.save(built)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_folder(output_dir), tokenizer


def _ingest(
    spark: "SparkSession",
    sources: Mapping[str, str],
    reading: LogOptions,
    filters: FilterOptions,
    events: EventOptions,
    report: FilterReport,
) -> tuple["DataFrame", list[str]]:
    """
    `data.ingest.ingest` on Spark: the good rows that `min_rating` and `event_types` keep, with `place`, the position in the
    log, and the event types.
    """
    from pyspark.sql import functions as f

    log = _read_all(spark, sources, reading, report, with_rating=filters.min_rating is not None)
    for name, role in ((events.needs_types, "event_type"), (events.needs_times, "timestamp")):
        if name is not None and role not in log.columns:
            raise ValueError(
                f"{name} is {getattr(events, name)}, but {report.source} has no {role} known; name its column with {role}=…"
            )
    bad = BadRows(skip=reading.on_bad_rows == "skip")
    log = _clean(log, report, bad).localCheckpoint()
    read = log.count()
    if filters.min_rating is not None:
        log = log.filter(f.col("rating") >= filters.min_rating).drop("rating").localCheckpoint()
    if events.type_list is not None:
        log = log.filter(f.col("event_type").isin(events.type_list)).localCheckpoint()
    report.read(read, bad.reasons)
    for name in ("user", "item"):
        log = _read_floats_as_integers(log, name, report)
    if name := row_filters(filters, events):
        report.add(name, *_totals(log))
    types = events.type_list or []
    if not types and "event_type" in log.columns:
        first = log.groupBy("event_type").agg(f.min("place").alias("place")).orderBy("place")
        types = [row["event_type"] for row in first.collect()]
    return log, types


def _order(log: "DataFrame") -> list["Column"]:
    """The columns that order the events of a user."""
    from pyspark.sql import functions as f

    return [f.col(name) for name in ("part", "timestamp", "place") if name in log.columns]


def _select(log: "DataFrame", filters: FilterOptions, events: EventOptions, report: FilterReport) -> "DataFrame":
    """`data.build._select` on Spark: the events that the filters keep."""
    from pyspark.sql import Window
    from pyspark.sql import functions as f

    order = _order(log)
    if events.collapse_repeats:
        along = Window.partitionBy("user").orderBy(*order)
        repeated = f.lit(True)
        for name in ("item", *(["event_type"] if "event_type" in log.columns else [])):
            repeated &= f.coalesce(f.lag(name).over(along) == f.col(name), f.lit(False))
        log = log.withColumn("repeated", repeated).filter("not repeated").drop("repeated").localCheckpoint()
        report.add("collapse repeats", *_totals(log))
    if filters.deduplicate != "none":
        along = order if filters.deduplicate == "first" else [column.desc() for column in order]
        number = f.row_number().over(Window.partitionBy("user", "item").orderBy(*along))
        log = log.withColumn("number", number).filter("number = 1").drop("number").localCheckpoint()
        report.add(f"deduplicate, {filters.deduplicate} stays", *_totals(log))
    if filters.k_core != [1, 1]:
        user_core, item_core = filters.k_core
        log = _k_core(log, user_core, item_core)
        report.add(f"k-core {user_core}, {item_core}", *_totals(log))
    if filters.min_history > 1 or filters.max_history is not None:
        whole = Window.partitionBy("user")
        log = log.withColumn("length", f.count("*").over(whole)).filter(f.col("length") >= filters.min_history)
        if filters.max_history is not None:
            from_end = f.row_number().over(whole.orderBy(*(column.desc() for column in order)))
            log = log.withColumn("from_end", from_end).filter(f.col("from_end") <= filters.max_history)
            log = log.drop("from_end")
        log = log.drop("length").localCheckpoint()
        report.add(f"history {filters.min_history} to {filters.max_history or 'any'}", *_totals(log))
    report.add("all filters", *_totals(log))
    return log


def _number_items(
    spark: "SparkSession", log: "DataFrame", items: "DataFrame"
) -> tuple[BlossomRecTokenizer, "DataFrame"]:
    """The vocabulary, and the vocabulary `id` of each `item`."""
    from pyspark.sql import functions as f

    every_item = items.join(log.groupBy("item").count(), "item", "left").fillna(0, ["count"])
    every_item = every_item.orderBy(f.col("count").desc(), "item_place").select("item", "count")
    catalog = pl.from_arrow(_collect(every_item))
    # The type is that of all items of the log, whether the filters keep them or not, as build_sequences finds it.
    ids = as_integers(catalog["item"])
    kept = catalog["count"] > 0
    item_type = "int" if ids.dtype.is_integer() else "str"
    tokenizer = BlossomRecTokenizer.from_items(ids.filter(kept).to_list(), item_type=item_type)
    numbered = catalog.filter(kept).select("item").with_row_index("id", NUM_SPECIAL_IDS)
    vocabulary = spark.createDataFrame(numbered.select("item", "id").rows(), ["item", "id"])
    return tokenizer, vocabulary.withColumn("id", f.col("id").cast("int"))


def _histories(log: "DataFrame", users: "DataFrame", vocabulary: "DataFrame", types: list[str]) -> "DataFrame":
    """One row per user, in the order of the users' first events, with the stored columns of the events as lists."""
    from pyspark.sql import functions as f

    if "event_type" in log.columns:
        code = f.array_position(f.array(*map(f.lit, types)), f.col("event_type")) - 1
        log = log.withColumn("event_type", code.cast("int"))
    others = [name for name in ("event_type", "weight") if name in log.columns]
    lists = [*others, *(["part"] if "part" in log.columns else [])]
    events = f.sort_array(f.collect_list(f.struct(*_order(log), "id", *others)))
    rows = log.join(f.broadcast(vocabulary), "item").groupBy("user").agg(events.alias("events"))
    columns = [f.col("user").alias("user_id"), f.col("events.id").alias("input_ids")]
    if "timestamp" in log.columns:
        columns.append(f.col("events.timestamp").alias("time"))
    columns += [f.col(f"events.{name}").alias(name) for name in lists]
    rows = rows.join(users, "user").orderBy("user_place").select(*columns)
    if dict(users.dtypes)["user"] == "string":
        plain = f.coalesce(f.expr("cast(try_cast(user as bigint) as string) = user"), f.lit(False))
        if users.filter(~plain).isEmpty():
            rows = rows.withColumn("user_id", f.col("user_id").cast("bigint"))
    return rows


def _read_all(
    spark: "SparkSession", sources: Mapping[str, str], reading: LogOptions, report: FilterReport, *, with_rating: bool
) -> "DataFrame":
    """The columns of [`_read`] of all sources; with the column `part` if they are those of a given split."""
    from pyspark.sql import functions as f

    notes: list[str] = []
    logs = {}
    for number, (part, source) in enumerate(sources.items()):
        log = _read(spark, source, reading, report, notes, with_rating=with_rating)
        if part:
            place = f.col("place") + f.lit(number << _PLACE_BITS)
            log = log.withColumn("part", f.lit(PARTS.index(part))).withColumn("place", place)
        logs[source] = log
    (first, log), *others = logs.items()
    for source, other in others:
        _check_alike(first, log, source, other)
        log = log.unionByName(other)
    if len(sources) > 1:
        notes.insert(0, given_note({part: Path(source).name for part, source in sources.items()}))
    if "timestamp" not in log.columns:
        notes.append(no_times_note(reading.timestamp))
    report.note(dict.fromkeys(notes))
    return log


def _check_alike(first: str, log: "DataFrame", source: str, other: "DataFrame") -> None:
    """
    Checks that two parts of a given split have the same columns and types of ids.

    Raises:
        ValueError: if they do not.
    """
    types, others = dict(log.dtypes), dict(other.dtypes)
    for name in types.keys() ^ others.keys():
        has, lacks = (first, source) if name in types else (source, first)
        raise ValueError(f"{lacks} has no {name} known, but {has} has; name its column with {name}=…")
    for name in ("user", "item"):
        if types[name] != others[name]:
            raise ValueError(
                f"the {name} ids are {types[name]} in {first} and {others[name]} in {source}; write them as one type."
            )


def _read(
    spark: "SparkSession",
    source: str,
    reading: LogOptions,
    report: FilterReport,
    notes: list[str],
    *,
    with_rating: bool,
) -> "DataFrame":
    """`user`, `item`, the columns of other roles that are known or required, and `place`, the position in the log."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as f

    try:
        raw = spark.read.option("mergeSchema", True).parquet(source)
    except (PySparkException, Py4JJavaError) as error:
        raise ValueError(
            f"source {source!r} can not be read as Parquet; are all of its files complete, and does each column have one type "
            "in all of them?"
        ) from error
    found = find_columns(raw.columns, reading.column_names, source, notes)
    if with_rating and "rating" not in found:
        raise ValueError(f"min_rating is given, but {source} has no rating known; name its column with rating=…")
    if not with_rating:
        found.pop("rating", None)
    types = dict(raw.dtypes)
    columns = []
    for role, column in found.items():
        column, kind = f.col(f"`{column}`"), types[column]
        if role in ("user", "item"):
            columns.append(_as_id(raw, column, kind, role, reading.keep_na_ids).alias(role))
        elif role == "timestamp":
            columns.append(_as_time(column, kind).alias(role))
            report.time_unit = "us" if kind in ("date", "timestamp", "timestamp_ntz") else None
        elif role == "event_type":
            text = f.btrim(column.cast("string"), f.lit(BLANKS))
            columns.append(f.when(~text.isin("", *MISSING_IDS), text).alias(role))
        else:
            columns.append(column.cast("float" if role == "weight" else "double").alias(role))
    if "timestamp" in found:
        times = raw.groupBy("_metadata.file_path").agg(f.count(f"`{found['timestamp']}`").alias("times"))
        without = times.filter("times = 0").first()
        if without is not None and times.count() > 1:
            raise ValueError(
                f"{without[0]} has no times in the column {found['timestamp']!r}, but other files have; correct it, or pass "
                'timestamp="" to read every history in the order of rows.'
            )
    if "row" in raw.columns:  # of partition_log
        part = [f.col("part").cast("int").alias("part")] if "part" in raw.columns else []
        return raw.select(*columns, *part, f.col("row").cast("bigint").alias("place"))
    files = sorted(row[0] for row in raw.select("_metadata.file_path").distinct().collect())
    number = f.array_position(f.array(*map(f.lit, files)), f.col("_metadata.file_path")) - 1
    place = f.shiftleft(number, _ROWS_BITS) + f.col("_metadata.row_index")
    return raw.select(*columns, place.alias("place"))


def _as_id(raw: "DataFrame", column: "Column", kind: str, name: str, keep_na: bool) -> "Column":
    """`data.ids.as_ids` on Spark: bigint or string, null if the id is missing."""
    from pyspark.sql import functions as f

    if kind in ("tinyint", "smallint", "int", "bigint"):
        return column.cast("bigint")
    if kind == "decimal(20,0)":  # UInt64
        return column.cast("string")
    if kind in ("float", "double"):
        number = f.nanvl(column.cast("double"), f.lit(None))
        largest = raw.select(f.max(f.abs(number))).first()[0]
        if largest is not None and largest > EXACT[pl.Float32 if kind == "float" else pl.Float64]:
            raise ValueError(
                f"the {name} ids are floats up to {largest:.0f}, whose last digits are lost; write them as integers."
            )
        return f.when(number == f.floor(number), number).cast("bigint")
    if kind == "string":
        missing = ["", *([] if keep_na else MISSING_IDS)]
        return f.when(~f.btrim(column, f.lit(BLANKS)).isin(missing), column)
    raise ValueError(f"column of {name} ids has type {kind}; ids may be integers or strings.")


def _as_time(column: "Column", kind: str) -> "Column":
    """`data.times.as_times` on Spark: numbers, or microseconds since 1970, in any time zone of the session."""
    from pyspark.sql import functions as f

    if kind == "timestamp":
        return f.unix_micros(column)
    if kind in ("date", "timestamp_ntz"):
        days = f.unix_date(column.cast("date")).cast("bigint") * 86_400_000_000
        if kind == "date":
            return days
        seconds = (f.hour(column) * 3600 + f.minute(column) * 60).cast("bigint") * 1_000_000
        return days + seconds + (f.date_part(f.lit("SECOND"), column) * 1_000_000).cast("bigint")
    if kind == "string":
        raise ValueError("the times are texts, which are not read on Spark; write the log with partition_log first.")
    return column.cast("bigint" if kind in ("tinyint", "smallint", "int", "bigint") else "double")


def _read_floats_as_integers(log: "DataFrame", name: str, report: FilterReport) -> "DataFrame":
    """`data.ids.Codes.read_floats_as_integers` on Spark."""
    from pyspark.sql import functions as f

    if dict(log.dtypes)[name] != "string":
        return log
    if (shortened := log.filter(f.col(name).rlike(EXPONENT)).select(name).first()) is not None:
        raise exponent_error(shortened[0])
    is_float = f.col(name).rlike(FLOAT)
    first = log.filter(is_float).orderBy("place").select(name).first()
    text = f.when(is_float, f.regexp_replace(name, r"\.0+$", "")).otherwise(f.col(name))
    number = text.try_cast("bigint")
    if first is None or not log.filter(~f.coalesce(number.cast("string") == text, f.lit(False))).isEmpty():
        return log
    largest = log.filter(is_float).select(f.max(f.abs(number))).first()[0]
    if largest > EXACT[pl.Float64]:
        raise ValueError(
            f"ids such as '{first[0]}' are floats up to {largest}, whose last digits are lost; write them as integers."
        )
    report.note([floats_note(name, first[0])])
    return log.withColumn(name, text).localCheckpoint()


def _clean(log: "DataFrame", report: FilterReport, bad: BadRows) -> "DataFrame":
    from pyspark.sql import functions as f

    usable = {name: f.col(name).isNotNull() for name in ROLES if name in log.columns}
    if "rating" in usable:
        usable["rating"] &= ~f.isnan("rating")
    if "weight" in usable:
        usable["weight"] &= f.col("weight").between(0, float(np.finfo(np.float32).max))
    if "timestamp" in usable:
        middle = log.select(f.percentile_approx("timestamp", 0.5)).first()[0]
        if report.time_unit is None and middle is not None:
            report.time_unit = time_unit(middle)
        usable["timestamp"] = f.coalesce(f.col("timestamp").between(0, latest_time(report.time_unit)), f.lit(False))
    good, reason = f.lit(True), f.lit(None)
    for name, here in reversed(usable.items()):
        good, reason = good & here, f.when(~here, f"no usable {name}").otherwise(reason)
    if dict(log.dtypes).get("timestamp") == "double":
        whole = log.filter(good & (f.col("timestamp") != f.floor("timestamp"))).isEmpty()
        log = log.withColumn("timestamp", f.col("timestamp").cast("bigint")) if whole else log
    counts = log.filter(~good).groupBy(reason.alias("reason")).count().collect()
    total = sum(row["count"] for row in counts)
    for row in sorted(counts):
        described = f"{report.source}: {total} rows without a usable user, item, rating, time, event type or weight"
        bad.add(row["reason"], row["count"], described)
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
    """A small frame as a table on the driver. `toPandas` would turn integers with gaps into floats."""
    rows = frame.collect()
    return pa.table({name: pa.array([row[name] for row in rows]) for name in frame.columns})


def _user_rows(folder: Path, events: EventColumns, report: FilterReport) -> Iterator[pa.Table]:
    """`data.rows.user_rows` of the files that Spark wrote, which are in the order of users."""
    maker = RowMaker(events, report)
    for path in sorted(folder.glob("part-*.parquet")):
        table = pq.read_table(path, partitioning=None)
        for start in range(0, table.num_rows, USERS_A_BATCH):
            users = table.slice(start, USERS_A_BATCH).combine_chunks()
            lists = {name: users[name].combine_chunks() for name in users.column_names if name != "user_id"}
            lengths = lists["input_ids"].value_lengths().to_numpy().astype(np.int64)
            stored = {name: column.flatten().to_numpy() for name, column in lists.items()}
            ids = stored["input_ids"].astype(np.int32)
            yield maker.rows(users["user_id"].combine_chunks(), ids, stored, np.cumsum(lengths) - lengths, lengths)
    maker.note_counts()
