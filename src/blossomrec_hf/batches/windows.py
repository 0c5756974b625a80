"""Training examples of long histories: the latest window, overlapping windows, or a random crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ..data.event_table import EventTable
from ..data.splits import event_batches, part_lengths, too_short, warn_of_baskets
from .histories import HistoryStore


if TYPE_CHECKING:
    from datasets import Dataset

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
            cover the whole history, each event the target of exactly one of them (the overlap is context);
            `"random_crop"`, one window per user at a place drawn in each epoch, see [`~HistoryWindows.set_epoch`].
        stride (`int`, *optional*): step of overlapping windows. Defaults to half of `max_length`.
        seed (`int`, defaults to 0): seed of the crops.
        columns: other columns of the events that the windows have, such as `timestamps`. Events of weight 0 are no
            targets, also without the column `weights`. A [`HistoryStore`] has its columns already.

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
            context = longest - stride
            firsts = np.maximum(first_targets - context, firsts)
            count = 1 + np.maximum(-(-(stops - firsts - longest) // stride), 0)
            self.sources, stops, first_targets = (
                np.repeat(part, count) for part in (self.sources, stops, first_targets)
            )
            number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            starts = np.repeat(firsts, count) + number * stride
            stops = np.minimum(starts + longest, stops)
            first_targets = np.where(number == 0, first_targets, starts + context)
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


def _training_histories(data: Dataset | EventTable, columns: Sequence[str]) -> HistoryStore:
    """The training part of a data set; the history of a user without two training events is empty."""
    ends = part_lengths(data, "train")[0]
    ends[ends < 2] = 0
    if not ends.any():
        raise too_short(data, "train")
    warn_of_baskets(data)
    values = {name: _training_events(data, name, ends) for name in ("input_ids", *columns)}
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
