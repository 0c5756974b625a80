"""Batches: every history once, the same T each step, labels only where there is something to predict."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.batches import (
    HistoryDataLoader,
    HistoryWindows,
    PackingCollator,
    PaddingCollator,
    TokenBudgetSampler,
)


def built(lengths: list[int], start: int = 2) -> Dataset:
    """Histories of distinct ids, so that every event can be told from every other. Training ends two before the last."""
    ends = np.cumsum(lengths)
    histories = [list(range(start + end - length, start + end)) for end, length in zip(ends.tolist(), lengths)]
    return Dataset.from_dict(
        {
            "user_id": list(range(len(lengths))),
            "input_ids": histories,
            "train_end": np.array(lengths, np.int32) - 2,
            "validation_end": np.array(lengths, np.int32) - 1,
            "test_end": np.array(lengths, np.int32),
        }
    )


def segments(batch: dict) -> list[list[int]]:
    """The histories of a packed batch, fill left out; checks that everything beside the ids agrees with the offsets."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    offsets = batch["cu_seq_lens_q"].tolist()
    assert offsets[0] == 0 and offsets[-1] == len(ids) and offsets == sorted(set(offsets))
    assert batch["cu_seq_lens_k"].tolist() == offsets and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] >= max(np.diff(offsets))
    found = []
    for start, stop in zip(offsets, offsets[1:]):
        assert batch["position_ids"][0, start:stop].tolist() == list(range(stop - start))
        assert labels[start] == -100
        if ids[start] == 0:
            assert (ids[start:stop] == 0).all() and (labels[start:stop] == -100).all()
        else:
            found.append(ids[start:stop].tolist())
    return found


def test_packing_by_hand():
    batch = PackingCollator(3)([{"input_ids": [9, 5, 6, 7]}, {"input_ids": [8]}, {"input_ids": [2, 1, 0, 3]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 0, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, -100, 3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 7]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_padding_by_hand():
    rows = [{"input_ids": [5, 6, 1, 7]}, {"input_ids": [8, 9]}]
    right = PaddingCollator(3)(rows)
    assert right["input_ids"].tolist() == [[6, 1, 7], [8, 9, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    left = PaddingCollator(3, "left")(rows)
    assert left["input_ids"].tolist() == [[6, 1, 7], [0, 8, 9]]
    assert left["labels"].tolist() == [[-100, -100, 7], [-100, -100, 9]]


def test_packing_fills_to_the_same_size():
    collate = PackingCollator(4, max_tokens=11)
    for rows in ([], [{"input_ids": [5, 6]}], [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 9, 9, 9]}]):
        batch = collate(rows)
        assert batch["input_ids"].shape == (1, 11) and batch["max_length_q"] == 4
        assert segments(batch) == [row["input_ids"] for row in rows]
    with pytest.raises(ValueError, match="max_tokens is 11"):
        collate([{"input_ids": [5, 6, 7, 8]}] * 3)
    with pytest.raises(ValueError, match="no history"):
        PackingCollator()([{"input_ids": []}])


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    room=st.integers(0, 40),
    shuffle=st.booleans(),
    replicas=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_row_once_within_budget_and_even_on_ranks(lengths, room, shuffle, replicas, epoch):
    budget = max(lengths) + room
    samplers = [
        TokenBudgetSampler(lengths, budget, shuffle=shuffle, seed=1, num_replicas=replicas, rank=rank)
        for rank in range(replicas)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in batch) <= budget for batches in ranks for batch in batches)
    dealt = TokenBudgetSampler(lengths, budget, shuffle=shuffle, seed=1, num_replicas=replicas)
    dealt.set_epoch(epoch)
    assert [list(dealt)[rank::replicas] for rank in range(replicas)] == ranks


def test_epochs_differ_and_repeat():
    sampler = TokenBudgetSampler(np.random.default_rng(0).integers(2, 50, 500), 300)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    together = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    assert not together


def test_batches_are_nearly_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.6, 1, 3000).astype(int) + 2, 1000)
    sampler = TokenBudgetSampler(lengths, 16384)
    assert lengths.sum() / (len(sampler) * 16384) > 0.98


def test_sampler_refuses():
    with pytest.raises(ValueError, match="max_tokens is 5"):
        TokenBudgetSampler([3, 6], 5)
    assert len(TokenBudgetSampler([3, 6], 5, max_length=5)) == 2
    with pytest.raises(ValueError, match="lengths is empty"):
        TokenBudgetSampler([], 5)
    with pytest.raises(ValueError, match="rank is 2"):
        TokenBudgetSampler([3], 5, num_replicas=2, rank=2)


def test_latest_windows():
    windows = HistoryWindows(built([7, 3, 12]), 4)
    assert windows.lengths.tolist() == [4, 4]  # the history of three has one training event: nothing to predict in it
    assert [list(windows[n]["input_ids"]) for n in (0, 1)] == [[3, 4, 5, 6], [18, 19, 20, 21]]
    assert HistoryWindows(built([7, 12])).lengths.tolist() == [5, 10]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(4, 60), min_size=1, max_size=8), st.integers(2, 20), st.data())
def test_overlapping_windows_ask_for_each_event_once(lengths, longest, data):
    stride = data.draw(st.integers(1, longest - 1))
    dataset = built(lengths)
    windows = HistoryWindows(dataset, longest, window="overlapping", stride=stride)
    batch = PackingCollator(longest)([windows[n] for n in range(len(windows))])
    asked = sorted(batch["labels"][batch["labels"] >= 0].tolist())
    wanted = sorted(item for row in dataset for item in row["input_ids"][1 : row["train_end"]])
    assert asked == wanted
    assert windows.lengths.max() <= longest
    assert windows.lengths.tolist() == [len(windows[n]["input_ids"]) for n in range(len(windows))]


def test_random_crops_stay_in_the_training_part_and_change():
    dataset = built([40, 30])
    windows = HistoryWindows(dataset, 5, window="random_crop", seed=3)
    seen = set()
    for epoch in range(200):
        windows.set_epoch(epoch)
        for number in range(2):
            crop = windows[number]["input_ids"].tolist()
            assert crop == windows[number]["input_ids"].tolist()
            assert crop == list(range(crop[0], crop[0] + 5))
            seen.update(crop)
    assert seen == {item for row in dataset for item in row["input_ids"][:-2]}


def test_windows_refuse():
    with pytest.raises(ValueError, match="max_length is None"):
        HistoryWindows(built([9]), window="random_crop")
    with pytest.raises(ValueError, match="stride is 5"):
        HistoryWindows(built([9]), 5, window="overlapping", stride=5)
    with pytest.raises(ValueError, match="no user"):
        HistoryWindows(built([3]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_each_history_once_on_two_ranks(workers):
    lengths = np.random.default_rng(0).integers(4, 60, 100).tolist()
    dataset = built(lengths)
    windows = HistoryWindows(dataset, 30)
    wanted = sorted(row["input_ids"][: row["train_end"]][-30:] for row in dataset)
    loaders = [
        HistoryDataLoader(windows, max_tokens=128, num_replicas=2, rank=rank, num_workers=workers) for rank in range(2)
    ]
    for epoch in range(2):
        found, steps = [], []
        for loader in loaders:
            loader.set_epoch(epoch)
            batches = list(loader)
            assert all(batch["input_ids"].shape == (1, 128) for batch in batches)
            steps.append(len(batches))
            found += [history for batch in batches for history in segments(batch)]
        assert sorted(found) == wanted
        assert steps == [len(loaders[0])] * 2


def test_more_ranks_than_histories():
    windows = HistoryWindows(built([9, 8]), 30)
    batches = [list(HistoryDataLoader(windows, max_tokens=64, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(part) for part in batches] == [1, 1, 1]
    assert sorted(len(segments(part[0])) for part in batches) == [0, 1, 1]
