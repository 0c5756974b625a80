"""
Attention of all positions of packed histories in tiles: the queries of a tile, which are any positions of one key/value
head, read the same few blocks of keys. The forward pass joins what a query has read in several tiles by their
log-sum-exps; the backward pass computes the probabilities again. Memory is linear in the number of tokens.

A query row is (token, key/value head): row token · G + group of the queries `[T·G, r·d]`, where r = H / G query heads
share a key/value head. A key row is (block, key/value head): row block · G + group. Logits are in base 2, since `exp2` is
fast for all numbers on a CPU.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from .ops_reference import Queries


# Logits that are computed at once. On a CPU they stay in the cache of a core.
SLICE_LOGITS = {"cpu": 2**17, "cuda": 2**25}

NEVER = -1e30  # the logit of a key that is not seen: finite, so that nothing becomes NaN
LOG2E = math.log2(math.e)


def reads_freely(x: torch.Tensor) -> bool:
    """Whether reading the values of tensors costs nothing: on a CPU, outside of a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]`, whose backward pass is an addition of whole rows; several times faster on a CPU."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


class Rows(NamedTuple):
    """Tokens laid out in rows of one block each, every history beginning a new row."""

    token: torch.Tensor  # [N, size]: the packed position in each slot; anything valid where the slot is empty
    block: torch.Tensor  # [N]: the block's index inside its history
    first: torch.Tensor  # [S]: the first row of each history

    def slots(self, queries: Queries) -> torch.Tensor:
        """The slots of positions, row · size + place in the row."""
        return self.first[queries.history] * self.token.shape[1] + queries.position


def lay_out_rows(cu_seqlens: torch.Tensor, num_tokens: int, size: int) -> Rows:
    """Rows of packed histories, as many as there may be at most."""
    num_histories = cu_seqlens.shape[0] - 1
    ends = torch.div(cu_seqlens.diff() + size - 1, size, rounding_mode="floor").cumsum(0)
    first = nn.functional.pad(ends, (1, 0))[:-1]
    row = torch.arange((num_tokens + num_histories * (size - 1)) // size, device=cu_seqlens.device)
    history = torch.searchsorted(ends, row, right=True).clamp(max=num_histories - 1)
    block = row - first[history]
    token = (cu_seqlens[history] + block * size)[:, None] + torch.arange(size, device=row.device)
    return Rows(token.clamp(max=num_tokens - 1), block, first)


class Tiles(NamedTuple):
    """
    Which queries read which keys.

    Attributes:
        query (`torch.LongTensor` `[n, C]`): the query row in each slot of a tile; any valid one where the slot is empty.
        empty (`torch.BoolTensor` `[n, C]`): the empty slots.
        keys (`torch.LongTensor` `[n, J]`): the key rows of a tile; −1 for none.
        slot (`torch.LongTensor` `[T·G, P]`): the slots that a query has, tile · C + place in the tile; n · C for none.
        num_own (`int`): the number of leading tiles whose first key row is the own block of their queries, which are its
            positions in order. There, a query sees the keys up to itself.
    """

    query: torch.Tensor
    empty: torch.Tensor
    keys: torch.Tensor
    slot: torch.Tensor
    num_own: int


def own_tiles(rows: Rows, queries: Queries, num_groups: int) -> Tiles:
    """The positions of every block, which read that block."""
    (num_rows, size), slots = rows.token.shape, rows.slots(queries)
    group = torch.arange(num_groups, device=slots.device)
    token = slots.new_zeros(num_rows * size).index_copy_(0, slots, torch.arange(len(slots), device=slots.device))
    empty = torch.ones_like(token, dtype=torch.bool).index_fill_(0, slots, False)
    query = token.view(num_rows, 1, size) * num_groups + group[:, None]
    empty = empty.view(num_rows, 1, size).expand_as(query)
    row = torch.div(slots, size, rounding_mode="floor")
    slot = (row[:, None] * num_groups + group) * size + (slots - row * size)[:, None]
    keys = torch.arange(num_rows * num_groups, device=slots.device)[:, None]
    return Tiles(query.flatten(0, 1), empty.flatten(0, 1), keys, slot.view(-1, 1), num_rows * num_groups)


def selected_tiles(rows: Rows, queries: Queries, block_indices: torch.Tensor) -> Tiles:
    """
    The tiles of own blocks, then those of pairs of a query and a selected block: the queries that selected a block are
    dealt out to tiles of as many queries as a block has positions.

    Args:
        block_indices: `[T, G, k]`, −1 for none.
    """
    (num_rows, size), (num_tokens, num_groups, k) = rows.token.shape, block_indices.shape
    own, device = own_tiles(rows, queries, num_groups), block_indices.device
    num_keys = num_rows * num_groups
    key = (rows.first[queries.history][:, None, None] + block_indices) * num_groups
    key = key + torch.arange(num_groups, device=device)[:, None]
    key, pair = torch.where(block_indices < 0, num_keys, key).flatten().sort(stable=True)
    ends = torch.searchsorted(key, torch.arange(num_keys, device=device), right=True)  # behind the pairs of a key row
    counts = ends.diff(prepend=ends.new_zeros(1))
    tile_ends = torch.div(counts + size - 1, size, rounding_mode="floor").cumsum(0)
    if reads_freely(key):
        num_tiles = int(tile_ends[-1])
    else:
        num_tiles = num_tokens * num_groups * k // size + num_keys
    tile_key = torch.searchsorted(tile_ends, torch.arange(num_tiles, device=device), right=True)
    none = (num_keys + num_tiles) * size
    # Pairs of a key row follow one another from the first slot of its first tile on.
    begin = num_keys * size + nn.functional.pad(tile_ends, (1, 0))[:-1] * size - (ends - counts)
    slot = begin[key.clamp(max=num_keys - 1)] + torch.arange(len(key), device=device)
    slot = torch.where(key < num_keys, slot, none)

    query = nn.functional.pad(own.query.flatten(), (0, num_tiles * size + 1))
    query = query.index_copy_(0, slot, torch.div(pair, k, rounding_mode="floor"))[:-1]
    empty = nn.functional.pad(own.empty.flatten(), (0, num_tiles * size + 1), value=True)
    empty = empty.index_fill_(0, slot, False)[:-1]
    keys = torch.cat([own.keys, tile_key.clamp(max=num_keys - 1)[:, None]])
    slot = torch.empty_like(slot).index_copy_(0, pair, slot).view(-1, k)
    return Tiles(query.view(-1, size), empty.view(-1, size), keys, torch.cat([slot, own.slot], 1), num_keys)


def distant_tiles(rows: Rows, queries: Queries, num_groups: int, distances: torch.Tensor) -> Tiles:
    """The positions of every block, which read the blocks at `distances` `[J]` before it; the first one is 0."""
    row = torch.arange(rows.block.shape[0], device=distances.device)[:, None]
    keys = (row - distances) * num_groups + torch.arange(num_groups, device=row.device)[:, None, None]
    keys = torch.where(rows.block[:, None] >= distances, keys, -1).transpose(0, 1)
    return own_tiles(rows, queries, num_groups)._replace(keys=keys.flatten(0, 1))


def attend_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    queries: Queries,
    tiles: Tiles,
    scaling: float,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention of all positions over the keys of their tiles, `[T, H, d]`.

    Args:
        q: `[T, H, d]`; `k` and `v`: `[T, G, d]`.
        rows: blocks of keys.
        factor: `[T, G, P − 1]`, one in value, multiplies the logits of all slots but the last one.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    out = _AttendTiles.apply(q, k, v, factor, rows.token, rows.slots(queries), *tiles, scaling)
    return out.to(dtype)


class _AttendTiles(torch.autograd.Function):
    """`attend_tiles` in float32 or better, with its backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, factor, token, place, query, empty, keys, slot, num_own, scaling):
        num_groups, width = k.shape[1:]
        r, size = q.shape[1] // num_groups, token.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            q = (q * (scaling * LOG2E)).reshape(-1, r * width)
            k, v = (gather(x, token).transpose(1, 2).reshape(-1, size * width) for x in (k, v))
            key = torch.arange(size, device=q.device)
            causal = (key[:, None] > key).to(q.dtype).repeat_interleave(r, 1) * NEVER  # [keys, queries · r]
            compute = _Slices(query, keys, num_own, causal, width)
            out, lse = compute.forward(q, k, v)
            out, lse = _join(out, lse, slot, width)
            out = out.view(-1, num_groups * r, width)
        ctx.save_for_backward(q, k, v, out, lse, causal, place, query, empty, keys, slot)
        ctx.num_own, ctx.scaling, ctx.with_factor = num_own, scaling, factor is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, causal, place, query, empty, keys, slot = ctx.saved_tensors
        num_tokens, heads, width = out.shape
        r, size = q.shape[1] // width, causal.shape[0]
        num_groups = heads // r
        with torch.autocast(q.device.type, enabled=False):
            delta = (grad * out).sum(-1).view(-1, r)
            grad = grad.reshape(-1, r * width)
            compute = _Slices(query, keys, ctx.num_own, causal, width)
            grads, grad_k, grad_v, of_factor = compute.backward(q, k, v, grad, lse, delta, empty, ctx.with_factor)
            grad_q = _sum_slots(grads, slot).mul_(ctx.scaling).view(num_tokens, heads, width)
            grad_k, grad_v = (
                x.view(-1, num_groups, size, width).transpose(1, 2).flatten(0, 1)[place] for x in (grad_k, grad_v)
            )
            if of_factor is not None:
                of_factor = gather(of_factor, slot[:, :-1]).view(num_tokens, num_groups, -1) / LOG2E
        return grad_q, grad_k / LOG2E, grad_v, of_factor, *[None] * 8


class _Slices(NamedTuple):
    """The computation of tiles, a slice of them at a time."""

    query: torch.Tensor
    keys: torch.Tensor
    num_own: int
    causal: torch.Tensor
    width: int

    def bounds(self) -> list[tuple[int, int]]:
        num_tiles = self.query.shape[0]
        if torch.compiler.is_compiling():  # a graph of its own for every number of slices would be compiled
            return [(0, num_tiles)]
        logits = self.causal.numel() * self.keys.shape[1]
        length = max(1, SLICE_LOGITS.get(self.causal.device.type, 2**25) // logits)
        return [(i, min(i + length, num_tiles)) for i in range(0, num_tiles, length)]

    def logits(self, q: torch.Tensor, k: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """Logits `[n, keys, C·r]` of tiles, their queries `[n, C·r, d]`, keys `[n, keys, d]`, and both rows, flat."""
        query, keys = self.query[begin:end].flatten(), self.keys[begin:end]
        row = keys.flatten() if keys.shape[1] == 1 else keys.flatten().clamp(min=0)
        q = q.index_select(0, query).view(end - begin, -1, self.width)
        k = k.index_select(0, row).view(end - begin, -1, self.width)
        logits = torch.bmm(k, q.mT)
        if keys.shape[1] > 1:
            absent = (keys < 0).to(logits.dtype)
            logits.unflatten(1, (keys.shape[1], -1)).add_(absent[..., None, None], alpha=NEVER)
        if begin < self.num_own:
            logits[: self.num_own - begin, : self.causal.shape[0]] += self.causal
        return logits, q, k, query, row

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[n·C + 1, r·d]` and log-sum-exps `[n·C + 1, r]` of the slots; the last row is that of no slot."""
        (num_tiles, size), r = self.query.shape, q.shape[1] // self.width
        out, lse = q.new_empty(num_tiles * size + 1, r * self.width), q.new_empty(num_tiles * size + 1, r)
        for begin, end in self.bounds():
            logits, _, _, _, row = self.logits(q, k, begin, end)
            top = logits.amax(1, keepdim=True)
            probs = logits.sub_(top).exp2_()
            total = probs.sum(1, keepdim=True)
            values = v.index_select(0, row).view(end - begin, -1, self.width)
            slots = slice(begin * size, end * size)
            out[slots].view(end - begin, -1, self.width).baddbmm_(probs.div_(total).mT, values, beta=0)
            lse[slots].view_as(top).copy_(top.add_(total.log2_()))
        # A number that is assigned becomes a tensor on the CPU when it is compiled, which a CUDA graph refuses to copy.
        out[-1].zero_()
        lse[-1].fill_(NEVER)
        return out, lse

    def backward(self, q, k, v, grad, lse, delta, empty, with_factor: bool):
        """Gradients of the queries of all slots `[n·C + 1, r·d]`, of `k`, `v`, and of factors of the slots `[n·C + 1]`."""
        (num_tiles, size), grad_k, grad_v = self.query.shape, torch.zeros_like(k), torch.zeros_like(v)
        grad_q = q.new_empty(num_tiles * size + 1, q.shape[1])
        of_factor = q.new_zeros(num_tiles * size + 1) if with_factor else None
        for begin, end in self.bounds():
            logits, queries, keys, query, row = self.logits(q, k, begin, end)
            total = lse.index_select(0, query).sub_(empty[begin:end].flatten()[:, None].to(q.dtype), alpha=NEVER)
            probs = logits.sub_(total.view(end - begin, 1, -1)).exp2_()  # 0 in empty slots
            grads = grad.index_select(0, query).view_as(queries)
            of_logits = torch.bmm(v.index_select(0, row).view_as(keys), grads.mT)
            of_logits.sub_(delta.index_select(0, query).view(end - begin, 1, -1)).mul_(probs)
            grad_v.index_add_(0, row, torch.bmm(probs, grads).view(-1, v.shape[1]))
            grad_k.index_add_(0, row, torch.bmm(of_logits, queries).view(-1, k.shape[1]))
            slots = slice(begin * size, end * size)
            of_queries = grad_q[slots].view_as(queries).baddbmm_(of_logits.mT, keys, beta=0)
            if with_factor:
                of_factor[slots] = (of_queries * queries).view(-1, q.shape[1]).sum(1)
        grad_q[-1].zero_()
        return grad_q, grad_k, grad_v, of_factor


def _join(out: torch.Tensor, lse: torch.Tensor, slot: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[T·G, r·d]` and log-sum-exps `[T·G, r]` over all slots of each query."""
    parts = gather(lse, slot)  # [T·G, P, r]
    if slot.shape[1] == 1:
        return gather(out, slot[:, 0]), parts[:, 0]
    r = lse.shape[1]
    top = parts.amax(1, keepdim=True)
    weight = parts.sub_(top).exp2_()
    total = weight.sum(1, keepdim=True)
    weight = weight.div_(total).transpose(1, 2).reshape(-1, slot.shape[1])
    head = (slot[:, None] * r + torch.arange(r, device=slot.device)[:, None]).view_as(weight)
    joined = nn.functional.embedding_bag(head, out.view(-1, width), mode="sum", per_sample_weights=weight)
    return joined.view(-1, r * width), (top + total.log2_())[:, 0]


def _sum_slots(x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of `x` over the slots of each query, `[T·G, r·d]`."""
    if slot.shape[1] == 1:
        return gather(x, slot[:, 0])
    return nn.functional.embedding_bag(slot, x, mode="sum")
