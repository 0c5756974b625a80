"""
BlossomRec's attention in plain PyTorch, for any device and dtype: the functions of `ops_reference.py` under the same
names, with memory linear in the number of tokens. Nothing is ever laid out as positions × positions or as positions ×
windows: queries meet their candidates in slices that are recomputed in the backward pass. Attention of all positions to
blocks is computed in `ops_torch_tiles.py`.

The number of rows is always a bound that follows from the shapes (never read from a GPU), so nothing here
synchronizes and everything compiles. Conventions and docstrings of the public functions: `ops_reference.py`.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .ops_reference import Blocks, Keys, Ops, Queries, Selection, power_law_distances
from .ops_torch_tiles import (
    LOG2E,
    NEVER,
    SLICE_LOGITS,
    attend_tiles,
    distant_tiles,
    gather,
    lay_out_rows,
    reads_freely,
    selected_tiles,
)


try:  # variable-length FlashAttention, since torch 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Elements that one slice may lay out. More slices cost launches, larger ones memory; on a CPU, a tensor of more than
# 32 MiB costs fresh pages at every allocation, which is slower than computing the slices a second time.
SLICE_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}

# Queries of one history that read its blocks (or, in full attention, its keys) together.
TILE = 64
# Queries of one history that select one after the other: a new event, and the one before it that is computed again.
FEW = 2


def is_half_on_cpu(x: torch.Tensor) -> bool:
    """Whether `x` has half precision on a CPU, where float32 attends: sums then depend on nothing but the history."""
    return x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)


def _is_alone(queries: Queries, first: torch.Tensor) -> bool:
    """
    Whether there is one query of one history. Its place is then a number, and it reads consecutive rows in less time
    than small operations need to gather a few.
    """
    return queries.position.shape[0] == 1 and first.shape[0] == 1 and reads_freely(first)


class _Tiles(NamedTuple):
    """Queries in tiles of up to `TILE`, each of one history (or, of packed ones, of histories that follow one another)."""

    token: torch.Tensor | None  # [N, size]: the query in each slot; `None` for tiles of one query each
    slot: torch.Tensor | None  # [Q]: the slot of each query; `None` if queries and slots have one order

    @classmethod
    def of(cls, queries: Queries, num_histories: int) -> "_Tiles":
        number = torch.arange(queries.history.shape[0], device=queries.history.device)
        if queries.most == 1:
            return cls(None, None)
        if queries.every:
            size = TILE if queries.max_length <= 1024 else 8 * TILE
            token = torch.arange(-(-len(number) // size) * size, device=number.device).clamp(max=len(number) - 1)
            return cls(token.unflatten(0, (-1, size)), None)
        offsets = torch.searchsorted(queries.history, torch.arange(num_histories + 1, device=number.device))
        size = min(queries.most, TILE)
        rows = lay_out_rows(offsets, len(number), size)
        slot = rows.first[queries.history] * size + number - offsets[queries.history]
        # The bound may be far above the number of tiles.
        token = rows.token[: int(slot[-1]) // size + 1] if reads_freely(slot) else rows.token
        return cls(token, slot)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`[Q, …]` → `[N, size, …]`"""
        return x[:, None] if self.token is None else gather(x, self.token)

    def join(self, x: torch.Tensor, num_queries: int) -> torch.Tensor:
        """`[N, size, …]` → `[Q, …]`"""
        x = x.flatten(0, 1)
        return x[:num_queries] if self.slot is None else gather(x, self.slot)


def short_places(position: torch.Tensor, max_length: int, *, block_size: int, window: int, base: int) -> torch.Tensor:
    """
    The places `[…, J·B]` that the short-term stream attends to from each `position` `[…]`, the own block first: those
    of them that are at least 0 and at most the position.
    """
    distances = power_law_distances(-(-max_length // block_size), window, base, position.device)
    block = torch.div(position, block_size, rounding_mode="floor")[..., None] - distances
    return (block[..., None] * block_size + torch.arange(block_size, device=position.device)).flatten(-2)


def _in_slices(
    function: Callable[..., torch.Tensor], row_elements: int, *tensors: torch.Tensor | None
) -> torch.Tensor:
    """
    `function` over slices of the tensors' rows, of which each lays out `row_elements`; where there are several slices,
    they are recomputed in the backward pass.
    """
    length = max(1, SLICE_ELEMENTS.get(tensors[0].device.type, 2**25) // row_elements)
    if tensors[0].shape[0] <= length:
        return function(*tensors)
    splits = zip(*(t.split(length) if t is not None else _endless(None) for t in tensors))
    if not torch.is_grad_enabled():
        return torch.cat([function(*parts) for parts in splits])
    return torch.cat([checkpoint(function, *parts, use_reentrant=False) for parts in splits])


def _endless(value):
    while True:
        yield value


def _gather_states(keys: Keys, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[…, d]` in `dtype` at the `index` of row · G + group."""
    if keys.states is not None:
        return gather(keys.states.flatten(0, 1), index).to(dtype).chunk(2, -1)
    return tuple(nn.functional.embedding(index, x.flatten(0, 1)).to(dtype) for x in (keys.k, keys.v))


def compress(k: torch.Tensor, compressor: nn.Module, windows: Queries, first: torch.Tensor) -> torch.Tensor:
    """As `ops_reference.compress`."""
    place = windows.position[:, None] + torch.arange(1 - compressor.position.shape[1], 1, device=k.device)
    row = (first[windows.history, None] + place).clamp(0, max(k.shape[0] - 1, 0))
    keys = gather(k, row).masked_fill((place < 0)[..., None, None], 0.0)
    return compressor(keys.transpose(1, 2))


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
    As `ops_reference.select`. The importance is linear before its softmax and candidates are whole past blocks, so the
    mean over a group's heads is taken of the queries.
    """
    (num_blocks, num_groups, _), dtype = blocks.rows.shape, blocks.rows.dtype
    shape = (q.shape[0], num_groups, num_selected_blocks)
    if num_blocks == 0 or q.shape[0] == 0:  # no candidate anywhere; the compressor still gets its gradients, zero
        nothing = torch.full(shape, -1, device=q.device)
        return Selection(nothing, torch.zeros(shape, device=q.device, dtype=dtype) + blocks.rows.sum() * 0)
    if reads_freely(blocks.first) and q.shape[0] <= FEW and blocks.first.shape[0] == 1:
        ends = (queries.position // block_size).tolist()
        alone = [_select_alone(x, blocks.rows[:end], *shape[1:], threshold, scaling) for x, end in zip(q, ends)]
        return alone[0] if len(alone) == 1 else Selection(*map(torch.cat, zip(*alone)))

    begin = blocks.first.index_select(0, queries.history)
    end = begin + torch.div(queries.position, block_size, rounding_mode="floor")
    with torch.autocast(q.device.type, enabled=False):
        mean_q = q.to(dtype).unflatten(1, (num_groups, -1)).mean(2) * (scaling * LOG2E)
        if queries.most == 1 and not torch.is_grad_enabled() and reads_freely(end):
            width = max(queries.max_length // block_size, num_selected_blocks)
            pi, chosen = _rank_for_one_each(mean_q, blocks.rows, begin, end, width, num_selected_blocks)
        else:
            # A tile meets the blocks from the first one of its first history on: that history's own, and, if all positions
            # are asked for, those that begin inside the tile.
            tiles = _Tiles.of(queries, blocks.first.shape[0])
            begin, end = tiles.split(begin), tiles.split(end)
            reach_over = begin.shape[1] // block_size if queries.every else 0
            width = max(queries.max_length // block_size + reach_over, num_selected_blocks)
            pi, chosen = _RankBlocks.apply(tiles.split(mean_q), blocks.rows, begin, end, width, num_selected_blocks)
            pi, chosen = tiles.join(pi, q.shape[0]), tiles.join(chosen, q.shape[0])
    kept = pi.detach() > threshold
    return Selection(torch.where(kept, chosen, -1), torch.where(kept, pi, 0.0))


class _RankBlocks(torch.autograd.Function):
    """
    The best candidates of tiles of queries, ties to the lower block: their probabilities π (0 for what is no candidate) and
    their indices in the query's history, `[N, size, G, k]` each. Scores are in base 2, as in `ops_torch_tiles.py`.

    Args:
        q: `[N, size, G, d]`.
        rows: `[M, G, d]`.
        begin, end: `[N, size]`, the rows that are the candidates of each query; a tile reads up to `width` ≥ k rows
            from the first one of its first query on.
    """

    @staticmethod
    def forward(ctx, q, rows, begin, end, width, k):
        pi, chosen = q.new_empty(*q.shape[:3], k), begin.new_empty(*q.shape[:3], k)
        norms = q.new_empty(q.shape[0], q.shape[2], 1, q.shape[1])
        none = q.new_full((), -1000 * LOG2E)  # the constant logit; no copy from the CPU, which a CUDA graph refuses
        for part, met in _slices(begin, end, width, k, q.shape[2]):
            scores, _ = _score(q[part], rows, begin[part], end[part], met)
            left, tops, bests = scores.clone(), [], []
            for _ in range(k):
                top, best = left.max(2, keepdim=True)  # the first of equals: ties to the lower block
                left.scatter_(2, best, -torch.inf)
                tops.append(top)
                bests.append(best)
            largest = torch.maximum(tops[0], none)
            total = scores.sub_(largest).exp2_().sum(2, keepdim=True) + (none - largest).exp2_()
            norm = norms[part] = largest + total.log2_()
            pi[part] = torch.cat(tops, 2).sub_(norm).exp2_().permute(0, 3, 1, 2)
            chosen[part] = torch.cat(bests, 2).permute(0, 3, 1, 2) - (begin[part] - begin[part, :1])[..., None, None]
        ctx.save_for_backward(q, rows, begin, end, pi, chosen, norms)
        ctx.width = width
        ctx.mark_non_differentiable(chosen)
        return pi, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        q, rows, begin, end, pi, chosen, norms = ctx.saved_tensors
        grad_q, grad_rows = torch.empty_like(q), torch.zeros_like(rows)
        weights = grad * pi
        best = chosen + (begin - begin[:, :1])[..., None, None]  # among the rows that the tile reads
        with torch.autocast(q.device.type, enabled=False):
            for part, met in _slices(begin, end, ctx.width, pi.shape[3], q.shape[2]):
                scores, keys = _score(q[part], rows, begin[part], end[part], met)
                weight = weights[part].permute(0, 2, 3, 1)  # [n, G, k, size]
                of_scores = scores.sub_(norms[part]).exp2_().mul_(-weight.sum(2, keepdim=True))
                of_scores.scatter_add_(2, best[part].permute(0, 2, 3, 1).clamp(max=met.shape[1] - 1), weight)
                grad_q[part] = torch.matmul(of_scores.mT, keys).transpose(1, 2)
                of_keys = torch.matmul(of_scores, q[part].transpose(1, 2)).transpose(1, 2).flatten(0, 1)
                grad_rows.index_add_(0, met.flatten().clamp(max=rows.shape[0] - 1), of_keys)
        return grad_q / LOG2E, grad_rows / LOG2E, None, None, None, None


def _rank_for_one_each(
    q: torch.Tensor, rows: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, width: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_RankBlocks` of queries `[Q, G, d]` of one history each, without gradients; π and indices are `[Q, G, k]`."""
    num_groups, none = rows.shape[1], q.new_full((), -1000 * LOG2E)  # the constant logit
    group, pis, chosen = torch.arange(num_groups, device=q.device)[:, None], [], []
    for part, met in _slices(begin[:, None], end[:, None], width, k, num_groups):
        # In the order of the product, which would copy them otherwise.
        place = met.clamp(max=rows.shape[0] - 1)[:, None] * num_groups + group
        left = torch.matmul(gather(rows.flatten(0, 1), place), q[part][..., None])[..., 0]  # [n, G, M]
        left.masked_fill_((met >= end[part, None])[:, None], NEVER)
        top, best = left.max(-1, keepdim=True)
        largest = torch.maximum(top, none)
        norm = largest + ((left - largest).exp2_().sum(-1, keepdim=True) + (none - largest).exp2_()).log2_()
        tops, bests = [top], [best]
        for _ in range(k - 1):
            left.scatter_(-1, best, -torch.inf)
            top, best = left.max(-1, keepdim=True)  # the first of equals: ties to the lower block
            tops.append(top)
            bests.append(best)
        pis.append((torch.cat(tops, -1) - norm).exp2_())
        chosen.append(torch.cat(bests, -1))
    return torch.cat(pis), torch.cat(chosen)


def _slices(
    begin: torch.Tensor, end: torch.Tensor, width: int, k: int, num_groups: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of tiles, with the rows `[n, M]` that their queries read, at least `k`."""
    if torch.compiler.is_compiling():
        yield slice(None), begin[:, :1] + torch.arange(width, device=begin.device)
        return
    length = max(1, SLICE_LOGITS.get(begin.device.type, 2**25) // (begin.shape[1] * width * num_groups))
    for i in range(0, begin.shape[0], length):
        part = slice(i, i + length)
        first, reach = begin[part, :1], width
        if reads_freely(end):  # of these tiles, not the widest
            reach = max(int((end[part] - first).max()), k)
        yield part, first + torch.arange(reach, device=begin.device)


def _score(
    q: torch.Tensor, rows: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, met: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores `[n, G, M, size]` of the rows `met` for queries `[n, size, G, d]`, and these rows `[n, G, M, d]`."""
    keys = gather(rows, met.clamp(max=rows.shape[0] - 1)).transpose(1, 2)
    scores = torch.matmul(keys, q.permute(0, 2, 3, 1))
    other = (met[:, :, None] < begin[:, None]) | (met[:, :, None] >= end[:, None])
    return scores.add_(other[:, None].to(scores.dtype), alpha=NEVER), keys


def _select_alone(
    q: torch.Tensor, rows: torch.Tensor, num_groups: int, number: int, threshold: float, scaling: float
) -> Selection:
    """The selection of one query `[H, d]`, all of whose candidates are `rows` `[M, G, d]`."""
    queries = q.to(rows.dtype).unflatten(0, (num_groups, -1)).mean(1) * scaling
    scores = (rows * queries).sum(-1).T  # [G, M]; no product of matrices, which autocast would round
    if rows.shape[0] < number:
        scores = nn.functional.pad(scores, (0, number - rows.shape[0]), value=-torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :number]  # of equals the lower block first
    pi = nn.functional.pad(scores, (0, 1), value=-1000.0).softmax(-1).gather(1, order)[None]
    kept = pi > threshold
    return Selection(torch.where(kept, order, -1), torch.where(kept, pi, 0.0))


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
    """As `ops_reference.attend_selected`. Of all positions, the ones that selected a block read it together."""
    num_rows, num_groups, _ = keys.k.shape
    if q.shape[0] == 0:
        return torch.zeros_like(q) + (0 if factor is None else factor.sum().to(q.dtype))
    if factor is None and _is_alone(queries, keys.first) and int(queries.position) + 1 == num_rows:
        mask = _blocks_alone(block_indices[0], num_rows, block_size)
        return _attend_alone(q, keys.k, keys.v, mask, scaling)
    if queries.every:
        rows = lay_out_rows(_offsets(keys), num_rows, block_size)
        tiles = selected_tiles(rows, queries, block_indices)
        return attend_tiles(q, keys.k, keys.v, rows, queries, tiles, scaling, factor)
    own = torch.div(queries.position, block_size, rounding_mode="floor")[:, None, None].expand(-1, num_groups, 1)
    blocks = torch.cat([block_indices, own], -1)[..., None]  # block −1 lies before the start
    place = (blocks * block_size + torch.arange(block_size, device=q.device)).flatten(2)
    if factor is not None:
        factor = nn.functional.pad(factor, (0, 1), value=1.0).repeat_interleave(block_size, -1)
    return _attend_places(q, keys, queries, place, scaling, factor)


def attend_short(
    q: torch.Tensor, keys: Keys, queries: Queries, *, block_size: int, window: int, base: int, scaling: float
) -> torch.Tensor:
    """As `ops_reference.attend_short`. Of all positions, those of a block read the same few blocks together."""
    num_rows, num_groups, _ = keys.k.shape
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    sizes = {"block_size": block_size, "window": window, "base": base}
    if _is_alone(queries, keys.first):
        position = int(queries.position)
        place = short_places(queries.position[0], position + 1, **sizes)
        place = place[place <= position]
        return _attend_alone(q, keys.k.index_select(0, place), keys.v.index_select(0, place), None, scaling)
    if queries.every:
        rows = lay_out_rows(_offsets(keys), num_rows, block_size)
        distances = power_law_distances(-(-queries.max_length // block_size), window, base, q.device)
        tiles = distant_tiles(rows, queries, num_groups, distances)
        return attend_tiles(q, keys.k, keys.v, rows, queries, tiles, scaling)
    place = short_places(queries.position, queries.max_length, **sizes)
    return _attend_places(q, keys, queries, place[:, None], scaling)


def attend_full(q: torch.Tensor, keys: Keys, queries: Queries, *, scaling: float) -> torch.Tensor:
    """
    As `ops_reference.attend_full`, through PyTorch's fused attention: FlashAttention on the packed histories on a GPU
    in half precision, elsewhere on rows padded to the longest history.
    """
    num_rows, num_groups, _ = keys.k.shape
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if _is_alone(queries, keys.first):
        length = int(queries.position) + 1
        return _attend_alone(q, keys.k[:length], keys.v[:length], None, scaling)
    if queries.every and _has_varlen(q):
        k, v = (x.repeat_interleave(q.shape[1] // num_groups, 1) for x in (keys.k, keys.v))
        offsets, length = _offsets(keys).to(torch.int32), queries.max_length
        return varlen_attn(q, k, v, offsets, offsets, length, length, scale=scaling, **_VARLEN_CAUSAL)
    if queries.every:
        return _attend_padded(q, keys, queries, scaling)

    tiles = _Tiles.of(queries, keys.first.shape[0])
    place = torch.arange(queries.max_length, device=q.device)
    group = torch.arange(num_groups, device=q.device)[:, None]

    def attend(q, history, position):
        # All heads of a group and all queries of the tile read the same keys.
        size, q = q.shape[1], q.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)  # [N, G, H/G, size, d]
        row = (keys.first[history[:, :1]] + place).clamp(max=num_rows - 1)  # [N, L]
        k, v = _gather_states(keys, row[:, None] * num_groups + group, q.dtype)
        mask = (place <= position[..., None])[:, None, None].expand(-1, 1, q.shape[2], -1, -1).flatten(2, 3)
        q = q.flatten(2, 3)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    parts = [tiles.split(x) for x in (q, queries.history, queries.position)]
    row_elements = queries.max_length * max(parts[0].shape[1] * q.shape[1], 2 * num_groups * q.shape[2])
    return tiles.join(_in_slices(attend, row_elements, *parts), q.shape[0])


def attend_places(
    q: torch.Tensor, keys: Keys, queries: Queries, place: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """As `ops_reference.attend_places`."""
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    return _attend_places(q, keys, queries, place, scaling)


def _attend_places(q, keys, queries, place, scaling, factor=None):
    """`attend_places` with a `factor` `[Q, G, K]` of the logits."""
    num_rows, num_groups, width = keys.k.shape
    first = keys.first.index_select(0, queries.history)
    if keys.states is None:  # packed: an empty history at the end begins behind the last row
        first = first.clamp(max=num_rows - 1)
    first = (first[:, None] * num_groups + torch.arange(num_groups, device=q.device))[..., None]  # [Q, G, 1]

    def attend(q, first, position, place, factor):
        mask = (place >= 0) & (place <= position)
        row = torch.minimum(place.clamp(min=0), position)
        k, v = _gather_states(keys, row * num_groups + first, q.dtype)
        if factor is not None:
            k = k * factor[..., None].to(q.dtype)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, None], scale=scaling)

    tiles, position = q.unflatten(1, (num_groups, -1)), queries.position[:, None, None]
    row_elements = num_groups * place.shape[2] * width
    return _in_slices(attend, row_elements, tiles, first, position, place, factor).flatten(1, 2)


def _blocks_alone(block_indices: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """Which of the `length` keys of a history `[G, 1, length]` its last position sees."""
    num_blocks = -(-length // block_size)
    # Column 0 takes the −1s, the last one is the own block.
    seen = torch.zeros(block_indices.shape[0], num_blocks + 1, dtype=torch.bool, device=block_indices.device)
    seen.scatter_(1, block_indices + 1, True)
    seen[:, -1] = True
    return seen[:, 1:, None].expand(-1, -1, block_size).flatten(1)[:, None, :length]


def _attend_alone(q, k, v, mask, scaling):
    """Attention of one query `[1, H, d]` to the rows of `k` and `v`, where `mask` `[G, 1, N]` is set (if given)."""
    tiles, k, v = q.unflatten(1, (k.shape[1], -1)), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    mask = None if mask is None else mask[None]
    out = nn.functional.scaled_dot_product_attention(
        tiles, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scaling
    )
    return out.flatten(1, 2)


def _offsets(keys: Keys) -> torch.Tensor:
    """`cu_seqlens` `[S + 1]` of packed histories."""
    return nn.functional.pad(keys.first, (0, 1), value=keys.k.shape[0])


def _has_varlen(q: torch.Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and q.is_cuda and half and q.shape[2] % 8 == 0


def _attend_padded(q: torch.Tensor, keys: Keys, queries: Queries, scaling: float) -> torch.Tensor:
    """Causal attention on histories padded to the longest."""
    num_tokens, num_heads, width = q.shape
    length = queries.max_length
    k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (keys.k, keys.v))
    token = keys.first[:, None] + torch.arange(length, device=q.device)
    token = token.clamp(max=num_tokens - 1)  # padding is on the right, where a causal mask never looks

    def attend(token):
        tiles, keys, values = (gather(x, token).transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(tiles, keys, values, is_causal=True, scale=scaling)
        return out.transpose(1, 2)

    out = _in_slices(attend, length * num_heads * width, token)
    return gather(out.flatten(0, 1), queries.history * length + queries.position)


# How the installed torch spells causal attention.
_VARLEN_CAUSAL = {}
if varlen_attn is not None:
    _new = "window_size" in inspect.signature(varlen_attn).parameters
    _VARLEN_CAUSAL = {"window_size": (-1, 0)} if _new else {"is_causal": True}


TORCH_OPS = Ops(compress, select, attend_selected, attend_short, attend_full, attend_places)
