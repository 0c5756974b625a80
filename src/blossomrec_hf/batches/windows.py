"""Training examples of long histories: the latest window, overlapping windows, or a random crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..data.event_table import EventTable
from ..data.splits import event_batches, part_lengths, too_short
from .histories import HistoryStore


if TYPE_CHECKING:
    from datasets import Dataset


class HistoryWindows(HistoryStore):
    """
    The training part of a prepared data set as windows of at most `max_length` events, in memory (4 bytes per event).

    Args:
        data: from [`~blossomrec_hf.data.build_sequences`], or as an [`~blossomrec_hf.data.EventTable`].
        max_length (`int`, *optional*): number of events of a window; by default, whole histories.
        window: `"latest"`, one window per user, the latest events; `"overlapping"`, windows that step by `stride` and
            cover the whole history, each event the target of exactly one of them (the overlap is context);
            `"random_crop"`, one window per user at a place drawn in each epoch, see [`~HistoryWindows.set_epoch`].
        stride (`int`, *optional*): step of overlapping windows. Defaults to half of `max_length`.
        seed (`int`, defaults to 0): seed of the crops.
        columns: other columns of the events that the windows have, such as `timestamps`. Events of weight 0 are no
            targets, also without the column `weights`.

    Raises:
        ValueError: if `window` is unknown, `"overlapping"` or `"random_crop"` have no `max_length`, `stride` is not 1 to
            `max_length - 1`, or no user has two training events.
    """

    def __init__(
        self,
        data: Dataset | EventTable,
        max_length: int | None = None,
        *,
        window: Literal["latest", "overlapping", "random_crop"] = "latest",
        stride: int | None = None,
        seed: int = 0,
        columns: Sequence[str] = (),
    ) -> None:
        if window not in ("latest", "overlapping", "random_crop"):
            raise ValueError(f'window is {window!r}; it may be "latest", "overlapping" or "random_crop".')
        if max_length is None and window != "latest":
            raise ValueError(f'max_length is None; the window "{window}" needs a number of items, 2 or more.')
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it may be 2 (an item and its next) or more.")
        ends = part_lengths(data, "train")[0]
        ends[ends < 2] = 0
        if not ends.any():
            raise too_short(data, "train")
        lengths = ends[ends > 0]
        offsets = np.append(0, np.cumsum(lengths))
        values = {name: _training_events(data, name, ends) for name in ("input_ids", *columns)}
        weights = None
        if "weights" in data.column_names and "weights" not in columns:
            weights = _training_events(data, "weights", ends)
        super().__init__(values.pop("input_ids"), offsets, columns=values, weights=weights)

        longest = max_length or int(lengths.max())
        firsts, stops = offsets[:-1], offsets[1:]
        starts = np.maximum(stops - longest, firsts)
        known = np.ones_like(starts)
        if window == "overlapping":
            stride = max(longest // 2, 1) if stride is None else stride
            if not 1 <= stride < longest:
                raise ValueError(f"stride is {stride}; it may be 1 to max_length - 1 ({longest - 1}).")
            count = 1 + np.maximum(-(-(lengths - longest) // stride), 0)
            number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            starts = np.repeat(firsts, count) + number * stride
            stops = np.minimum(starts + longest, np.repeat(stops, count))
            known = np.where(number == 0, 1, longest - stride)
        self._set_spans(starts, stops - starts, known)
        self._crops = (firsts, starts - firsts) if window == "random_crop" else None
        self.seed, self._epoch = seed, None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the random crops of an epoch; the same seed and epoch give the same ones on every process."""
        if self._crops is not None and epoch != self._epoch:
            firsts, room = self._crops
            drawn = np.random.default_rng((self.seed, epoch)).integers(room + 1)
            self._set_spans(firsts + drawn, self.lengths, self.num_known)
            self._epoch = epoch


def _training_events(data: Dataset | EventTable, column: str, ends: np.ndarray) -> np.ndarray:
    """[events], the values of the first `ends` events of each user."""
    parts, first = [], 0
    for values, lengths in event_batches(data, column):
        position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        parts.append(values[position < np.repeat(ends[first : first + len(lengths)], lengths)])
        first += len(lengths)
    return np.concatenate(parts)
