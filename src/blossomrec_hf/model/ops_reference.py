"""
BlossomRec's attention written for the eye: dense masks over all pairs of packed positions, O(T²). This file is the
oracle that every other implementation is tested against; nothing here is fast, and nothing should be.

Conventions of all ops files. Histories lie end to end: `q` is `[T, H, d]`, `k` and `v` are `[T, G, d]` (rotary
embeddings applied), history i holds the rows `cu_seqlens[i] … cu_seqlens[i + 1] − 1`. Every position, window and
block is counted inside its own history. Section numbers are those of the paper, arXiv 2512.13368.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Selection(NamedTuple):
    """
    What the long-term stream selected.

    Attributes:
        block_indices (`torch.LongTensor` `[T, G, k]`): the selected blocks of each query and key/value head, counted
            inside the history, the most important first; −1 where fewer than k were selected.
        importance (`torch.Tensor` `[T, G, k]`): their probabilities π (0 where nothing was selected).
    """

    block_indices: torch.Tensor
    importance: torch.Tensor


class Ops(NamedTuple):
    """The functions that every ops file has; their contracts are the docstrings of this file."""

    compress: Callable
    select: Callable
    attend_selected: Callable
    attend_short: Callable
    attend_full: Callable


def locate(cu_seqlens: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The history of each packed position, and its place inside that history; both `[T]`."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    history = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return history, token - cu_seqlens[history]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[1, heads, T, d]` by `cos` and `sin` `[1, T, d]`, in float32 or better."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


def power_law_distances(num_blocks: int, window: int, base: int) -> list[int]:
    """The block distances below `num_blocks` that the short-term stream attends to, ascending."""
    distances = set(range(min(window, num_blocks)))
    power = 1
    while power < num_blocks:
        distances.add(power)
        power *= base
    return sorted(distances)


def compress(k: torch.Tensor, compressor: nn.Module, cu_seqlens: torch.Tensor, *, stride: int) -> torch.Tensor:
    """
    Compressed keys `[W, G, d]`, one a complete window, histories end to end (long-term stream, split and compress).

    Args:
        k: keys `[T, G, d]`.
        compressor: maps windows `[..., G, l, d]` to `[..., G, d]`; `compressor.position` `[G, l, d]` is the learned
            position inside a window.
        stride: s; window j ends at position (j + 1)·s − 1 and covers the l positions up to there.
    """
    length = compressor.position.shape[1]
    windows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        padded = torch.cat([k.new_zeros(length, *k.shape[1:]), k[start:end]])
        for j in range((end - start) // stride):
            last = length + (j + 1) * stride
            windows.append(compressor(padded[last - length : last].transpose(0, 1)))
    if not windows:  # the compressor still takes part, so that its gradients exist
        return compressor(k.new_zeros(0, *compressor.position.shape))
    return torch.stack(windows)


def select(
    q: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    num_selected_blocks: int,
    block_size: int,
    stride: int,
    threshold: float,
    scaling: float,
) -> Selection:
    """
    The most important past blocks of every query (long-term stream, score and select).

    Args:
        q: queries `[T, H, d]`.
        c: compressed keys `[W, G, d]` of `compress`.
        threshold: β; a block with π ≤ β is dropped.
        scaling: 1/√d.
    """
    num_tokens, num_groups = q.shape[0], c.shape[1]
    history, position = locate(cu_seqlens, num_tokens)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(1, (num_groups, -1))
    scores = torch.einsum("tghd,wgd->tghw", q, c.to(dtype)).mul(scaling).mean(2)

    # Pool the windows of each complete block; a history's leftover windows belong to no complete block.
    lengths = cu_seqlens.diff()
    windows_per_block = block_size // stride
    pooled, block_history, block_index = [], [], []
    first_window = 0
    for i, n in enumerate(lengths.tolist()):
        for m in range(n // block_size):
            window = first_window + m * windows_per_block
            pooled.append(scores[..., window : window + windows_per_block].mean(-1))
            block_history.append(i)
            block_index.append(m)
        first_window += n // stride
    importance = torch.stack(pooled, -1) if pooled else scores[..., :0]
    block_history = torch.tensor(block_history, device=q.device, dtype=torch.long)
    block_index = torch.tensor(block_index, device=q.device, dtype=torch.long)

    candidate = (block_history == history[:, None]) & (block_index < (position // block_size)[:, None])
    importance = importance.masked_fill(~candidate[:, None], -torch.inf)
    constant = (
        torch.full_like(importance[..., :1], -1000.0) if pooled else scores.new_full((*scores.shape[:2], 1), -1e3)
    )
    pi = torch.cat([importance, constant], -1).softmax(-1)[..., :-1]

    k = num_selected_blocks
    order = importance.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # stable: ties to the lower block
    order = nn.functional.pad(order, (0, k - order.shape[-1]), value=-1)
    kept_pi = pi.gather(-1, order.clamp(min=0)) if pooled else pi.new_zeros(order.shape) + scores.sum() * 0
    kept = (order >= 0) & (kept_pi > threshold)
    blocks = block_index[order.clamp(min=0)] if pooled else order
    return Selection(torch.where(kept, blocks, -1), torch.where(kept, kept_pi, 0.0))


def straight_through(importance: torch.Tensor) -> torch.Tensor:
    """The factor f = π + stop_gradient(1 − π): one in value, with the gradient of π."""
    return importance + (1 - importance).detach()


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    factor: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    block_size: int,
    scaling: float,
    return_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Attention over the selected blocks and the own block up to the query (long-term stream, attend).

    Args:
        block_indices: `[T, G, k]`, −1 for none.
        factor: `[T, G, k]`, multiplies the logits of a selected block's keys; `None` for one everywhere.

    Returns:
        `[T, H, d]`, and with `return_probs` the probabilities `[H, T, T]` too.
    """
    num_groups = k.shape[1]
    history, position = locate(cu_seqlens, q.shape[0])
    block = position // block_size
    same_history = history[:, None] == history
    own = same_history & (block[:, None] == block) & (position[:, None] >= position)
    chosen = block_indices[..., None] == block  # [T, G, k, T]
    chosen = chosen & same_history[:, None, None]
    mask = chosen.any(2) | own[:, None]  # [T, G, T]

    logits = torch.einsum("tghd,ugd->gtuh", q.unflatten(1, (num_groups, -1)), k) * scaling
    if factor is not None:
        weight = torch.where(chosen, factor[..., None], 0.0).sum(2) + torch.where(chosen.any(2), 0.0, 1.0)
        logits = logits * weight.transpose(0, 1)[..., None]
    return _attend(logits, mask.transpose(0, 1), v, return_probs)


def attend_short(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    block_size: int,
    window: int,
    base: int,
    scaling: float,
    return_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Attention over short-term blocks at a distance below `window` or at a power of `base` (short-term stream).

    Returns:
        `[T, H, d]`, and with `return_probs` the probabilities `[H, T, T]` too.
    """
    history, position = locate(cu_seqlens, q.shape[0])
    distance = position[:, None] // block_size - position // block_size
    distances = power_law_distances(max(max_seqlen, 1), window, base)
    mask = torch.isin(distance, torch.tensor(distances, device=q.device))
    mask = mask & (history[:, None] == history) & (position[:, None] >= position)
    logits = torch.einsum("tghd,ugd->gtuh", q.unflatten(1, (k.shape[1], -1)), k) * scaling
    return _attend(logits, mask[None], v, return_probs)


def attend_full(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    scaling: float,
    return_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the whole history. `[T, H, d]`, and with `return_probs` the probabilities too."""
    history, position = locate(cu_seqlens, q.shape[0])
    mask = (history[:, None] == history) & (position[:, None] >= position)
    logits = torch.einsum("tghd,ugd->gtuh", q.unflatten(1, (k.shape[1], -1)), k) * scaling
    return _attend(logits, mask[None], v, return_probs)


def _attend(logits: torch.Tensor, mask: torch.Tensor, v: torch.Tensor, return_probs: bool):
    """Softmax of `logits` `[G, T, T, H/G]` over the keys where `mask` `[G or 1, T, T]` is set."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probs = logits.to(dtype).masked_fill(~mask[..., None], -torch.inf).softmax(2)
    out = torch.einsum("gtuh,ugd->tghd", probs.to(v.dtype), v).flatten(1, 2)
    return (out, probs.permute(0, 3, 1, 2).flatten(0, 1)) if return_probs else out


REFERENCE_OPS = Ops(compress, select, attend_selected, attend_short, attend_full)
