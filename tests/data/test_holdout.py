"""Splits by dates, shares of the events and rolling folds, against plain Python; users who are left out are counted by reason."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert "train: left out 2 of 4 users: 2 with fewer than 2 training events" in caplog.text
    caplog.clear()
    counts = item_counts(timed, len(tokenizer))
    counts[tokenizer.encode_items(["y"])] = 0
    split(timed, "validation", counts=counts)
    assert (
        "validation: left out 3 of 4 users: 1 without an event before the targets, 1 without a target, "
        "1 whose targets never occur in training" in caplog.text
    )
    caplog.clear()
    divided = split_by_user(dataset, validation=0, test=0.5, seed=1)
    test_users = int((np.array(divided["part"]) == 2).sum())
    split(divided, "train")
    assert (
        f"train: left out {4 - len(split(divided, 'train'))} of 4 users: {test_users} of the other parts"
        in caplog.text
    )
