"""
Attention to the selected blocks, forward and backward, one program per block. A program loads its block once and gathers
the queries that chose it, many in a tile of rows whatever the number of query heads per group. Each pair of a query and
a block has its own place in the results, which `ops_triton_streams.py` sums per query. Conventions: `ops_triton_launch.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_triton_launch import LAUNCH, Layout, block_place, ceil, jit, tl


class Pairs(NamedTuple):
    """
    The selected pairs in the order of their blocks.

    Attributes:
        order (int64): numbers of the pairs, sorted by (block, group); those without a block come last.
        offsets (int32) `[num_keys + 1]`: where the pairs of each (block, group) begin.
        chunks (int32) `[·, 4]`: begin and end in `order`, first token of the block, and group of each chunk of at most
            `layout.chunk` pairs. (block, group) number i owns the chunks from `offsets[i] // layout.chunk + i` on.
    """

    order: Tensor
    offsets: Tensor
    chunks: Tensor


@jit
def chunk_kernel(
    numbers,
    start,
    stop,
    offsets,
    chunks,
    T,
    num_pairs,
    num_keys,
    G: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
):
    """`offsets` and `chunks` of the sorted `numbers` of (block, group)s."""
    key = tl.program_id(0) * BK + tl.arange(0, BK)
    lo = tl.zeros((BK,), tl.int32)
    lo_hi = lo + num_pairs
    hi = tl.zeros((BK,), tl.int32)
    hi_hi = hi + num_pairs
    width = num_pairs
    while width > 0:  # two binary searches at once, for the first pair not below `key` and not below `key + 1`
        middle = (lo + lo_hi) // 2
        below = (lo < lo_hi) & (tl.load(numbers + middle, lo < lo_hi, 0).to(tl.int32) < key)
        lo_hi = tl.where(below, lo_hi, middle)
        lo = tl.where(below, middle + 1, lo)
        middle = (hi + hi_hi) // 2
        below = (hi < hi_hi) & (tl.load(numbers + middle, hi < hi_hi, 0).to(tl.int32) <= key)
        hi_hi = tl.where(below, hi_hi, middle)
        hi = tl.where(below, middle + 1, hi)
        width = width // 2
    real = key < num_keys
    tl.store(offsets + key, lo, real)
    tl.store(offsets + key + 1, hi, key == num_keys - 1)
    token, _, _ = block_place(tl.where(real, key // G, 0), T, start, stop, B)
    chunk = lo // CHUNK + key
    count = tl.where(real, hi // CHUNK + key + 1 - chunk, 0)
    for i in range(tl.max(count, 0)):
        begin = lo + i * CHUNK
        target = chunks + (chunk + i) * 4
        tl.store(target, begin, i < count)
        tl.store(target + 1, tl.minimum(begin + CHUNK, hi), i < count)
        tl.store(target + 2, token, i < count)
        tl.store(target + 3, key % G, i < count)


@jit
def load_chunk(chunks, offsets, num_keys, CHUNK: tl.constexpr):
    """Begin, end, first token and group of this program's chunk; an empty one behind the last."""
    chunk = tl.program_id(0)
    owned = chunk < tl.load(offsets + num_keys) // CHUNK + num_keys
    begin = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    return begin, tl.where(owned, end, begin), tl.load(chunks + chunk * 4 + 2), tl.load(chunks + chunk * 4 + 3)


@jit
def selected_kernel(
    q,
    k,
    v,
    order,
    offsets,
    chunks,
    out,
    lse_out,
    num_keys,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    PQ: tl.constexpr,
    CHUNK: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """Attention of each pair: its query to its block alone, with the lse by which blocks are weighted."""
    begin, end, first, group = load_chunk(chunks, offsets, num_keys, CHUNK)
    if begin < end:
        d = tl.arange(0, D)[None, :]
        source = ((first + tl.arange(0, B)).to(INDEX) * G + group)[:, None] * D + d
        keys, values = tl.load(k + source), tl.load(v + source)
        row = tl.arange(0, PQ * REPP)
        head = group * REP + row % REPP
        for i in range(begin, end, PQ):
            real = (i + row // REPP < end) & (row % REPP < REP)
            pair = tl.load(order + i + row // REPP, real, 0).to(INDEX)
            at = pair // (G * K) * H + head
            queries = tl.load(q + at[:, None] * D + d, real[:, None], 0.0)
            s = tl.dot(queries, tl.trans(keys), input_precision=PREC)
            m = tl.max(s, 1)
            p = tl.exp2(s - m[:, None])
            norm = tl.sum(p, 1)
            acc = tl.dot(p.to(values.dtype), values, input_precision=PREC) * (1.0 / norm)[:, None]
            target = pair * REP + row % REPP
            tl.store(out + target[:, None] * D + d, acc, real[:, None])
            tl.store(lse_out + target, m + tl.log2(norm), real)


@jit
def selected_backward_kernel(
    q,
    k,
    v,
    grad,
    terms,
    pi,
    order,
    offsets,
    chunks,
    dq_part,
    dk_part,
    dv_part,
    dc_part,
    weight_out,
    num_keys,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    PQ: tl.constexpr,
    CHUNK: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    From the queries that chose a block: the gradients of its keys, of its values and (`FACTOR`) of its score key, and of
    each pair that of the query and π times that of the straight-through factor. To the score key, the best block of a
    query passes on its weight times 1 − π, other blocks theirs whole; `spread_kernel` subtracts what both lack.
    """
    begin, end, first, group = load_chunk(chunks, offsets, num_keys, CHUNK)
    if begin < end:
        token = tl.arange(0, B)
        d = tl.arange(0, D)[None, :]
        source = ((first + token).to(INDEX) * G + group)[:, None] * D + d
        keys, values = tl.load(k + source), tl.load(v + source)
        dk = tl.zeros((B, D), tl.float32)
        dv = tl.zeros((B, D), tl.float32)
        row = tl.arange(0, PQ * REPP)
        dc = tl.zeros((PQ * REPP, D), tl.float32)
        head = group * REP + row % REPP
        for i in range(begin, end, PQ):
            real = (i + row // REPP < end) & (row % REPP < REP)
            pair = tl.load(order + i + row // REPP, real, 0).to(INDEX)
            query = pair // (G * K)
            at = query * H + head
            queries = tl.load(q + at[:, None] * D + d, real[:, None], 0.0)
            do = tl.load(grad + at[:, None] * D + d, real[:, None], 0.0)
            lse, delta = tl.load(terms + at * 2, real, 0.0), tl.load(terms + at * 2 + 1, real, 0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PREC)
            p = tl.where(real[None, :], tl.exp2(s - lse[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision=PREC)
            ds = p * (tl.dot(values, tl.trans(do), input_precision=PREC) - delta[None, :])
            ds = ds.to(queries.dtype)
            dk += tl.dot(ds, queries, input_precision=PREC)
            dq = tl.dot(tl.trans(ds), keys, input_precision=PREC)
            target = pair * REP + row % REPP
            tl.store(dq_part + target[:, None] * D + d, dq, real[:, None])
            if FACTOR:
                # The sum of ds times the logits, over the block's keys and the group's heads, in natural logits.
                dfactor = tl.sum(tl.reshape(tl.sum(dq * queries.to(tl.float32), 1), (PQ, REPP)), 1)
                dfactor = tl.reshape(tl.broadcast_to(dfactor[:, None], (PQ, REPP)), (PQ * REPP,)) * 0.6931471805599453
                chosen = tl.load(pi + pair, real, 0.0)
                weight = dfactor * chosen
                tl.store(weight_out + pair, weight, real & (row % REPP == 0))
                weight *= tl.where(pair % K == 0, 1.0 - chosen, 1.0)
                dc += queries.to(tl.float32) * tl.where(real, weight, 0.0)[:, None]
        chunk = tl.program_id(0).to(INDEX)
        target = (chunk * B + token)[:, None] * D + d
        tl.store(dk_part + target, dk)
        tl.store(dv_part + target, dv)
        if FACTOR:
            tl.store(dc_part + chunk * D + tl.arange(0, D), tl.sum(dc, 0) * (1.0 / REP))


def pair_shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of the `Pairs`."""
    count = layout.num_tokens * layout.groups * layout.sizes.selected
    return {
        "order": ((count,), torch.int64),
        "offsets": ((layout.num_keys + 1,), torch.int32),
        "chunks": ((count // layout.chunk + layout.num_keys, 4), torch.int32),
    }


def sort_pairs(layout: Layout, number: Tensor, start: Tensor, stop: Tensor) -> Pairs:
    """`number` `[T, G, k]`: that of the (block, group) of each pair, `num_keys` for none."""
    numbers, order = number.flatten().sort(stable=True)
    offsets, chunks = (layout.empty(*shape, dtype=dtype) for shape, dtype in list(pair_shapes(layout).values())[1:])
    if layout.rows:
        chunk_kernel[(ceil(layout.num_keys, 128),)](
            numbers,
            start,
            stop,
            offsets,
            chunks,
            layout.num_tokens,
            number.numel(),
            layout.num_keys,
            G=layout.groups,
            B=layout.sizes.block,
            CHUNK=layout.chunk,
            BK=128,
        )
    return Pairs(order, offsets, chunks)


def _tile(layout: Layout, name: str) -> dict[str, int]:
    rows = LAUNCH[name]["ROWS"]
    if name == "selected_backward":
        rows = max(16, rows * 16 // layout.width)
    queries = max(1, rows // layout.rep_kw["REPP"])
    rows = queries * layout.rep_kw["REPP"]
    return {"PQ": queries} | layout.launch(name, rows, layout.sizes.block)


def selected(layout: Layout, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Attention `[T, G, k, H / G, d]` of each pair to its block alone, and its lse `[T, G, k, H / G]`."""
    shape = (layout.num_tokens, layout.groups, layout.sizes.selected, layout.rep_kw["REP"])
    out, lse = layout.empty(*shape, layout.width), layout.empty(*shape, dtype=torch.float32)
    if layout.rows:
        selected_kernel[(pairs.chunks.shape[0],)](
            q,
            k,
            v,
            *pairs,
            out,
            lse,
            layout.num_keys,
            **layout.heads_kw,
            **layout.rep_kw,
            B=layout.sizes.block,
            K=layout.sizes.selected,
            CHUNK=layout.chunk,
            **layout.index,
            **layout.precision,
            **_tile(layout, "selected"),
        )
    return out, lse


class SelectedGradients(NamedTuple):
    """
    Attributes:
        dq `[T, G, k, H / G, d]`: of the query of each pair, without the factor scaling.
        weight `[T, G, k]`: π times the gradient of the straight-through factor.
        dk, dv `[chunks, b, d]`, dc `[chunks, d]`: of each chunk's keys, values and score key; dk and dc times log2(e), as
            the queries carry it.
    """

    dq: Tensor
    weight: Tensor
    dk: Tensor
    dv: Tensor
    dc: Tensor


def selected_backward(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    terms: Tensor,
    pi: Tensor,
    pairs: Pairs,
    factor: bool,
) -> SelectedGradients:
    """`terms`: of `ops_triton_streams.gradient_terms`, for the long-term stream; `factor`: whether π has a gradient."""
    shape = (layout.num_tokens, layout.groups, layout.sizes.selected)
    chunks, block = pairs.chunks.shape[0], layout.sizes.block
    dq = layout.empty(*shape, layout.rep_kw["REP"], layout.width)
    weight = layout.empty(*(shape if factor else (0,)), dtype=torch.float32)
    dk, dv = (layout.empty(chunks, block, layout.width, dtype=torch.float32) for _ in range(2))
    dc = layout.empty(*((chunks, layout.width) if factor else (0,)), dtype=torch.float32)
    if layout.rows:
        selected_backward_kernel[(chunks,)](
            q,
            k,
            v,
            grad,
            terms,
            pi,
            *pairs,
            dq,
            dk,
            dv,
            dc,
            weight,
            layout.num_keys,
            **layout.heads_kw,
            **layout.rep_kw,
            B=block,
            K=layout.sizes.selected,
            CHUNK=layout.chunk,
            FACTOR=factor,
            **layout.index,
            **layout.precision,
            **_tile(layout, "selected_backward"),
        )
    return SelectedGradients(dq, weight, dk, dv, dc)
