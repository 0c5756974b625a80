"""Training examples of long histories: the latest window, overlapping windows, or a random crop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ..data.event_table import EventTable
from ..data.splits import event_batches, part_lengths, too_short
from .histories import HistoryStore


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Window = Literal["latest", "overlapping", "random_crop"]
WINDOWS: tuple[Window, ...] = get_args(Window)


class HistoryWindows(HistoryStore):
    """
    Histories as windows of at most `max_length` events, in memory (4 bytes per event): by default, the training part of a
    prepared data set.

    Args:
        data: from [`~blossomrec_hf.data.build_sequences`], as an [`~blossomrec_hf.data.EventTable`], or a [`HistoryStore`]
            of whole histories, of which events beyond `num_known` are targets. The store shares its columns.
        max_length (`int`, *optional*): number of events of a window; by default, whole histories.
        window: `"latest"`, one window per user, the latest events; `"overlapping"`, windows that step by `stride` and
            cover the whole history, each event the target of exactly one of them (the overlap is context). Windows end with a
            whole basket, and events of a basket of `max_length` events or more are no targets;
            `"random_crop"`, one window per user at a place drawn in each epoch, see [`~HistoryWindows.set_epoch`].
        stride (`int`, *optional*): step of overlapping windows. Defaults to half of `max_length`.
        seed (`int`, defaults to 0): seed of the crops.
        columns: other columns of the events that the windows have, such as `timestamps`. Events of weight 0 are no
            targets, also without the column `weights`; windows always have `basket_starts`. A [`HistoryStore`] has its columns already.

    Attributes:
        sources: int64 [windows], index in `data` of the history of each window.

    Raises:
        ValueError: if `window` is unknown, `"overlapping"` or `"random_crop"` have no `max_length`, `stride` is not 1 to
            `max_length - 1`, or no user of a data set has two training events.
    """

    def __init__(
        self,
        data: Dataset | EventTable | HistoryStore,
        max_length: int | None = None,
        *,
        window: Window = "latest",
        stride: int | None = None,
        seed: int = 0,
        columns: Sequence[str] = (),
    ) -> None:
        if window not in WINDOWS:
            raise ValueError(f'window is {window!r}; it may be "latest", "overlapping" or "random_crop".')
        if max_length is None and window != "latest":
            raise ValueError(f'max_length is None; the window "{window}" needs a number of items, 2 or more.')
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it may be 2 (an item and its next) or more.")
        whole = data if isinstance(data, HistoryStore) else _training_histories(data, columns)
        vars(self).update(vars(whole))  # shares the columns
        self.sources = np.flatnonzero(whole.lengths > whole.num_known)
        firsts, lengths, known = (part[self.sources] for part in (whole.starts, whole.lengths, whole.num_known))
        longest = max_length or int(lengths.max(initial=2))
        stops, first_targets = firsts + lengths, firsts + known
        self._crops = None
        if window == "overlapping":
            stride = max(longest // 2, 1) if stride is None else stride
            if not 1 <= stride < longest:
                raise ValueError(f"stride is {stride}; it may be 1 to max_length - 1 ({longest - 1}).")
            windows = _overlapping(whole, firsts, stops, first_targets, longest, longest - stride)
            place, starts, stops, first_targets = windows
            self.sources = self.sources[place]
        else:
            starts = np.maximum(stops - longest, firsts)
        if window == "random_crop":
            earliest = np.maximum(first_targets + 1 - longest, firsts)  # with a target
            self._crops = (earliest, starts - earliest, first_targets)
        self._set_spans(starts, stops - starts, first_targets - starts)
        self.seed, self._epoch = seed, None
        self.set_epoch(0)

    @property
    def has_targets(self) -> np.ndarray:
        """bool [windows], whether a window has a target: a random crop, in any epoch."""
        if self._crops is None:
            return super().has_targets
        earliest, room, first_targets = self._crops
        return self._count_targets(np.maximum(first_targets, earliest + 1), earliest + room + self.lengths) > 0

    def select(self, rows: Sequence[int] | np.ndarray) -> HistoryWindows:
        """The store of some of the windows, which shares the columns."""
        store = super().select(rows)
        store.sources = self.sources[rows]
        store._crops = None if self._crops is None else tuple(part[rows] for part in self._crops)
        return store

    def set_epoch(self, epoch: int) -> None:
        """Draws the random crops of an epoch; the same seed and epoch give the same ones on every process."""
        if self._crops is not None and epoch != self._epoch:
            earliest, room, first_targets = self._crops
            starts = earliest + np.random.default_rng((self.seed, epoch)).integers(room + 1)
            self._set_spans(starts, self.lengths, first_targets - starts)
            self._epoch = epoch


def _overlapping(
    histories: HistoryStore,
    firsts: np.ndarray,
    stops: np.ndarray,
    first_targets: np.ndarray,
    longest: int,
    context: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Windows that ask for each event of whole baskets once: the place of each window's history, and the indices of its
    first event, of the event behind its last one, and of its first target, int64 [windows] each.

    Args:
        histories: the store.
        firsts, stops, first_targets: of each history, such indices.
        longest: the most events of a window.
        context: the number of events before the first target, less where a basket needs the room.
    """
    places, next_targets, num_dropped = np.arange(len(firsts)), first_targets.copy(), 0
    windows = [np.empty((4, 0), np.int64)]
    while len(places):  # the next window of each history
        first, stop, target = firsts[places], stops[places], next_targets[places]
        begin, basket_end = histories.basket_begin(target), np.minimum(histories.basket_end(target), stop)
        start = np.maximum(np.maximum(np.minimum(target - context, begin - 1), basket_end - longest), first)
        end = histories.basket_begin(np.minimum(start + longest, stop))
        end = np.where(start + longest < stop, np.maximum(end, basket_end), stop)
        fits = start < begin
        num_dropped += int((end - target)[~fits].sum())
        windows.append(np.stack([places, start, end, target])[:, fits])
        next_targets[places] = end
        places = places[end < stop]
    if num_dropped:
        logger.warning(
            "train: %s events in baskets of %d events or more are no targets; raise max_length to learn them",
            *(f"{num_dropped:,}", longest),
        )
    place, start, end, target = np.concatenate(windows, axis=1)
    order = np.argsort(place, kind="stable")
    return place[order], start[order], end[order], target[order]


def _training_histories(data: Dataset | EventTable, columns: Sequence[str]) -> HistoryStore:
    """The training part of a data set; the history of a user without two training events is empty."""
    ends = part_lengths(data, "train")[0]
    ends[ends < 2] = 0
    if not ends.any():
        raise too_short(data, "train")
    names = [name for name in ("input_ids", "basket_starts", *columns) if name in columns or name in data.column_names]
    values = {name: _training_events(data, name, ends) for name in dict.fromkeys(names)}
    weights = None
    if "weights" in data.column_names and "weights" not in columns:
        weights = _training_events(data, "weights", ends)
    offsets = np.append(0, np.cumsum(ends))
    return HistoryStore(values.pop("input_ids"), offsets, columns=values, weights=weights)


def _training_events(data: Dataset | EventTable, column: str, ends: np.ndarray) -> np.ndarray:
    """[events], the values of the first `ends` events of each user."""
    parts, first = [], 0
    for values, lengths in event_batches(data, column):
        position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        parts.append(values[position < np.repeat(ends[first : first + len(lengths)], lengths)])
        first += len(lengths)
    return np.concatenate(parts)
