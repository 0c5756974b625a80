"""Events carry columns: packed and padded batches of any column against plain Python, whatever is cut, shifted or windowed."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.batches import HistoryStore, HistoryWindows, PackingCollator, PaddingCollator
from blossomrec_hf.data import EventTable, split, split_by_leave_one_out


KINDS = {
    "timestamps": (np.int64, st.integers(-(2**40), 2**40)),
    "event_type_ids": (np.int8, st.integers(0, 5)),
    "weights": (np.float32, st.floats(0, 2, width=32)),
    "session_starts": (np.bool_, st.booleans()),
}


@st.composite
def event_rows(draw, shortest: int = 0) -> tuple[list[str], list[dict]]:
    """Names of columns, and rows of 0 to 12 events with them; some say how many of their events are known."""
    names = draw(st.lists(st.sampled_from(sorted(KINDS)), unique=True))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(shortest, 12))
        row = {"input_ids": draw(st.lists(st.integers(0, 30), min_size=length, max_size=length))}
        for name in names:
            kind, values = KINDS[name]
            row[name] = np.array(draw(st.lists(values, min_size=length, max_size=length)), kind)
        rows.append(row if draw(st.booleans()) else row | {"num_known": draw(st.integers(1, length + 1))})
    return names, rows


def latest(row: dict, max_length: int | None) -> dict:
    """The latest events of a row in lists, with the labels that a batch gives them."""
    length = len(row["input_ids"])
    first = 0 if max_length is None else max(length - max_length, 0)
    cut = {name: np.asarray(values)[first:].tolist() for name, values in row.items() if name != "num_known"}
    known, weights = row.get("num_known", 1) - first, cut.get("weights", [1] * length)
    cut["labels"] = [
        item if place >= max(known, 1) and item >= 2 and weights[place] > 0 else -100
        for place, item in enumerate(cut["input_ids"])
    ]
    return cut


def unpack(batch: dict) -> list[dict]:
    """The histories of a packed batch, each with all of its columns."""
    offsets = batch["cu_seq_lens_q"].tolist()
    tensors = {name: values[0] for name, values in batch.items() if torch.is_tensor(values) and values.dim() == 2}
    return [{name: values[a:b].tolist() for name, values in tensors.items()} for a, b in zip(offsets, offsets[1:])]


@settings(max_examples=150, deadline=None)
@given(event_rows(), st.sampled_from([None, 1, 2, 5, 40]), st.booleans(), st.data())
def test_packed_and_padded_batches_have_each_event_with_its_columns(rows_of, max_length, as_store, data):
    names, rows = rows_of
    wanted = [latest(row, max_length) for row in rows]
    given_rows = HistoryStore.from_rows(rows, columns=names) if as_store else rows
    store = HistoryStore.from_rows(given_rows, columns=names, max_length=max_length)
    assert store.num_targets.tolist() == [sum(label >= 0 for label in row["labels"]) for row in wanted]

    side = data.draw(st.sampled_from(["right", "left"]))
    batch = PaddingCollator(max_length, side, columns=names)(given_rows)
    width = max(len(row["input_ids"]) for row in wanted)
    for number, row in enumerate(wanted):
        padding = width - len(row["input_ids"])
        for name, values in (*row.items(), ("attention_mask", [1] * len(row["input_ids"]))):
            fill = [-100 if name == "labels" else 0] * padding
            assert batch[name][number].tolist() == (values + fill if side == "right" else fill + values), name
    assert set(batch) == {"attention_mask", "labels", "input_ids", *names}

    if not any(row["input_ids"] for row in wanted):
        return
    total = sum(len(row["input_ids"]) for row in wanted)
    for max_tokens in (None, total, total + 7):
        batch = PackingCollator(max_length, max_tokens=max_tokens, columns=names)(given_rows)
        found = unpack(batch)
        for row in found:
            assert row.pop("position_ids") == list(range(len(row["input_ids"])))
        kept = [row for row in wanted if row["input_ids"]]
        assert found[: len(kept)] == kept
        for fill in found[len(kept) :]:
            assert not any(any(values) for name, values in fill.items() if name != "labels")
            assert set(fill["labels"]) == {-100}
        assert batch["input_ids"].shape[1] == max_tokens if max_tokens else total
        assert all(len(row["input_ids"]) <= batch["max_length_q"] for row in found)


@settings(max_examples=100, deadline=None)
@given(event_rows(shortest=1), st.data())
def test_the_next_event_of_a_packed_batch_is_that_of_the_history(rows_of, data):
    """Shifted by one inside each history, as the loss and a gap to the next event need it; no column crosses a border."""
    names, rows = rows_of
    batch = PackingCollator(max_tokens=data.draw(st.sampled_from([None, 100])), columns=names)(rows)
    ends = batch["cu_seq_lens_q"][1:].long() - 1
    inside = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    inside[ends] = False
    for name in ("input_ids", *names):
        following = batch[name][0].roll(-1)[inside]
        wanted = [value for row in rows for value in np.asarray(row[name]).tolist()[1:]]
        assert following.tolist()[: len(wanted)] == wanted
        assert not following[len(wanted) :].any()  # fill


@settings(max_examples=40, deadline=None)
@given(event_rows(shortest=1), st.sampled_from(["latest", "overlapping", "random_crop"]), st.booleans(), st.data())
def test_windows_of_a_data_set_have_each_event_with_its_columns(rows_of, window, as_table, data):
    names, rows = rows_of
    columns = {name: [np.asarray(row[name]).tolist() for row in rows] for name in ("input_ids", *names)}
    ends = [len(row["input_ids"]) for row in rows]
    columns |= {"user_id": list(range(len(rows))), "train_end": ends, "validation_end": ends, "test_end": ends}
    dataset = split_by_leave_one_out(Dataset.from_dict(columns))
    training = [{name: row[name][: row["train_end"]] for name in ("input_ids", *names)} for row in dataset]
    training = [row for row in training if len(row["input_ids"]) >= 2]
    if not training:
        return
    source = EventTable.from_dataset(dataset) if as_table else dataset
    max_length = data.draw(st.integers(2, 12))
    windows = HistoryWindows(source, max_length, window=window, seed=data.draw(st.integers(0, 9)), columns=names)
    windows.set_epoch(data.draw(st.integers(0, 3)))
    found = unpack(PackingCollator(columns=names)(windows))
    assert [len(row["input_ids"]) for row in found] == windows.lengths.tolist()
    for row in found:
        row.pop("position_ids")
    if window == "latest":
        assert found == [latest(row, max_length) for row in training]
        if "weights" in names:  # users without a training target are no part of the view
            return
        view = split(source, "train", columns=names)
        assert unpack(PackingCollator(max_length, columns=names)(view)) == unpack(
            PackingCollator(columns=names)(windows)
        )
    elif window == "random_crop":
        for crop, row in zip(found, training, strict=True):
            length = len(row["input_ids"])
            places = [latest({n: v[:stop] for n, v in row.items()}, max_length) for stop in range(1, length + 1)]
            assert crop in [place for place in places if len(place["input_ids"]) == min(max_length, length)]
    else:  # each event is the target of exactly one window, with its columns
        asked = [
            [
                (place, *(row[name][place] for name in ("input_ids", *names)))
                for place, label in enumerate(row["labels"])
                if label >= 0
            ]
            for row in found
        ]
        wanted = [
            tuple(row[name][place] for name in ("input_ids", *names))
            for row in training
            for place in range(1, len(row["input_ids"]))
            if row["input_ids"][place] >= 2 and row.get("weights", {place: 1})[place] > 0
        ]
        assert sorted(event[1:] for events in asked for event in events) == sorted(wanted)


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 values in timestamps for 3 events"):
        HistoryStore(np.array([2, 3, 4]), np.array([0, 3]), columns={"timestamps": np.array([1, 2])})


@pytest.mark.parametrize("collator", [PackingCollator, PaddingCollator])
def test_the_name_of_one_column_is_no_list(collator):
    with pytest.raises(
        ValueError, match=r"columns is 'timestamps'; it must be a list of names, such as \['timestamps'\]"
    ):
        collator(columns="timestamps")
