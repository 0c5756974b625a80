"""Splits by dates, shares of the events and rolling folds, against plain Python; users who are dropped are counted by reason."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.commands import prepare
from blossomrec_hf.data import (
    EventTable,
    build_sequences,
    choose_fold,
    item_counts,
    split,
    split_by_time,
    split_by_user,
    split_into_folds,
)
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.storage import export_folder


DAY = 86_400
START = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9 * DAY)), min_size=1, max_size=40)


def built(events: list[tuple[int, int]]):
    log = pl.DataFrame(events, ["user", "time"], orient="row")
    return build_sequences(log.with_columns(item=pl.int_range(pl.len()), time=pl.col("time") + START))[0]


def before(dataset, time: float) -> list[int]:
    return [sum(t < time for t in times) for times in dataset["timestamps"]]


@settings(max_examples=30, deadline=None)
@given(events=EVENTS, day=st.integers(2, 9), hours=st.sampled_from([12, 24, 60]), folds=st.integers(1, 3))
def test_folds_roll_over_time(events, day, hours, folds):
    dataset = built([*events, (0, 0)])
    width = hours * 3600
    first = START + day * DAY
    if first - width <= START:
        return
    named = f"2024-01-{day + 1:02d}"
    for source in (dataset, EventTable.from_dataset(dataset)):
        folded = split_into_folds(source, named, width=f"{hours}h", folds=folds)
        for number in range(folds):
            chosen = choose_fold(folded, number)
            rows = chosen if source is dataset else chosen.to_dataset()
            borders = [first + (number - 1) * width, first + number * width, first + (number + 1) * width]
            for part, border in zip(("train", "validation", "test"), borders):
                assert list(rows[f"{part}_end"]) == before(dataset, border)
        last = folded if source is dataset else folded.to_dataset()
        assert list(last["test_end"]) == before(dataset, first + folds * width)
    with pytest.raises(ValueError, match=f"fold is {folds}, but the data set has {folds} folds"):
        choose_fold(folded, folds)


@settings(max_examples=30, deadline=None)
@given(events=EVENTS, shares=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)).map(sorted))
def test_shares_are_of_the_events_in_the_order_of_time(events, shares):
    dataset = built([*events, (0, 0), (1, 10**6)])
    times = sorted(time for row in dataset["timestamps"] for time in row)
    # The first second with so many events before it; at the latest that of the last event, so that it can be tested.
    seconds = sorted({*times, *(time + 1 for time in times[:-1] if time < times[-1])})
    borders = [
        next((t for t in seconds if sum(x < t for x in times) >= share * len(times)), times[-1]) for share in shares
    ]
    timed = split_by_time(dataset, *shares)
    assert list(timed["train_end"]) == before(dataset, borders[0])
    assert list(timed["validation_end"]) == before(dataset, borders[1])
    assert list(timed["test_end"]) == list(map(len, dataset["timestamps"]))


@pytest.mark.parametrize(
    "date, seconds",
    [
        ("2024-01-02", START + DAY),
        ("2024-01-02 06:30", START + DAY + 6.5 * 3600),
        ("2024-01-02T06:30:00+02:00", START + DAY + 4.5 * 3600),
        (f"{START + 5}", START + 5),
    ],
)
def test_dates(date, seconds):
    dataset = built([(0, hour * 1800) for hour in range(200)])
    assert split_by_time(dataset, date, "2024-01-04")[:] == split_by_time(dataset, seconds, START + 3 * DAY)[:]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda d: split_by_time(d, "January", 5), "validation_from is 'January'; it may be a number of seconds, a date"),
        (lambda d: split_by_time(d, "2024-01-03", "2024-01-02"), "test_from is 2024-01-02, before validation_from 2024-01-03"),
        (lambda d: split_by_time(d, 0.5, 0.7, 0.6), "test_to is 0.6, before test_from 0.7"),
        (lambda d: split_by_time(d, "2023-01-01", "2024-01-02"), "validation_from is 2023-01-01, but no event is before it"),
        (lambda d: split_into_folds(d, 0.5, width="week", folds=2), "width is 'week'; it may be a number of seconds"),
        (lambda d: split_into_folds(d, 0.5, width="7d", folds=0), "folds is 0; it may be 1 or more"),
        (lambda d: split_into_folds(d.remove_columns("timestamps"), 1, width="7d", folds=1), "no column timestamps"),
        (lambda d: choose_fold(d, 0), "fold is 0, but the data set has 0 folds"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(call, said):
    dataset = built([(0, hour * 1800) for hour in range(200)])
    with pytest.raises(ValueError, match=said):
        call(dataset)


def test_users_are_left_out_for_counted_reasons(caplog):
    log = pl.DataFrame(
        {"user": list("aaaabbcddd"), "item": list("xyxyxyzzxy"), "timestamp": [0, 1, 5, 6, 0, 5, 5, 0, 1, 2]}
    )
    dataset, tokenizer = build_sequences(log)
    timed = split_by_time(dataset, 3, 6)
    split(timed, "train")
    assert "train: dropped 2 of 4 users: 2 with fewer than 2 training events" in caplog.text
    caplog.clear()
    counts = item_counts(timed, len(tokenizer))
    counts[tokenizer.encode_items(["y"])] = 0
    split(timed, "validation", counts=counts)
    assert (
        "validation: dropped 3 of 4 users: 1 without an event before the targets, 1 without a target, "
        "1 whose targets never occur in training" in caplog.text
    )
    caplog.clear()
    divided = split_by_user(dataset, validation=0, test=0.5, seed=1)
    test_users = int((np.array(divided["part"]) == 2).sum())
    split(divided, "train")
    assert (
        f"train: dropped {4 - len(split(divided, 'train'))} of 4 users: {test_users} of the other parts" in caplog.text
    )


PARTS = ("train", "validation", "test")
GIVEN = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 3), st.sampled_from(PARTS)), min_size=1, max_size=40
)


def given_histories(events: list[tuple], *, timed: bool) -> dict[int, dict[str, list[int]]]:
    """The items of each user and part in the order of time, in plain Python."""
    histories: dict[int, dict[str, list[int]]] = {}
    for part in PARTS:
        rows = [event for event in events if event[3] == part]
        for user, item, _, _ in sorted(rows, key=lambda event: event[2] if timed else 0):
            histories.setdefault(user, {name: [] for name in PARTS})[part].append(item)
    return histories


def views(dataset, tokenizer) -> dict[str, dict[int, tuple]]:
    """What each user's views read and predict, as raw ids."""
    found = {}
    for part in PARTS:
        try:
            rows = list(split(dataset, part))
        except ValueError:  # no user has enough events
            rows = []
        decode = tokenizer.decode_items
        found[part] = {r["user_id"]: (decode(list(r["input_ids"])), decode(list(r["target_ids"]))) for r in rows}
    return found


def plain_views(histories: dict[int, dict[str, list[int]]]) -> dict[str, dict[int, tuple]]:
    users = histories.items()
    known = {user: h["train"] + h["validation"] for user, h in users}
    return {
        "train": {user: (h["train"], []) for user, h in users if len(h["train"]) > 1},
        "validation": {user: (h["train"], h["validation"]) for user, h in users if h["train"] and h["validation"]},
        "test": {user: (known[user], h["test"]) for user, h in users if known[user] and h["test"]},
    }


@settings(max_examples=30, deadline=None)
@given(events=GIVEN, timed=st.booleans(), partition_rows=st.sampled_from([5, 1000]))
def test_a_given_split_is_that_of_its_tables(events, timed, partition_rows):
    events = [*events, (0, 0, 0, "train"), (0, 1, 0, "validation"), (1, 0, 0, "test")]
    log = pl.DataFrame(events, ["user", "item", "timestamp", "part"], orient="row")
    log = log if timed else log.drop("timestamp")
    tables = {part: log.filter(part=part).drop("part") for part in PARTS}
    dataset, tokenizer = build_sequences(tables, partition_rows=partition_rows)
    histories = given_histories(events, timed=timed)
    assert {
        row["user_id"]: (tokenizer.decode_items(row["input_ids"]), [row[f"{part}_end"] for part in PARTS])
        for row in dataset
    } == {
        user: (sum(parts.values(), []), np.cumsum([len(items) for items in parts.values()]).tolist())
        for user, parts in histories.items()
    }
    assert views(dataset, tokenizer) == plain_views(histories)
    assert views(EventTable.from_dataset(dataset), tokenizer) == plain_views(histories)


def test_the_parts_of_a_given_split_are_baskets_of_their_own():
    """What is read to predict a basket ends before it, also where a given split divides the events of one second."""
    rows = {"train": [("a", 1), ("b", 2), ("c", 2)], "validation": [("d", 2)], "test": [("e", 2), ("f", 2)]}
    tables = {
        part: pl.DataFrame([("u", *row) for row in events], ["user", "item", "timestamp"], orient="row")
        for part, events in rows.items()
    }
    dataset, _ = build_sequences(tables, group="timestamp")
    assert dataset["basket_starts"][:] == [[True, True, False, True, True, False]]
    assert [dataset[f"{part}_end"][0] for part in PARTS] == [3, 4, 6]


def write_given(folder: Path, layout: str) -> list[tuple]:
    """Writes 200 random events as three files, and returns them."""
    rng = np.random.default_rng(0)
    events = [(int(u), int(i), int(t), PARTS[p]) for u, i, t, p in rng.integers(0, (20, 30, 9, 3), (200, 4))]
    folder.mkdir()
    for part in PARTS:
        rows = [event[:3] for event in events if event[3] == part]
        header = "user_id:token\titem_id:token\ttimestamp:float" if layout == "recbole" else "user,item,timestamp"
        name = f"set.{part[:5]}.inter" if layout == "recbole" else f"{part}.csv"
        lines = [("\t" if layout == "recbole" else ",").join(map(str, row)) for row in rows]
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return events


@pytest.mark.parametrize("layout", ["recbole", "csv"])
def test_the_command_takes_a_given_split_which_saving_and_exporting_keep(tmp_path, layout):
    events = write_given(tmp_path / "log", layout)
    arguments = {
        "recbole": [str(tmp_path / "log"), "--split", "given"],
        "csv": [str(tmp_path / "log/train.csv")]
        + [word for part in PARTS[1:] for word in (f"--{part}", str(tmp_path / f"log/{part}.csv"))],
    }[layout]
    prepare.main([*arguments, "--output_dir", str(tmp_path / "out")])
    export_folder(tmp_path / "out", tmp_path / "out.safetensors")
    tokenizer = BlossomRecTokenizer.from_pretrained(tmp_path / "out")
    wanted = plain_views(given_histories(events, timed=True))
    assert views(load_from_disk(tmp_path / "out"), tokenizer) == wanted
    assert views(EventTable.load(tmp_path / "out.safetensors"), tokenizer) == wanted
    notes = " ".join(FilterReport.load(tmp_path / "out").notes)
    if layout == "recbole":
        prepare.main([str(tmp_path / "log"), "--output_dir", str(tmp_path / "joined")])
        assert "--split given keeps the split" in " ".join(FilterReport.load(tmp_path / "joined").notes)
    assert "the split is that of " in notes and "a given part of a user begins before the part before it ends" in notes


def test_a_given_split_that_is_none_is_refused(tmp_path, capsys):
    write_given(tmp_path / "log", "csv")
    files = [str(tmp_path / f"log/{part}.csv") for part in PARTS]
    out = ["--output_dir", str(tmp_path / "out")]
    for arguments, said in (
        ([files[0], "--test", files[2], "--split", "user", *out], "--split is user, but --test names the events of a given"),
        ([str(tmp_path / "log"), "--split", "given", *out], "is no folder with a given split: it should have one file .train.inter"),
        ([files[0], "--test", str(tmp_path / "none.csv"), *out], "none.csv' is no file"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            prepare.main(arguments)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    table = pl.DataFrame({"user": [1], "item": [2]})
    for parts in ({"train": table}, {"validation": table, "test": table}, {"train": table, "dev": table}):
        with pytest.raises(
            ValueError,
            match="source is a mapping of .*; a given split is one of train and of validation, test or both",
        ):
            build_sequences(parts)
    with pytest.raises(ValueError, match="the parts of source have the formats csv, table; write them in one format"):
        build_sequences({"train": files[0], "test": table})
    (tmp_path / "a.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\n1\t3 4\t5\n")
    with pytest.raises(ValueError, match="has the column item_id_list, so that a row is a history with its next item"):
        build_sequences(tmp_path / "a.inter")
