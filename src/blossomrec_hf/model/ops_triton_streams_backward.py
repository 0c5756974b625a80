"""
The gradients of the streams: those of the gates, of the queries (in the tiles of `ops_triton_streams.py`) and of the keys
and values (in tiles of their own). Conventions: `ops_triton_launch.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_triton_launch import LAUNCH, Layout, ceil, jit, power_of_two, tl, unrotate
from .ops_triton_streams import Stream, count_distances, distance_of, query_tile, slot_parts, tile_place


@jit
def query_gradient(queries, do, keys, values, seen, lse, delta, PREC: tl.constexpr):
    """What a step of `attend` gives the gradient of the queries, without the factor scaling."""
    s = tl.dot(queries, tl.trans(keys), input_precision=PREC)
    p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(do, tl.trans(values), input_precision=PREC) - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, input_precision=PREC)


@jit
def key_gradients(queries, do, keys, values, seen, lse, delta, dkeys, dvalues, PREC: tl.constexpr):
    """Adds what a step of `attend` gives the gradients of the keys and values, transposed; keys times log2(e)."""
    s = tl.dot(queries, tl.trans(keys), input_precision=PREC)
    p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
    dvalues += tl.dot(tl.trans(do), p.to(do.dtype), input_precision=PREC)
    ds = p * (tl.dot(do, tl.trans(values), input_precision=PREC) - delta[:, None])
    dkeys += tl.dot(tl.trans(queries), ds.to(queries.dtype), input_precision=PREC)
    return dkeys, dvalues


@jit
def load_queries(q, grad, terms, source, reads, D: tl.constexpr):
    """Rows of queries, their gradients and the terms of their stream. Rows that are not read are 0 and add nothing."""
    at = source[:, None] * D + tl.arange(0, D)[None, :]
    queries, do = tl.load(q + at, reads[:, None], 0.0), tl.load(grad + at, reads[:, None], 0.0)
    return queries, do, tl.load(terms + source * 2, reads, 0.0), tl.load(terms + source * 2 + 1, reads, 0.0)


@jit
def store_terms(do, out, lse, gate, terms, dgate, at, source, real, GATED: tl.constexpr):
    """The gradient of the gate of a stream, and its terms."""
    delta = tl.sum(do * tl.load(out + source, real[:, None], 0.0).to(tl.float32), 1)
    shifted = tl.load(lse + at, real, 0.0)
    if GATED:
        tl.store(dgate, delta, real)
        shifted -= tl.log2(tl.load(gate, real, 1.0).to(tl.float32))
    tl.store(terms + at * 2, shifted, real)
    tl.store(terms + at * 2 + 1, delta, real)


@jit
def terms_kernel(
    grad,
    gates,
    long_out,
    long_lse,
    short_out,
    short_lse,
    long_terms,
    short_terms,
    dgates,
    T,
    sg_t,
    sg_h,
    sg_s,
    sdg_t,
    sdg_h,
    sdg_s,
    H: tl.constexpr,
    D: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of the gates, and the terms of each stream: see `gradient_terms`."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = at < T.to(tl.int64) * H
    source = at[:, None] * D + tl.arange(0, D)[None, :]
    do = tl.load(grad + source, real[:, None], 0.0).to(tl.float32)
    gate = gates + at // H * sg_t + at % H * sg_h
    dgate = dgates + at // H * sdg_t + at % H * sdg_h
    if LONG:
        store_terms(do, long_out, long_lse, gate, long_terms, dgate, at, source, real, GATED)
    if SHORT:
        store_terms(do, short_out, short_lse, gate + sg_s, short_terms, dgate + sdg_s, at, source, real, GATED)


@jit
def query_backward_kernel(
    q,
    k,
    v,
    tiles,
    grad,
    long_terms,
    short_terms,
    blocks,
    dq_part,
    weight,
    c,
    u,
    cos,
    sin,
    dq,
    num_powers,
    scaling,
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
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    The gradient of the queries in the tiles of `streams_kernel`, rotary embedding undone, (`FACTOR`) with what their
    importance gives them.
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
        do = tl.load(grad + at[:, None] * D + d, stored[:, None], 0.0)
        acc = tl.zeros((N * REPP, D), tl.float32)
        if LONG:
            for first_slot in tl.static_range(0, K, KC):
                part, real = slot_parts(first_slot, lo, n, p0, group, blocks, G, K, REP, REPP, TILE, N, KC, INDEX)
                other = tl.load(dq_part + part[:, None] * D + d, real[:, None], 0.0).to(tl.float32)
                acc += tl.sum(tl.reshape(other, (KC, N * REPP, D)), 0)
            lse, delta = tl.load(long_terms + at * 2, stored, 0.0), tl.load(long_terms + at * 2 + 1, stored, 0.0)
            for e in tl.static_range(OWN):
                own = (p0 // SB + e) * SB + tl.arange(0, SB)
                own_source = ((lo + own).to(INDEX) * G + group)[:, None] * D + d
                own_keys = tl.load(k + own_source, (own < n)[:, None], 0.0)
                own_values = tl.load(v + own_source, (own < n)[:, None], 0.0)
                own_seen = own[None, :] <= place[:, None]
                if OWN > 1:
                    own_seen &= (p0 // SB + e == place // SB)[:, None]
                acc += query_gradient(queries, do, own_keys, own_values, own_seen, lse, delta, PREC)
        if SHORT:
            lse, delta = tl.load(short_terms + at * 2, stored, 0.0), tl.load(short_terms + at * 2 + 1, stored, 0.0)
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
                acc += query_gradient(queries, do, keys, values, seen, lse, delta, PREC)
        acc *= scaling
        if FACTOR:
            kept = (tl.arange(0, N) < TILE) & (p0 + tl.arange(0, N) < n)
            at_group = (lo + p0 + tl.arange(0, N)).to(INDEX) * G + group
            dmean = tl.zeros((N, D), tl.float32)
            total = tl.zeros((N,), tl.float32)
            for first_slot in tl.static_range(0, K, KC):
                slot = tl.arange(0, KC * N)
                place = p0 + slot % N
                pair = ((lo + place).to(INDEX) * G + group) * K + first_slot + slot // N
                real = (slot % N < TILE) & (place < n) & (first_slot + slot // N < K)
                block = tl.load(blocks + pair, real, -1).to(INDEX)
                w = tl.load(weight + pair, block >= 0, 0.0)
                source = ((lo // SB + block) * G + group)[:, None] * D + d
                score_keys = tl.load(c + source, (block >= 0)[:, None], 0.0).to(tl.float32)
                dmean += tl.sum(tl.reshape(w[:, None] * score_keys, (KC, N, D)), 0)
                total += tl.sum(tl.reshape(w, (KC, N)), 0)
            dmean -= total[:, None] * tl.load(u + at_group[:, None] * D + d, kept[:, None], 0.0).to(tl.float32)
            dmean *= scaling / REP
            acc = tl.reshape(tl.reshape(acc, (N, REPP, D)) + dmean[:, None, :], (N * REPP, D))
        angle = token[:, None] * D + d
        cosine, sine = tl.load(cos + angle, stored[:, None], 0.0), tl.load(sin + angle, stored[:, None], 0.0)
        one, two = unrotate(acc, cosine, sine, N * REPP, D)
        target = dq + at[:, None] * D + tl.arange(0, D // 2)[None, :]
        tl.store(target, one, stored[:, None])
        tl.store(target + D // 2, two, stored[:, None])


@jit
def key_backward_kernel(
    q,
    k,
    v,
    tiles,
    grad,
    long_terms,
    short_terms,
    dk_part,
    dv_part,
    spans,
    dwindows,
    cos,
    sin,
    dk,
    dv,
    num_powers,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    SB: tl.constexpr,
    STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    BASE: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    OWN: tl.constexpr,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    CHOSEN: tl.constexpr,
    WINDOWS: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    Gradients of the keys and values of a tile of TILE positions: from short-term queries (the tile moved ahead, C distances
    at a time), from queries of the own selection block, from the chunks of `selected_backward_kernel` (`CHOSEN`), and from
    the windows (`WINDOWS`).
    """
    lo, n, p0 = tile_place(tiles)
    group = tl.program_id(1)
    if p0 < n:
        column = tl.arange(0, N)
        key = p0 + column
        real = (column < TILE) & (key < n)
        d = tl.arange(0, D)[None, :]
        token = (lo + key).to(INDEX)
        at = token * G + group
        keys = tl.load(k + at[:, None] * D + d, real[:, None], 0.0)
        values = tl.load(v + at[:, None] * D + d, real[:, None], 0.0)
        if CHOSEN:
            span = spans + ((lo // SB + key // SB) * G + group) * 2
            whole = real & ((key // SB + 1) * SB <= n)
            chunk, count_chunks = tl.load(span, whole, 0), tl.load(span + 1, whole, 0)
        dkeys = tl.zeros((D, N), tl.float32)
        dvalues = tl.zeros((D, N), tl.float32)
        if SHORT:
            row = tl.arange(0, C * N * REPP)
            local = row // REPP % N
            head = group * REP + row % REPP
            count = count_distances((n - 1 - p0) // B, num_powers, WINDOW, POWER, BASE)
            number = row // (N * REPP)
            place = p0 + distance_of(number, num_powers, WINDOW, POWER, BASE) * B + local
            reads = (number < count) & (local < TILE) & (place < n) & (row % REPP < REP)
            source = (lo + place).to(INDEX) * H + head
            queries, do, lse, delta = load_queries(q, grad, short_terms, source, reads, D)
            for first in range(0, count, C):
                seen = key[None, :] <= place[:, None]
                if TILE > B:
                    seen &= (local // B)[:, None] == (column // B)[None, :]
                # Loaded before the current ones are used: two products need them in two layouts, which the compiler
                # does not load ahead of time.
                number += C
                place = p0 + distance_of(number, num_powers, WINDOW, POWER, BASE) * B + local
                reads = (number < count) & (local < TILE) & (place < n) & (row % REPP < REP)
                source = (lo + place).to(INDEX) * H + head
                following = load_queries(q, grad, short_terms, source, reads, D)
                dkeys, dvalues = key_gradients(queries, do, keys, values, seen, lse, delta, dkeys, dvalues, PREC)
                queries, do, lse, delta = following
        if LONG:
            own_row = tl.arange(0, OWN * N * REPP)
            own_head = group * REP + own_row % REPP
            end = tl.minimum(n, ((p0 + TILE - 1) // SB + 1) * SB)
            for first in range(p0, end, OWN * N):
                own = first + own_row // REPP
                own_source = (lo + own).to(INDEX) * H + own_head
                own_reads = (own < end) & (own_row % REPP < REP)
                own_queries, own_do, own_lse, own_delta = load_queries(q, grad, long_terms, own_source, own_reads, D)
                own_seen = (key[None, :] <= own[:, None]) & ((own // SB)[:, None] == (key // SB)[None, :])
                dkeys, dvalues = key_gradients(
                    own_queries, own_do, keys, values, own_seen, own_lse, own_delta, dkeys, dvalues, PREC
                )
        dkeys, dvalues = tl.trans(dkeys), tl.trans(dvalues)
        if CHOSEN:
            for i in range(0, tl.max(count_chunks, 0), 2):
                for e in tl.static_range(2):
                    part = ((chunk + i + e).to(INDEX) * SB + key % SB)[:, None] * D + d
                    dkeys += tl.load(dk_part + part, (i + e < count_chunks)[:, None], 0.0)
                    dvalues += tl.load(dv_part + part, (i + e < count_chunks)[:, None], 0.0)
        dkeys *= 0.6931471805599453  # the queries carry log2(e)
        if WINDOWS:
            for i in tl.static_range((LENGTH + STRIDE - 1) // STRIDE):
                j = key // STRIDE + i
                slot = key - (j + 1) * STRIDE + LENGTH
                inside = real & (slot >= 0) & (slot < LENGTH) & (j < n // SB * (SB // STRIDE))
                window = (lo // SB * (SB // STRIDE) + j).to(INDEX) * G + group
                source = dwindows + (window * LENGTH + slot)[:, None] * D + d
                dkeys += tl.load(source, inside[:, None], 0.0).to(tl.float32)
        tl.store(dv + at[:, None] * D + d, dvalues, real[:, None])
        angle = token[:, None] * D + d
        cosine, sine = tl.load(cos + angle, real[:, None], 0.0), tl.load(sin + angle, real[:, None], 0.0)
        one, two = unrotate(dkeys, cosine, sine, N, D)
        target = dk + at[:, None] * D + tl.arange(0, D // 2)[None, :]
        tl.store(target, one, real[:, None])
        tl.store(target + D // 2, two, real[:, None])


def gradient_terms(
    layout: Layout, grad: Tensor, gates: Tensor | None, long: Stream | None, short: Stream | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """
    What the gradients of each stream need of each head, `[T, H, 2]`: the lse minus the logarithm of the gate, so that
    probabilities come out times the gate; and delta, the sum of output times gradient. Then the gradient of the gates.
    """
    gated = gates is not None
    dgates = torch.empty_like(gates) if gated else layout.empty(0)
    long_terms, short_terms = (
        None if stream is None else layout.empty(*stream.lse.shape, 2, dtype=torch.float32) for stream in (long, short)
    )
    rows = max(16, 2048 // layout.width)
    terms_kernel[(ceil(layout.num_tokens * layout.heads, rows),)](
        grad,
        gates if gated else grad,
        *(long or (grad, grad)),
        *(short or (grad, grad)),
        *(grad if terms is None else terms for terms in (long_terms, short_terms)),
        dgates,
        layout.num_tokens,
        *(gates.stride() + dgates.stride() if gated else (0,) * 6),
        H=layout.heads,
        D=layout.width,
        LONG=long is not None,
        SHORT=short is not None,
        GATED=gated,
        ROWS=rows,
    )
    return long_terms, short_terms, dgates


class LongGradients(NamedTuple):
    """
    What the gradient of the queries needs of the long-term stream.

    Attributes:
        terms: of `gradient_terms`.
        blocks `[T, G, k]`.
        dq `[T, G, k, H / G, d]`: of each pair.
        factor: π times the gradient of the factor `[T, G, k]`, score keys `[rows, G, d]` and u `[T, G, d]`; `None` if
            the importance is not learned.
    """

    terms: Tensor
    blocks: Tensor
    dq: Tensor
    factor: tuple[Tensor, Tensor, Tensor] | None


def query_backward(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    grad: Tensor,
    long: LongGradients | None,
    short_terms: Tensor | None,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """
    The gradient of the queries before the rotary embedding.

    Args:
        short_terms: `gradient_terms` of the short-term stream, or `None`.
        rotary: cosines and sines `[T, d]`.
    """
    factor = None if long is None else long.factor
    dq = layout.empty(*q.shape)
    query_backward_kernel[(layout.num_tiles(layout.query_tile), layout.groups)](
        q,
        k,
        v,
        query_tiles,
        grad,
        long.terms if long else q,
        q if short_terms is None else short_terms,
        *((long.blocks, long.dq) if long else (q, q)),
        *(factor or (q, q, q)),
        *rotary,
        dq,
        layout.num_powers,
        layout.scaling,
        **layout.heads_kw,
        **layout.rep_kw,
        SB=layout.sizes.block,
        K=layout.sizes.selected,
        **layout.short_kw,
        LONG=long is not None,
        SHORT=short_terms is not None,
        FACTOR=factor is not None,
        **layout.index,
        **layout.precision,
        **query_tile(layout, "query_backward"),
    )
    return dq


def key_backward(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_tiles: Tensor,
    grad: Tensor,
    long_terms: Tensor | None,
    short_terms: Tensor | None,
    chosen: tuple[Tensor, Tensor, Tensor] | None,
    dwindows: Tensor | None,
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """
    The gradients of the keys before the rotary embedding, and of the values.

    Args:
        long_terms, short_terms: `gradient_terms` of each stream, or `None`.
        chosen: the parts dk and dv of `ops_triton_selected.selected_backward`, and the spans of its pairs.
        dwindows: the gradient of the windows.
    """
    dk, dv = layout.empty(*k.shape), layout.empty(*v.shape)
    positions = max(8, power_of_two(layout.key_tile))
    rows = positions * layout.rep_kw["REPP"]
    own = max(1, min(layout.sizes.block, LAUNCH["key_backward"]["ROWS"] // layout.rep_kw["REPP"]) // positions)
    distances = max(ceil(16, rows), LAUNCH["key_backward"]["ROWS"] // rows)
    own = max(own, ceil(16, rows))
    key_backward_kernel[(layout.num_tiles(layout.key_tile), layout.groups)](
        q,
        k,
        v,
        key_tiles,
        grad,
        *(q if terms is None else terms for terms in (long_terms, short_terms)),
        *(chosen or (q, q, q)),
        q if dwindows is None else dwindows,
        *rotary,
        dk,
        dv,
        layout.num_powers,
        **layout.heads_kw,
        **layout.rep_kw,
        SB=layout.sizes.block,
        STRIDE=layout.sizes.stride,
        LENGTH=layout.sizes.length,
        **layout.short_kw,
        LONG=long_terms is not None,
        SHORT=short_terms is not None,
        CHOSEN=chosen is not None,
        WINDOWS=dwindows is not None,
        **layout.index,
        **layout.precision,
        TILE=layout.key_tile,
        N=positions,
        C=distances,
        OWN=own,
        **layout.launch("key_backward", distances * rows, positions),
    )
    return dk, dv
