import numpy as np
import pytest
import torch

from blossomrec_hf.batches import HistoryStore, HistoryWindows, PackingCollator, budget_batches
from blossomrec_hf.batches.histories import concatenate
from blossomrec_hf.data import split


@pytest.mark.parametrize("max_length", [None, 1, 7])
def test_packs_what_the_collator_packs(log, max_length):
    view = split(log[0], "train")
    store = HistoryStore.from_rows(view, max_length=max_length)
    rows = np.random.default_rng().permutation(len(view))[:20]
    batch, expected = store.pack(rows, labels=True), PackingCollator(max_length)([view[int(row)] for row in rows])
    for name in batch:
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])), name
    assert store.num_targets[rows].sum() == (expected["labels"] != -100).sum()


@pytest.mark.parametrize("max_length", [None, 5, 7])
def test_what_overlapping_windows_know_is_no_target(log, max_length):
    windows = HistoryWindows(log[0], 8, window="overlapping", stride=3)
    store = HistoryStore.from_rows(windows, max_length=max_length)
    rows = np.random.default_rng().permutation(len(windows))[:30]
    batch, expected = store.pack(rows, labels=True), PackingCollator(max_length)([windows[int(row)] for row in rows])
    for name in batch:
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])), name
    np.testing.assert_array_equal(
        store.num_targets[rows], [(store.pack([row], labels=True)["labels"] != -100).sum() for row in rows]
    )
    if max_length is None:  # every event but each user's first is a target once
        assert store.num_targets.sum() == HistoryStore.from_rows(split(log[0], "train")).num_targets.sum()


def test_specials_and_first_items_are_no_targets():
    store = HistoryStore(*concatenate([[5, 1, 6, 0, 7], [], [4], [1, 9]]), max_length=4)
    np.testing.assert_array_equal(store.num_targets, [2, 0, 0, 1])
    np.testing.assert_array_equal(store.lengths, [4, 0, 1, 2])
    assert store.pack([0, 3], labels=True)["labels"].tolist() == [[-100, 6, -100, 7, -100, 9]]


def test_budget_batches_cut_in_order_and_lose_nothing():
    rng = np.random.default_rng()
    sizes = rng.integers(0, 30, size=200)
    batches = budget_batches(sizes, 25, max_count=4)
    assert np.concatenate([np.arange(200)[batch] for batch in batches]).tolist() == list(range(200))
    for batch in batches:
        assert batch.stop - batch.start <= 4
        assert sizes[batch].sum() <= 25 or batch.stop - batch.start == 1
    assert budget_batches(sizes[:0], 25) == []


def test_bad_max_length_is_named():
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        HistoryStore(*concatenate([[2, 3]]), max_length=0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([[1, 2], [3, 4, 5]], "`timestamps` has 2 values in row 0, which has 3 events; give one value each"),
        ([[1, 2, 3], None], "`timestamps` has None in row 1, which has 2 events"),
        ([[1, 2, None], [3, 4]], "`timestamps` has values of object; give numbers, such as times in whole seconds"),
        ([["a", "b", "c"], ["d", "e"]], "`timestamps` has values of <U1; give numbers"),
        ([np.array(["2026-11-27"] * n, "datetime64[s]") for n in (3, 2)], "`timestamps` has values of datetime64"),
    ],
)
def test_columns_with_other_values_than_one_number_per_event_are_refused(times, message):
    rows = [{"input_ids": ids, "timestamps": values} for ids, values in zip([[2, 3, 4], [5, 6]], times)]
    with pytest.raises(ValueError, match=message):
        HistoryStore.from_rows(rows, columns=["timestamps"])
    with pytest.raises(ValueError, match=message.replace("timestamps", "weights")):
        HistoryStore.from_rows([{"input_ids": row["input_ids"], "weights": row["timestamps"]} for row in rows])


@pytest.mark.parametrize(
    "ids", [[2.7, 3.0], [2, None], None, 5, [[2, 3]], ["a"], [True], [2**40], np.array([2**32 + 5])]
)
def test_ids_that_are_no_list_of_integers_are_refused(ids):
    with pytest.raises(
        ValueError, match="`input_ids` is .* in row 1; it must be one list of vocabulary ids, integers"
    ):
        PackingCollator()([{"input_ids": [2, 3]}, {"input_ids": ids}])
    items, offsets = concatenate([[], [2, 3], np.array([4], np.uint16), ()])
    assert items.tolist() == [2, 3, 4] and items.dtype == np.int32 and offsets.tolist() == [0, 0, 2, 3, 3]
