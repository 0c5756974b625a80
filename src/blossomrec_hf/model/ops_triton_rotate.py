"""
What comes before the streams: offsets of histories, rotary embedding, windows of keys. Conventions:
`ops_triton_launch.py`.
"""

import math

import torch
from torch import Tensor

from .ops_triton_launch import Layout, block_place, ceil, jit, power_of_two, tl


@jit
def store_tiles(tiles, history, lo, hi, index, TILE: tl.constexpr):
    """The place of the tiles number `index` of a history: its first token and length, and the tile's first position."""
    target = tiles + (lo // TILE + history + index) * 4
    inside = lo // TILE + index < hi // TILE + 1
    tl.store(target, tl.zeros_like(index) + lo, mask=inside)
    tl.store(target + 1, tl.zeros_like(index) + hi - lo, mask=inside)
    tl.store(target + 2, index * TILE, mask=inside)


@jit
def plan_kernel(
    cu_seqlens,
    start,
    stop,
    query_tiles,
    key_tiles,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`start` and `stop` of each token, and the place of each tile: see `plan`."""
    history = tl.program_id(0)
    lo = tl.load(cu_seqlens + history).to(tl.int32)
    hi = tl.load(cu_seqlens + history + 1).to(tl.int32)
    index = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = lo + index < hi
    tl.store(start + lo + index, tl.zeros_like(index) + lo, mask=inside)
    tl.store(stop + lo + index, tl.zeros_like(index) + hi, mask=inside)
    store_tiles(query_tiles, history, lo, hi, index, QUERY_TILE)
    store_tiles(key_tiles, history, lo, hi, index, KEY_TILE)


@jit
def rotate_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    mean_out,
    T,
    sq_t,
    sq_h,
    sk_t,
    sk_g,
    scale2,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    REP: tl.constexpr,
    MEAN: tl.constexpr,
    BT: tl.constexpr,
):
    """Rotary embedding of queries (times `scale2`) and keys, and the mean query of each group."""
    group = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    half = tl.arange(0, D // 2)
    mask = (t < T)[:, None]
    t = t.to(tl.int64)[:, None]
    at = t * D + half
    c1, c2 = tl.load(cos + at, mask, 0.0), tl.load(cos + at + D // 2, mask, 0.0)
    s1, s2 = tl.load(sin + at, mask, 0.0), tl.load(sin + at + D // 2, mask, 0.0)
    mean1 = tl.zeros((BT, D // 2), tl.float32)
    mean2 = tl.zeros((BT, D // 2), tl.float32)
    for r in tl.static_range(REP):
        head = group * REP + r
        source = q + t * sq_t + head * sq_h + half
        x1, x2 = tl.load(source, mask, 0.0).to(tl.float32), tl.load(source + D // 2, mask, 0.0).to(tl.float32)
        y1 = ((x1 * c1 - x2 * s1) * scale2).to(q_out.dtype.element_ty)
        y2 = ((x2 * c2 + x1 * s2) * scale2).to(q_out.dtype.element_ty)
        target = q_out + (t * H + head) * D + half
        tl.store(target, y1, mask)
        tl.store(target + D // 2, y2, mask)
        mean1 += y1.to(tl.float32)
        mean2 += y2.to(tl.float32)
    if MEAN:
        target = mean_out + (t * G + group) * D + half
        tl.store(target, mean1 * (1.0 / REP), mask)
        tl.store(target + D // 2, mean2 * (1.0 / REP), mask)
    source = k + t * sk_t + group * sk_g + half
    x1, x2 = tl.load(source, mask, 0.0).to(tl.float32), tl.load(source + D // 2, mask, 0.0).to(tl.float32)
    target = k_out + (t * G + group) * D + half
    tl.store(target, x1 * c1 - x2 * s1, mask)
    tl.store(target + D // 2, x2 * c2 + x1 * s2, mask)


@jit
def windows_kernel(
    k,
    position,
    start,
    stop,
    out,
    T,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    BL: tl.constexpr,
):
    """The windows of every complete block with their learned positions, `[rows · B / STRIDE, G, LENGTH, D]`."""
    window, group = tl.program_id(0), tl.program_id(1)
    first, lo, real = block_place(window // (B // STRIDE), T, start, stop, B)
    begin = first + (window % (B // STRIDE) + 1) * STRIDE - LENGTH
    target = out + (window.to(tl.int64) * G + group) * LENGTH * D
    d = tl.arange(0, D)[None, :]
    length = tl.where(real, LENGTH, 0)
    for l0 in range(0, LENGTH, BL):
        i = (l0 + tl.arange(0, BL))[:, None]
        token = begin + i
        inside = i < length
        x = tl.load(k + (token.to(tl.int64) * G + group) * D + d, inside & (token >= lo), 0.0).to(tl.float32)
        x += tl.load(position + (group * LENGTH + i) * D + d, inside, 0.0).to(tl.float32)
        tl.store(target + i * D + d, x, i < LENGTH)


def plan(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    `start` and `stop` `[T]`, and the places of the tiles of queries and of keys `[tiles, 4]`: first token and length of
    the history, and the tile's first position in it (and nothing). All int32.
    """
    query_tile, key_tile = layout.query_tile, layout.key_tile
    start, stop = (layout.empty(layout.num_tokens, dtype=torch.int32) for _ in range(2))
    query_tiles, key_tiles = (layout.empty(layout.num_tiles(x), 4, dtype=torch.int32) for x in (query_tile, key_tile))
    grid = (layout.cu_seqlens.shape[0] - 1, max(1, ceil(layout.max_seqlen + 1, 1024)))
    plan_kernel[grid](
        layout.cu_seqlens,
        start,
        stop,
        query_tiles,
        key_tiles,
        QUERY_TILE=query_tile,
        KEY_TILE=key_tile,
        CHUNK=1024,
    )
    return start, stop, query_tiles, key_tiles


def rotate(
    layout: Layout, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Queries and keys with rotary embeddings, and with `mean` the mean query of each group. Queries carry the factor
    scaling · log2(e).
    """
    q_out, k_out = layout.empty(*q.shape), layout.empty(*k.shape)
    mean_q = layout.empty(*(k.shape if mean else (0,)))
    rotate_kernel[(ceil(layout.num_tokens, 32), layout.groups)](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        mean_q,
        layout.num_tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        layout.scaling * math.log2(math.e),
        **layout.heads_kw,
        REP=layout.rep_kw["REP"],
        MEAN=mean,
        BT=32,
    )
    return q_out, k_out, mean_q


def rotate_keys(layout: Layout, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys with rotary embeddings."""
    out = layout.empty(*k.shape)
    rotate_kernel[(ceil(layout.num_tokens, 32), layout.groups)](
        k,
        k,
        cos,
        sin,
        k,
        out,
        k,
        layout.num_tokens,
        *k.stride()[:2],
        *k.stride()[:2],
        1.0,
        **layout.heads_kw,
        REP=0,
        MEAN=False,
        BT=32,
    )
    return out


def windows(layout: Layout, k: Tensor, position: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """The windows of every complete block with their learned positions, `[rows · b / s, G, l, d]`."""
    stride, length, block = layout.sizes[:3]
    out = layout.empty(layout.rows * (block // stride), layout.groups, length, layout.width)
    if out.shape[0]:
        lines = min(power_of_two(length), max(1, 4096 // layout.width))
        windows_kernel[(out.shape[0], layout.groups)](
            k,
            position,
            start,
            stop,
            out,
            layout.num_tokens,
            G=layout.groups,
            D=layout.width,
            B=block,
            STRIDE=stride,
            LENGTH=length,
            BL=lines,
            num_warps=1 if lines * layout.width <= 1024 else 4,
        )
    return out
