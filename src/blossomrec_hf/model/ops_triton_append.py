"""
The attention of new events to cached histories as GPU kernels: what `append_blossomrec.Append` computes, in a few launches
a layer. An append has so little to compute that it costs what its operations cost to be launched.

Layouts are those of the cache: `states` `[B, C, G, 2·d]` and `block_keys` `[B, C // b, G, d]`, contiguous. `events`
`[T, 2]` (int64) are the history and the place in it of each new event. Everything is computed in float32, whatever the
dtype of the states, and the same events give the same bits. Nothing here has gradients, synchronizes, or is specialized
on a size that changes from one append to the next.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from .ops_reference import Queries, Selection
from .ops_triton_launch import Sizes, ceil, jit, power_of_two, tl


@jit
def rotated(x, at, cos, sin, angle, mask, D: tl.constexpr):
    """Vectors that begin at `x + at`, rotary embedding of `angle` applied, rounded to their dtype; `[…, D]` in float32."""
    d = tl.arange(0, D)[None, :]
    c, s = tl.load(cos + angle + d, mask, 0.0), tl.load(sin + angle + d, mask, 0.0)
    own = tl.load(x + at + d, mask, 0.0).to(tl.float32)
    other = tl.load(x + at + (d + D // 2) % D, mask, 0.0).to(tl.float32)
    return (own * c + tl.where(d < D // 2, -other, other) * s).to(x.dtype.element_ty).to(tl.float32)


@jit
def store_kernel(k, v, cos, sin, events, states, T, num_rows, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr):
    """Rotated keys, and values, of BT events to where they belong in the states of `num_rows` = C positions."""
    t, group = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1)
    real = t < T
    d = tl.arange(0, D)[None, :]
    source = ((t * G + group) * D)[:, None]
    keys = rotated(k, source, cos, sin, (t * D)[:, None], real[:, None], D)
    history, place = tl.load(events + 2 * t, real, 0), tl.load(events + 2 * t + 1, real, 0)
    target = states + (((history * num_rows + place) * G + group) * (2 * D))[:, None] + d
    tl.store(target, keys, real[:, None])
    tl.store(target + D, tl.load(v + source + d, real[:, None], 0.0), real[:, None])


@jit
def windows_kernel(
    k,
    learned,
    first,
    history,
    last,
    out,
    row_stride,
    G: tl.constexpr,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    BL: tl.constexpr,
):
    """One window of keys, with its learned positions."""
    window, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(last + window) - (LENGTH - 1)
    source = k + (tl.load(first + tl.load(history + window)) + begin) * row_stride + group * (row_stride // G)
    target = out + (window * G + group) * LENGTH * D
    d = tl.arange(0, D)[None, :]
    for n in range(0, LENGTH, BL):
        i = (n + tl.arange(0, BL))[:, None]
        inside = i < LENGTH
        x = tl.load(source + i * row_stride + d, inside & (begin + i >= 0), 0.0).to(tl.float32)
        x += tl.load(learned + (group * LENGTH + i) * D + d, inside, 0.0).to(tl.float32)
        tl.store(target + i * D + d, x, inside)


@jit
def attend_to(queries, k, v, place, seen, m, norm, acc, scale2, ROW: tl.constexpr, D: tl.constexpr):
    """
    One step of attention of `queries` `[R, D]` to the `place` `[N]` of a history, where `seen`: a softmax in base 2. `k` and
    `v` are its place 0, ROW elements before the next one.
    """
    at = place.to(tl.int64)[:, None] * ROW + tl.arange(0, D)[None, :]
    keys = tl.load(k + at, seen[:, None], 0.0).to(tl.float32)
    values = tl.load(v + at, seen[:, None], 0.0).to(tl.float32)
    s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale2
    s = tl.where(seen[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    norm = norm * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p, values, input_precision="ieee")
    return m_new, norm, acc


@jit
def attend_kernel(
    q,
    cos,
    sin,
    gates,
    events,
    k,
    v,
    block_keys,
    out,
    block_out,
    pi_out,
    num_rows,
    scaling,
    threshold,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SB: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    BASE: tl.constexpr,
    POWERS: tl.constexpr,
    BM: tl.constexpr,
    N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """
    The selection of one event and key/value group, the attention of its heads (R rows) to the selected blocks and to the
    short-term ones, and their gated sum. Blocks meet the mean query BM at a time, keys the queries N at a time.

    Keys and values are those of a cache, side by side, or (`PACKED`) of packed histories, whose offsets `events` are; the
    events are their last positions.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    NONE: tl.constexpr = 1 << 30  # above every block
    REP: tl.constexpr = H // G
    t, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = tl.arange(0, R)
    real = (r < REP)[:, None]
    d = tl.arange(0, D)[None, :]
    head = group * REP + r
    at = ((t * H + head) * D)[:, None]
    queries = rotated(q, at, cos, sin, t * D, real, D)
    if PACKED:
        first = tl.load(events + t).to(tl.int64)
        place = (tl.load(events + t + 1).to(tl.int64) - first).to(tl.int32) - 1  # −1 of no event: nothing is seen
        first_block = first // B
    else:
        history, place = tl.load(events + 2 * t), tl.load(events + 2 * t + 1).to(tl.int32)
        first, first_block = history * num_rows, history * (num_rows // B)
    ROW: tl.constexpr = G * D if PACKED else G * D * 2
    k += first * ROW + group * (ROW // G)
    v += first * ROW + group * (ROW // G)
    scale2 = scaling * LOG2E
    column = tl.arange(0, N)
    total = tl.zeros((R, D), tl.float32)

    if LONG:
        own = tl.maximum(place, 0) // B
        mean = tl.sum(queries, 0)[None, :] * (scaling / REP)
        keys = block_keys + (first_block * G + group) * D
        slot = tl.arange(0, KP)
        top = tl.where(slot < K, float("-inf"), float("inf"))
        chosen = NONE + slot
        m = tl.full((1,), -1000.0 * LOG2E, tl.float32)
        norm = tl.full((1,), 1.0, tl.float32)
        for n in range(0, own, BM):
            block = n + tl.arange(0, BM)
            s = tl.sum(tl.load(keys + block[:, None] * (G * D) + d, (block < own)[:, None], 0.0) * mean, 1)
            s = tl.where(block < own, s, float("-inf"))
            best = tl.max(s, 0)
            m_new = tl.maximum(m, best * LOG2E)
            norm = norm * tl.exp2(m - m_new) + tl.sum(tl.exp2(s * LOG2E - m_new), 0)
            m = m_new
            # As often as the best beats the lowest of the top: put it there, and take it out.
            lowest = tl.min(top, 0)
            while best > lowest:
                hit = tl.min(tl.where(s == best, block, NONE), 0)
                evicted = tl.max(tl.where(top == lowest, chosen, -1), 0)
                change = chosen == evicted
                top = tl.where(change, best, top)
                chosen = tl.where(change, hit, chosen)
                s = tl.where(block == hit, float("-inf"), s)
                best = tl.max(s, 0)
                lowest = tl.min(top, 0)
        top = tl.where(slot < K, top, float("-inf"))
        before = (top[None, :] > top[:, None]) | ((top[None, :] == top[:, None]) & (chosen[None, :] < chosen[:, None]))
        rank = tl.sum(before.to(tl.int32), 1)
        pi = tl.exp2(top * LOG2E - m - tl.log2(norm))
        pi = tl.where(pi > threshold, pi, 0.0)
        chosen = tl.where(pi > threshold, chosen, -1)
        target = (t * G + group) * K + rank
        tl.store(block_out + target, chosen.to(tl.int64), slot < K)
        tl.store(pi_out + target, pi, slot < K)

        m = tl.full((R,), -1e30, tl.float32)
        norm = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, D), tl.float32)
        for n in range(0, (K + 1) * B, N):
            i = (n + column) // B  # the own block, then the chosen ones
            block = tl.sum(tl.where((i - 1)[:, None] == slot[None, :], chosen[None, :], 0), 1)
            block = tl.where(i == 0, own, block)
            key = block * B + (n + column) % B
            seen = (i <= K) & (block >= 0) & (key <= place)
            m, norm, acc = attend_to(queries, k, v, key, seen, m, norm, acc, scale2, ROW, D)
        acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
        if SHORT:
            gate = tl.load(gates + t * (2 * H) + head[:, None], real, 0.0).to(tl.float32)
            total = acc * gate
        else:
            total = acc

    if SHORT:
        own = tl.maximum(place, 0) // SB
        number = tl.minimum(own + 1, WINDOW)
        for e in tl.static_range(POWERS):
            number += (own >= POWER * BASE**e).to(tl.int32)
        m = tl.full((R,), -1e30, tl.float32)
        norm = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, D), tl.float32)
        for n in range(0, number * SB, N):
            i = (n + column) // SB
            distance = i
            for e in tl.static_range(POWERS):
                distance = tl.where(i == WINDOW + e, POWER * BASE**e, distance)
            key = (own - distance) * SB + (n + column) % SB
            seen = (i < number) & (key <= place)
            m, norm, acc = attend_to(queries, k, v, key, seen, m, norm, acc, scale2, ROW, D)
        acc = acc / tl.where(norm > 0, norm, 1.0)[:, None]
        if LONG:
            gate = tl.load(gates + t * (2 * H) + H + head[:, None], real, 0.0).to(tl.float32)
            total += acc * gate
        else:
            total = acc
    tl.store(out + at + d, total, real)


def store_events(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, events: Tensor, states: Tensor) -> None:
    """
    Writes keys, rotary embedding applied here, and values into `states`.

    Args:
        k, v: `[1, G, T, d]`.
        cos, sin: `[1, T, d]`, in float32.
        events: `[T, 2]`.
        states: `[B, C, G, 2·d]` in the dtype of `k`.
    """
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    _, tokens, groups, width = k.shape
    grid = (ceil(tokens, 32), groups)
    store_kernel[grid](k, v, cos, sin, events, states, tokens, states.shape[1], G=groups, D=width, BT=32)


def compress(k: Tensor, compressor: nn.Module, windows: Queries, first: Tensor) -> Tensor:
    """
    As `ops_reference.compress`, without gradients.

    Args:
        k: `[N, G, d]`, a view of states or contiguous.
        compressor: a `BlossomCompressor`, whose weights are read here.
    """
    learned = compressor.position
    groups, length, width = learned.shape
    number = windows.position.shape[0]
    dtype = torch.promote_types(k.dtype, learned.dtype)
    out = torch.empty((number, groups, length, width), device=k.device, dtype=dtype)
    history, last = windows.history.contiguous(), windows.position.contiguous()
    lines = min(power_of_two(length), max(1, 4096 // width))
    if number:
        windows_kernel[(number, groups)](
            k, learned, first, history, last, out, k.stride(0), G=groups, D=width, LENGTH=length, BL=lines
        )
    return compressor.mlp(out.flatten(2))


@lru_cache
def _constants(heads: int, groups: int, width: int, long: bool, short: bool, sizes: Sizes) -> dict[str, int]:
    """What `attend_kernel` is specialized on."""
    rows = max(16, power_of_two(heads // groups))
    power = next(p for p in (sizes.base**e for e in range(64)) if p >= sizes.window)
    powers = next(e for e in range(32) if power * sizes.base**e * sizes.short_block >= 2**31)
    return {
        "H": heads,
        "G": groups,
        "D": width,
        "R": rows,
        "LONG": long,
        "SHORT": short,
        "B": sizes.block,
        "K": sizes.selected,
        "KP": power_of_two(sizes.selected),
        "SB": sizes.short_block,
        "WINDOW": sizes.window,
        "POWER": power,
        "BASE": sizes.base,
        "POWERS": powers,
        "BM": 4096 // width,
        "N": max(16, 1024 // width),
        "num_warps": 4 if rows * width <= 512 else 8,
        "num_stages": 2,
    }


def attend_events(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    gates: Tensor | None,
    events: Tensor,
    k: Tensor,
    v: Tensor,
    block_keys: Tensor | None,
    *,
    num_rows: int | None,
    sizes: Sizes,
    scaling: float,
    threshold: float,
    short: bool,
) -> tuple[Tensor, Selection | None]:
    """
    Long-term attention (with `block_keys`), `short`-term attention, or both with `gates`, of events to all events of their
    histories up to them: of new events of a cache, or of the last events of packed histories (of an empty one, the output is 0).

    Args:
        q: `[1, H, T, d]`, of the T events; the rotary embedding is applied here.
        cos, sin: `[1, T, d]`, in float32.
        gates: `[1, T, H, 2]`.
        events: histories and places `[T, 2]` in a cache; offsets of packed histories `[T + 1]`.
        k, v: of a cache, the halves `[B, C, G, d]` of its states, in the dtype of `q`; of packed histories, `[N, G, d]`,
            contiguous. The rotary embedding of the keys is applied.
        block_keys: `[B, C // b, G, d]` of a cache, in float32; `[N // b, G, d]` of packed histories, where those of a history
            that begins at row `first` are from row `first // b` on.
        num_rows: C, the number of places of a history in the cache; `None` for packed histories.

    Returns:
        head outputs `[1, T, H, d]` and the selection, `[T, G, k]` each.
    """
    q = q.transpose(1, 2).contiguous()
    gates = None if gates is None else gates.transpose(2, 3).contiguous()
    _, tokens, heads, width = q.shape
    groups, long = k.shape[-2], block_keys is not None
    out = torch.empty_like(q)
    blocks = torch.empty((tokens, groups, sizes.selected), device=q.device, dtype=torch.int64) if long else q
    pi = torch.empty(blocks.shape, device=q.device, dtype=torch.float32) if long else q
    attend_kernel[(tokens, groups)](
        q,
        cos,
        sin,
        q if gates is None else gates,
        events,
        k,
        v,
        block_keys if long else q,
        out,
        blocks,
        pi,
        num_rows or 0,
        scaling,
        threshold,
        PACKED=num_rows is None,
        **_constants(heads, groups, width, long, short, sizes),
    )
    return out, Selection(blocks, pi) if long else None
