"""Histories held in memory as one long array of items, and packed batches cut out of it.

A collator that walks over lists of Python integers costs more than a GPU training step of a small model. Here a batch
is a few vectorised operations whatever the number of histories in it, so the loop and the evaluation never wait for
data.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ..model.ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS


class HistoryStore:
    """
    Histories end to end in one array, each with its latest `max_length` items in use.

    Args:
        items: int32 [total], the vocabulary ids of all histories, one history after the other.
        offsets: int64 [number of histories + 1], where each history starts; the last entry is the total.
        max_length: how many of its latest items each history gives to a batch; all when left out.
        num_known: int64 [number of histories], how many of its first items are context and no targets, as
            [`~blossomrec_hf.batches.HistoryWindows`] that overlap have them; 1 when left out.

    Attributes:
        lengths: int64 [number of histories], the items in use.
        num_targets: int64 [number of histories], the positions the model is trained on: every item in use but the
            known ones, unless it is `[PAD]` or `[UNK]`.
    """

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        *,
        max_length: int | None = None,
        num_known: np.ndarray | None = None,
    ):
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        self.items = torch.from_numpy(np.require(items, dtype=np.int32, requirements=["C", "W"]))
        full_lengths = np.diff(offsets)
        self.lengths = full_lengths if max_length is None else np.minimum(full_lengths, max_length)
        self.starts = offsets[1:] - self.lengths

        targets_before = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(np.asarray(items) >= NUM_SPECIAL_IDS, out=targets_before[1:])
        known = np.ones_like(full_lengths) if num_known is None else np.asarray(num_known, dtype=np.int64)
        # Of the items in use; an item without one before it can never be predicted.
        self.num_known = np.maximum(known - (full_lengths - self.lengths), 1)
        first_targets = np.minimum(self.starts + self.num_known, offsets[1:])
        self.num_targets = targets_before[offsets[1:]] - targets_before[first_targets]

    @classmethod
    def from_rows(
        cls, rows: Dataset | Sequence[Mapping], *, column: str = "input_ids", max_length: int | None = None
    ) -> "HistoryStore":
        """
        Reads one column of a data set, a view of [`~blossomrec_hf.data.split`],
        [`~blossomrec_hf.batches.HistoryWindows`] or a list of dictionaries; and `num_known`, where rows have it.
        """
        if len(rows) and "num_known" in rows[0]:
            histories, num_known = zip(*iterate_columns(rows, column, "num_known"))
            return cls(*concatenate(histories), max_length=max_length, num_known=np.array(num_known))
        items, offsets = concatenate(values for (values,) in iterate_columns(rows, column))
        return cls(items, offsets, max_length=max_length)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "HistoryStore":
        """Moves the items, so that batches are cut where they are needed. Lengths and offsets stay on the CPU."""
        self.items = self.items.to(device)
        return self

    def pack(self, rows: np.ndarray | Sequence[int], *, labels: bool = False) -> dict[str, torch.Tensor | int]:
        """
        Packs some of the histories into one row.

        Args:
            rows: int [S], which histories, in the order of the batch. Empty histories are not allowed.
            labels: also give `labels`.

        Returns:
            The model's arguments, on the device of the items: `input_ids` int64 [1, T], `cu_seq_lens_q/k` int32 [S +
            1], `max_length_q/k` (plain integers) and, if asked for, `labels` int64 [1, T]: the items, with −100 for
            the known items of each history (its first, if nothing else is told) and for `[PAD]` and `[UNK]`.
        """
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        begins = ends - lengths
        # One small copy to the device instead of several of the size of the batch; `repeat_interleave` is told the
        # total, which it would wait for the device to learn.
        plan = np.stack([self.starts[rows] - begins, lengths, begins, begins + self.num_known[rows]])
        shifts, counts, firsts, first_targets = to_device(torch.from_numpy(plan), self.items.device)
        total = int(ends[-1])
        places = torch.arange(total, device=self.items.device)
        input_ids = self.items[places + torch.repeat_interleave(shifts, counts, output_size=total)].long()
        cu_seq_lens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        max_length = int(lengths.max())
        batch = {
            "input_ids": input_ids[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max_length,
            "max_length_k": max_length,
        }
        if labels:
            targets = input_ids.masked_fill(input_ids < NUM_SPECIAL_IDS, IGNORE_INDEX)
            if (self.num_known[rows] == 1).all():
                targets = targets.index_fill(0, firsts, IGNORE_INDEX)
            else:
                known = places < torch.repeat_interleave(first_targets, counts, output_size=total)
                targets = targets.masked_fill(known, IGNORE_INDEX)
            batch["labels"] = targets[None]
        return batch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies without making the CPU wait for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def iterate_columns(rows: Dataset | Sequence[Mapping], *columns: str, batch_size: int = 1000) -> Iterable[tuple]:
    """Yields the named columns of one row after the other, reading a `datasets.Dataset` many rows at a time."""
    if hasattr(rows, "iter"):
        for batch in rows.iter(batch_size=batch_size):
            yield from zip(*(batch[column] for column in columns), strict=True)
    else:
        for row in rows:
            yield tuple(row[column] for column in columns)


def concatenate(lists: Iterable[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lists end to end as int32, and int64 offsets that begin with 0 and end with the total."""
    arrays = [np.asarray(values, dtype=np.int32) for values in lists]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, dtype=np.int32), *arrays]), offsets


def budget_batches(sizes: np.ndarray, max_total: int, *, max_count: int | None = None) -> list[slice]:
    """
    Cuts a list of sizes, in its order, into runs whose sum stays within `max_total` and whose count within
    `max_count`. One size above the budget makes a run of its own.
    """
    ends = np.cumsum(sizes)
    batches: list[slice] = []
    start = 0
    while start < len(sizes):
        spent = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, spent + max_total, side="right")))
        if max_count is not None:
            stop = min(stop, start + max_count)
        batches.append(slice(start, stop))
        start = stop
    return batches
