"""The loader: every history once per epoch on any number of ranks, whatever the workers do."""

from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import make_model
from test_batches import built, segments

from blossomrec_hf.batches import (
    BatchSizeSampler,
    HistoryDataLoader,
    HistoryStore,
    HistoryWindows,
    PackingCollator,
    PaddingCollator,
)


def same(there: dict, here: dict) -> bool:
    return there.keys() == here.keys() and all(
        torch.equal(there[name], value) if torch.is_tensor(value) else there[name] == value
        for name, value in here.items()
    )


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    replicas=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches_of_a_size_have_each_row_once_on_any_number_of_ranks(num_rows, batch_size, replicas, shuffle, epoch):
    ranks = []
    for rank in range(replicas):
        sampler = BatchSizeSampler(num_rows, batch_size, shuffle=shuffle, seed=2, num_replicas=replicas, rank=rank)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == -(-num_rows // (batch_size * replicas))
    steps = [[row for batch in step for row in batch] for step in zip(*ranks)]
    assert sorted(row for step in steps for row in step) == list(range(num_rows))
    # The steps of several ranks have the rows that one rank with the same rows per step has.
    alone = BatchSizeSampler(num_rows, batch_size * replicas, shuffle=shuffle, seed=2)
    alone.set_epoch(epoch)
    assert steps == list(alone)
    assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])
    last = [len(batches[-1]) for batches in ranks]
    assert max(last) <= batch_size and max(last) - min(last) <= 1


def test_a_last_batch_that_is_not_full_is_dropped_if_asked():
    sampler = BatchSizeSampler(23, 5, drop_last=True, num_replicas=2, rank=1)
    assert [len(batch) for batch in sampler] == [5, 5] and len(sampler) == 2
    with pytest.raises(ValueError, match="num_rows is 9, too few for a batch of 10"):
        BatchSizeSampler(9, 5, drop_last=True, num_replicas=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchSizeSampler(9, 0)


def test_histories_or_tokens_of_a_batch_must_be_given():
    windows = HistoryWindows(built([9, 9]))
    for sizes in ({}, {"batch_size": 2, "max_tokens": 64}):
        with pytest.raises(ValueError, match="give one of them: histories or tokens"):
            HistoryDataLoader(windows, **sizes)


@pytest.mark.parametrize("collate", [PackingCollator(6), PaddingCollator(6)])
def test_a_loader_of_some_histories_per_batch(collate):
    dataset = built(np.random.default_rng().integers(4, 50, 23).tolist())
    store = HistoryWindows(dataset)
    batches = list(HistoryDataLoader(store, batch_size=5, collate=collate, shuffle=False))
    rows = [row["input_ids"][: row["train_end"]] for row in dataset if row["train_end"] >= 2]
    for number, batch in enumerate(batches):
        assert same(batch, collate([{"input_ids": row} for row in rows[5 * number : 5 * number + 5]]))
    assert len(batches) == -(-len(rows) // 5)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_every_epoch_has_its_own_crops_in_any_order_of_epochs(workers):
    windows = HistoryWindows(built(np.random.default_rng().integers(4, 50, 60).tolist()), 20, window="random_crop")
    plain = HistoryDataLoader(windows, max_tokens=128)
    other = HistoryDataLoader(windows, max_tokens=128, **workers)
    # In order; the same again; back; one left early; on from there; one from its middle, as a resumed run does.
    for epoch, first, taken in ((0, 0, None), (1, 0, None), (1, 0, None), (0, 0, None), (1, 0, 3), (2, 2, None)):
        plain.set_epoch(epoch)
        wanted = list(islice(plain, first, taken))
        loader = skip_first_batches(other, first) if first else other
        loader.batch_sampler.batch_sampler.set_epoch(epoch) if first else loader.set_epoch(epoch)
        got = list(islice(loader, taken))
        assert len(got) == len(wanted) and all(map(same, got, wanted)), (epoch, first, taken)


def test_a_rank_without_a_history_runs_every_parameter_and_adds_nothing():
    model = make_model(50).train()
    store = HistoryStore(np.arange(2, 9), np.array([0, 7]))
    for collate in (PackingCollator(), PaddingCollator(), PackingCollator(max_tokens=32)):
        sizes = {"max_tokens": 32} if getattr(collate, "max_tokens", None) else {"batch_size": 4}
        loaders = [HistoryDataLoader(store, collate=collate, num_replicas=2, rank=rank, **sizes) for rank in range(2)]
        batches = [batch for loader in loaders for batch in loader]
        (empty,) = [batch for batch in batches if not (batch["labels"] >= 0).any()]
        loss = model(**empty, num_items_in_batch=7).loss
        loss.backward()
        assert len(batches) == 2 and loss.item() == 0
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()


def test_more_ranks_than_histories_with_columns():
    times = np.array([5, 6, 7, 8])
    store = HistoryStore(np.array([2, 3, 4, 5]), np.array([0, 2, 4]), columns={"timestamps": times})
    batches = [
        batch
        for rank in range(3)
        for batch in HistoryDataLoader(
            store, max_tokens=8, collate=PackingCollator(max_tokens=8), num_replicas=3, rank=rank
        )
    ]
    assert sorted(len(segments(batch)) for batch in batches) == [0, 1, 1]
    assert all(batch["timestamps"].shape == (1, 8) for batch in batches)
