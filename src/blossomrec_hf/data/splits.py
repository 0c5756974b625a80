"""Splits: the events of each history that a model reads and those that it predicts, as views without copies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .event_table import EventTable, TableView


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
      next item);
    - validation: `input_ids` are the events up to `train_end`, and `target_ids` those up to `validation_end`;
    - test: `input_ids` are the events up to `validation_end`, and `target_ids` those up to `test_end`.

    Users without an event in the history or without a target (train: without two events) are dropped, and so are the
    users of the other parts after [`split_by_user`]; the log counts them.

    Args:
        dataset: from [`build_sequences`], or as an [`EventTable`].
        part (`"train"`, `"validation"` or `"test"`): the part.
        max_length (`int`, *optional*): number of latest items in `input_ids`; by default, all.
        columns: other columns of the events of `input_ids` to have in the view, such as `timestamps`.
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
            "the log with these columns, or leave them out."
        )
    rows, reasons = _usable_rows(dataset, part, counts)
    if len(rows) < len(dataset):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        logger.warning("%s: left out %d of %d users: %s", part, len(dataset) - len(rows), len(dataset), listed)
    if not len(rows):
        raise too_short(dataset, part)
    unseen = None if counts is None or part == "train" else np.asarray(counts) <= 0
    transform = _View(part, max_length, columns, unseen)
    if isinstance(dataset, EventTable):
        return TableView(dataset, rows, transform)
    view = dataset.with_format(None) if len(rows) == len(dataset) else dataset.with_format(None).select(rows)
    return view.with_transform(transform)


def too_short(dataset: Dataset | EventTable, part: str) -> ValueError:
    """The error if no user has enough events for `part`."""
    longest = _numbers(dataset, "test_end").max(initial=0)
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
    ends = {name: _numbers(dataset, f"{name}_end") for name in PARTS}
    history = ends["validation"] if part == "test" else ends["train"]
    target = {"train": history, "validation": ends["validation"], "test": ends["test"]}[part]
    if "part" in dataset.column_names:
        others = _numbers(dataset, "part") != PARTS.index(part)
        history, target = np.where(others, 0, history), np.where(others, 0, target)
    return history, target - history


def hold_out_nothing(dataset: Dataset | EventTable) -> Dataset | EventTable:
    """`dataset` with all events of all users in training, and none for validation and test."""
    return _with_ends(dataset, *[_history_lengths(dataset)] * 3)


def has_users(dataset: Dataset | EventTable, part: Literal["train", "validation", "test"]) -> bool:
    """Whether any user has enough events for `part`."""
    return bool(len(_usable_rows(dataset, part)[0]))


def _usable_rows(
    dataset: Dataset | EventTable, part: str, counts: np.ndarray | None = None
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
            logger.warning("%s: %d of %d targets never seen in training, dropped", part, dropped, total)
            tests["whose targets never occur in training"] = known >= 1
    if "part" in dataset.column_names:
        tests = {"of the other parts": _numbers(dataset, "part") == PARTS.index(part)} | tests
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
        stops = _numbers(dataset, "test_end")
        lengths, targets = np.maximum(stops - 1, 0), (stops >= 2).astype(np.int64)
    held_out, repeated, first = 0, 0, 0
    weights = event_batches(dataset, "weights") if "weights" in dataset.column_names else repeat((None, None))
    for (ids, events), (weight, _) in zip(event_batches(dataset), weights):
        last = first + events.size
        starts, stops = (np.repeat(ends[first:last], events) for ends in (lengths, lengths + targets))
        position = np.arange(ids.size) - np.repeat(np.cumsum(events) - events, events)
        pairs = np.repeat(np.arange(events.size), events) << np.int64(32) | ids
        item = (ids > UNK) & (stops > starts)
        is_target = item & (position >= starts) & (position < stops) & (True if weight is None else weight > 0)
        wanted = np.unique(pairs[is_target])
        held_out += wanted.size
        before = np.sort(pairs[item & (position < starts)])  # `np.isin` hashes them, which takes 20 times as long
        if before.size:
            repeated += (before.take(np.searchsorted(before, wanted), mode="clip") == wanted).sum()
        first = last
    return float(repeated / max(held_out, 1))


def user_ids(dataset: Dataset | EventTable) -> list[int | str]:
    """The ids of the users, in the order of the rows."""
    if isinstance(dataset, EventTable):
        return dataset.users["user_id"].tolist()
    return list(dataset.with_format(None)["user_id"])


def _numbers(dataset: Dataset | EventTable, column: str) -> np.ndarray:
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
    for table in dataset.with_format("arrow").select_columns([column]).iter(batch_size=50_000):
        events = table[column].combine_chunks()
        yield events.flatten().to_numpy(zero_copy_only=False), events.value_lengths().to_numpy().astype(np.int64)


class _View:
    """Transforms stored rows into the rows of a part. A class, because DataLoader workers may pickle it."""

    def __init__(self, part: str, max_length: int | None, columns: Sequence[str], unseen: np.ndarray | None) -> None:
        self.part, self.max_length, self.columns, self.unseen = part, max_length, columns, unseen

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
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
            ends = zip(batch["input_ids"], stops, batch[f"{self.part}_end"])
            targets = [events[stop:end] for events, stop, end in ends]
            if "weights" in batch:
                ends = zip(batch["weights"], stops, batch[f"{self.part}_end"])
                weights = [values[stop:end] for values, stop, end in ends]
                targets = [[item for item, w in zip(*pair) if w > 0] for pair in zip(targets, weights)]
            if unseen is not None:
                targets = [[item for item in items if not unseen[item]] for items in targets]
            rows["target_ids"] = targets
            rows["seen_ids"] = histories
        return rows

    def _latest(self, lists: list) -> list:
        return lists if self.max_length is None else [values[-self.max_length :] for values in lists]


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


def split_by_leave_one_out(dataset: Dataset | EventTable) -> Dataset | EventTable:
    """
    Splits by leave-one-out: the last target of each user is the test, and the one before it validation.

    Events with weight 0 are no targets; those after the last target are in no part. The events of a basket
    (`basket_starts`) are targets together.
    """
    batches = [_of_column(dataset, name) for name in ("input_ids", "weights", "basket_starts")]
    ends = [leave_one_out_ends(lengths, *values) for (_, lengths), *values in zip(*batches)]
    return _with_ends(dataset, *(np.concatenate([end[part] for end in ends]) for part in PARTS))


def _of_column(dataset: Dataset | EventTable, name: str) -> Iterator[Any]:
    """Batches of the events of a column: with lengths for `input_ids`, without for others, `None` if there is none."""
    if name not in dataset.column_names:
        return repeat(None)
    batches = event_batches(dataset, name)
    return batches if name == "input_ids" else (values for values, _ in batches)


def leave_one_out_ends(
    lengths: np.ndarray, weights: np.ndarray | None = None, basket_starts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """
    The ends of the parts under leave-one-out, see [`split_by_leave_one_out`].

    Args:
        lengths: int [users], the number of events of each user.
        weights: float [events], the weight of each event; by default, 1.
        basket_starts: bool [events], whether an event is the first of a basket; by default, each is.

    Returns:
        int64 [users] by part: the number of events before the end of the part. The test has the basket of the last target;
        validation has the events from the basket of the target before it.
    """
    if weights is None and basket_starts is None:
        return {part: np.maximum(lengths - held_out, 0) for part, held_out in zip(PARTS, (2, 1, 0))}
    total, stops = int(lengths.sum()), np.cumsum(lengths)
    starts = stops - lengths
    begins = np.arange(total) if basket_starts is None else np.flatnonzero(basket_starts)
    targets = np.arange(total) if weights is None else np.flatnonzero(np.asarray(weights) > 0)
    before = np.append(targets, -1)  # index -1: there is no target before

    def last_target(stop: np.ndarray) -> np.ndarray:
        found = before[np.searchsorted(targets, stop) - 1]
        return np.where(found >= starts, found, -1)

    def basket_of(event: np.ndarray) -> np.ndarray:
        return begins[np.maximum(np.searchsorted(begins, event, side="right") - 1, 0)] if total else event

    last = last_target(stops)
    test_start = np.where(last >= 0, basket_of(last), starts)
    next_basket = np.append(begins, total)[np.searchsorted(begins, last, side="right")]
    test_end = np.where(last >= 0, next_basket, starts)
    earlier = last_target(test_start)
    validation_start = np.where(earlier >= 0, basket_of(earlier), test_start)
    return {part: end - starts for part, end in zip(PARTS, (validation_start, test_start, test_end))}


def split_by_time(dataset: Dataset | EventTable, validation_from: float, test_from: float) -> Dataset | EventTable:
    """
    `dataset` with the ends of a global time split: train before `validation_from`, validation from there to before
    `test_from`, test from there on; nothing of a later part is known in an earlier one. The lists are shared, not
    copied.

    A user may have no event in some parts, and an item none in training: the log says how many, [`split`] leaves such
    users out of those parts, and with `counts` it takes such items out too.

    Args:
        validation_from, test_from: times in the unit of the column `timestamps`.

    Raises:
        `ValueError`: no column `timestamps`; `test_from` before `validation_from`; no event before `validation_from`.
    """
    if "timestamps" not in dataset.column_names:
        raise ValueError("dataset has no column timestamps; a split by time needs a log with times.")
    if test_from < validation_from:
        raise ValueError(f"test_from is {test_from}, before validation_from {validation_from}.")
    ends = []
    for border in (validation_from, test_from):
        before = []
        for times, lengths in event_batches(dataset, "timestamps"):
            user = np.repeat(np.arange(lengths.size), lengths)
            before.append(np.bincount(user[times < border], minlength=lengths.size))
        ends.append(np.concatenate(before))
    if not ends[0].any():
        raise ValueError(
            f"validation_from is {validation_from}, but no event is before it; nothing would be left to train."
        )
    lengths = _history_lengths(dataset)
    logger.info("%d of %d users have no event before %s: cold", (ends[0] == 0).sum(), len(dataset), validation_from)
    return _with_ends(dataset, *ends, lengths)


def split_by_user(
    dataset: Dataset | EventTable,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    num_targets: int = 1,
    seed: int = 0,
) -> Dataset | EventTable:
    """
    Splits by user: users of validation and test do not occur in training.

    The result has a column `part` (int8: 0 train, 1 validation, 2 test). All events of a training user are in training.
    Of other users, the last `num_targets` events are to be predicted from those before. The lists are shared, not copied.

    Args:
        validation, test (`float`): share of the users.
        num_targets (`int`): number of events to predict.
        seed (`int`): seed of the draw.

    Raises:
        ValueError: if a share is negative, or no user remains for training.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            f"validation is {validation} and test {test}; they may be 0 or more and less than 1 together."
        )
    draw = np.random.default_rng(seed).random(len(dataset))
    part = np.where(draw < test, 2, np.where(draw < test + validation, 1, 0)).astype(np.int8)
    lengths = _history_lengths(dataset)
    history = np.maximum(lengths - num_targets, 0)
    train_end = np.where(part == 0, lengths, history)
    validation_end = np.where(part == 2, history, lengths)
    split = _with_ends(dataset, train_end, validation_end, lengths)
    if isinstance(split, EventTable):
        return replace(split, users={**split.users, "part": part})
    return split.add_column("part", part)


def _history_lengths(dataset: Dataset | EventTable) -> np.ndarray:
    return np.concatenate([lengths for _, lengths in event_batches(dataset)])


def _with_ends(dataset: Dataset | EventTable, *ends: np.ndarray) -> Dataset | EventTable:
    names = [f"{part}_end" for part in PARTS]
    if isinstance(dataset, EventTable):
        users = {name: values for name, values in dataset.users.items() if name != "part"}
        return replace(dataset, users=users | {name: end.astype(np.int32) for name, end in zip(names, ends)})
    dataset = dataset.remove_columns([*names, *({"part"} & set(dataset.column_names))])
    for name, end in zip(names, ends):
        dataset = dataset.add_column(name, end.astype(np.int32))
    return dataset
