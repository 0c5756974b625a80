"""
BlossomRec's attention written for the eye: dense masks over all pairs of queries and keys, O(T²). This file is the
reference that every other implementation is tested against; nothing here is fast, and nothing should be.

Conventions of all ops files. Keys lie in token-major rows: `k` and `v` are `[N, G, d]` (rotary embeddings applied), and
`first` `[S]` is the row of each history's position 0. A batch of packed histories and a cache differ in `first` alone.
Queries are `[Q, H, d]`, each given by its history and its position there: all positions, the last ones or appended
events are the same functions with other queries. Every position, window and block is counted inside its own history.
The functions of this file also accept leading batch dimensions of `q`, `k` and `v`: `[…, Q, H, d]`, `[…, N, G, d]`.
Streams and steps in parentheses are those of the paper, arXiv 2512.13368.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Queries(NamedTuple):
    """
    The places of queries, sorted by history. Windows and blocks are given in the same way, by their last positions.

    Attributes:
        history (`torch.LongTensor` `[Q]`): the history of each query.
        position (`torch.LongTensor` `[Q]`): its place in that history.
        max_length (`int`): an upper bound of all lengths; greater than every position.
        most (`int`): an upper bound of the number of queries of one history.
        every (`bool`): whether the queries are all positions of packed histories, in the order of the keys.
    """

    history: torch.Tensor
    position: torch.Tensor
    max_length: int
    most: int
    every: bool = False


class Keys(NamedTuple):
    """
    Keys and values of histories.

    Attributes:
        k, v (`torch.Tensor` `[N, G, d]`): rows of keys (rotary embedding applied) and of values.
        first (`torch.LongTensor` `[S]`): the row of each history's position 0.
        states (`torch.Tensor` `[N, G, 2·d]`, *optional*): keys and values side by side, if `k` and `v` are its halves.
    """

    k: torch.Tensor
    v: torch.Tensor
    first: torch.Tensor
    states: torch.Tensor | None = None


class Blocks(NamedTuple):
    """
    What a stream has computed of complete blocks.

    Attributes:
        rows (`torch.Tensor` `[M, G, width]`): one row for each block.
        first (`torch.LongTensor` `[S]`): the row of each history's block 0.
    """

    rows: torch.Tensor
    first: torch.Tensor


class Selection(NamedTuple):
    """
    What the long-term stream selected.

    Attributes:
        block_indices (`torch.LongTensor` `[Q, G, k]`): the selected blocks of each query and key/value head, counted
            inside the history, the most important first; −1 where fewer than k were selected.
        importance (`torch.Tensor` `[Q, G, k]`): their probabilities π (0 where nothing was selected).
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
    attend_places: Callable


def locate(first: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The history of each of `num_rows` rows, and its place inside that history, both `[num_rows]`; `first` `[S]` is the
    row of each history's place 0.
    """
    row = torch.arange(num_rows, device=first.device)
    if first.shape[0] == 1:
        return torch.zeros_like(row), row
    # One more element in front: Inductor of PyTorch 2.11 cannot search in a slice, which `first` often is.
    history = torch.searchsorted(nn.functional.pad(first, (1, 0)), row, right=True) - 2
    return history, row - first[history]


def every_position(cu_seqlens: torch.Tensor, num_tokens: int, max_length: int) -> Queries:
    """All positions of packed histories; `cu_seqlens` `[S + 1]` are their offsets, `num_tokens` the last of these."""
    return Queries(*locate(cu_seqlens[:-1], num_tokens), max_length, max_length, every=True)


def last_positions(cu_seqlens: torch.Tensor, max_length: int) -> Queries:
    """The last position of each packed history; of an empty one, position 0."""
    history = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return Queries(history, (cu_seqlens.diff() - 1).clamp(min=0), max_length, 1)


def complete_blocks(cu_seqlens: torch.Tensor, num_tokens: int, size: int) -> tuple[Queries, torch.Tensor]:
    """
    The complete blocks of `size` positions of packed histories, end to end, and the first block `[S]` of each history.
    There are `num_tokens // size` of them; those after the last complete one mean nothing.
    """
    number = torch.div(cu_seqlens.diff(), size, rounding_mode="floor")
    first = nn.functional.pad(number.cumsum(0)[:-1], (1, 0))
    history, block = locate(first, num_tokens // size)
    return Queries(history, (block + 1) * size - 1, num_tokens, num_tokens // size), first


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[…, heads, T, d]` by `cos` and `sin` `[1, T, d]`, in float32 or better."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


def power_law_distances(
    num_blocks: int, window: int, base: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The block distances below `num_blocks` that the short-term stream attends to, ascending."""
    near, powers, power = min(window, num_blocks), [], 1
    while power < num_blocks:
        if power >= near:
            powers.append(power)
        power *= base
    if device is None or torch.device(device).type == "cpu":
        return torch.tensor([*range(near), *powers], dtype=torch.long)
    # For a list that is copied to a GPU, the CPU waits.
    far = powers[0] * base ** torch.arange(len(powers), device=device) if powers else torch.arange(0, device=device)
    return torch.cat([torch.arange(near, device=device), far])


def compress(k: torch.Tensor, compressor: nn.Module, windows: Queries, first: torch.Tensor) -> torch.Tensor:
    """
    Compressed keys `[W, G, d]` of windows (long-term stream, split and compress).

    Args:
        k: keys `[N, G, d]`.
        compressor: maps windows `[..., G, l, d]` to `[..., G, d]`; `compressor.position` `[G, l, d]` is the learned
            position inside a window, which covers the l positions up to its last one. Keys before the start are 0.
        windows: their histories and last positions.
        first: the row of each history's position 0, `[S]`.
    """
    place = windows.position[:, None] + torch.arange(1 - compressor.position.shape[1], 1, device=k.device)  # [W, l]
    row = (first[windows.history, None] + place).clamp(0, max(k.shape[-3] - 1, 0))
    keys = k[..., row, :, :].masked_fill((place < 0)[..., None, None], 0.0)
    return compressor(keys.transpose(-3, -2))


def select(
    q: torch.Tensor,
    blocks: Blocks,
    queries: Queries,
    *,
    num_selected_blocks: int,
    block_size: int,
    threshold: float,
    scaling: float,
) -> Selection:
    """
    The most important past blocks of every query (long-term stream, score and select).

    Args:
        q: queries `[Q, H, d]`.
        blocks: for each block, the mean of its compressed keys, `[M, G, d]` in float32 or better: the importance of a
            block, a mean over its windows, is linear in them.
        threshold: β; a block with π ≤ β is dropped.
        scaling: 1/√d.
    """
    q = q.to(blocks.rows.dtype).unflatten(-2, (blocks.rows.shape[-2], -1))
    importance = torch.einsum("...qghd,...mgd->...qghm", q, blocks.rows).mul(scaling).mean(-2)
    history, block = locate(blocks.first, blocks.rows.shape[-3])
    own = torch.div(queries.position, block_size, rounding_mode="floor")
    candidate = (history == queries.history[:, None]) & (block < own[:, None])
    importance = importance.masked_fill(~candidate[:, None], -torch.inf)
    norm = nn.functional.pad(importance, (0, 1), value=-1000.0).logsumexp(-1, keepdim=True)

    # Columns of no block, so that there are always enough to choose from.
    left = nn.functional.pad(importance, (0, num_selected_blocks), value=-torch.inf)
    block = nn.functional.pad(block, (0, num_selected_blocks))
    scores, chosen = [], []
    for _ in range(num_selected_blocks):
        score, best = left.max(-1, keepdim=True)  # the first of equals: ties to the lower block
        scores.append(score)
        chosen.append(best)
        left = left.scatter(-1, best, -torch.inf)
    pi = (torch.cat(scores, -1) - norm).exp()
    kept = pi > threshold
    return Selection(torch.where(kept, block[torch.cat(chosen, -1)], -1), torch.where(kept, pi, 0.0))


def straight_through(importance: torch.Tensor) -> torch.Tensor:
    """The factor f = π + stop_gradient(1 − π): one in value, with the gradient of π."""
    return importance + (1 - importance).detach()


def selected_mask(
    block_indices: torch.Tensor, queries: Queries, position: torch.Tensor, *, block_size: int
) -> torch.Tensor:
    """
    The places that the long-term stream sees: the selected blocks and the own one up to the query, `[Q, G, N]`.

    Args:
        block_indices: `[Q, G, k]`, −1 for none.
        position: `[N]`, places in the query's history.
    """
    block = torch.div(position, block_size, rounding_mode="floor")
    own = torch.div(queries.position, block_size, rounding_mode="floor")
    mask = (own[:, None] == block)[:, None]
    for i in range(block_indices.shape[-1]):
        mask = mask | (block_indices[..., i, None] == block)
    return mask & full_mask(queries, position)


def short_mask(queries: Queries, position: torch.Tensor, *, block_size: int, window: int, base: int) -> torch.Tensor:
    """The places that the short-term stream sees, `[Q, 1, N]` of `position` `[N]`."""
    distances = power_law_distances(queries.max_length, window, base, position.device)
    visible = (torch.arange(position.shape[0], device=position.device)[:, None] == distances).any(1)  # by distance
    block = torch.div(position, block_size, rounding_mode="floor")
    own = torch.div(queries.position, block_size, rounding_mode="floor")
    return visible[(own[:, None] - block).clamp(min=0)][:, None] & full_mask(queries, position)


def full_mask(queries: Queries, position: torch.Tensor) -> torch.Tensor:
    """The places up to the query, `[Q, 1, N]` of `position` `[N]`."""
    return (position <= queries.position[:, None])[:, None]


def attend_selected(
    q: torch.Tensor,
    keys: Keys,
    queries: Queries,
    block_indices: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    block_size: int,
    scaling: float,
) -> torch.Tensor:
    """
    Attention over the selected blocks and the own block up to the query (long-term stream, attend), `[Q, H, d]`.

    Args:
        block_indices: `[Q, G, k]`, −1 for none.
        factor: `[Q, G, k]`, multiplies the logits of a selected block's keys. It is one in value (`straight_through`),
            and other implementations compute its gradient alone; `None` for no gradient.
    """
    _, position = locate(keys.first, keys.k.shape[-3])
    weight = None
    if factor is not None:
        chosen = block_indices[..., None] == torch.div(position, block_size, rounding_mode="floor")  # [Q, G, k, N]
        weight = torch.where(chosen, factor[..., None], 1.0).prod(-2)  # a block is chosen once at most
    mask = selected_mask(block_indices, queries, position, block_size=block_size)
    return _attend(q, keys, queries, mask, scaling, weight)


def attend_short(
    q: torch.Tensor, keys: Keys, queries: Queries, *, block_size: int, window: int, base: int, scaling: float
) -> torch.Tensor:
    """
    Attention over short-term blocks at a distance below `window` or at a power of `base` (short-term stream),
    `[Q, H, d]`.
    """
    _, position = locate(keys.first, keys.k.shape[-3])
    mask = short_mask(queries, position, block_size=block_size, window=window, base=base)
    return _attend(q, keys, queries, mask, scaling)


def attend_full(q: torch.Tensor, keys: Keys, queries: Queries, *, scaling: float) -> torch.Tensor:
    """Causal attention over the whole history, `[Q, H, d]`."""
    _, position = locate(keys.first, keys.k.shape[-3])
    return _attend(q, keys, queries, full_mask(queries, position), scaling)


def attend_places(
    q: torch.Tensor, keys: Keys, queries: Queries, place: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """
    Attention to given places of the history, `[Q, H, d]`: the generic form of a stream.

    Args:
        place: `[Q, G or 1, K]`, all different; those below 0 or behind the query are ignored, and at least one is left.
    """
    _, position = locate(keys.first, keys.k.shape[-3])
    mask = (place[..., None] == position).any(-2) & full_mask(queries, position)
    return _attend(q, keys, queries, mask, scaling)


def _attend(
    q: torch.Tensor,
    keys: Keys,
    queries: Queries,
    mask: torch.Tensor,
    scaling: float,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention to the rows of the query's history where `mask` `[Q, G or 1, N]` is set; `weight` `[Q, G, N]`
    multiplies the logits.
    """
    history, _ = locate(keys.first, keys.k.shape[-3])
    mask = mask & (history == queries.history[:, None])[:, None]
    logits = torch.einsum("...qghd,...ngd->...qghn", q.unflatten(-2, (keys.k.shape[-2], -1)), keys.k)
    logits = logits * scaling
    if weight is not None:
        logits = logits * weight[..., None, :]
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    # Finite: the output of an empty history, which no one reads, has gradients.
    logits = logits.masked_fill(~mask[..., None, :], torch.finfo(logits.dtype).min)
    probs = logits.softmax(-1).to(keys.v.dtype)
    return torch.einsum("...qghn,...ngd->...qghd", probs, keys.v).flatten(-3, -2)


REFERENCE_OPS = Ops(compress, select, attend_selected, attend_short, attend_full, attend_places)
