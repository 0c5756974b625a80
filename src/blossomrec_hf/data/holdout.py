"""Which events of a prepared data set are held out: the last ones, periods of time, users, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from .event_table import EventTable
from .splits import PARTS, event_batches, numbers
from .time_units import as_seconds, duration_seconds


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def hold_out_nothing(dataset: Dataset | EventTable) -> Dataset | EventTable:
    """Splits so that all events of all users are in training, and none in validation and test."""
    return _with_ends(dataset, *[_history_lengths(dataset)] * 3)


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
    targets = None if weights is None else np.flatnonzero(np.asarray(weights) > 0)
    begins = None if basket_starts is None else np.flatnonzero(basket_starts)

    def last_target(stop: np.ndarray) -> np.ndarray:
        """The last target before `stop`, or −1 if the user has none."""
        place = stop - 1
        if targets is not None:
            index = np.searchsorted(targets, stop) - 1
            place = np.where(index >= 0, targets[np.maximum(index, 0)] if targets.size else -1, -1)
        return np.where(place >= starts, place, -1)

    def basket_start(event: np.ndarray) -> np.ndarray:
        if begins is None or not total:
            return event
        return begins[np.maximum(np.searchsorted(begins, event, side="right") - 1, 0)]

    def basket_end(event: np.ndarray) -> np.ndarray:
        return event + 1 if begins is None else np.append(begins, total)[np.searchsorted(begins, event, side="right")]

    last = last_target(stops)
    test_start = np.where(last >= 0, basket_start(last), starts)
    test_end = np.where(last >= 0, basket_end(last), starts)
    earlier = last_target(test_start)
    validation_start = np.where(earlier >= 0, basket_start(earlier), test_start)
    return {part: end - starts for part, end in zip(PARTS, (validation_start, test_start, test_end))}


def given_ends(parts: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """
    The ends of the parts if the split is given.

    Args:
        parts: int [events], the part of each event as an index of [`~data.splits.PARTS`], ascending for each user.
        starts: int [users], the index of each user's first event.

    Returns:
        int64 [users] by part: the number of events before the end of the part.
    """
    if not starts.size:
        return {name: np.zeros(0, np.int64) for name in PARTS}
    return {name: np.add.reduceat((parts <= part).astype(np.int64), starts) for part, name in enumerate(PARTS)}


def split_by_time(
    dataset: Dataset | EventTable,
    validation_from: float | str,
    test_from: float | str,
    test_to: float | str | None = None,
) -> Dataset | EventTable:
    """
    Splits by time: training ends at `validation_from`, validation at `test_from` and the test at `test_to`. The lists are
    shared, not copied.

    A user may have no event in a part, and an item none in training. [`split`] drops such users from the part and counts
    them; with `counts`, it does so with such items.

    Args:
        validation_from, test_from, test_to: seconds; a date (`"2024-01-31"`, `"2024-01-31 18:30"`, UTC if it has no time
            zone); or the share of all events that come before, between 0 and 1 (not later than the last event). `test_to` is by default after all events.

    Raises:
        ValueError: if there is no column `timestamps`, a time cannot be read, a time is before an earlier one, or no event
            is before `validation_from`.
    """
    if "timestamps" not in dataset.column_names:
        raise ValueError("dataset has no column timestamps; a split by time needs a log with times.")
    given = {"validation_from": validation_from, "test_from": test_from, "test_to": test_to}
    times = {name: _second(dataset, name, time) for name, time in given.items() if time is not None}
    for (name, time), (later, other) in pairwise(times.items()):
        if other < time:
            raise ValueError(f"{later} is {given[later]}, before {name} {given[name]}.")
    ends = [_events_before(dataset, time) for time in times.values()]
    if not ends[0].any():
        raise ValueError(
            f"validation_from is {validation_from}, but no event is before it; nothing would be left to train."
        )
    cold = int((ends[0] == 0).sum())
    logger.info("%d of %d users have no event before %s: cold", cold, len(dataset), validation_from)
    return _with_ends(dataset, *ends, *([] if test_to is not None else [_history_lengths(dataset)]))


def split_into_folds(
    dataset: Dataset | EventTable, test_from: float | str, *, width: str, folds: int
) -> Dataset | EventTable:
    """
    Splits by time into rolling folds: the test of fold k covers the k-th period of `width` from `test_from` on, validation
    the period before, and training everything before that.

    The ends of fold k are the columns `train_end_k`, `validation_end_k` and `test_end_k`; [`choose_fold`] makes them the ends
    of the parts. Without it, they are those of the last fold.

    Args:
        test_from: the beginning of the first test, as in [`split_by_time`].
        width (`str`): duration of a test, such as `12h` or `7d`.
        folds (`int`): number of folds, at least 1.

    Raises:
        ValueError: as [`split_by_time`]; also if `width` is no duration or `folds` is below 1.
    """
    if folds < 1:
        raise ValueError(f"folds is {folds}; it may be 1 or more.")
    seconds = duration_seconds("width", width)
    if "timestamps" not in dataset.column_names:
        raise ValueError("dataset has no column timestamps; folds need a log with times.")
    first = _second(dataset, "test_from", test_from)
    numbered = {}
    for number in range(folds):
        start = first + number * seconds
        dataset = split_by_time(dataset, start - seconds, start, start + seconds)
        numbered |= {f"{part}_end_{number}": numbers(dataset, f"{part}_end").astype(np.int32) for part in PARTS}
    return _with_columns(dataset, numbered)


def choose_fold(dataset: Dataset | EventTable, number: int) -> Dataset | EventTable:
    """
    Makes the ends of a fold of [`split_into_folds`] the ends of the parts.

    Raises:
        ValueError: if there is no such fold.
    """
    folds = sum(name.startswith("train_end_") for name in dataset.column_names)
    if not 0 <= number < folds:
        which = f"it may be from 0 to {folds - 1}" if folds else "prepare it with `--split folds`"
        raise ValueError(f"fold is {number}, but the data set has {folds} folds; {which}.")
    return _with_ends(dataset, *(numbers(dataset, f"{part}_end_{number}") for part in PARTS))


def _second(dataset: Dataset | EventTable, name: str, time: float | str) -> float:
    """A time that is given as seconds, a date or a share of the events, in seconds."""
    if isinstance(time, str):
        time = as_seconds(name, time, "a share of the events between 0 and 1")
    if not 0 < time < 1:
        return time
    batches = [times for times, _ in event_batches(dataset, "timestamps") if times.size]
    low, high = min(int(times.min()) for times in batches), max(int(times.max()) for times in batches)
    wanted = time * sum(times.size for times in batches)
    while low < high:  # the first second with at least so many events before it
        middle = (low + high) // 2
        enough = sum(int((times < middle).sum()) for times in batches) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _events_before(dataset: Dataset | EventTable, time: float) -> np.ndarray:
    """int64 [users]: the number of events before a time."""
    before = []
    for times, lengths in event_batches(dataset, "timestamps"):
        user = np.repeat(np.arange(lengths.size), lengths)
        before.append(np.bincount(user[times < time], minlength=lengths.size))
    return np.concatenate(before)


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
    Of other users, the last `num_targets` events, with the others of their baskets (`basket_starts`), are to be predicted
    from those before. The lists are shared, not copied.

    Args:
        validation, test (`float`): share of the users.
        num_targets (`int`): number of events to predict, at least.
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
    history = _basket_begins(dataset, np.maximum(lengths - num_targets, 0))
    train_end = np.where(part == 0, lengths, history)
    validation_end = np.where(part == 2, history, lengths)
    return _with_columns(_with_ends(dataset, train_end, validation_end, lengths), {"part": part})


def _basket_begins(dataset: Dataset | EventTable, places: np.ndarray) -> np.ndarray:
    """int64 [users]: the place of the first event of the basket of an event in each history."""
    if "basket_starts" not in dataset.column_names:
        return places
    found, user = [], 0
    for starts, lengths in event_batches(dataset, "basket_starts"):
        place, first = places[user : user + lengths.size], np.cumsum(lengths) - lengths
        begins = np.append(np.flatnonzero(starts), starts.size)
        begin = begins[np.searchsorted(begins, first + place, side="right") - 1] - first
        found.append(np.where(place < lengths, begin, place))
        user += lengths.size
    return np.concatenate(found)


def _history_lengths(dataset: Dataset | EventTable) -> np.ndarray:
    return np.concatenate([lengths for _, lengths in event_batches(dataset)])


def _with_ends(dataset: Dataset | EventTable, *ends: np.ndarray) -> Dataset | EventTable:
    """`dataset` with other ends of the parts, and all users in all parts."""
    names = ("part", *(f"{part}_end" for part in PARTS))
    if isinstance(dataset, EventTable):
        dataset = replace(dataset, users={name: values for name, values in dataset.users.items() if name not in names})
    else:
        dataset = dataset.remove_columns([name for name in names if name in dataset.column_names])
    return _with_columns(dataset, {name: end.astype(np.int32) for name, end in zip(names[1:], ends)})


def _with_columns(dataset: Dataset | EventTable, columns: dict[str, np.ndarray]) -> Dataset | EventTable:
    if isinstance(dataset, EventTable):
        return replace(dataset, users=dataset.users | columns)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset
