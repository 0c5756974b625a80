"""Collators: rows of a split -> one packed or padded batch for the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..model.ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS


def _histories(rows: Sequence[Any], max_length: int | None) -> tuple[list[np.ndarray], list[int]]:
    """The items of each row, and how many of its first items are no targets: the first has nothing before it."""
    histories, known = [], []
    for row in rows:
        items = np.asarray(row["input_ids"], dtype=np.int64)
        cut = 0 if max_length is None else max(items.size - max_length, 0)
        histories.append(items[cut:])
        known.append(max(row.get("num_known", 1) - cut, 1))
    return histories, known


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it may be 1 or more, or None for all.")


class PackingCollator:
    """
    Lays histories end to end, without padding; the names are those of `transformers`' padding-free collator.

    A batch is `input_ids` and `position_ids` (int64 [1, T]; positions restart at 0 in each history), `labels` (int64
    [1, T], unshifted; −100 where a history begins, at a row's first `num_known` items and at `[PAD]`/`[UNK]`),
    `cu_seq_lens_q` and `cu_seq_lens_k` (int32 [histories + 1]), `max_length_q` and `max_length_k` (`int`).

    With `max_tokens` every batch has the same T: what the rows leave open is filled with `[PAD]` as histories of its
    own without targets, and `max_length_q` is the same number each time too (that of `max_length`, if given), so that
    compiled graphs hold. No rows at all then give a batch of nothing but fill: it runs every parameter, and adds
    nothing to the loss.

    Args:
        max_length (`int`, *optional*): each history's latest so many items.
        max_tokens (`int`, *optional*): T.

    Raises:
        `ValueError`: rows with more than `max_tokens` items, or, without `max_tokens`, no item in any row.
    """

    def __init__(self, max_length: int | None = None, *, max_tokens: int | None = None) -> None:
        _check_max_length(max_length)
        self.max_length, self.max_tokens = max_length, max_tokens

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        histories, known = _histories(rows, self.max_length)
        total = sum(history.size for history in histories)
        longest = max((history.size for history in histories), default=0)
        if self.max_tokens is not None:
            if total > self.max_tokens:
                raise ValueError(
                    f"rows hold {total} items, but max_tokens is {self.max_tokens}; use TokenBudgetSampler."
                )
            longest = min(self.max_length or self.max_tokens, self.max_tokens)
            while total < self.max_tokens:
                histories.append(np.zeros(min(longest, self.max_tokens - total), np.int64))
                known.append(1)
                total += histories[-1].size
        if not total:
            raise ValueError("rows holds no history with an item; leave empty histories out, or give max_tokens.")
        lengths = np.array([history.size for history in histories])
        known = np.array(known)[lengths > 0]
        lengths = lengths[lengths > 0]
        ends = np.cumsum(lengths)
        ids = np.concatenate(histories)
        positions = np.arange(total) - np.repeat(ends - lengths, lengths)
        labels = np.where((ids < NUM_SPECIAL_IDS) | (positions < np.repeat(known, lengths)), IGNORE_INDEX, ids)
        offsets = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": int(longest),
            "max_length_k": int(longest),
        }


class PaddingCollator:
    """
    Pads histories to the longest of the batch: `input_ids`, `attention_mask` and `labels`, int64 [B, L].

    `labels` follow the rule of [`PackingCollator`]; padding is −100 in them, 0 elsewhere.

    Args:
        max_length (`int`, *optional*): each history's latest so many items.
        padding_side (`"right"` or `"left"`): the model does not care.
    """

    def __init__(self, max_length: int | None = None, padding_side: str = "right") -> None:
        _check_max_length(max_length)
        if padding_side not in ("right", "left"):
            raise ValueError(f'padding_side is {padding_side!r}; it may be "right" or "left".')
        self.max_length, self.padding_side = max_length, padding_side

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        histories, known = _histories(rows, self.max_length)
        width = max((history.size for history in histories), default=0)
        ids = np.zeros((len(histories), width), np.int64)
        mask = np.zeros_like(ids)
        labels = np.full_like(ids, IGNORE_INDEX)
        for row, (history, first_target) in enumerate(zip(histories, known)):
            start = 0 if self.padding_side == "right" else width - history.size
            place = slice(start, start + history.size)
            ids[row, place] = history
            mask[row, place] = 1
            labels[row, place] = np.where(history < NUM_SPECIAL_IDS, IGNORE_INDEX, history)
            labels[row, start : start + first_target] = IGNORE_INDEX
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
