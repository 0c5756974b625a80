"""Splits: the events of each history that a model reads and those that it predicts, as views without copies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .event_table import USERS_A_BATCH, EventTable, TableView, event_type_names


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
UNK = 1
_NEEDED = {
    "train": "training needs two items of a user (4 in all with leave-one-out, which holds out the last two)",
    "validation": "validation needs an item before the one to predict (3 in all with leave-one-out)",
    "test": "the test needs an item before the one to predict (2 in all with leave-one-out)",
}


def split(
    dataset: Dataset | EventTable,
    part: Literal["train", "validation", "test"],
    max_length: int | None = None,
    *,
    columns: Sequence[str] = (),
    counts: np.ndarray | None = None,
) -> Dataset | TableView:
    """
    Returns a view of one part of a prepared data set: selected rows with a transform at access, without copies.

    The columns are `user_id`, `input_ids` (the history that the model reads), `target_ids` (the events to predict) and,
    for validation and test, `seen_ids` (the whole history):

    - train: `input_ids` are the events up to `train_end`, and `target_ids` is empty (the target of every position is the
      next item, except events of weight 0; the items of a basket are targets together). If the data set has `weights` or
      `basket_starts`, the view has them too;
    - validation: `input_ids` are the events up to `train_end`, and `target_ids` those up to `validation_end`;
    - test: `input_ids` are the events up to `validation_end`, and `target_ids` those up to `test_end`.

    Users without an event in the history or without a target (train: without two events) are dropped, and so are the
    users of the other parts after [`split_by_user`]; the log counts them.

    Args:
        dataset: from [`build_sequences`], or as an [`EventTable`].
        part (`"train"`, `"validation"` or `"test"`): the part.
        max_length (`int`, *optional*): number of latest items in `input_ids`; by default, all.
        columns: other columns of the events to have in the view, such as `timestamps`. For validation and test, those of the
            events in `target_ids` are `target_timestamps` and so on.
        counts (int64 [vocab_size], *optional*): training frequencies from [`item_counts`]. If given, an item that never
            occurs in training, as after a split by time, is `[UNK]` in validation and test histories and no target; the
            log counts these targets.

    Raises:
        ValueError: if `part` is unknown, `max_length` is below 1, a column of [`build_sequences`] or of `columns` is
            missing, or no user has enough events.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; it may be one of {', '.join(PARTS)}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it may be 1 or more, or None for all.")
    if missing := set(columns) - set(dataset.column_names):
        raise ValueError(
            f"columns has {', '.join(sorted(missing))}, but the data set has {', '.join(dataset.column_names)}; prepare "
            "the log with these columns, or omit them."
        )
    rows, reasons = _usable_rows(dataset, part, counts, log_unseen=True)
    if len(rows) < len(dataset):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        logger.warning("%s: dropped %d of %d users: %s", part, len(dataset) - len(rows), len(dataset), listed)
    if not len(rows):
        raise too_short(dataset, part)
    if part == "train":
        own = [name for name in ("weights", "basket_starts") if name in dataset.column_names]
        columns = dict.fromkeys([*columns, *own])
    unseen = None if counts is None or part == "train" else np.asarray(counts) <= 0
    transform = _View(part, max_length, tuple(columns), unseen)
    if isinstance(dataset, EventTable):
        return TableView(dataset, rows, transform)
    view = dataset.with_format(None) if len(rows) == len(dataset) else dataset.with_format(None).select(rows)
    return view.with_transform(transform)


def too_short(dataset: Dataset | EventTable, part: str) -> ValueError:
    """The error if no user has enough events for `part`."""
    longest = numbers(dataset, "test_end").max(initial=0)
    return ValueError(
        f'dataset has no user with enough items for the part "{part}": it has {len(dataset)} users, the longest history '
        f"has {longest} items, and {_NEEDED[part]}. Give a log with longer histories; where they should be longer, look "
        "whether `user` names the right column and what `k_core` and `max_history` left."
    )


def part_lengths(dataset: Dataset | EventTable, part: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 [users] each: the number of events in each user's history in `part`, and the number to predict after them."""
    needed = {"input_ids", "train_end", "validation_end", "test_end"}
    if missing := needed - set(dataset.column_names):
        raise ValueError(f"dataset lacks {', '.join(sorted(missing))}; it should come from build_sequences.")
    ends = {name: numbers(dataset, f"{name}_end") for name in PARTS}
    history = ends["validation"] if part == "test" else ends["train"]
    target = {"train": history, "validation": ends["validation"], "test": ends["test"]}[part]
    if "part" in dataset.column_names:
        others = numbers(dataset, "part") != PARTS.index(part)
        history, target = np.where(others, 0, history), np.where(others, 0, target)
    return history, target - history


def has_users(
    dataset: Dataset | EventTable, part: Literal["train", "validation", "test"], counts: np.ndarray | None = None
) -> bool:
    """Whether any user has enough events for `part`; with `counts`, see [`split`], also a target that occurs in training."""
    return bool(len(_usable_rows(dataset, part, counts)[0]))


def target_types(dataset: Dataset | EventTable) -> list[str] | None:
    """Names of the event types that are targets; `None` if all are, or the data set has no event types."""
    names = event_type_names(dataset)
    if names is None or "weights" not in dataset.column_names:
        return None
    found = np.zeros(len(names), bool)
    for (types, _), (weights, _) in zip(event_batches(dataset, "event_type_ids"), event_batches(dataset, "weights")):
        found[np.unique(types[(weights > 0) & (types >= 0)])] = True
    return None if found.all() else [name for name, is_target in zip(names, found) if is_target]


def _usable_rows(
    dataset: Dataset | EventTable, part: str, counts: np.ndarray | None = None, *, log_unseen: bool = False
) -> tuple[np.ndarray, dict[str, int]]:
    """The indices of the users with enough events for `part`, and the number of other users by reason."""
    history, events = part_lengths(dataset, part)
    if part == "train":
        targets = _count_targets(dataset, np.minimum(history, 1), history)
        tests = {"with fewer than 2 training events": history >= 2, "without a training target": targets >= 1}
    else:
        targets = _count_targets(dataset, history, history + events)
        tests = {"without an event before the targets": history >= 1, "without a target": targets >= 1}
        if counts is not None:
            known = _count_targets(dataset, history, history + events, np.asarray(counts) > 0)
            dropped, total = int((targets - known).sum()), int(targets.sum())
            if log_unseen:
                logger.warning("%s: %d of %d targets never seen in training, dropped", part, dropped, total)
            tests["whose targets never occur in training"] = known >= 1
    if "part" in dataset.column_names:
        tests = {"of the other parts": numbers(dataset, "part") == PARTS.index(part)} | tests
    usable, reasons = np.ones(len(dataset), bool), {}
    for reason, passed in tests.items():
        if failed := int((usable & ~passed).sum()):
            reasons[reason] = failed
        usable &= passed
    return np.flatnonzero(usable), reasons


def repeat_share(dataset: Dataset | EventTable) -> float:
    """
    The share of the test targets that already occur in their user's history; an item counts once per user. If no user
    has a test target, the share of the users' latest events whose item occurs before; 0 if there are none.
    """
    lengths, targets = part_lengths(dataset, "test")
    targets = np.where(lengths >= 1, targets, 0)
    if not targets.any():
        stops = numbers(dataset, "test_end")
        lengths, targets = np.maximum(stops - 1, 0), (stops >= 2).astype(np.int64)
    held_out, repeated, first = 0, 0, 0
    weights = event_batches(dataset, "weights") if "weights" in dataset.column_names else repeat((None, None))
    for (ids, events), (weight, _) in zip(event_batches(dataset), weights):
        users = slice(first, first := first + events.size)
        before = np.where(targets[users] > 0, lengths[users], 0)
        after = events - before - targets[users]
        place = np.repeat(  # of each event: 0 before the targets, 1 among them, 2 after them
            np.tile(np.arange(3, dtype=np.int8), events.size),
            np.stack([before, targets[users], after], axis=1).ravel(),
        )
        pairs = np.repeat(np.arange(events.size) << np.int64(32), events) | ids
        item = ids > UNK
        is_target = item & (place == 1) & (True if weight is None else weight > 0)
        wanted = np.unique(pairs[is_target])
        held_out += wanted.size
        read = np.sort(pairs[item & (place == 0)])  # `np.isin` hashes them, which takes 20 times as long
        if read.size:
            repeated += (read.take(np.searchsorted(read, wanted), mode="clip") == wanted).sum()
    return float(repeated / max(held_out, 1))


def count_unseen_targets(dataset: Dataset | EventTable, vocab_size: int) -> tuple[int, int]:
    """
    The number of test targets whose item never occurs in training, and the number of all test targets. Users without an
    event before the test do not count.
    """
    history, events = part_lengths(dataset, "test")
    events = np.where(history >= 1, events, 0)
    total = int(_count_targets(dataset, history, history + events).sum())
    seen = item_counts(dataset, vocab_size) > 0
    return total - int(_count_targets(dataset, history, history + events, seen).sum()), total


def user_ids(dataset: Dataset | EventTable) -> list[int | str]:
    """The ids of the users, in the order of the rows."""
    if isinstance(dataset, EventTable):
        return dataset.users["user_id"].tolist()
    return list(dataset.with_format(None)["user_id"])


def numbers(dataset: Dataset | EventTable, column: str) -> np.ndarray:
    """int64 [users]: a column of one number per user."""
    if isinstance(dataset, EventTable):
        return dataset.users[column].astype(np.int64)
    return dataset.with_format("arrow").select_columns([column])[:][column].to_numpy().astype(np.int64)


def _count_targets(
    dataset: Dataset | EventTable, starts: np.ndarray, stops: np.ndarray, seen: np.ndarray | None = None
) -> np.ndarray:
    """int64 [users]: the number of targets from event `starts` to `stops`; of those whose item is `seen`, if given."""
    weighted = "weights" in dataset.column_names
    if seen is None and not weighted:
        return stops - starts
    counts, first = np.zeros(len(dataset), np.int64), 0
    weights = event_batches(dataset, "weights") if weighted else repeat((None, None))
    for (ids, lengths), (weight, _) in zip(event_batches(dataset), weights):
        last = first + lengths.size
        position = np.arange(ids.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        target = position >= np.repeat(starts[first:last], lengths)
        target &= position < np.repeat(stops[first:last], lengths)
        target &= True if weight is None else weight > 0
        target &= True if seen is None else seen[ids]
        counts += np.bincount(np.repeat(np.arange(first, last), lengths)[target], minlength=counts.size)
        first = last
    return counts


def event_batches(dataset: Dataset | EventTable, column: str = "input_ids") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the values of all events, and the number of events per user, in batches of users."""
    if isinstance(dataset, EventTable):
        yield from dataset.event_batches(column)
        return
    for table in dataset.with_format("arrow").select_columns([column]).iter(batch_size=USERS_A_BATCH):
        events = table[column].combine_chunks()
        yield events.flatten().to_numpy(zero_copy_only=False), events.value_lengths().to_numpy().astype(np.int64)


class _View:
    """Transforms stored rows into the rows of a part. A class, because DataLoader workers may pickle it."""

    def __init__(self, part: str, max_length: int | None, columns: Sequence[str], unseen: np.ndarray | None) -> None:
        self.part, self.max_length, self.columns, self.unseen = part, max_length, columns, unseen

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "train_end" not in batch:
            raise ValueError(
                "the columns of the view were removed, as `Trainer` does with those that the model does not read; set "
                "`remove_unused_columns=False`, or use `SequentialRecommendationTrainer`."
            )
        stops = batch["validation_end"] if self.part == "test" else batch["train_end"]
        histories = [events[:stop] for events, stop in zip(batch["input_ids"], stops)]
        unseen = self.unseen
        if unseen is not None:
            histories = [[UNK if unseen[item] else item for item in history] for history in histories]
        rows: dict[str, Any] = {"user_id": batch["user_id"], "input_ids": self._latest(histories)}
        for name in self.columns:
            rows[name] = self._latest([values[:stop] for values, stop in zip(batch[name], stops)])
        rows["target_ids"] = [[] for _ in histories]
        if self.part != "train":
            ends = list(zip(stops, batch[f"{self.part}_end"]))
            targets = [events[stop:end] for events, (stop, end) in zip(batch["input_ids"], ends)]
            keep = self._kept_targets(batch, ends, targets)
            rows["target_ids"] = _chosen(targets, keep)
            for name in self.columns:
                values = [values[stop:end] for values, (stop, end) in zip(batch[name], ends)]
                rows[f"target_{name}"] = _chosen(values, keep)
            rows["seen_ids"] = histories
        return rows

    def _kept_targets(self, batch: dict[str, list], ends: list, targets: list) -> list[list[bool]] | None:
        """Which events of each user are targets; `None` for all of them."""
        keep = None
        if "weights" in batch:
            keep = [[w > 0 for w in values[stop:end]] for values, (stop, end) in zip(batch["weights"], ends)]
        if self.unseen is not None:
            keep = [[True] * len(items) for items in targets] if keep is None else keep
            keep = [[k and not self.unseen[x] for x, k in zip(items, row)] for items, row in zip(targets, keep)]
        return keep

    def _latest(self, lists: list) -> list:
        return lists if self.max_length is None else [values[-self.max_length :] for values in lists]


def _chosen(lists: list, keep: list[list[bool]] | None) -> list:
    if keep is None:
        return lists
    return [[value for value, kept in zip(values, row) if kept] for values, row in zip(lists, keep)]


def item_counts(dataset: Dataset | EventTable, vocab_size: int) -> np.ndarray:
    """
    How often each vocabulary id occurs in the training part, as int64 [vocab_size].

    Raises:
        ValueError: if an id of the dataset is `vocab_size` or more.
    """
    counts = np.zeros(vocab_size, np.int64)
    stops, first = part_lengths(dataset, "train")[0], 0
    for ids, lengths in event_batches(dataset):
        position = np.arange(ids.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids = ids[position < np.repeat(stops[first : first + lengths.size], lengths)]
        first += lengths.size
        if ids.size and ids.max() >= vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, but dataset has the id {ids.max()}.")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts
