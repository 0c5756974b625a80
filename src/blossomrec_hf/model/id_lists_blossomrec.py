"""Vocabulary ids that are given as tensors, lists, or lists of different lengths."""

from collections.abc import Sequence
from typing import Any

import torch


def as_ids(name: str, ids: Any, padding: int, device: torch.device, vocab_size: int) -> torch.Tensor:
    """
    Vocabulary ids, given as a tensor, a list, or lists of different lengths, as int64 `[C]` or `[B, C]` with `padding`
    behind the shorter lists.

    Raises:
        ValueError: if an id is not a whole number, or is outside the vocabulary (`padding` itself is allowed).
    """
    if not isinstance(ids, torch.Tensor):
        ids = tensor_of_lists(name, ids, padding, device)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` has dtype {ids.dtype}; it must contain vocabulary ids, whole numbers.")
    ids = ids.to(device=device, dtype=torch.long)
    if ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < min(padding, 0) or high >= vocab_size:
            wrong = high if high >= vocab_size else low
            raise ValueError(
                f"`{name}` contains {wrong}; ids lie in 0 … {vocab_size - 1}"
                + (f" (or are {padding}, padding)." if padding < 0 else ".")
            )
    return ids


def as_id_list(ids: Any, device: torch.device, vocab_size: int) -> torch.Tensor:
    """
    Vocabulary ids as int64 `[N]`.

    Raises:
        ValueError: if `ids` is not one list of vocabulary ids.
    """
    ids = as_ids("ids", ids, 0, device, vocab_size)
    if ids.dim() != 1:
        raise ValueError(f"`ids` has shape {tuple(ids.shape)}; it must be one list of vocabulary ids.")
    return ids


def tensor_of_lists(
    name: str, ids: Any, padding: int, device: torch.device, kind: str = "vocabulary ids, whole numbers"
) -> torch.Tensor:
    """One list of numbers `[C]`, or lists or tensors of different lengths as `[B, longest]` on `device`."""
    if not hasattr(ids, "__iter__"):
        raise ValueError(f"`{name}` is {ids!r}; it must be a list or tensor of {kind}.")
    ids = list(ids)
    nested = any(isinstance(row, (Sequence, torch.Tensor)) or hasattr(row, "__array__") for row in ids)
    try:
        if not nested:
            return torch.as_tensor(ids) if ids else torch.empty(0, dtype=torch.long)
        rows = [torch.as_tensor(row) for row in ids]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must contain {kind}: {error}.") from error
    if all(row.dim() == 0 for row in rows):  # numbers of numpy
        return torch.stack([row.cpu() for row in rows])
    if any(row.dim() != 1 for row in rows):
        raise ValueError(f"`{name}` must be one list of {kind}, or one list a history.")
    rows = [row.long() if row.numel() == 0 else row for row in rows]
    for row in rows:
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise ValueError(f"`{name}` has dtype {row.dtype}; it must contain {kind}.")
    if len({row.dtype for row in rows}) > 1 or len({row.device for row in rows}) > 1:
        rows = [row.to(device=device, dtype=torch.long) for row in rows]
    # Padded on the device, so that no padding is copied there.
    flat = torch.cat(rows).to(device=device, dtype=torch.long)
    lengths = torch.tensor([row.shape[0] for row in rows], device=device)
    longest = max(row.shape[0] for row in rows)
    real = torch.arange(longest, device=device) < lengths[:, None]
    return flat.new_full(real.shape, padding).masked_scatter_(real, flat)
