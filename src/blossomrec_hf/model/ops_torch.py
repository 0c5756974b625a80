"""
BlossomRec's attention in plain PyTorch, for any device and dtype: the functions of `ops_reference.py` under the same
names, with memory linear in the number of tokens. Nothing is ever laid out as positions × positions or as positions ×
windows: queries meet their candidates in slices that are recomputed in the backward pass.

The number of rows is always a bound that follows from the shapes (never read from the device), so nothing here
synchronises and everything compiles. Conventions and docstrings of the public functions: `ops_reference.py`.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .ops_reference import Ops, Selection, locate, power_law_distances


try:  # variable-length FlashAttention, since torch 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Elements that one slice may lay out. More slices cost launches, larger ones memory; on a CPU, a tensor of more than
# 32 MiB costs fresh pages at every allocation, which is slower than computing the slices a second time.
SLICE_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}

# Up to this length reading every key of a history is cheaper than gathering the selected blocks of every query.
DENSE_MAX_LENGTH = 256


def is_half_on_cpu(x: torch.Tensor) -> bool:
    """Whether `x` has half precision on a CPU, where float32 attends: sums then depend on nothing but the history."""
    return x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16)


class _Rows(NamedTuple):
    """Tokens laid out in rows of one block each, every history beginning a new row."""

    token: torch.Tensor  # [N, size]: the packed position in each slot; anything valid where the slot is empty
    block: torch.Tensor  # [N]: the block's index inside its history
    first: torch.Tensor  # [S]: the first row of each history


def _rows(cu_seqlens: torch.Tensor, num_tokens: int, size: int) -> _Rows:
    num_histories = cu_seqlens.shape[0] - 1
    ends = torch.div(cu_seqlens.diff() + size - 1, size, rounding_mode="floor").cumsum(0)
    first = nn.functional.pad(ends, (1, 0))[:-1]
    row = torch.arange((num_tokens + num_histories * (size - 1)) // size, device=cu_seqlens.device)
    history = torch.searchsorted(ends, row, right=True).clamp(max=num_histories - 1)
    block = row - first[history]
    token = (cu_seqlens[history] + block * size)[:, None] + torch.arange(size, device=row.device)
    return _Rows(token.clamp(max=num_tokens - 1), block, first)


class _Blocks(NamedTuple):
    """The complete selection blocks of all histories end to end; those after the last one mean nothing."""

    first: torch.Tensor  # [S + 1]: the first block of each history
    history: torch.Tensor  # [M]: the history of each block
    window: torch.Tensor  # [M, b / s]: its rows of the compressed keys


def _blocks(cu_seqlens: torch.Tensor, num_windows: int, block_size: int, stride: int) -> _Blocks:
    """The blocks that `num_windows` ≥ b / s compressed keys belong to."""
    per_block = block_size // stride
    lengths = cu_seqlens.diff()
    first = nn.functional.pad(torch.div(lengths, block_size, rounding_mode="floor").cumsum(0), (1, 0))
    first_window = nn.functional.pad(torch.div(lengths, stride, rounding_mode="floor").cumsum(0), (1, 0))
    block = torch.arange(num_windows // per_block, device=cu_seqlens.device)
    history = (torch.searchsorted(first, block, right=True) - 1).clamp(max=lengths.shape[0] - 1)
    window = first_window[history] + (block - first[history]) * per_block
    window = window[:, None] + torch.arange(per_block, device=block.device)
    return _Blocks(first, history, window.clamp(max=num_windows - 1))


def _distances(num_blocks: int, window: int, base: int, device: torch.device) -> torch.Tensor:
    """`power_law_distances`, made on the device: for a list that is copied to a GPU, the CPU waits."""
    distances = power_law_distances(num_blocks, window, base)
    near = torch.arange(min(window, num_blocks), device=device)
    far = distances[near.shape[0] :]
    return torch.cat([near, far[0] * base ** torch.arange(len(far), device=device)]) if far else near


def short_places(position: torch.Tensor, max_seqlen: int, *, block_size: int, window: int, base: int) -> torch.Tensor:
    """
    The places `[…, J·B]` that the short-term stream attends to from each `position` `[…]`: those of them that are at
    least 0 and at most the position.
    """
    distances = _distances(-(-max_seqlen // block_size), window, base, position.device)
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


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]`, whose backward pass is an addition of whole rows; several times faster on a CPU."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def compress(k: torch.Tensor, compressor: nn.Module, cu_seqlens: torch.Tensor, *, stride: int) -> torch.Tensor:
    """As `ops_reference.compress`, with `T // stride` rows: those after the last complete window mean nothing."""
    num_tokens, length = k.shape[0], compressor.position.shape[1]
    ends = torch.div(cu_seqlens.diff(), stride, rounding_mode="floor").cumsum(0)
    window = torch.arange(num_tokens // stride, device=k.device)
    history = torch.searchsorted(ends, window, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    last = (window - nn.functional.pad(ends, (1, 0))[history] + 1) * stride
    inside = (last - length)[:, None] + torch.arange(length, device=k.device)
    token = (inside + cu_seqlens[history, None]).clamp(0, max(num_tokens - 1, 0))
    windows = _gather(k, token).masked_fill((inside < 0)[..., None, None], 0.0)
    return compressor(windows.transpose(1, 2))


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
    As `ops_reference.select`. The importance is linear before its softmax and candidates are whole past blocks, so
    the mean over a group's heads is taken of the queries, and the mean over a block's windows of the compressed keys.
    """
    num_tokens, num_groups = q.shape[0], c.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (num_tokens, num_groups, num_selected_blocks)
    num_blocks = c.shape[0] // (block_size // stride)
    if num_blocks == 0:  # no candidate anywhere; the compressor still takes part, so that its gradients exist
        nothing = torch.full(shape, -1, device=q.device)
        return Selection(nothing, torch.zeros(shape, device=q.device, dtype=dtype) + c.sum().to(dtype) * 0)

    blocks = _blocks(cu_seqlens, c.shape[0], block_size, stride)
    # A tile of consecutive queries meets the blocks from the first one of its first history on: that history's own,
    # and those that begin inside the tile.
    tile = 64 if max_seqlen <= 1024 else 512
    width = max(max_seqlen // block_size + tile // block_size, num_selected_blocks)
    num_tiles = -(-num_tokens // tile)
    history, position = locate(cu_seqlens, num_tokens)
    padding = num_tiles * tile - num_tokens
    begin = nn.functional.pad(blocks.first[history], (0, padding)).view(num_tiles, tile)
    end = begin + nn.functional.pad(torch.div(position, block_size, rounding_mode="floor"), (0, padding)).view_as(
        begin
    )

    with torch.autocast(q.device.type, enabled=False):
        keys = _gather(c.to(dtype), blocks.window).mean(1)  # [M, G, d]
        queries = q.to(dtype).unflatten(1, (num_groups, -1)).mean(2) * scaling
        queries = nn.functional.pad(queries, (0, 0, 0, 0, 0, padding)).unflatten(0, (num_tiles, tile))

        def rank(queries, begin, end):
            reach = width
            if q.device.type == "cpu" and not torch.compiler.is_compiling():  # where reading a tensor costs nothing
                reach = max(int((end - begin[:, :1]).max()), num_selected_blocks)
            met = begin[:, :1] + torch.arange(reach, device=q.device)
            scores = queries.transpose(1, 2) @ _gather(keys, met.clamp(max=num_blocks - 1)).permute(0, 2, 3, 1)
            candidate = (met[:, None] >= begin[..., None]) & (met[:, None] < end[..., None])
            pi, chosen = best_blocks(scores, candidate[:, None], num_selected_blocks)
            chosen = chosen - (begin - begin[:, :1])[:, None, :, None]
            # Both in one tensor, so that slices can be recomputed; block numbers are exact in float32.
            return torch.stack([pi, chosen.to(dtype)]).permute(1, 3, 2, 4, 0)

        ranked = _in_slices(rank, tile * width * num_groups, queries, begin, end).flatten(0, 1)[:num_tokens]
    pi, chosen = ranked[..., 0], ranked[..., 1].detach().long()
    kept = pi.detach() > threshold
    return Selection(torch.where(kept, chosen, -1), torch.where(kept, pi, 0.0))


def best_blocks(scores: torch.Tensor, candidate: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `number` best candidates by `scores` `[..., M]` (M ≥ `number`), ties to the lower block: their probabilities π
    (0 for what is no candidate) and their indices, `[..., number]` each.
    """
    scores = scores.masked_fill(~candidate, -1e30)  # finite: a row without candidates has gradients
    chosen, left = [], scores.detach().clone()
    for _ in range(number):
        best = left.max(-1, keepdim=True).indices  # the first of equals: ties to the lower block
        left.scatter_(-1, best, -torch.inf)
        chosen.append(best)
    chosen = torch.cat(chosen, -1)
    norm = torch.logaddexp(scores.logsumexp(-1), scores.new_full((), -1000.0))
    return (scores.gather(-1, chosen) - norm[..., None]).exp(), chosen


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
) -> torch.Tensor:
    """As `ops_reference.attend_selected`: every query gathers its selected blocks and its own."""
    num_tokens, num_groups, width = k.shape
    if num_tokens == 0:
        return torch.zeros_like(q) + (0 if factor is None else factor.sum().to(q.dtype))
    if max_seqlen <= DENSE_MAX_LENGTH:
        return _attend_selected_dense(
            q, k, v, block_indices, factor, cu_seqlens, max_seqlen=max_seqlen, block_size=block_size, scaling=scaling
        )
    history, position = locate(cu_seqlens, num_tokens)
    rows = _rows(cu_seqlens, num_tokens, block_size)
    k_blocks = _gather(k, rows.token).transpose(1, 2).reshape(-1, block_size * width)  # [N·G, b·d]
    v_blocks = _gather(v, rows.token).transpose(1, 2).reshape(-1, block_size * width)
    own = torch.div(position, block_size, rounding_mode="floor")[:, None, None].expand(-1, num_groups, 1)
    blocks = torch.cat([block_indices, own], -1)
    group = torch.arange(num_groups, device=q.device)[:, None]
    index = (rows.first[history][:, None, None] + blocks.clamp(min=0)) * num_groups + group
    offset = torch.arange(block_size, device=q.device)
    past = (block_indices >= 0)[..., None].expand(-1, -1, -1, block_size)
    present = (offset <= position[:, None] % block_size)[:, None, None].expand(-1, num_groups, 1, -1)
    mask = torch.cat([past, present], 2).flatten(2)[:, :, None]
    if factor is not None:
        factor = nn.functional.pad(factor, (0, 1), value=1.0).to(k.dtype)[..., None]

    def attend(q, index, mask, factor):
        keys = nn.functional.embedding(index, k_blocks)
        if factor is not None:
            keys = keys * factor  # the factor of a logit may as well stand on its key
        values = nn.functional.embedding(index, v_blocks)
        keys, values = (x.reshape(*x.shape[:2], -1, width) for x in (keys, values))
        return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)

    row_elements = num_groups * mask.shape[-1] * width
    return _in_slices(attend, row_elements, q.unflatten(1, (num_groups, -1)), index, mask, factor).flatten(1, 2)


def _attend_selected_dense(q, k, v, block_indices, factor, cu_seqlens, *, max_seqlen, block_size, scaling):
    """The same for short histories: one padded tile a history, unselected keys masked."""
    num_tokens, num_groups = k.shape[:2]
    history, position = locate(cu_seqlens, num_tokens)
    place = torch.arange(max_seqlen, device=q.device)
    token = (cu_seqlens[:-1, None] + place).clamp(max=num_tokens - 1)  # [S, L]
    num_blocks = -(-max_seqlen // block_size)
    block = torch.div(place, block_size, rounding_mode="floor")
    own = (block[:, None] == block) & (place[:, None] >= place)
    # Weight of each block in each query's row: f where selected, else 0; the last column takes the −1s.
    if factor is None:
        factor = torch.ones_like(block_indices, dtype=q.dtype)
    weight = q.new_zeros(num_tokens, num_groups, num_blocks + 1)
    target = torch.where(block_indices < 0, num_blocks, block_indices)
    weight = weight.scatter(-1, target, factor.to(q.dtype))[..., :num_blocks]

    def attend(token):
        queries = _gather(q, token).unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)  # [S, G, H/G, L, d]
        keys, values = (_gather(x, token).transpose(1, 2)[:, :, None] for x in (k, v))
        weights = _gather(weight, token).transpose(1, 2)[..., block] + own.to(q.dtype)  # [S, G, L, L]
        logits = (queries * scaling) @ keys.transpose(-1, -2) * weights[:, :, None]
        logits = logits.masked_fill((weights.detach() == 0)[:, :, None], -torch.inf)
        probs = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (probs @ values).permute(0, 3, 1, 2, 4).flatten(2, 3)

    out = _in_slices(attend, q.shape[1] * max_seqlen**2, token)
    return _gather(out.flatten(0, 1), history * max_seqlen + position)


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
) -> torch.Tensor:
    """As `ops_reference.attend_short`: all queries of a block gather the same few key blocks."""
    num_tokens, num_groups, width = k.shape
    if num_tokens == 0:
        return torch.zeros_like(q)
    distance = _distances(-(-max_seqlen // block_size), window, base, q.device)
    if max_seqlen <= DENSE_MAX_LENGTH:
        place = torch.arange(max_seqlen, device=q.device)
        block = torch.div(place, block_size, rounding_mode="floor")
        mask = torch.isin(block[:, None] - block, distance) & (place[:, None] >= place)
        return _attend_padded(q, k, v, cu_seqlens, mask, max_seqlen=max_seqlen, scaling=scaling)
    rows = _rows(cu_seqlens, num_tokens, block_size)
    history, position = locate(cu_seqlens, num_tokens)
    k_blocks = _gather(k, rows.token).transpose(1, 2).reshape(-1, block_size * width)  # [N·G, B·d]
    v_blocks = _gather(v, rows.token).transpose(1, 2).reshape(-1, block_size * width)
    queries = _gather(q, rows.token).unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)  # [N, G, B·H/G, d]

    past = rows.block[:, None] >= distance
    row = torch.arange(rows.token.shape[0], device=q.device)[:, None]
    index = torch.where(past, row - distance, row)[:, None] * num_groups
    index = index + torch.arange(num_groups, device=q.device)[:, None]  # [N, G, J]
    offset = torch.arange(block_size, device=q.device)
    causal = (distance[:, None] > 0) | (offset[:, None, None] >= offset)  # [B, J, B]
    mask = past[:, None, :, None] & causal  # [N, B, J, B]
    mask = mask.flatten(2).repeat_interleave(q.shape[1] // num_groups, 1)[:, None]

    def attend(queries, index, mask):
        keys, values = (nn.functional.embedding(index, x) for x in (k_blocks, v_blocks))
        keys, values = (x.reshape(*x.shape[:2], -1, width) for x in (keys, values))
        return nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)

    row_elements = mask.shape[-1] * max(num_groups * width, mask.shape[2])
    out = _in_slices(attend, row_elements, queries, index, mask)
    out = out.unflatten(2, (block_size, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return _gather(out, rows.first[history] * block_size + position)


def attend_full(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    scaling: float,
) -> torch.Tensor:
    """
    As `ops_reference.attend_full`, through PyTorch's fused attention: FlashAttention on the packed histories on a GPU
    in half precision, elsewhere on rows padded to the longest history.
    """
    num_heads = q.shape[1]
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if _has_varlen(q):
        k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (k, v))
        offsets = cu_seqlens.to(torch.int32)
        return varlen_attn(q, k, v, offsets, offsets, max_seqlen, max_seqlen, scale=scaling, **_VARLEN_CAUSAL)
    return _attend_padded(q, k, v, cu_seqlens, None, max_seqlen=max_seqlen, scaling=scaling)


def _has_varlen(q: torch.Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return varlen_attn is not None and q.is_cuda and half and q.shape[2] % 8 == 0


def _attend_padded(q, k, v, cu_seqlens, mask, *, max_seqlen, scaling):
    """Causal attention on histories padded to the longest, or attention under one `mask` `[L, L]` for all of them."""
    num_tokens, num_heads, width = q.shape
    k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (k, v))
    history, position = locate(cu_seqlens, num_tokens)
    token = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=q.device)
    token = token.clamp(max=num_tokens - 1)  # padding is on the right, where a causal mask never looks

    def attend(token):
        queries, keys, values = (_gather(x, token).transpose(1, 2) for x in (q, k, v))
        if mask is None:
            out = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
        else:  # so few keys that the fused attention, which takes masks slowly on a CPU, does not pay
            logits = (queries * scaling @ keys.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
            out = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ values
        return out.transpose(1, 2)

    row_elements = max_seqlen * num_heads * (width if mask is None else max_seqlen)
    out = _in_slices(attend, row_elements, token)
    return _gather(out.flatten(0, 1), history * max_seqlen + position)


# How the installed torch spells causal attention.
_VARLEN_CAUSAL = {}
if varlen_attn is not None:
    _new = "window_size" in inspect.signature(varlen_attn).parameters
    _VARLEN_CAUSAL = {"window_size": (-1, 0)} if _new else {"is_causal": True}


TORCH_OPS = Ops(compress, select, attend_selected, attend_short, attend_full)


# The same for the query of each history's last position alone: `q` is `[S, H, d]`, and what follows from it has S rows;
# compressed keys are those of `compress`. They need not be differentiated, so there is no factor. Of an empty history
# the result is finite and means nothing. There is at least one token.


def _last_position(cu_seqlens: torch.Tensor) -> torch.Tensor:
    return (cu_seqlens.diff() - 1).clamp(min=0)


def last_select(
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
    """Selection of the last positions, `[S, G, k]`; every block meets one query alone, that of its own history."""
    num_groups, dtype = c.shape[1], torch.promote_types(q.dtype, torch.float32)
    if c.shape[0] < block_size // stride:  # no candidate anywhere
        nothing = torch.full((q.shape[0], num_groups, num_selected_blocks), -1, device=q.device)
        return Selection(nothing, torch.zeros_like(nothing, dtype=dtype))
    blocks = _blocks(cu_seqlens, c.shape[0], block_size, stride)
    own = torch.div(_last_position(cu_seqlens), block_size, rounding_mode="floor")
    width = max((max_seqlen - 1) // block_size, num_selected_blocks)
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(dtype).unflatten(1, (num_groups, -1)).mean(2) * scaling
        keys = _gather(c.to(dtype), blocks.window).mean(1)
        scores = (keys * _gather(queries, blocks.history)).sum(-1)  # [M, G]

        def rank(first, own):
            reach = width
            if q.device.type == "cpu" and not torch.compiler.is_compiling():  # where reading a tensor costs nothing
                reach = max(int(own.max()), num_selected_blocks)
            block = torch.arange(reach, device=q.device)
            met = _gather(scores, (first[:, None] + block).clamp(max=scores.shape[0] - 1)).transpose(1, 2)
            pi, chosen = best_blocks(met, (block < own[:, None])[:, None], num_selected_blocks)
            return torch.stack([pi, chosen.to(dtype)], -1)

        pi, chosen = _in_slices(rank, num_groups * width, blocks.first[:-1], own).unbind(-1)
    kept = pi > threshold
    return Selection(torch.where(kept, chosen.long(), -1), torch.where(kept, pi, 0.0))


def last_attend_selected(q, k, v, block_indices, factor, cu_seqlens, *, max_seqlen, block_size, scaling):
    """Attention of the last positions over their selected blocks and their own one."""
    own = torch.div(_last_position(cu_seqlens), block_size, rounding_mode="floor")[:, None, None]
    blocks = torch.cat([block_indices, own.expand(-1, k.shape[1], 1)], -1)[..., None]
    # Block −1 lies before the start.
    place = (blocks * block_size + torch.arange(block_size, device=q.device)).flatten(2)
    return _last_attend(q, k, v, cu_seqlens, place, scaling)


def last_attend_short(q, k, v, cu_seqlens, *, max_seqlen, block_size, window, base, scaling):
    """Attention of the last positions over their short-term blocks."""
    sizes = {"block_size": block_size, "window": window, "base": base}
    place = short_places(_last_position(cu_seqlens)[:, None], max_seqlen, **sizes)
    return _last_attend(q, k, v, cu_seqlens, place, scaling)


def last_attend_full(q, k, v, cu_seqlens, *, max_seqlen, scaling):
    """Attention of the last positions over their whole histories."""
    if _has_varlen(q):
        # The heads of a group are so many queries to the same keys, all of which they see.
        heads = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1)
        offsets = heads * torch.arange(cu_seqlens.shape[0], device=q.device, dtype=torch.int32)
        out = varlen_attn(queries, k, v, offsets, cu_seqlens.to(torch.int32), heads, max_seqlen, scale=scaling)
        return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)
    place = torch.arange(max_seqlen, device=q.device).expand(q.shape[0], 1, -1)
    return _last_attend(q, k, v, cu_seqlens, place, scaling)


def _last_attend(q, k, v, cu_seqlens, place, scaling):
    """Attention of the last positions to those of the places `[S, G or 1, K]` that their histories have."""
    num_tokens, num_groups, width = k.shape
    group = torch.arange(num_groups, device=q.device)[:, None]
    k_rows, v_rows = k.flatten(0, 1), v.flatten(0, 1)  # [T·G, d]

    def attend(q, start, position, place):
        mask = (place >= 0) & (place <= position)
        # An empty history at the end begins behind the last token.
        token = (start + torch.minimum(place.clamp(min=0), position)).clamp(max=num_tokens - 1)
        keys, values = (nn.functional.embedding(token * num_groups + group, x) for x in (k_rows, v_rows))
        return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, :, None], scale=scaling)

    where = cu_seqlens[:-1, None, None], _last_position(cu_seqlens)[:, None, None]
    queries = q.unflatten(1, (num_groups, -1))
    return _in_slices(attend, num_groups * place.shape[2] * width, queries, *where, place).flatten(1, 2)


LAST_OPS = Ops(compress, last_select, last_attend_selected, last_attend_short, last_attend_full)


# The same where there is one history alone: its length, `max_seqlen`, is known without a look at `cu_seqlens`, and so is
# where everything lies. A single query reads all keys in less time than small operations need to name a few.


def one_compress(k, compressor, cu_seqlens, *, stride):
    """As `compress`, with no row after the last complete window."""
    complete, length = k.shape[0] // stride * stride, compressor.position.shape[1]
    if complete == 0:
        return k.new_zeros(0, k.shape[1], k.shape[2])
    windows = nn.functional.pad(k[:complete], (0, 0, 0, 0, length - stride, 0)).unfold(0, length, stride)
    return compressor(windows.transpose(2, 3))


def one_select(q, c, cu_seqlens, *, max_seqlen, num_selected_blocks, block_size, stride, threshold, scaling):
    """As `last_select`."""
    num_groups, dtype = c.shape[1], torch.promote_types(q.dtype, torch.float32)
    num_blocks, per_block = (max_seqlen - 1) // block_size, block_size // stride
    queries = q[0].to(dtype).unflatten(0, (num_groups, -1)).mean(1) * scaling
    keys = c[: num_blocks * per_block].to(dtype).unflatten(0, (num_blocks, per_block)).mean(1)
    scores = (keys * queries).sum(-1).T  # [G, M]; no product of matrices, which autocast would round
    if num_blocks < num_selected_blocks:
        scores = nn.functional.pad(scores, (0, num_selected_blocks - num_blocks), value=-torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # of equals the lower block first
    order = order[:, :num_selected_blocks]
    pi = nn.functional.pad(scores, (0, 1), value=-1000.0).softmax(-1).gather(1, order)[None]
    kept = pi > threshold
    return Selection(torch.where(kept, order, -1), torch.where(kept, pi, 0.0))


def one_attend_selected(q, k, v, block_indices, factor, cu_seqlens, *, max_seqlen, block_size, scaling):
    """As `last_attend_selected`."""
    num_blocks = -(-max_seqlen // block_size)
    # Column 0 takes the −1s, the last one is the own block.
    seen = torch.zeros(k.shape[1], num_blocks + 1, dtype=torch.bool, device=q.device)
    seen.scatter_(1, block_indices[0] + 1, True)
    seen[:, -1] = True
    mask = seen[:, 1:, None].expand(-1, -1, block_size).flatten(1)[:, None, :max_seqlen]
    return _one_attend(q, k, v, mask, scaling)


def one_attend_short(q, k, v, cu_seqlens, *, max_seqlen, block_size, window, base, scaling):
    """As `last_attend_short`."""
    own = (max_seqlen - 1) // block_size
    places = []
    for distance in power_law_distances(own + 1, window, base):
        first = (own - distance) * block_size
        places.extend(range(first, min(first + block_size, max_seqlen)))
    place = torch.tensor(places, device=q.device)
    return _one_attend(q, k.index_select(0, place), v.index_select(0, place), None, scaling)


def one_attend_full(q, k, v, cu_seqlens, *, max_seqlen, scaling):
    """As `last_attend_full`."""
    return _one_attend(q, k, v, None, scaling)


def _one_attend(q, k, v, mask, scaling):
    queries, keys, values = q.unflatten(1, (k.shape[1], -1)), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    mask = None if mask is None else mask[None]
    out = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    return out.flatten(1, 2)


ONE_OPS = Ops(one_compress, one_select, one_attend_selected, one_attend_short, one_attend_full)
