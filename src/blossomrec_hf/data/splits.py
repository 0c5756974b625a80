"""Splits: which part of each history a model reads and which it has to predict, as views that copy nothing."""

import logging
from typing import Any, Literal

import numpy as np
from datasets import Dataset


logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")


def split(
    dataset: Dataset, part: Literal["train", "validation", "test"], max_length: int | None = None
) -> Dataset:
    """
    A view of one part of a built Dataset: selected rows and a transform at access; nothing is copied.

    Rows are `user_id`, `input_ids` (the history that the model reads, its latest `max_length` items) and `target_ids`
    (the events to predict); in `validation` and `test` also `seen_ids`, the whole uncut history.

    - train: `input_ids` = events up to `train_end`, `target_ids` empty (every position has its next item as target);
    - validation: events up to `train_end` → those up to `validation_end`;
    - test: events up to `validation_end` → those up to `test_end`.

    Users without an event in the history or the targets (train: without two events) are left out and counted in the
    log.

    Raises:
        `ValueError`: another `part`, `max_length` below 1, a dataset without the columns of `build_sequences`, or a part
            that no user has.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; it may be one of {', '.join(PARTS)}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it may be 1 or more, or None for all.")
    lengths, targets = part_lengths(dataset, part)
    rows = np.flatnonzero((lengths >= 2) if part == "train" else (lengths >= 1) & (targets >= 1))
    if len(rows) < len(dataset):
        logger.warning("%s: %d of %d users have too few items for it", part, len(dataset) - len(rows), len(dataset))
    if not len(rows):
        raise ValueError(f'dataset has no user with enough items for the part "{part}".')
    view = dataset.with_format(None) if len(rows) == len(dataset) else dataset.with_format(None).select(rows)
    return view.with_transform(_View(part, max_length))


def part_lengths(dataset: Dataset, part: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 [users]: the events that each user's history in `part` has, and the events to predict after them."""
    missing = {"input_ids", "train_end", "validation_end", "test_end"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"dataset lacks {', '.join(sorted(missing))}; it should come from build_sequences.")
    arrow = dataset.with_format("arrow")
    ends = {name: _numbers(arrow, f"{name}_end") for name in PARTS}
    history = ends["validation"] if part == "test" else ends["train"]
    target = {"train": history, "validation": ends["validation"], "test": ends["test"]}[part]
    return history, target - history


def _numbers(arrow: Dataset, column: str) -> np.ndarray:
    return np.asarray(arrow[:][column] if len(arrow) else [], dtype=np.int64)


class _View:
    """Batches of stored rows -> batches of a part's rows. A class, because DataLoader workers may pickle it."""

    def __init__(self, part: str, max_length: int | None) -> None:
        self.part, self.max_length = part, max_length

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        stops = batch["validation_end"] if self.part == "test" else batch["train_end"]
        histories = [events[:stop] for events, stop in zip(batch["input_ids"], stops)]
        cut = histories if self.max_length is None else [history[-self.max_length :] for history in histories]
        rows: dict[str, Any] = {"user_id": batch["user_id"], "input_ids": cut, "target_ids": [[] for _ in histories]}
        if self.part != "train":
            ends = zip(batch["input_ids"], stops, batch[f"{self.part}_end"])
            rows["target_ids"] = [events[stop:end] for events, stop, end in ends]
            rows["seen_ids"] = histories
        return rows


def item_counts(dataset: Dataset, vocab_size: int) -> np.ndarray:
    """
    How often each vocabulary id stands in the training part, events up to `train_end`, as int64 [vocab_size].

    Raises:
        `ValueError`: an id of the dataset is `vocab_size` or more.
    """
    counts = np.zeros(vocab_size, np.int64)
    for table in dataset.with_format("arrow").iter(batch_size=50_000):
        events = table["input_ids"].combine_chunks()
        ids, lengths = events.flatten().to_numpy(), events.value_lengths().to_numpy()
        starts = np.cumsum(lengths) - lengths
        position = np.arange(ids.size) - np.repeat(starts, lengths)
        ids = ids[position < np.repeat(table["train_end"].to_numpy(), lengths)]
        if ids.size and ids.max() >= vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but dataset holds the id {ids.max()}.")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts
