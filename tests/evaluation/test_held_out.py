"""Held-out items carry the times and types of events: against plain Python, from any data set."""

from itertools import pairwise

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.data import EventTable, has_users, item_counts, split, split_by_time
from blossomrec_hf.evaluation import GapPopularity, HeldOutItems, RecentlyViewed
from blossomrec_hf.model.time_blossomrec import GAP_BOUNDS


VOCAB_SIZE = 9
COLUMNS = ["timestamps", "event_type_ids"]


@st.composite
def typed_logs(draw) -> Dataset:
    """Histories of events with times and types, some with weights, split by time."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))

    def lists(values):
        return [draw(st.lists(values, min_size=length, max_size=length)) for length in lengths]

    columns = {"user_id": list(range(len(lengths))), "input_ids": lists(st.integers(1, VOCAB_SIZE - 1))}
    columns["timestamps"] = [sorted(times) for times in lists(st.integers(0, 30))]
    columns["timestamps"][0][0] = 0  # something to train on
    columns["event_type_ids"] = lists(st.integers(0, 2))
    if draw(st.booleans()):
        columns["weights"] = lists(st.sampled_from([0.0, 1.0]))
    columns |= {f"{part}_end": lengths for part in ("train", "validation", "test")}
    dataset = Dataset.from_dict(columns).cast_column("event_type_ids", List(ClassLabel(names=["a", "b", "c"])))
    return split_by_time(dataset, 10, 20)


def plain_rows(dataset: Dataset, part: str, counts: np.ndarray | None) -> list[dict]:
    """The users of a part, with the events before their targets and the targets, each as (item, time, type)."""
    rows = []
    for row in dataset:
        begin, end = (
            (row["train_end"], row["validation_end"])
            if part == "validation"
            else (row["validation_end"], row["test_end"])
        )
        events = list(zip(row["input_ids"], row["timestamps"], row["event_type_ids"]))
        wanted = row.get("weights") or [1] * len(events)
        targets = [event for event, weight in zip(events[begin:end], wanted[begin:end]) if weight > 0]
        targets = [event for event in targets if counts is None or counts[event[0]] > 0]
        if begin and targets:
            rows.append({"user_id": row["user_id"], "events": events[:begin], "targets": targets})
    return rows


@settings(max_examples=80, deadline=None)
@given(typed_logs(), st.sampled_from(["validation", "test"]), st.booleans(), st.booleans(), st.data())
def test_held_out_events_have_their_times_and_types(dataset, part, as_table, known, data):
    counts = item_counts(dataset, VOCAB_SIZE) if known else None
    expected = plain_rows(dataset, part, counts)
    source = EventTable.from_dataset(dataset) if as_table else dataset
    assert has_users(source, part, counts) == bool(expected)
    if not expected:
        return
    view = split(source, part, columns=COLUMNS, counts=counts)
    max_length = data.draw(st.sampled_from([None, 1, 3]))
    held_out = HeldOutItems.from_rows(view, columns=COLUMNS, max_length=max_length)
    assert held_out.user_ids == [row["user_id"] for row in expected]
    assert held_out.prediction_times.tolist() == [row["targets"][0][1] for row in expected]
    assert held_out.target_types.tolist() == [row["targets"][0][2] for row in expected]
    for number, row in enumerate(expected):
        read = row["events"][-max_length:] if max_length else row["events"]
        found = held_out.inputs[number]
        assert found["timestamps"].tolist() == [time for _, time, _ in read]
        assert found["event_type_ids"].tolist() == [kind for _, _, kind in read]

    time = data.draw(st.integers(0, 30))
    late = [
        row for row in expected if row["events"][-1][1] > time and min(event[1] for event in row["targets"]) > time
    ]
    if not late:
        with pytest.raises(ValueError, match=f"`test_after` is {time}, but no user has"):
            HeldOutItems.from_rows(view, test_after=time)
        return
    chosen = HeldOutItems.from_rows(view, test_after=time)
    assert chosen.user_ids == [row["user_id"] for row in late]
    assert chosen.targets.tolist() == [item for row in late for item in sorted({event[0] for event in row["targets"]})]
    assert list(chosen.inputs.columns) == ["input_ids"] and chosen.prediction_times is None


def test_a_view_without_the_columns_is_refused():
    rows = [{"user_id": 1, "input_ids": [2, 3], "target_ids": [4]}]
    with pytest.raises(ValueError, match=r"no timestamps and no target_timestamps; .*columns=\['timestamps'\]"):
        HeldOutItems.from_rows(rows, columns=["timestamps"])
    with pytest.raises(ValueError, match="no timestamps"):
        HeldOutItems.from_rows(rows, test_after=3)
    with pytest.raises(ValueError, match="`rows` has no target_ids; give a view such as"):
        HeldOutItems.from_rows([{"user_id": 1, "input_ids": [2, 3]}])


@settings(max_examples=60, deadline=None)
@given(typed_logs(), st.booleans())
def test_the_items_viewed_last_come_first(dataset, as_table):
    rows = plain_rows(dataset, "test", None)
    if not rows:
        return
    source = EventTable.from_dataset(dataset) if as_table else dataset
    held_out = HeldOutItems.from_rows(split(source, "test"))
    counts = np.array([0, 0, 5, 3, 1, 4, 2, 6, 7])
    scores = RecentlyViewed(source, "test", held_out, counts)(np.arange(len(rows)))
    weights = {row["user_id"]: row.get("weights") for row in dataset}
    for number, row in enumerate(rows):
        items = [item for item, _, _ in row["events"]]
        if (weight := weights[row["user_id"]]) is not None:  # events that are no targets
            items = [item for item, w in zip(items, weight) if w == 0]
        viewed = list(dict.fromkeys(item for item in reversed(items) if item >= 2))
        others = sorted(set(range(2, VOCAB_SIZE)) - set(viewed), key=lambda item: -counts[item])
        assert scores[number, 2:].argsort(descending=True, stable=True).add(2).tolist() == viewed + others


@settings(max_examples=60, deadline=None)
@given(typed_logs())
def test_items_that_follow_gaps_as_long_as_that_to_now_come_first(dataset):
    rows = plain_rows(dataset, "test", None)
    training = [
        row for row in dataset if row["train_end"] >= 2 and any((row.get("weights") or [1] * 99)[1 : row["train_end"]])
    ]
    if not rows or not training:
        return
    view = split(dataset, "train", columns=["timestamps"])
    histories = HistoryStore.from_rows(view, columns=["timestamps"])
    held_out = HeldOutItems.from_rows(split(dataset, "test", columns=COLUMNS), columns=COLUMNS)
    counts = np.array([0, 0, 5, 3, 1, 4, 2, 6, 7])
    scores = GapPopularity(histories, held_out, counts)(np.arange(len(rows)))

    def bucket(gap: int) -> int:
        return sum(gap >= bound for bound in GAP_BOUNDS)

    for number, row in enumerate(rows):
        gap = bucket(row["targets"][0][1] - row["events"][-1][1])
        expected = counts / (counts.max() + 1)
        for user in training:
            events = list(zip(user["input_ids"], user["timestamps"]))[: user["train_end"]]
            for (_, before), (item, time) in pairwise(events):
                expected[item] += item >= 2 and bucket(time - before) == gap
        assert scores[number].tolist() == pytest.approx(expected.tolist())
