"""Baskets: which event predicts which target, in every kind of batch and window, against plain Python."""

import numpy as np
import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.batches import HistoryStore, HistoryWindows, PackingCollator, PaddingCollator
from blossomrec_hf.batches.histories import concatenate
from blossomrec_hf.data import EventTable, build_sequences, split
from blossomrec_hf.model.loss_blossomrec import basket_targets
from blossomrec_hf.model.packing_blossomrec import pack_histories


@st.composite
def logs(draw) -> list[dict]:
    """1 to 5 histories of 1 to 14 events, each another item, in baskets."""
    rows, item = [], 2
    for _ in range(draw(st.integers(1, 5))):
        starts = draw(st.lists(st.booleans(), min_size=1, max_size=14))
        rows.append({"input_ids": list(range(item, item + len(starts))), "basket_starts": starts})
        item += len(starts)
    return rows


def baskets_of(row: dict) -> list[list[int]]:
    baskets = []
    for item, start in zip(row["input_ids"], row["basket_starts"]):
        if start or not baskets:
            baskets.append([])
        baskets[-1].append(item)
    return baskets


def pairs_of(row: dict) -> list[tuple[int, int]]:
    """The item of the event that predicts, and the target: for each event of a basket, the last event before the basket."""
    baskets = baskets_of(row)
    return [(before[-1], item) for before, basket in zip(baskets, baskets[1:]) for item in basket]


def pairs_in(batch: dict) -> list[tuple[int, int]]:
    """The pairs that the loss of a batch has."""
    packing = {name: batch[name] for name in ("cu_seq_lens_q", "max_length_q") if name in batch}
    columns = (batch["input_ids"], batch.get("attention_mask"))
    histories = pack_histories(*columns, vocab_size=1000, labels=batch["labels"], **packing)
    items, labels, starts = (histories.pack(batch[name]) for name in ("input_ids", "labels", "basket_starts"))
    sources, targets = basket_targets(labels, starts, histories.cu_seqlens)
    pairs = [pair for pair in zip(items[sources].tolist(), targets.tolist()) if pair[1] >= 0]
    assert len(pairs) == (batch["labels"] >= 0).sum()  # no label without a source: it would be counted in vain
    return pairs


def latest(row: dict, max_length: int | None) -> dict:
    return row if max_length is None else {name: values[-max_length:] for name, values in row.items()}


@settings(max_examples=200, deadline=None)
@given(logs(), st.sampled_from([None, 1, 2, 5]), st.sampled_from(["right", "left"]), st.booleans())
def test_the_items_of_a_basket_are_predicted_from_the_last_event_before_it(rows, max_length, side, as_store):
    wanted = [pair for row in rows for pair in pairs_of(latest(row, max_length))]
    given_rows = HistoryStore.from_rows(rows) if as_store else rows
    total = sum(len(row["input_ids"]) for row in rows)
    for collate in (
        PackingCollator(max_length),
        PackingCollator(max_length, max_tokens=total + 5),
        PaddingCollator(max_length, side),
    ):
        assert pairs_in(collate(given_rows)) == wanted
    store = HistoryStore.from_rows(rows, max_length=max_length)
    assert store.num_targets.sum() == len(wanted)
    rows_again = [store[n] for n in range(len(store))]
    assert pairs_in(PackingCollator()(rows_again)) == wanted


@settings(max_examples=200, deadline=None)
@given(logs(), st.integers(2, 15), st.integers(1, 3), st.data())
def test_overlapping_windows_ask_for_each_event_of_a_basket_once(rows, max_length, num_known, data):
    known = [min(num_known, len(row["input_ids"])) for row in rows]
    store = HistoryStore.from_rows([row | {"num_known": n} for row, n in zip(rows, known)])
    stride = data.draw(st.integers(1, max_length - 1))
    windows = HistoryWindows(store, max_length, window="overlapping", stride=stride)
    assert windows.lengths.max(initial=0) <= max_length
    wanted = []
    for row, n in zip(rows, known):
        context = set(row["input_ids"][:n])
        of_basket = {item: len(basket) for basket in baskets_of(row) for item in basket}
        wanted += [(s, t) for s, t in pairs_of(row) if t not in context and of_basket[t] < max_length]
    found = pairs_in(PackingCollator()(windows)) if len(windows) else []
    assert sorted(found, key=lambda pair: pair[1]) == wanted
    assert windows.num_targets.sum() == len(wanted) and windows.has_targets.all()


@settings(max_examples=100, deadline=None)
@given(logs(), st.integers(2, 15), st.integers(0, 3))
def test_random_crops_have_only_pairs_of_the_whole_history(rows, max_length, epoch):
    windows = HistoryWindows(HistoryStore.from_rows(rows), max_length, window="random_crop")
    windows.set_epoch(epoch)
    if len(windows):
        found = pairs_in(PackingCollator()(windows))
        assert set(found) <= {pair for row in rows for pair in pairs_of(row)}
        assert windows.num_targets.sum() == len(found)


EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(EVENTS, st.sampled_from(["latest", "overlapping"]))
def test_events_of_one_second_are_a_basket_from_the_log_to_the_loss(events, window):
    """(user, second) of events of different items; the last two baskets of each user are held out."""
    log = pl.DataFrame(events, ["user", "time"], orient="row").with_columns(item=pl.int_range(pl.len()))
    dataset, tokenizer = build_sequences(log, timestamp="time", group="timestamp")
    pairs, held_out = [], {"validation": [], "test": []}
    for user in sorted({user for user, _ in events}):
        seconds: dict[int, list[int]] = {}
        for item, (other, second) in enumerate(events):
            if other == user:
                seconds.setdefault(second, []).append(item)
        baskets = [seconds[second] for second in sorted(seconds)]
        trained = baskets[:-2]
        pairs += [(before[-1], item) for before, basket in zip(trained, trained[1:]) for item in basket]
        for part, count in (("validation", 2), ("test", 1)):
            if len(baskets) > count:
                before = [item for basket in baskets[:-count] for item in basket]
                held_out[part].append((before, baskets[-count]))
    for source in (dataset, EventTable.from_dataset(dataset)):
        for part, wanted in held_out.items():
            if wanted:
                rows = split(source, part)
                found = [
                    (tokenizer.decode_items(row["input_ids"]), tokenizer.decode_items(row["target_ids"]))
                    for row in rows
                ]
                assert sorted(found) == sorted(wanted)
        if pairs:
            batch = PackingCollator()(HistoryWindows(source, 50, window=window))
            assert pairs_in(PackingCollator()(list(split(source, "train")))) == pairs_in(batch)
            found = [tuple(tokenizer.decode_items(list(pair))) for pair in pairs_in(batch)]
            assert sorted(found) == sorted(pairs)


def test_the_order_inside_a_basket_changes_no_source():
    row = {"input_ids": [2, 3, 4, 5, 6, 7], "basket_starts": [True, True, False, False, True, False]}
    other = row | {"input_ids": [2, 4, 3, 5, 7, 6]}
    sources = [[source for source, _ in pairs_of(r)] for r in (row, other)]
    assert sources == [[2, 2, 2, 5, 5]] * 2
    assert pairs_in(PackingCollator()([row])) == pairs_of(row)
    assert sorted(pairs_in(PackingCollator()([other]))) == sorted(pairs_of(row))


def test_large_baskets_are_reported(caplog):
    items, offsets = concatenate([range(2, 12), range(12, 20)])
    starts = np.array([n not in (3, 4, 5, 6) for n in range(18)])
    store = HistoryStore(items, offsets, columns={"basket_starts": starts})
    windows = HistoryWindows(store, 5, window="overlapping")
    assert "train: 5 events in baskets of 5 events or more are no targets; raise max_length" in caplog.text
    assert windows.num_targets.sum() == 16 - 5
    caplog.clear()
    assert HistoryWindows(store, 6, window="overlapping").num_targets.sum() == 16 and not caplog.text


def test_without_baskets_every_event_is_one():
    rows = [{"input_ids": [2, 3, 4, 5]}, {"input_ids": [6, 7]}]
    plain = PackingCollator()(rows)
    baskets = PackingCollator()([row | {"basket_starts": [True] * len(row["input_ids"])} for row in rows])
    assert torch.equal(plain["labels"], baskets["labels"])
    assert pairs_in(baskets) == [(2, 3), (3, 4), (4, 5), (6, 7)]


def test_only_batches_with_labels_have_the_columns_of_the_loss():
    store = HistoryStore.from_rows([{"input_ids": [2, 3], "basket_starts": [True, True], "weights": [1.0, 0.5]}])
    loss_columns = {"basket_starts", "weights"}
    assert loss_columns <= store.pack([0], labels=True).keys() and not loss_columns & store.pack([0]).keys()
