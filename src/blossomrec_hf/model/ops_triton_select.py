"""
Scores of past blocks, their softmax and the best of them in one pass, and the gradient of the score keys. Conventions:
`ops_triton_launch.py`.
"""

import math

import torch
from torch import Tensor

from .ops_triton_launch import LAUNCH, Layout, ceil, jit, power_of_two, tl


@jit
def select_kernel(
    mean_q,
    c,
    start,
    block_out,
    pair_out,
    pi_out,
    lse_out,
    u_out,
    T,
    num_rows,
    threshold,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
):
    """
    Scores, softmax and the top blocks in one pass, and (`SAVE`) u = sum of π · c for the backward pass. Of each pair also
    the number of its (block, group), by which `ops_triton_selected.py` sorts.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the late queries of a history have the most to do
    group = tl.program_id(1)
    t = tile * BQ + tl.arange(0, BQ)
    token = tl.minimum(t, T - 1)
    lo = tl.load(start + token)
    begin = lo // B
    end = begin + (token - lo) // B
    d = tl.arange(0, D)
    at = token.to(tl.int64) * G + group
    queries = tl.load(mean_q + at[:, None] * D + d)
    slot = tl.arange(0, KP)[None, :]
    top = tl.where(slot < K, float("-inf"), float("inf")) + tl.zeros((BQ, KP), tl.float32)
    where = tl.zeros((BQ, KP), tl.int32) - 1 - slot
    m = tl.zeros((BQ,), tl.float32) - 1000.0 * 1.4426950408889634
    norm = tl.zeros((BQ,), tl.float32) + 1.0
    u = tl.zeros((BQ, D), tl.float32)
    common_begin, common_end = tl.max(begin, 0), tl.min(end, 0)  # candidates of every row of the tile
    last = tl.max(end, 0)
    for n in range(tl.min(begin, 0), last, BM):
        column = n + tl.arange(0, BM)
        source = c + (tl.minimum(column, num_rows - 1).to(tl.int64) * G + group)[:, None] * D + d
        keys = tl.load(source)
        s = tl.dot(queries, tl.trans(keys), input_precision=PREC)
        if (n < common_begin) | (n + BM > common_end):
            s = tl.where((column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None]), s, float("-inf"))
        best = tl.max(s, 1)
        m_new = tl.maximum(m, best)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        norm = norm * alpha + tl.sum(p, 1)
        if SAVE:
            u = u * alpha[:, None] + tl.dot(p.to(keys.dtype), keys, input_precision=PREC)
        m = m_new
        # As often as any row's best beats the lowest of its top: put it there, and take it out of the tile.
        lowest = tl.min(top, 1)
        while tl.max((best > lowest).to(tl.int32), 0) > 0:
            hit = tl.min(tl.where(s == best[:, None], column[None, :], 2147483647), 1)
            evicted = tl.max(tl.where(top == lowest[:, None], where, -2147483647), 1)
            change = (where == evicted[:, None]) & (top == lowest[:, None]) & (best > lowest)[:, None]
            top = tl.where(change, best[:, None], top)
            where = tl.where(change, hit[:, None], where)
            s = tl.where(column[None, :] == hit[:, None], float("-inf"), s)
            best = tl.max(s, 1)
            lowest = tl.min(top, 1)
    top = tl.where(slot < K, top, float("-inf"))
    order = tl.where(slot < K, where, -2147483647)  # behind everything: among equals the lower block comes first
    behind = (top[:, None, :] > top[:, :, None]) | (
        (top[:, None, :] == top[:, :, None])
        & tl.where(
            top[:, :, None] == float("-inf"),
            order[:, None, :] > order[:, :, None],
            order[:, None, :] < order[:, :, None],
        )
    )
    rank = tl.sum(behind.to(tl.int32), 2)
    lse = m + tl.log2(norm)
    pi = tl.exp2(top - m[:, None]) / norm[:, None]  # through lse, large scores would cost digits
    kept = pi > threshold
    target = at[:, None] * K + rank
    mask = (t < T)[:, None] & (slot < K)
    tl.store(block_out + target, tl.where(kept, where - begin[:, None], -1).to(tl.int64), mask)
    number = tl.where(kept, where * G + group, num_rows * G)
    tl.store(pair_out + target, number.to(pair_out.dtype.element_ty), mask)
    tl.store(pi_out + target, tl.where(kept, pi, 0.0), mask)
    if SAVE:
        tl.store(lse_out + at, lse, t < T)
        tl.store(u_out + at[:, None] * D + d, u / norm[:, None], (t < T)[:, None])


@jit
def spread_kernel(
    mean_q,
    c,
    lse,
    weight,
    weight_sum,
    blocks,
    start,
    stop,
    dc_part,
    T,
    num_rows,
    span,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    What the score keys get through the softmax of all later queries, of which each program takes `span`. To the best block
    of a query, its own weight does not come back this way (`selected_backward_kernel` accounts for it).
    """
    r0, group, split = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    row = r0 + tl.arange(0, BM)
    d = tl.arange(0, D)[None, :]
    source = (row.to(tl.int64) * G + group)[:, None] * D + d
    keys = tl.load(c + source, (row < num_rows)[:, None], 0.0)
    begin = r0 * B + split * span
    end = tl.minimum(begin + span, tl.load(stop + tl.minimum(r0 + BM, num_rows) * B - 1))
    acc = tl.zeros((BM, D), tl.float32)
    for i in range(begin, end, BQ):
        t = i + tl.arange(0, BQ)
        real = t < end
        at = t.to(tl.int64) * G + group
        queries = tl.load(mean_q + at[:, None] * D + d, real[:, None], 0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PREC)
        p = tl.exp2(s - tl.load(lse + at, real, 0.0)[None, :])
        best = tl.load(blocks + at * K, real, -1).to(tl.int32)  # −1 for none, whose weights are zero
        best += tl.load(start + t, real, 0) // B
        all_blocks = tl.load(weight_sum + at, real, 0.0)
        others = all_blocks - tl.load(weight + at * K, real, 0.0)
        p *= tl.where(row[:, None] == best[None, :], others[None, :], all_blocks[None, :])
        lo = tl.load(start + i)
        one_history = lo == tl.load(start + tl.minimum(i + BQ, end) - 1)
        if (one_history == 0) | (i + BQ > end) | (lo // B > r0) | (lo // B + (i - lo) // B < r0 + BM):
            first = tl.load(start + t, real, 0)
            last = tl.where(real, first // B + (t - first) // B, 0)
            p = tl.where((row[:, None] >= (first // B)[None, :]) & (row[:, None] < last[None, :]), p, 0.0)
        acc += tl.dot(p.to(queries.dtype), queries, input_precision=PREC)
    target = ((split.to(tl.int64) * num_rows + row) * G + group)[:, None] * D + d
    tl.store(dc_part + target, acc, (row < num_rows)[:, None])


@jit
def score_key_kernel(
    chosen_part,
    spread_part,
    spans,
    dc,
    num_rows,
    num_splits,
    factor,
    G: tl.constexpr,
    D: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BR: tl.constexpr,
):
    """Sums the parts of the score keys' gradient, and hands each window of a block its share."""
    key = tl.program_id(0) * BR + tl.arange(0, BR)  # row · G + group
    real = key < num_rows * G
    first, count = tl.load(spans + key * 2, real, 0), tl.load(spans + key * 2 + 1, real, 0)
    d = tl.arange(0, D)[None, :]
    acc = tl.zeros((BR, D), tl.float32)
    for i in range(tl.max(count, 0)):
        acc += tl.load(chosen_part + (first + i).to(tl.int64)[:, None] * D + d, (i < count)[:, None], 0.0)
    for i in range(num_splits):
        at = key.to(tl.int64) + i * (num_rows.to(tl.int64) * G)
        acc -= tl.load(spread_part + at[:, None] * D + d, real[:, None], 0.0)
    acc *= factor
    for i in tl.static_range(PER_BLOCK):
        window = (key // G).to(tl.int64) * PER_BLOCK + i
        tl.store(dc + (window * G + key % G)[:, None] * D + d, acc, real[:, None])


def pool(layout: Layout, c: Tensor) -> Tensor:
    """Score keys `[rows, G, d]` of compressed keys `[rows · b / s, G, d]`."""
    per_block = layout.sizes.block // layout.sizes.stride
    return c if per_block == 1 else c.unflatten(0, (-1, per_block)).mean(1, dtype=torch.float32).to(c.dtype)


def select(
    layout: Layout, mean_q: Tensor, c: Tensor, start: Tensor, threshold: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    Returns:
        blocks (int64) `[T, G, k]`, −1 for none; the number row · G + g of each one's (block, group), that of none behind
        all others; π `[T, G, k]`; and with `save` the lse of the scores `[T, G]` and u `[T, G, d]`.
    """
    tokens, groups, selected = layout.num_tokens, layout.groups, layout.sizes.selected
    blocks = layout.empty(tokens, groups, selected, dtype=torch.int64)
    pair = layout.empty(*blocks.shape, dtype=torch.int16 if layout.num_keys < 2**15 else torch.int32)
    pi = layout.empty(*blocks.shape, dtype=torch.float32)
    lse = layout.empty(*((tokens, groups) if save else (0,)), dtype=torch.float32)
    u = layout.empty(*((tokens, groups, layout.width) if save else (0,)))
    queries = LAUNCH["select"]["BQ"]
    columns = min(LAUNCH["select"]["BM"], max(16, power_of_two(layout.max_seqlen // layout.sizes.block)))
    select_kernel[(ceil(tokens, queries), groups)](
        mean_q,
        c,
        start,
        blocks,
        pair,
        pi,
        lse,
        u,
        tokens,
        layout.rows,
        threshold,
        G=groups,
        D=layout.width,
        B=layout.sizes.block,
        K=selected,
        KP=power_of_two(selected),
        SAVE=save,
        **layout.precision,
        BQ=queries,
        BM=columns,
        **layout.launch("select", queries, columns),
    )
    return blocks, pair, pi, lse, u


def select_backward(
    layout: Layout,
    mean_q: Tensor,
    c: Tensor,
    lse: Tensor,
    weight: Tensor,
    blocks: Tensor,
    start: Tensor,
    stop: Tensor,
    chosen_part: Tensor,
    spans: Tensor,
) -> Tensor:
    """
    The gradient of the compressed keys `[rows · b / s, G, d]`.

    Args:
        weight: `[T, G, k]`, π times the gradient of the factor of each selected block.
        chosen_part, spans: the parts of the score keys' gradient that come from the queries that chose them, and the
            span of each (block, group) in them (`ops_triton_selected.py`).
    """
    stride, _, block = layout.sizes[:3]
    dc = layout.empty(layout.rows * (block // stride), layout.groups, layout.width)
    if not layout.rows:
        return dc
    keys, queries = LAUNCH["spread"]["BM"], LAUNCH["spread"]["BQ"]
    span = max(1024, ceil(layout.max_seqlen, 16 * queries) * queries)
    num_splits = ceil(keys * block + layout.max_seqlen, span)
    parts = layout.empty(num_splits, layout.rows, layout.groups, layout.width, dtype=torch.float32)
    spread_kernel[(ceil(layout.rows, keys), layout.groups, num_splits)](
        mean_q,
        c,
        lse,
        weight,
        weight.sum(-1),
        blocks,
        start,
        stop,
        parts,
        layout.num_tokens,
        layout.rows,
        span,
        G=layout.groups,
        D=layout.width,
        B=block,
        K=layout.sizes.selected,
        **layout.precision,
        BM=keys,
        BQ=queries,
        **layout.launch("spread", keys // 2, queries),
    )
    # The mean queries carry scaling · log2(e).
    score_key_kernel[(ceil(layout.num_keys, 16),)](
        chosen_part,
        parts,
        spans,
        dc,
        layout.rows,
        num_splits,
        math.log(2) * stride / block,
        G=layout.groups,
        D=layout.width,
        PER_BLOCK=block // stride,
        BR=16,
        num_warps=1,
    )
    return dc
