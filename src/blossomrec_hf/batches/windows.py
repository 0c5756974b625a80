"""What a training example is: a history's latest window, several overlapping windows, or a random crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from ..data.splits import part_lengths, too_short


if TYPE_CHECKING:
    from datasets import Dataset


class HistoryWindows(TorchDataset):
    """
    The training part of a built Dataset as windows of at most `max_length` items, for a `DataLoader`.

    Examples are read from Arrow as numpy arrays, without Python lists in between, and only what a window covers:
    `{"input_ids": int32 [n], "num_known": int}`. The first `num_known` items are context and no targets.

    Args:
        dataset: from [`build_sequences`].
        max_length (`int`, *optional*): items of a window; whole histories if not given.
        window: `"latest"`, one window a user, its latest items; `"overlapping"`, windows that step by `stride` and
            cover the whole history, each event the target of exactly one of them (the overlap is context);
            `"random_crop"`, one window a user at a place drawn anew each epoch ([`~HistoryWindows.set_epoch`]).
        stride (`int`, *optional*): step of overlapping windows, half of `max_length` if not given.
        seed (`int`): of the crops.

    Attributes:
        lengths (int64 [examples]): items of each example; for [`TokenBudgetSampler`].

    Raises:
        `ValueError`: an unknown `window`; `"overlapping"` or `"random_crop"` without `max_length`; a stride that is not
            1 to `max_length - 1`; no user with two training events.
    """

    def __init__(
        self,
        dataset: Dataset,
        max_length: int | None = None,
        *,
        window: Literal["latest", "overlapping", "random_crop"] = "latest",
        stride: int | None = None,
        seed: int = 0,
    ) -> None:
        if window not in ("latest", "overlapping", "random_crop"):
            raise ValueError(f'window is {window!r}; it may be "latest", "overlapping" or "random_crop".')
        if max_length is None and window != "latest":
            raise ValueError(f'max_length is None; the window "{window}" needs a number of items, 2 or more.')
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it may be 2 (an item and its next) or more.")
        history, _ = part_lengths(dataset, "train")
        rows = np.flatnonzero(history >= 2)
        if not rows.size:
            raise too_short(dataset, "train")
        stops = history[rows]
        longest = max_length or int(stops.max())
        starts = np.maximum(stops - longest, 0)
        known = np.ones_like(starts)
        if window == "overlapping":
            stride = max(longest // 2, 1) if stride is None else stride
            if not 1 <= stride < longest:
                raise ValueError(f"stride is {stride}; it may be 1 to max_length - 1 ({longest - 1}).")
            count = 1 + np.maximum(-(-(stops - longest) // stride), 0)
            number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            rows, ends = np.repeat(rows, count), np.repeat(stops, count)
            starts = number * stride
            stops = np.minimum(starts + longest, ends)
            known = np.where(number == 0, 1, longest - stride)
        self.dataset = dataset.with_format("arrow")
        self.rows, self.starts, self.lengths, self.num_known = rows, starts, stops - starts, known
        self.room = starts if window == "random_crop" else None
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change

    def set_epoch(self, epoch: int) -> None:
        """Draws new random crops; the same seed and epoch give the same ones, in any worker and on any rank."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.examples(indices, int(self._epoch))

    def examples(self, indices: Sequence[int], epoch: int) -> list[dict[str, Any]]:
        """Some examples, of any epoch."""
        if not len(indices):
            return []
        events = self.dataset[self.rows[indices].tolist()]["input_ids"].combine_chunks()
        offsets, values = events.offsets.to_numpy(), events.values.to_numpy()
        examples = []
        for index, offset in zip(indices, offsets):
            start = self.starts[index]
            if self.room is not None:
                rng = np.random.default_rng((self.seed, epoch, index))
                start = rng.integers(self.room[index] + 1)
            start += offset
            ids = values[start : start + self.lengths[index]]
            examples.append({"input_ids": ids, "num_known": int(self.num_known[index])})
        return examples
