"""The Spark engine, in local mode, gives what the engine of one machine gives, byte for byte."""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from blossomrec_hf.data import build_sequences, build_sequences_on_spark, partition_log
from blossomrec_hf.data.filters import FilterReport


DATA = Path(os.environ.get("BLOSSOMREC_TEST_DATA", "nowhere"))


@pytest.fixture(scope="module")
def spark():
    sql = pytest.importorskip("pyspark.sql", reason="the extra spark is not installed")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java")
    builder = sql.SparkSession.builder.master("local[2]").config("spark.sql.shuffle.partitions", 3)
    builder = builder.config("spark.ui.enabled", False).config("spark.driver.bindAddress", "127.0.0.1")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.memory", "1g")
    # Queries are small, and each is new: the optimizing compiler would take most of the time.
    java = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    session = builder.config("spark.driver.extraJavaOptions", java).getOrCreate()
    yield session
    session.stop()


def random_log(rows: int, text: bool, times: str) -> pl.DataFrame:
    """Ties in time, repeats, ids that are no row numbers."""
    rng = np.random.default_rng(rows)
    log = pl.DataFrame(
        {
            "user": rng.permutation(90)[rng.integers(0, 40, rows)],
            "item": rng.permutation(90)[np.minimum(rng.geometric(0.08, rows), 60)] - 5,
            "rating": rng.integers(1, 6, rows),
            "timestamp": rng.integers(0, 30, rows),
        }
    )
    if times == "float":
        log = log.with_columns(pl.col("timestamp") / 4)
    elif times == "datetime":
        log = log.with_columns(pl.from_epoch("timestamp", "s"))
    elif times == "none":
        log = log.drop("timestamp")
    if text:
        log = log.with_columns(pl.format("u {}", "user").alias("user"), pl.col("item").cast(pl.String))
    return log


def same(one: tuple, other: tuple) -> None:
    (rows, tokenizer), (other_rows, other_tokenizer) = one, other
    assert rows.features == other_rows.features
    assert rows.data.table.combine_chunks().equals(other_rows.data.table.combine_chunks())
    assert tokenizer.get_vocab() == other_tokenizer.get_vocab() and tokenizer.item_type == other_tokenizer.item_type


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, times, arguments",
    [
        (False, "int", {}),
        (True, "datetime", {"deduplicate": "first", "k_core": (3, 4)}),
        (True, "float", {"deduplicate": "last", "k_core": 5, "min_rating": 2, "min_history": 6, "max_history": 9}),
        (False, "none", {"k_core": 2, "max_history": 7}),
    ],
)
def test_spark_agrees_to_the_byte(spark, tmp_path, text, times, arguments):
    log = random_log(700, text, times)
    for number, start in enumerate(range(0, 700, 250)):
        (tmp_path / "log").mkdir(exist_ok=True)
        log[start : start + 250].write_parquet(tmp_path / "log" / f"part-{number}.parquet")
    here = build_sequences(tmp_path / "log", output_dir=tmp_path / "here", **arguments)
    there = build_sequences_on_spark(str(tmp_path / "log"), tmp_path / "there", spark=spark, **arguments)
    same(here, there)
    assert FilterReport.load(tmp_path / "here") == FilterReport.load(tmp_path / "there")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"event_types": "buy,view", "targets": "buy", "type_weights": "buy=0.3", "weight": "rating", "min_rating": 2},
        {"session_gap": "2s", "group": "timestamp", "collapse_repeats": True, "targets": "cart,buy"},
    ],
)
def test_spark_agrees_to_the_byte_on_types_sessions_and_baskets(spark, tmp_path, arguments):
    log = random_log(700, True, "float").with_columns(
        pl.Series(
            "kind", np.random.default_rng(7).choice(["view", " cart", "buy", "NULL"], 700, p=[0.6, 0.2, 0.15, 0.05])
        )
    )
    log.write_parquet(tmp_path / "log.parquet")
    arguments = {"event_type": "kind", "on_bad_rows": "skip", **arguments}
    here = build_sequences(tmp_path / "log.parquet", output_dir=tmp_path / "here", **arguments)
    there = build_sequences_on_spark(str(tmp_path / "log.parquet"), tmp_path / "there", spark=spark, **arguments)
    same(here, there)
    assert FilterReport.load(tmp_path / "here") == FilterReport.load(tmp_path / "there")
    partition_log(
        tmp_path / "log.parquet", tmp_path / "shards", 3, with_rating=True, event_type="kind", on_bad_rows="skip"
    )
    arguments |= {"event_type": "event_type"}
    same(here, build_sequences_on_spark(str(tmp_path / "shards"), tmp_path / "sharded", spark=spark, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, times, arguments",
    [
        (True, "float", {"event_type": "kind", "targets": "buy", "deduplicate": "last", "max_history": 15}),
        (False, "none", {"k_core": 2, "collapse_repeats": True}),
    ],
)
def test_spark_agrees_to_the_byte_on_given_splits_and_item_tables(spark, tmp_path, text, times, arguments):
    """Parts of several files, users and items of one part alone, ties over the ends of parts, features of some items."""
    log = random_log(700, text, times).with_columns(kind=pl.Series(["view", "buy", "buy", "cart"] * 175))
    bounds = {
        "test": (600, 700),
        "train": (0, 450),
        "validation": (450, 600),
    }  # in another order than that of the parts
    for part, (start, stop) in bounds.items():
        (tmp_path / part).mkdir()
        log[start : stop - 60].write_parquet(tmp_path / part / "a.parquet")
        log[stop - 60 : stop].write_parquet(tmp_path / part / "b.parquet")
    source = {part: str(tmp_path / part) for part in bounds}
    ids = log["item"].unique(maintain_order=True)[::2]
    features = [
        pl.Series("genre", [["x"], ["y", "x"], []] * len(ids)), pl.Series("price", [0.0, 2.5, None] * len(ids)),
        pl.Series("place", [[1.0, 2.0], [3.0, 4.5], None] * len(ids)),
    ]  # fmt: skip
    items = pl.DataFrame([ids.alias("item_id"), *(column[: len(ids)] for column in features)])
    arguments |= {"items": items, "item_categories": "genre", "item_numbers": "price", "item_vectors": "place"}
    here = build_sequences(source, output_dir=tmp_path / "here", **arguments)
    there = build_sequences_on_spark(source, tmp_path / "there", spark=spark, **arguments)
    reading = {"event_type": arguments.get("event_type")}
    partition_log(source, tmp_path / "shards", 3, **reading)
    if arguments.get("event_type"):
        arguments["event_type"] = "event_type"
    sharded = build_sequences_on_spark(str(tmp_path / "shards"), tmp_path / "sharded", spark=spark, **arguments)
    for built in (there, sharded):
        same(here, built)
    files = [(tmp_path / name / "items.parquet").read_bytes() for name in ("here", "there", "sharded")]
    assert files[0] == files[1] == files[2]
    report = FilterReport.load(tmp_path / "here")
    assert report == FilterReport.load(tmp_path / "there")
    assert report.steps == FilterReport.load(tmp_path / "sharded").steps
    with pytest.raises(ValueError, match="source is a mapping of train, other"):
        build_sequences_on_spark({"train": "x", "other": "y"}, tmp_path / "out", spark=spark)
    log[:9].rename({"item": "thing"}).write_parquet(tmp_path / "test" / "b.parquet")
    (tmp_path / "test" / "a.parquet").unlink()
    with pytest.raises(ValueError, match="has no column known to be the item"):
        build_sequences_on_spark(source, tmp_path / "out", spark=spark)
    log[:9].with_columns(user=pl.lit(1) if text else pl.lit("u")).write_parquet(tmp_path / "test" / "b.parquet")
    with pytest.raises(ValueError, match="the user ids are .* in .* and .* in .*; write them as one type"):
        build_sequences_on_spark(source, tmp_path / "out", spark=spark)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
def test_spark_on_user_partitions_of_movielens(spark, tmp_path):
    path = DATA / "ml-100k" / "ml-100k.inter"
    partition_log(path, tmp_path / "shards", 4)
    here = build_sequences(path, k_core=10)
    there = build_sequences_on_spark(str(tmp_path / "shards"), tmp_path / "there", spark=spark, k_core=10)
    same(here, there)


@pytest.mark.slow
def test_spark_refuses_and_counts_bad_rows(spark, tmp_path):
    log = pl.DataFrame({"user": [1, None, 3], "item": [1, 2, 3], "timestamp": [5, 6, -1]})
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="2 rows without a usable"):
        build_sequences_on_spark(str(tmp_path / "log.parquet"), tmp_path / "out", spark=spark)
    rows, _ = build_sequences_on_spark(
        str(tmp_path / "log.parquet"), tmp_path / "out", spark=spark, on_bad_rows="skip"
    )
    assert list(rows["user_id"]) == [1]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        build_sequences_on_spark(str(tmp_path / "log.parquet"), tmp_path / "out", spark=spark)


def test_partitions_hold_whole_users_and_all_rows(tmp_path):
    log = random_log(500, True, "int")
    partition_log(log, tmp_path / "shards", 3, with_rating=True)
    shards = [pl.from_arrow(pq.read_table(path)) for path in sorted((tmp_path / "shards").iterdir())]
    assert len(shards) == 3
    users = [set(shard["user"]) for shard in shards]
    assert sum(map(len, users)) == len(set.union(*users)) == log["user"].n_unique()
    assert pl.concat(shards).sort("row").drop("row").equals(log.cast({"rating": pl.Int64}))
    assert os.listdir(tmp_path) == ["shards"]
    with pytest.raises(FileExistsError, match="shards"):
        partition_log(log, tmp_path / "shards", 3)
    with pytest.raises(ValueError, match="num_partitions is 0"):
        partition_log(log, tmp_path / "more", 0)


@pytest.mark.slow
def test_spark_reads_ids_and_times_by_the_same_rules(spark, tmp_path):
    """Missing ids, floats for integers, large integers, and dates of every type, whatever the time zone of the session."""
    spark.conf.set("spark.sql.session.timeZone", "America/New_York")
    hours = pl.Series(range(8)) * 3_600_000_000 + 1_300_000_000_000_000  # through the night in which clocks go forward
    log = pl.DataFrame(
        {
            "user": ["1.0", "NA", "2.0", "", "1.0", " ", "2.00", None],
            "item": [5.0, 6.0, 7.0, 8.0, None, 9.0, 5.0, 6.0],
            "rating": [1.0, 2.0, 3.0, 4.0, 5.0, float("nan"), float("nan"), 1.0],
            "created_at": hours.cast(pl.Datetime("us")),
            "updated": [None] * 8,
        }
    )
    large = pl.DataFrame({"user": log["user"], "item": pl.Series([2**63 + n % 3 for n in range(8)], dtype=pl.UInt64)})
    for number, (table, arguments) in enumerate(
        [
            (log, {}),
            (log.with_columns(pl.col("created_at").dt.date()), {"min_rating": 2}),
            (log.with_columns(pl.col("created_at").dt.replace_time_zone("UTC")), {"keep_na_ids": True}),
            (large, {}),
        ]
    ):
        path = tmp_path / f"{number}.parquet"
        table.write_parquet(path)
        there = build_sequences_on_spark(
            str(path), tmp_path / f"there{number}", spark=spark, on_bad_rows="skip", **arguments
        )
        here = build_sequences(path, output_dir=tmp_path / f"here{number}", on_bad_rows="skip", **arguments)
        same(here, there)
        assert FilterReport.load(tmp_path / f"here{number}") == FilterReport.load(tmp_path / f"there{number}")


@pytest.mark.slow
def test_spark_refuses_what_the_other_engine_refuses(spark, tmp_path):
    for number, (table, named) in enumerate(
        [
            ([{"user": [1], "item": [2.0**53 + 2]}], "last digits are lost"),
            ([{"user": [1], "item": [2], "time": ["2019-01-01"]}], "partition_log"),
            ([{"user": [1], "item": [2], "time": [3]}, {"user": [1], "item": [2]}], "b.parquet has no times"),
            ([{"user": [1], "item": [2]}, {"user": [1], "item": ["x"]}], "does each column have one type"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, columns in zip("ab", table):
            pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
        with pytest.raises(ValueError, match=named):
            build_sequences_on_spark(str(folder), tmp_path / "out", spark=spark)
