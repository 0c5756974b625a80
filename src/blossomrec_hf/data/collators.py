"""Collators: rows of a split -> one packed or padded batch for the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


IGNORE = -100
NUM_SPECIAL = 2  # [PAD] and [UNK] are no targets


def _histories(rows: Sequence[Any], max_length: int | None) -> list[np.ndarray]:
    histories = [np.asarray(row["input_ids"] if isinstance(row, dict) else row, dtype=np.int64) for row in rows]
    return histories if max_length is None else [history[-max_length:] for history in histories]


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it may be 1 or more, or None for all.")


class PackingCollator:
    """
    Lays histories end to end, without padding; the names are those of `transformers`' padding-free collator.

    A batch is `input_ids` and `position_ids` (int64 [1, T]; positions restart at 0 in each history), `labels` (int64
    [1, T], unshifted; −100 where a history begins and at `[PAD]`/`[UNK]`), `cu_seq_lens_q` and `cu_seq_lens_k` (int32
    [histories + 1]), `max_length_q` and `max_length_k` (`int`).

    Args:
        max_length (`int`, *optional*): each history's latest so many items.

    Raises:
        `ValueError`: no history with an item among the rows.
    """

    def __init__(self, max_length: int | None = None) -> None:
        _check_max_length(max_length)
        self.max_length = max_length

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        histories = [history for history in _histories(rows, self.max_length) if history.size]
        if not histories:
            raise ValueError("rows holds no history with an item; leave empty histories out before packing.")
        lengths = np.array([history.size for history in histories])
        ends = np.cumsum(lengths)
        ids = np.concatenate(histories)
        positions = np.arange(ids.size) - np.repeat(ends - lengths, lengths)
        labels = np.where((ids < NUM_SPECIAL) | (positions == 0), IGNORE, ids)
        offsets = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "labels": torch.from_numpy(labels)[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
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
        histories = _histories(rows, self.max_length)
        width = max((history.size for history in histories), default=0)
        ids = np.zeros((len(histories), width), np.int64)
        mask = np.zeros_like(ids)
        labels = np.full_like(ids, IGNORE)
        for row, history in enumerate(histories):
            start = 0 if self.padding_side == "right" else width - history.size
            place = slice(start, start + history.size)
            ids[row, place] = history
            mask[row, place] = 1
            labels[row, place] = np.where(history < NUM_SPECIAL, IGNORE, history)
            labels[row, start : start + 1] = IGNORE
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
