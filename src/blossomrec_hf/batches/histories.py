"""
Histories in memory, and the batches made of them.

All events lie end to end in one array per column. A batch takes a few array operations, whatever the number of histories in
it, so that training and evaluation never wait for data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ..model.ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS


_DTYPES = {"input_ids": np.int32, "weights": np.float32, "basket_starts": np.bool_}  # of what every batch needs
_LOSS_COLUMNS = ("weights", "basket_starts")


class HistoryStore(Dataset):
    """
    Histories whose events have columns, and the packed or padded batches of some of them.

    It is a data set for a `DataLoader`: `store[i]` is a row such as `{"input_ids": int32 [n]}`, and several rows at once are
    another store, which [`PackingCollator`] and [`PaddingCollator`] take without a loop over rows.

    Args:
        items: int32 [events], vocabulary ids of all histories, one history after the other.
        offsets: int64 [histories + 1], index of each history's first event; the last entry is the number of events.
        max_length (`int`, *optional*): number of latest events of each history in use; by default, all.
        num_known: int64 [histories], number of first events of each history that are context and no targets, as in
            overlapping windows. Defaults to 1: nothing precedes the first event.
        columns: other columns of the events, by name, [events] each: times, event types, weights. With `basket_starts`
            (bool, whether an event is the first of a basket), the items of a basket are targets together: those of a
            history's first basket are context, also if `max_length` cut it.
        weights: [events], the weight of each event in the loss: 0 for events that are context and no targets. They become a
            column, unless all are 0 or 1: the labels then say everything.

    Attributes:
        columns (`dict[str, torch.Tensor]`): all columns, with the items as `input_ids`.
        starts, lengths: int64 [histories], index of the first event in use and number of events in use.
        num_known: int64 [histories], as the argument, for the events in use; at least those of the first basket.

    Raises:
        ValueError: if `max_length` is below 1, a column has another number of values than `items`, or weights are below 0 or
            not finite.
    """

    def __init__(
        self,
        items: np.ndarray,
        offsets: np.ndarray,
        *,
        max_length: int | None = None,
        num_known: np.ndarray | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
        weights: np.ndarray | None = None,
    ):
        arrays = {"input_ids": items, **(columns or {}), **({} if weights is None else {"weights": weights})}
        for name, values in arrays.items():
            if len(values) != len(items):
                raise ValueError(
                    f"`columns` has {len(values)} values in {name} for {len(items)} events; give one each."
                )
            arrays[name] = np.require(values, dtype=_DTYPES.get(name), requirements=["C", "W"])
        if "weights" in arrays:
            _check_weights(arrays["weights"])
        self.columns = {name: torch.from_numpy(values) for name, values in arrays.items()}
        self._weights = None
        if weights is not None and np.isin(arrays["weights"], (0, 1)).all():
            self._weights = self.columns.pop("weights")
        self._basket_begins = None
        if "basket_starts" in self.columns:
            self._basket_begins = _basket_begins(self.columns["basket_starts"], offsets)
        known = np.ones(len(offsets) - 1, np.int64) if num_known is None else np.asarray(num_known, dtype=np.int64)
        self._set_spans(offsets[:-1], np.diff(offsets), known)
        if max_length is not None:
            self._set_spans(*self._latest(max_length))

    @classmethod
    def from_rows(
        cls,
        rows: Dataset | Sequence[Mapping] | HistoryStore,
        *,
        columns: Sequence[str] = (),
        max_length: int | None = None,
    ) -> HistoryStore:
        """
        Reads rows with `input_ids`: a view of [`~blossomrec_hf.data.split`], a list of dictionaries, or another store, of
        which only the spans are copied.

        Args:
            rows: the histories. Their `num_known`, `weights` and `basket_starts` are read if they have them.
            columns: other columns to read, one value per event.
            max_length (`int`, *optional*): number of latest events of each history in use; by default, all.

        Raises:
            ValueError: for rows without one of the columns, for columns of another length than `input_ids`, and for values
                that are not numbers.
        """
        if isinstance(rows, HistoryStore):
            store = copy.copy(rows)
            if max_length is not None:
                store._set_spans(*rows._latest(max_length))
            return store
        values: dict[str, list] = {name: [] for name in ("input_ids", *columns)}
        known: list[int] = []
        weights: list = []
        for batch in _row_batches(rows):
            if "basket_starts" in batch:
                values.setdefault("basket_starts", [])
            if missing := [name for name in values if name not in batch]:
                raise ValueError(
                    f"`columns` has {', '.join(missing)}, but the rows have {', '.join(batch)}; make the view with "
                    f"`split(dataset, part, columns={list(columns)})`."
                )
            for name, lists in values.items():
                lists += batch[name]
            if "weights" not in columns:
                weights += batch.get("weights", [])
            known += batch.get("num_known", [1] * len(batch["input_ids"]))
        items, offsets = concatenate(values.pop("input_ids"))
        lengths = np.diff(offsets)
        joined = {name: _join(name, lists, lengths) for name, lists in values.items()}
        return cls(
            items,
            offsets,
            max_length=max_length,
            num_known=np.array(known, np.int64),
            columns=joined,
            weights=_join("weights", weights, lengths) if weights else None,
        )

    @property
    def items(self) -> torch.Tensor:
        """int32 [events], the vocabulary ids of all events."""
        return self.columns["input_ids"]

    @property
    def weights(self) -> torch.Tensor | None:
        """[events], the weights of all events: the column of that name, or the argument."""
        return self.columns.get("weights", self._weights)

    @property
    def num_targets(self) -> np.ndarray:
        """
        int64 [histories], number of events that are targets: those in use without the known ones, `[PAD]`, `[UNK]` and those
        of weight 0.
        """
        if self._num_targets is None:
            self._num_targets = self._count_targets(self.starts + self.num_known, self.starts + self.lengths)
        return self._num_targets

    @property
    def has_targets(self) -> np.ndarray:
        """bool [histories], whether a history has a target, in any epoch."""
        return self.num_targets > 0

    def _count_targets(self, firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """int64 [histories], number of events from index `firsts` to before `stops` that may be targets."""
        targets_before = np.zeros(len(self.items) + 1, dtype=np.int64)
        np.cumsum(self._may_be_targets(self.items, self.weights).cpu().numpy(), out=targets_before[1:])
        return targets_before[stops] - targets_before[np.minimum(firsts, stops)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(self.starts[index], self.starts[index] + self.lengths[index])
        row: dict[str, Any] = {name: values[span].cpu().numpy() for name, values in self.columns.items()}
        if self.weights is not None:
            row["weights"] = self.weights[span].cpu().numpy()
        return row if self.num_known[index] == 1 else row | {"num_known": int(self.num_known[index])}

    def __getitems__(self, indices: Sequence[int]) -> HistoryStore:
        return self.select(indices)

    def select(self, rows: Sequence[int] | np.ndarray) -> HistoryStore:
        """The store of some of the histories, which shares the columns."""
        store = copy.copy(self)
        rows = np.asarray(rows, dtype=np.int64)
        store._set_spans(self.starts[rows], self.lengths[rows], self.num_known[rows])
        return store

    def with_columns(self, names: Sequence[str]) -> HistoryStore:
        """
        The store with `input_ids`, `weights`, `basket_starts` and the named columns alone, which it shares.

        Raises:
            ValueError: if a column is missing.
        """
        if missing := [name for name in names if name not in self.columns]:
            raise ValueError(
                f"`columns` has {', '.join(missing)}, but the histories have {', '.join(self.columns)}; make the store with "
                f"columns={list(names)}."
            )
        kept = [name for name in self.columns if name in (*_DTYPES, *names)]
        if len(kept) == len(self.columns):
            return self
        store = copy.copy(self)
        store.columns = {name: self.columns[name] for name in kept}
        return store

    def set_epoch(self, epoch: int) -> None:
        """Chooses the events in use in an epoch, if they differ between epochs."""

    def to(self, device: torch.device | str) -> HistoryStore:
        """Moves the columns to the device where the batches are needed. Spans stay on the CPU."""
        self.columns = {name: values.to(device) for name, values in self.columns.items()}
        self._weights = None if self._weights is None else self._weights.to(device)
        return self

    def pack(self, rows: np.ndarray | Sequence[int], *, labels: bool = False) -> dict[str, torch.Tensor | int]:
        """
        Packs some of the histories into one row, without padding.

        Args:
            rows: int [S], indices of the histories, none of them empty.
            labels (`bool`): whether to add `labels`, and the columns of the loss, `weights` and `basket_starts`.

        Returns:
            Arguments of the model, on the device of the columns: `input_ids` int64 [1, T], the other columns [1, T]
            (integers as int64), `cu_seq_lens_q` and `cu_seq_lens_k` int32 [S + 1], `max_length_q` and `max_length_k`
            (`int`) and, with `labels`, `labels` int64 [1, T]: the items, with −100 for the known events of each history, for
            `[PAD]` and `[UNK]`, and for events of weight 0.
        """
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        begins = ends - lengths
        # One small copy to the device instead of several of the size of the batch. `output_size` saves waiting for the
        # device, which would have to report the total.
        plan = np.stack([self.starts[rows] - begins, lengths, begins, begins + self.num_known[rows]])
        shifts, counts, firsts, first_targets = to_device(torch.from_numpy(plan), self.items.device)
        total = int(lengths.sum())
        places = torch.arange(total, device=self.items.device)
        events = places + torch.repeat_interleave(shifts, counts, output_size=total)
        batch: dict[str, torch.Tensor | int] = {}
        for name, values in self.columns.items():
            if name in _LOSS_COLUMNS and not labels:
                continue
            values = values[events][None]
            batch[name] = values if values.is_floating_point() or values.dtype == torch.bool else values.long()
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        batch["max_length_q"] = batch["max_length_k"] = int(lengths.max(initial=0))
        if labels:
            input_ids = batch["input_ids"][0]
            weights = None if self.weights is None else self.weights[events]
            targets = input_ids.masked_fill(~self._may_be_targets(input_ids, weights), IGNORE_INDEX)
            if (self.num_known[rows] == 1).all():
                targets = targets.index_fill(0, firsts, IGNORE_INDEX)
            else:
                known = places < torch.repeat_interleave(first_targets, counts, output_size=total)
                targets = targets.masked_fill(known, IGNORE_INDEX)
            batch["labels"] = targets[None]
        return batch

    def pad(
        self, rows: np.ndarray | Sequence[int], *, padding_side: Literal["right", "left"] = "right"
    ) -> dict[str, torch.Tensor]:
        """
        Pads some of the histories to the longest of them.

        Args:
            rows: int [B], indices of the histories.
            padding_side (`"right"` or `"left"`, defaults to `"right"`): where the padding goes.

        Returns:
            `input_ids` and the other columns [B, L], 0 at padding; `attention_mask` int64 [B, L], 0 at padding, else 1;
            `labels` int64 [B, L] as in [`~HistoryStore.pack`], −100 at padding.
        """
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        width = int(lengths.max(initial=0))
        packed = self.pack(rows[lengths > 0], labels=True)
        counts = torch.from_numpy(lengths)[:, None].to(self.items.device)
        column = torch.arange(width, device=self.items.device)
        mask = column < counts if padding_side == "right" else column >= width - counts
        batch = {"attention_mask": mask.long()}
        for name in (*self.columns, "labels"):
            padding = IGNORE_INDEX if name == "labels" else 0
            batch[name] = packed[name].new_full(mask.shape, padding).masked_scatter(mask, packed[name])
        return batch

    @staticmethod
    def _may_be_targets(items: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        targets = items >= NUM_SPECIAL_IDS
        return targets if weights is None else targets & (weights > 0)

    def _latest(self, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, lengths and known events of the latest `max_length` events of each history."""
        if max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        lengths = np.minimum(self.lengths, max_length)
        cut = self.lengths - lengths
        return self.starts + cut, lengths, self.num_known - cut

    def basket_begin(self, events: np.ndarray) -> np.ndarray:
        """int64: the index of the first event of the basket of each of `events`; the end of all events is its own."""
        if self._basket_begins is None:
            return events
        return self._basket_begins[np.searchsorted(self._basket_begins, events, side="right") - 1]

    def basket_end(self, events: np.ndarray) -> np.ndarray:
        """int64: the index behind the last event of the basket of each of `events`."""
        if self._basket_begins is None:
            return events + 1
        last = len(self._basket_begins) - 1
        return self._basket_begins[np.minimum(np.searchsorted(self._basket_begins, events, side="right"), last)]

    def _set_spans(self, starts: np.ndarray, lengths: np.ndarray, num_known: np.ndarray) -> None:
        self.starts, self.lengths = starts, lengths
        # An event without one before its basket can never be predicted.
        self.num_known = np.maximum(num_known, np.maximum(self.basket_end(starts) - starts, 1))
        self._num_targets: np.ndarray | None = None


def _basket_begins(basket_starts: torch.Tensor, offsets: np.ndarray) -> np.ndarray:
    """int64: the index of the first event of each basket, and the number of events. Every history begins a basket."""
    starts = np.append(basket_starts.numpy(), True)
    starts[offsets] = True
    return np.flatnonzero(starts)


def _check_weights(weights: np.ndarray) -> None:
    wrong = ~((weights >= 0) & np.isfinite(weights))
    if wrong.any():
        raise ValueError(f"`weights` has the value {weights[wrong][0]:g}; weights of events may be 0 or more.")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies without making the CPU wait for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _row_batches(rows: Dataset | Sequence[Mapping]) -> Iterator[Mapping[str, list]]:
    """Columns of some rows at a time: of many rows of a `datasets.Dataset`, else of one row."""
    if hasattr(rows, "iter"):
        return rows.iter(batch_size=1000)
    return ({name: [value] for name, value in row.items()} for row in rows)


def iterate_columns(rows: Dataset | Sequence[Mapping], *columns: str) -> Iterator[tuple]:
    """Yields the named columns of one row after the other."""
    for batch in _row_batches(rows):
        yield from zip(*(batch[column] for column in columns), strict=True)


def _join(name: str, lists: list, lengths: np.ndarray) -> np.ndarray:
    """The values of all events, of one list per history; `lengths` are those of the histories."""
    for row, (values, length) in enumerate(zip(lists, lengths)):
        found = f"{len(values)} values" if hasattr(values, "__len__") else f"{values!r:.80}"
        if found != f"{length} values":
            raise ValueError(f"`{name}` has {found} in row {row}, which has {length} events; give one value each.")
    arrays = [np.asarray(values) for values in lists if len(values)]
    joined = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    if joined.dtype.kind not in "biuf":
        raise ValueError(f"`{name}` has values of {joined.dtype}; give numbers, such as times in whole seconds.")
    return joined


def _as_ids(row: int, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.int32 and array.ndim == 1:
        return array
    ids = array.astype(np.int32) if array.dtype.kind in "iu" or array.shape == (0,) else None
    if ids is None or array.ndim != 1 or (ids != array).any():
        raise ValueError(
            f"`input_ids` is {values!r:.80} in row {row}; it must be one list of vocabulary ids, integers."
        )
    return ids


def concatenate(lists: Iterable[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lists end to end as int32, and int64 offsets that begin with 0 and end with the total."""
    arrays = [_as_ids(row, values) for row, values in enumerate(lists)]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, dtype=np.int32), *arrays]), offsets
