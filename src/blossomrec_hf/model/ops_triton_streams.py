"""
Attention to the own block and to short-term blocks, and the gated sum of the streams, in tiles of neighboring positions.
Attention to the selected blocks comes from `ops_triton_selected.py` in parts, which are summed here. Conventions:
`ops_triton_launch.py`; gradients: `ops_triton_streams_backward.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_triton_launch import LAUNCH, Layout, ceil, jit, power_of_two, tl


# Up to this many blocks of a history, of at most 32, a tile of queries may read all keys up to it, KEYS at a time. On an
# H100 (65,536 items, 8 heads over 2, 2026-11-27), the attention of a layer then takes 170 us in inference instead of 213 at
# 200 items, and as long as otherwise at 512. With one query head per key/value head, and in training, nothing is gained.
MAX_BLOCKS_READ = 16
KEYS = 32


class Stream(NamedTuple):
    """
    What the backward pass needs of a stream.

    Attributes:
        out `[T, H, d]`: its output before the gate.
        lse `[T, H]`: of its logits.
    """

    out: Tensor
    lse: Tensor


@jit
def tile_place(tiles):
    """The first token and the length of the history of this program's tile, and the tile's first position in it."""
    tile = tiles + tl.program_id(0) * 4
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)


@jit
def count_distances(farthest, num_powers, WINDOW: tl.constexpr, POWER: tl.constexpr, BASE: tl.constexpr):
    """How many short-term block distances there are up to `farthest`."""
    count = tl.minimum(farthest + 1, WINDOW)
    distance = tl.full((), POWER, tl.int32)
    for _ in range(num_powers):
        count += (distance <= farthest).to(tl.int32)
        distance *= BASE
    return count


@jit
def distance_of(i, num_powers, WINDOW: tl.constexpr, POWER: tl.constexpr, BASE: tl.constexpr):
    """Short-term block distance number `i`; `POWER` is the first power of `BASE` that is not below `WINDOW`."""
    if BASE == 2:
        return tl.where(i < WINDOW, i, POWER << tl.minimum(tl.maximum(i - WINDOW, 0), 30))
    distance = i
    power = tl.full((), POWER, tl.int32)
    for e in range(num_powers):
        distance = tl.where(i == WINDOW + e, power, distance)
        power *= BASE
    return distance


@jit
def attend(queries, keys, values, seen, m, norm, acc, PREC: tl.constexpr):
    """One step of attention with a running maximum `m` and sum `norm`."""
    s = tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision=PREC), float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    norm = norm * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PREC)
    return m_new, norm, acc


@jit
def either(a, b):
    """The bits of both."""
    return a | b


@jit
def slot_parts(
    first_slot,
    lo,
    n,
    p0,
    group,
    blocks,
    G: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    KC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The numbers of the parts of KC slots of a tile's rows, slot after slot `[KC · N · REPP]`, and which exist."""
    row = tl.arange(0, KC * N * REPP)
    local, slot = row // REPP % N, first_slot + row // (N * REPP)
    pair = ((lo + p0 + local).to(INDEX) * G + group) * K + slot
    real = (local < TILE) & (p0 + local < n) & (row % REPP < REP) & (slot < K)
    return pair * REP + row % REPP, tl.load(blocks + pair, real, -1) >= 0


@jit
def streams_kernel(
    q,
    k,
    v,
    tiles,
    blocks,
    part_out,
    part_lse,
    gates,
    out,
    long_out,
    short_out,
    long_lse,
    short_lse,
    num_powers,
    sg_t,
    sg_h,
    sg_s,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    SB: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    BASE: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    OWN: tl.constexpr,
    KC: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    KEYS: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    The streams of a tile of TILE positions (padded to N). Long-term (`LONG`): the own block, and the parts of the selected
    ones; or, with `KEYS` > 0, all keys up to the tile, KEYS at a time, but for blocks that none of the tile's queries
    selected. Short-term (`SHORT`): the keys at one block distance are the tile itself moved back, C distances at a time.
    """
    lo, n, p0 = tile_place(tiles)
    group = tl.program_id(1)
    if p0 < n:
        row = tl.arange(0, N * REPP)
        local = row // REPP
        place = p0 + local
        stored = (local < TILE) & (place < n) & (row % REPP < REP)
        head = group * REP + row % REPP
        d = tl.arange(0, D)[None, :]
        token = (lo + place).to(INDEX)
        at = token * H + head
        queries = tl.load(q + at[:, None] * D + d, stored[:, None], 0.0)
        total = tl.zeros((N * REPP, D), tl.float32)
        if LONG:
            m = tl.full((N * REPP,), -1e30, tl.float32)
            norm = tl.zeros((N * REPP,), tl.float32)
            acc = tl.zeros((N * REPP, D), tl.float32)
            if KEYS:
                selected = tl.full((N * REPP,), 1, tl.int32) << (tl.minimum(place, n - 1) // SB)  # one bit per block
                for slot in tl.static_range(K):
                    chosen = tl.load(blocks + (token * G + group) * K + slot, stored, -1).to(tl.int32)
                    selected |= tl.where(chosen >= 0, 1 << tl.maximum(chosen, 0), 0)
                of_tile = tl.reduce(selected, 0, either)
                for first in range(0, tl.minimum(p0 + TILE, n), KEYS):
                    if ((of_tile >> (first // SB)) & ((2 << ((KEYS - 1) // SB)) - 1)) != 0:
                        key = first + tl.arange(0, KEYS)
                        source = ((lo + key).to(INDEX) * G + group)[:, None] * D + d
                        keys = tl.load(k + source, (key < n)[:, None], 0.0)
                        values = tl.load(v + source, (key < n)[:, None], 0.0)
                        seen = ((selected[:, None] >> (key // SB)[None, :]) & 1) != 0
                        seen &= key[None, :] <= place[:, None]
                        m, norm, acc = attend(queries, keys, values, seen, m, norm, acc, PREC)
            for first_slot in tl.static_range(0, 0 if KEYS else K, KC):
                part, real = slot_parts(first_slot, lo, n, p0, group, blocks, G, K, REP, REPP, TILE, N, KC, INDEX)
                lse = tl.load(part_lse + part, real, float("-inf"))
                other = tl.load(part_out + part[:, None] * D + d, real[:, None], 0.0).to(tl.float32)
                lse = tl.reshape(lse, (KC, N * REPP))
                m_new = tl.maximum(m, tl.max(lse, 0))
                weight = tl.exp2(lse - m_new[None, :])
                alpha = tl.exp2(m - m_new)
                norm = norm * alpha + tl.sum(weight, 0)
                other *= tl.reshape(weight, (KC * N * REPP,))[:, None]
                acc = acc * alpha[:, None] + tl.sum(tl.reshape(other, (KC, N * REPP, D)), 0)
                m = m_new
            for e in tl.static_range(0 if KEYS else OWN):
                own = (p0 // SB + e) * SB + tl.arange(0, SB)
                own_source = ((lo + own).to(INDEX) * G + group)[:, None] * D + d
                own_keys = tl.load(k + own_source, (own < n)[:, None], 0.0)
                own_values = tl.load(v + own_source, (own < n)[:, None], 0.0)
                own_seen = own[None, :] <= place[:, None]
                if OWN > 1:
                    own_seen &= (p0 // SB + e == place // SB)[:, None]
                m, norm, acc = attend(queries, own_keys, own_values, own_seen, m, norm, acc, PREC)
            norm = tl.where(stored, norm, 1.0)
            acc *= (1.0 / norm)[:, None]
            if SAVE:
                tl.store(long_lse + at, m + tl.log2(norm), stored)
            if GATED:
                if SAVE:
                    tl.store(long_out + at[:, None] * D + d, acc, stored[:, None])
                acc *= tl.load(gates + token * sg_t + head * sg_h, stored, 0.0).to(tl.float32)[:, None]
            total += acc
        if SHORT:
            m = tl.full((N * REPP,), -1e30, tl.float32)
            norm = tl.zeros((N * REPP,), tl.float32)
            acc = tl.zeros((N * REPP, D), tl.float32)
            column = tl.arange(0, C * N)
            count = count_distances((tl.minimum(p0 + TILE, n) - 1) // B, num_powers, WINDOW, POWER, BASE)
            for first in range(0, count, C):
                i = first + column // N
                key = p0 - distance_of(i, num_powers, WINDOW, POWER, BASE) * B + column % N
                near = (i < count) & (column % N < TILE) & (key >= 0) & (key < n)
                source = ((lo + key).to(INDEX) * G + group)[:, None] * D + d
                keys = tl.load(k + source, near[:, None], 0.0)
                values = tl.load(v + source, near[:, None], 0.0)
                seen = tl.where(near, key, n)[None, :] <= tl.minimum(place, n - 1)[:, None]
                if TILE > B:
                    seen &= (local // B)[:, None] == (column % N // B)[None, :]
                m, norm, acc = attend(queries, keys, values, seen, m, norm, acc, PREC)
            norm = tl.where(stored, norm, 1.0)
            acc *= (1.0 / norm)[:, None]
            if SAVE:
                tl.store(short_lse + at, m + tl.log2(norm), stored)
            if GATED:
                if SAVE:
                    tl.store(short_out + at[:, None] * D + d, acc, stored[:, None])
                acc *= tl.load(gates + token * sg_t + head * sg_h + sg_s, stored, 0.0).to(tl.float32)[:, None]
            total += acc
        tl.store(out + at[:, None] * D + d, total, stored[:, None])


def query_tile(layout: Layout, name: str) -> dict[str, int]:
    """The tiles of queries of the kernel `name`, its warps and stages."""
    repp = layout.rep_kw["REPP"]
    positions = max(power_of_two(layout.query_tile), ceil(16, repp))
    distances = max(ceil(16, positions), LAUNCH[name]["COLUMNS"] // positions)
    launch = layout.launch(name, positions * repp, distances * positions)
    slots = max(1, min(power_of_two(layout.sizes.selected), 2048 // (positions * repp * layout.width)))
    own = _own_blocks(layout)
    return {"TILE": layout.query_tile, "N": positions, "C": distances, "OWN": own, "KC": slots} | launch


def reads_all_keys(layout: Layout) -> bool:
    """Whether, in inference, reading all keys takes less time than attention to the selected blocks by themselves."""
    return layout.max_seqlen <= MAX_BLOCKS_READ * layout.sizes.block and layout.rep_kw["REPP"] >= 4


def _own_blocks(layout: Layout) -> int:
    """How many selection blocks a tile of queries may lie in."""
    tile, block = layout.query_tile, layout.sizes.block
    return 1 if block % tile == 0 else (tile - 2) // block + 2


def streams(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    blocks: Tensor | None,
    parts: tuple[Tensor, Tensor] | None,
    gates: Tensor | None,
    short: bool,
    save: bool,
) -> tuple[Tensor, Stream, Stream]:
    """
    Head outputs `[T, H, d]`, and with `save` the long-term and the short-term stream. A stream without a gate is the
    output itself, and its `out` is empty.

    Args:
        blocks: the selection; `None` without the long-term stream.
        parts: what `ops_triton_selected.selected` gives; `None` to read all keys (see `reads_all_keys`).
    """
    gated, long = gates is not None, blocks is not None
    out = layout.empty(*q.shape)

    def stream(wanted: bool) -> Stream:
        shape = q.shape if wanted and save else (0,)
        return Stream(layout.empty(*(shape if gated else (0,))), layout.empty(*shape[:2], dtype=torch.float32))

    long_stream, short_stream = stream(long), stream(short)
    streams_kernel[(layout.num_tiles(layout.query_tile), layout.groups)](
        q,
        k,
        v,
        query_tiles,
        blocks if long else q,
        *(parts or (q, q)),
        gates if gated else q,
        out,
        long_stream.out,
        short_stream.out,
        long_stream.lse,
        short_stream.lse,
        layout.num_powers,
        *(gates.stride() if gated else (0, 0, 0)),
        **layout.heads_kw,
        **layout.rep_kw,
        SB=layout.sizes.block,
        K=layout.sizes.selected,
        **layout.short_kw,
        LONG=long,
        SHORT=short,
        GATED=gated,
        SAVE=save,
        KEYS=KEYS if parts is None else 0,
        **layout.index,
        **layout.precision,
        **query_tile(layout, "streams"),
    )
    return out, long_stream, short_stream
