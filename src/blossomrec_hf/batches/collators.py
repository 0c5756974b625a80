"""Collators: some rows -> one packed or padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..model.ids_blossomrec import IGNORE_INDEX
from .histories import HistoryStore


class PackingCollator:
    """
    Lays histories end to end, without padding; the names are those of `transformers`' padding-free collator.

    A batch has `input_ids`, `position_ids` (restarting at 0 in each history) and `labels` (unshifted; −100 for a history's
    first event or, in rows with `basket_starts`, first basket; a row's first `num_known` events; `[PAD]`, `[UNK]`, and
    events of weight 0), all int64 [1, T], the columns named in `columns` and what the loss needs of `basket_starts` and
    `weights` [1, T], `cu_seq_lens_q` and `cu_seq_lens_k` (int32 [histories + 1]),
    `max_length_q` and `max_length_k` (`int`).

    With `max_tokens`, every batch has the same T: the remainder is filled with histories of `[PAD]` without targets, and
    `max_length_q` is constant too, so that compiled graphs are reused. A batch of no rows is then filled completely: it
    gives every parameter a gradient and adds nothing to the loss.

    A plain `transformers.Trainer` needs `remove_unused_columns=False` for views of [`split`], which make their columns from
    stored ones. `SequentialRecommendationTrainer` sets it.

    Args:
        max_length (`int`, *optional*): number of latest events of each history; by default, all.
        max_tokens (`int`, *optional*): T of every batch.
        columns: other columns of the rows, one value per event, such as `timestamps`.

    Raises:
        ValueError: if the rows have more than `max_tokens` events or, without `max_tokens`, no event.
    """

    def __init__(
        self, max_length: int | None = None, *, max_tokens: int | None = None, columns: Sequence[str] = ()
    ) -> None:
        _check_arguments(max_length, columns)
        self.max_length, self.max_tokens, self.columns = max_length, max_tokens, tuple(columns)

    def __call__(self, rows: Sequence[Mapping[str, Any]] | HistoryStore) -> dict[str, torch.Tensor | int]:
        histories = HistoryStore.from_rows(rows, columns=self.columns, max_length=self.max_length)
        total = int(histories.lengths.sum())
        if self.max_tokens is not None and total > self.max_tokens:
            raise ValueError(f"rows have {total} events, but max_tokens is {self.max_tokens}; use TokenBudgetSampler.")
        if self.max_tokens is None and not total:
            raise ValueError("rows has no history with an event; drop empty histories, or give max_tokens.")
        batch = histories.pack(np.flatnonzero(histories.lengths), labels=True)
        if self.max_tokens is not None:
            longest = min(self.max_length or self.max_tokens, self.max_tokens)
            batch = _fill(batch, self.max_tokens, longest)
        offsets = batch["cu_seq_lens_q"].long()
        begins = offsets[:-1].repeat_interleave(offsets.diff())
        batch["position_ids"] = (torch.arange(len(begins), device=begins.device) - begins)[None]
        return batch


class PaddingCollator:
    """
    Pads histories to the longest of the batch: `input_ids`, `attention_mask`, `labels` and the columns named in `columns`,
    [B, L]; see [`HistoryStore.pad`] and, for the labels, [`PackingCollator`].

    Args:
        max_length (`int`, *optional*): number of latest events of each history; by default, all.
        padding_side (`"right"` or `"left"`, defaults to `"right"`): where the padding goes; the model gives the same output.
        columns: other columns of the rows, one value per event, such as `timestamps`.
    """

    def __init__(
        self,
        max_length: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        *,
        columns: Sequence[str] = (),
    ) -> None:
        _check_arguments(max_length, columns)
        if padding_side not in ("right", "left"):
            raise ValueError(f'padding_side is {padding_side!r}; it may be "right" or "left".')
        self.max_length, self.padding_side, self.columns = max_length, padding_side, tuple(columns)

    def __call__(self, rows: Sequence[Mapping[str, Any]] | HistoryStore) -> dict[str, torch.Tensor]:
        histories = HistoryStore.from_rows(rows, columns=self.columns, max_length=self.max_length)
        return histories.pad(np.arange(len(histories)), padding_side=self.padding_side)


def _check_arguments(max_length: int | None, columns: Sequence[str]) -> None:
    if isinstance(columns, str):
        raise ValueError(f"columns is {columns!r}; it must be a list of names, such as [{columns!r}].")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it may be 1 or more, or None for all.")


def _fill(batch: dict[str, torch.Tensor | int], num_tokens: int, longest: int) -> dict[str, torch.Tensor | int]:
    """Fills a packed batch with `[PAD]` to `num_tokens` positions, as histories of up to `longest` without targets."""
    total = batch["input_ids"].shape[1]
    filled = {}
    for name, values in batch.items():
        if torch.is_tensor(values) and values.dim() == 2:
            padding = IGNORE_INDEX if name == "labels" else 0
            filled[name] = torch.cat([values, values.new_full((1, num_tokens - total), padding)], 1)
    offsets = batch["cu_seq_lens_q"]
    ends = torch.arange(total, num_tokens, longest, device=offsets.device) + longest
    offsets = torch.cat([offsets, ends.clamp(max=num_tokens).int()])
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {**filled, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, **lengths}
