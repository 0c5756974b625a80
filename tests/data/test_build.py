"""build_sequences against a pure-Python twin on random logs, on the real logs at hand, and on bad input."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from forked_commands import run_code
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.data import build_sequences, storage
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


DATA = Path(os.environ.get("BLOSSOMREC_TEST_DATA", "nowhere"))


def twin(rows, min_rating, deduplicate, user_core, item_core, shortest, longest):
    """The whole pipeline on a list of (user, item, rating, time), as plainly as it can be said."""
    rows = [row for row in rows if row[2] >= min_rating]
    users, items = list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))
    rows = sorted(rows, key=lambda row: (users.index(row[0]), row[3]))  # Python's sort is stable
    if deduplicate != "none":
        kept = {}
        for row in rows if deduplicate == "first" else rows[::-1]:
            kept.setdefault(row[:2], row)
        rows = list(kept.values()) if deduplicate == "first" else list(kept.values())[::-1]
    before = None
    while before != len(rows):
        before, per_user, per_item = len(rows), Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        rows = [row for row in rows if per_user[row[0]] >= user_core and per_item[row[1]] >= item_core]
    histories = {user: [row for row in rows if row[0] == user] for user in users}
    histories = {user: events[-longest:] for user, events in histories.items() if len(events) >= max(shortest, 1)}
    counts = Counter(row[1] for events in histories.values() for row in events)
    vocabulary = sorted(counts, key=lambda item: (-counts[item], items.index(item)))
    return vocabulary, [
        (user, [2 + vocabulary.index(row[1]) for row in events], [row[3] for row in events])
        for user, events in histories.items()
    ]


def unpack(dataset: Dataset) -> list[tuple]:
    return list(zip(dataset["user_id"], dataset["input_ids"], dataset["timestamps"]))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 6), st.integers(-3, 5), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=60
    ),
    min_rating=st.sampled_from([0, 3]),
    deduplicate=st.sampled_from(["none", "first", "last"]),
    cores=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    shortest=st.integers(1, 3),
    longest=st.sampled_from([3, 4, 1000]),
    partition_rows=st.sampled_from([1, 7, 1000]),
    text=st.booleans(),
)
def test_the_pipeline_agrees_with_its_twin(
    rows, min_rating, deduplicate, cores, shortest, longest, partition_rows, text
):
    rows = [(f"u {user}", f"[i{item}", *rest) for user, item, *rest in rows] if text else rows
    vocabulary, histories = twin(rows, min_rating, deduplicate, *cores, shortest, longest)
    log = pl.DataFrame(rows, ["user", "item", "rating", "timestamp"], orient="row")
    arguments = {
        "min_rating": min_rating, "deduplicate": deduplicate, "k_core": cores,
        "min_history": shortest, "max_history": longest, "partition_rows": partition_rows,
    }  # fmt: skip
    if not histories:
        with pytest.raises(ValueError, match="leaves nothing"):
            build_sequences(log, **arguments)
        return
    dataset, tokenizer = build_sequences(log, **arguments)
    assert unpack(dataset) == histories
    assert tokenizer.decode_items(range(2, len(tokenizer))) == vocabulary
    lengths = np.array([len(events) for _, events, _ in histories])
    for name, held_out in (("train_end", 2), ("validation_end", 1), ("test_end", 0)):
        assert list(dataset[name]) == np.maximum(lengths - held_out, 0).tolist()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_saved_and_in_memory_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_FILE_BYTES", 1000)
    rng = np.random.default_rng(0)
    log = pl.DataFrame({name: rng.integers(0, 50, 5000) for name in ("user", "item", "timestamp")})
    memory, tokenizer = build_sequences(log)
    saved, loaded = build_sequences(log, output_dir=tmp_path / "log", partition_rows=300)
    assert saved.features == memory.features == load_from_disk(tmp_path / "log").features
    assert unpack(saved) == unpack(memory) == unpack(load_from_disk(tmp_path / "log"))
    assert (
        BlossomRecTokenizer.from_pretrained(tmp_path / "log").get_vocab()
        == tokenizer.get_vocab()
        == loaded.get_vocab()
    )
    assert len(list((tmp_path / "log").glob("*.arrow"))) > 5
    assert os.listdir(tmp_path) == ["log"]
    assert FilterReport.load(tmp_path / "log").steps == [["all filters", 5000, 50, 50]]


def test_an_output_folder_is_not_overwritten_by_accident(tmp_path):
    log = pl.DataFrame({"user": [1, 1], "item": [1, 2]})
    build_sequences(log, output_dir=tmp_path / "log")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        build_sequences(log, output_dir=tmp_path / "log")
    bigger = pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3]})
    assert len(build_sequences(bigger, output_dir=tmp_path / "log", overwrite=True)[0]) == 2
    assert os.listdir(tmp_path) == ["log"]


def test_filters_report_what_they_left():
    log = pl.DataFrame(
        {"user": [1, 1, 1, 2, 2, 3], "item": [7, 7, 8, 7, 8, 9], "rating": [5, 5, 5, 4, 5, 1], "timestamp": range(6)}
    )
    description = build_sequences(log, min_rating=2, deduplicate="first", k_core=2, min_history=2)[0].info.description
    assert description.splitlines() == [
        "6 interactions read from source (0 bad rows skipped).",
        "After rating >= 2: 5 interactions, 2 users, 2 items.",
        "After deduplicate, first stays: 4 interactions, 2 users, 2 items.",
        "After k-core 2, 2: 4 interactions, 2 users, 2 items.",
        "After history 2 to any: 4 interactions, 2 users, 2 items.",
        "After all filters: 4 interactions, 2 users, 2 items.",
    ]


def test_the_filter_that_empties_is_named(tmp_path):
    log = pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3], "rating": [1, 2, 3]})
    for arguments, named in (
        ({"min_rating": 4}, "rating >= 4"), ({"k_core": 3}, "k-core 3, 3"), ({"min_history": 5}, "history 5 to any")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            build_sequences(log, output_dir=tmp_path / "log", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_known_vocabulary_is_kept():
    _, tokenizer = build_sequences(pl.DataFrame({"user": [1, 1, 2], "item": ["b", "a", "a"]}))
    later = pl.DataFrame({"user": [5, 5, 5], "item": ["c", "b", "a"]})
    dataset, same = build_sequences(later, tokenizer=tokenizer)
    assert dataset["input_ids"][0] == [1, 3, 2] and same is tokenizer
    _, numbers = build_sequences(pl.DataFrame({"user": [1, 1], "item": [10, 20]}))
    assert build_sequences(later.with_columns(item=pl.Series(["20", "x", "10"])), tokenizer=numbers)[0]["input_ids"][0] == [
        3, 1, 2
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["polars", "lazy", "pandas", "arrow", "dataset"])
def test_tables_in_memory(kind):
    table = pl.DataFrame({"uid": [2, 1, 2], "movieId": ["a", "b", "c"], "ts": [9, 5, 3]})
    source = {
        "polars": table,
        "lazy": table.lazy(),
        "pandas": table.to_pandas(),
        "arrow": table.to_arrow(),
        "dataset": Dataset.from_polars(table),
    }[kind]
    dataset, tokenizer = build_sequences(source, user="uid", item="movieId", timestamp="ts")
    assert unpack(dataset) == [(2, [4, 2], [3, 9]), (1, [3], [5])]
    assert tokenizer.decode_items([2, 3, 4]) == ["a", "b", "c"]


def test_gaps_in_pandas_integers_are_bad_rows():
    frame = pd.DataFrame({"user": [1, 2, None], "item": [3, 4, 5]})
    with pytest.raises(ValueError, match="source, row 2: not a usable user"):
        build_sequences(frame)
    dataset, _ = build_sequences(frame, on_bad_rows="skip")
    assert list(dataset["user_id"]) == [1, 2] and "1 bad rows" in dataset.info.description


def test_mixed_ids_are_refused():
    with pytest.raises(ValueError, match="not a mixture"):
        build_sequences(pd.DataFrame({"user": [1, "a"], "item": [3, 4]}))
    with pytest.raises(ValueError, match=r"source is a mapping of train; a given split is .* source\['train'\]"):
        build_sequences(DatasetDict(train=Dataset.from_dict({"user": [1], "item": [3]})))


@pytest.mark.parametrize(
    "values, wanted, dtype",
    [
        ([1.0, 2.0], [1, 2], "int64"),
        ([1.5, 2.0], [1, 2], "int64"),
        (["2020-01-01 00:00:00", "2020-01-01 00:00:01"], [1577836800, 1577836801], "int64"),
        (["2020-01-01T00:00:00Z", "2020-01-01T00:00:00.5Z"], [1577836800, 1577836800], "int64"),
    ],
)
def test_times(values, wanted, dtype):
    dataset, _ = build_sequences(pl.DataFrame({"user": [1, 1], "item": [3, 4], "timestamp": values}))
    assert dataset["timestamps"][0] == wanted
    assert dataset.features["timestamps"].feature.dtype == dtype


def test_a_late_fraction_keeps_every_time():
    rows = 1_100_000  # more than a batch of the reader
    times = np.arange(rows, dtype=np.float64)
    times[-1] += 0.5
    log = pl.DataFrame({"user": np.zeros(rows, np.int64), "item": np.zeros(rows, np.int64), "timestamp": times})
    assert np.array_equal(build_sequences(log)[0].with_format("numpy")[0]["timestamps"], np.floor(times))


@pytest.mark.parametrize("time", [-5, 99_999_999_999, float("nan")])
def test_absurd_times_are_bad_rows(time):
    log = pl.DataFrame({"user": [1, 1, 1], "item": [3, 4, 5], "timestamp": [1_577_836_800.0, time, 1_577_836_801.0]})
    with pytest.raises(ValueError, match="row 1: not a usable timestamp"):
        build_sequences(log)
    assert build_sequences(log, on_bad_rows="skip")[0]["timestamps"][0] == [1_577_836_800, 1_577_836_801]


def test_odd_ids_in_a_csv(tmp_path):
    path = write(tmp_path, "log.csv", 'user,item\n"a ""b""","x\ny"\nü,"[PAD]"\nü,"1, 2"\n')
    dataset, tokenizer = build_sequences(path)
    assert list(dataset["user_id"]) == ['a "b"', "ü"]
    assert tokenizer.decode_items([2, 3, 4]) == ["x\ny", "[PAD]", "1, 2"]


def test_leading_zeros_make_ids_text(tmp_path):
    tokenizer = build_sequences(write(tmp_path, "log.csv", "user,item\n1,0012\n2,7\n"))[1]
    assert tokenizer.item_type == "str" and tokenizer.decode_items([2, 3]) == ["0012", "7"]


def test_bad_rows_name_file_and_line(tmp_path):
    path = write(tmp_path, "log.csv", "user,item,timestamp\n1,2,5\n1,,6\n1,3,noon\n")
    with pytest.raises(ValueError, match=r"log.csv, line 3: not a usable item .item None"):
        build_sequences(path, output_dir=tmp_path / "out")
    assert os.listdir(tmp_path) == ["log.csv"]
    dataset, _ = build_sequences(path, on_bad_rows="skip")
    assert dataset["input_ids"][0] == [2] and "(2 bad rows skipped)" in dataset.info.description


@pytest.mark.slow
def test_nothing_is_left_of_a_full_disk(tmp_path):
    """A limit on file size stands in for the full disk: the system refuses the write either way."""
    code = (
        "import sys, polars as pl, numpy as np\n"
        "from blossomrec_hf.data import build_sequences\n"
        "log = pl.DataFrame({'user': np.arange(90_000) % 7, 'item': np.arange(90_000) % 11})\n"
        "try:\n"
        "    build_sequences(log, output_dir=sys.argv[1])\n"
        "except OSError as error:\n"
        "    print('refused:', error)\n"
    )
    done = run_code(code, tmp_path / "out", folder=tmp_path / "script", max_file_bytes=100_000)
    assert "refused:" in done.stdout and "room" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["script"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"deduplicate": "all"}, "deduplicate is 'all'"),
        ({"on_bad_rows": "drop"}, "on_bad_rows is 'drop'"),
        ({"k_core": 0}, "k_core is 0"),
        ({"k_core": "2"}, "k_core is 2; it may be one number"),
        ({"items": [{"item": 1}]}, "items is a list; it may be a path, or a Polars or pandas frame"),
        ({"k_core": (1, 0)}, "k_core is 0"),
        ({"min_history": 0}, "min_history is 0"),
        ({"min_history": 5, "max_history": 4}, "max_history is 4"),
        ({"min_rating": 3}, "min_rating is 3"),
        ({"user": "usr"}, "user='usr' is no column of source; did you mean 'user'"),
    ],
)
def test_arguments_are_checked(arguments, named):
    with pytest.raises(ValueError, match=named):
        build_sequences(pl.DataFrame({"user": [1], "item": [1]}), **arguments)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
def test_movielens_1m():
    path = DATA / "ml-1m" / "interactions.txt"
    dataset, tokenizer = build_sequences(path)
    assert (len(dataset), len(tokenizer) - 2) == (6040, 3416)
    expected: dict[int, list[int]] = {}
    for line in path.read_text().splitlines():
        user, item = map(int, line.split())
        expected.setdefault(user, []).append(item)
    assert sum(map(len, expected.values())) == 999_611
    assert list(dataset["user_id"]) == list(expected)
    items = np.array(tokenizer.decode_items(range(2, len(tokenizer))))
    for row, history in zip(dataset.with_format("numpy"), expected.values()):
        assert items[row["input_ids"] - 2].tolist() == history


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
@pytest.mark.parametrize(
    "name, separator, header, size",
    [
        ("ml-100k/ml-100k.inter", "\t", 1, (943, 1682, 100_000)),
        ("ml-latest-small/ratings.csv", ",", 1, (610, 9724, 100_836)),
    ],
)
def test_movielens_with_times(name, separator, header, size):
    dataset, tokenizer = build_sequences(DATA / name)
    lines = (DATA / name).read_text().splitlines()[header:]
    rows = [tuple(map(float, line.split(separator))) for line in lines]
    users = list(dict.fromkeys(row[0] for row in rows))
    expected = {user: [] for user in users}
    for user, item, _, time in sorted(rows, key=lambda row: row[3]):
        expected[user].append((item, time))
    assert (len(dataset), len(tokenizer) - 2, len(rows)) == size
    assert list(dataset["user_id"]) == users
    items = np.array(tokenizer.decode_items(range(2, len(tokenizer))))
    for row, history in zip(dataset.with_format("numpy"), expected.values()):
        assert list(zip(items[row["input_ids"] - 2].tolist(), row["timestamps"].tolist())) == history


def test_text_that_is_not_how_an_integer_is_written_is_unknown_to_a_vocabulary_of_integers():
    tokenizer = BlossomRecTokenizer.from_items([7, 8, 9])
    log = pl.DataFrame({"user": ["u"] * 6, "item": ["007", "8", "+9", "7.0", "x", "9"]})
    assert build_sequences(log, tokenizer=tokenizer)[0]["input_ids"][:] == [[1, 3, 1, 2, 1, 4]]
