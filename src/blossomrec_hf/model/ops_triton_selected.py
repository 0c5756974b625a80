"""
Attention to the selected blocks, forward and backward, one program per block. A program loads its block once and gathers
the queries that chose it, many in a tile of rows whatever the number of query heads per group. Each pair of a query and
a block has its own place in the results, which `ops_triton_streams.py` sums per query. Conventions: `ops_triton_launch.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ops_triton_launch import LAUNCH, Layout, block_place, jit, power_of_two, tl


# In batches of histories up to this length, the pairs of each block are found by reading what all later queries of its
# history selected, in longer ones by sorting. On an H100 with 65,536 tokens, reading saves 30 us per layer at L=200 and
# nothing at L=1,024, and costs 110 us more at L=4,096.
MAX_SCANNED_LENGTH = 1024


class Pairs(NamedTuple):
    """
    The selected pairs in the order of their blocks.

    Attributes:
        order (int64): the numbers of the pairs, those of one (block, group) after another, in ascending order. Gaps are
            possible.
        spans (int32) `[num_keys, 2]`: the first chunk of each (block, group), and how many it has.
        chunks (int32) `[·, 4]`: begin and end in `order`, first token of the block, and group of each chunk of at most
            `layout.chunk` pairs. Zeros if there is no such chunk.
    """

    order: Tensor
    spans: Tensor
    chunks: Tensor


@jit
def store_chunks(spans, chunks, number, begin, count, token, G: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks of each (block, group) `number`, whose `count` pairs begin at `begin` in the order."""
    chunk, needed = begin // CHUNK + number, (count + CHUNK - 1) // CHUNK
    tl.store(spans + number * 2, chunk)
    tl.store(spans + number * 2 + 1, needed)
    for i in range(needed):
        target = chunks + (chunk + i) * 4
        tl.store(target, begin + i * CHUNK)
        tl.store(target + 1, tl.minimum(begin + (i + 1) * CHUNK, begin + count))
        tl.store(target + 2, token)
        tl.store(target + 3, number % G)


@jit
def later_selections(
    numbers, first, end, number, G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr
):
    """Whether each of the TOKENS queries from `first` on, up to `end`, selected the (block, group) `number`; and the pair."""
    token, slot = (first + tl.arange(0, TOKENS))[:, None], tl.arange(0, KP)[None, :]
    pair = (token.to(tl.int64) * G + number % G) * K
    selected = tl.load(numbers + pair + slot, (token < end) & (slot < K), -1).to(tl.int32) == number
    hit = tl.sum(selected.to(tl.int32), 1)
    chosen = tl.sum(tl.where(selected, slot, 0), 1)
    return hit, ((first + tl.arange(0, TOKENS)).to(tl.int64) * G + number % G) * K + chosen


@jit
def count_kernel(
    numbers,
    start,
    stop,
    counts,
    T,
    G: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """How many queries selected a block."""
    row, group = tl.program_id(0), tl.program_id(1)
    first, lo, real = block_place(row, T, start, stop, B)
    end = tl.where(real, tl.load(stop + first), first)
    found = tl.zeros((TOKENS,), tl.int32)
    for i in range(first + B, end, TOKENS):
        hit, pair = later_selections(numbers, i, end, row * G + group, G, K, KP, TOKENS)
        found += hit
    tl.store(counts + row * G + group, tl.sum(found, 0))


@jit
def list_kernel(
    numbers,
    start,
    stop,
    counts,
    order,
    spans,
    chunks,
    T,
    G: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Lists the pairs of a block behind those of the blocks before it; a history's pairs begin where its tokens do."""
    row, group = tl.program_id(0), tl.program_id(1)
    first, lo, real = block_place(row, T, start, stop, B)
    end = tl.where(real, tl.load(stop + first), first)
    number = row * G + group
    before = tl.zeros((128,), tl.int32)
    for i in range(lo // B * G, number, 128):
        other = i + tl.arange(0, 128)
        before += tl.load(counts + other, other < number, 0)
    place = lo * (G * K) + tl.sum(before, 0)
    store_chunks(spans, chunks, number, place, tl.load(counts + number), first, G, CHUNK)
    for i in range(first + B, end, TOKENS):
        hit, pair = later_selections(numbers, i, end, number, G, K, KP, TOKENS)
        rank = tl.cumsum(hit, 0)
        tl.store(order + place + rank - 1, pair, hit > 0)
        place += tl.sum(hit, 0)


@jit
def chunk_kernel(
    sorted_numbers,
    start,
    stop,
    spans,
    chunks,
    T,
    num_pairs,
    G: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The chunks of a block, whose pairs two binary searches find among the sorted ones."""
    row, group = tl.program_id(0), tl.program_id(1)
    number = row * G + group + tl.arange(0, 2)  # the first pair not below it, and not below the next one
    lo = tl.zeros((2,), tl.int32)
    hi = lo + num_pairs
    width = num_pairs
    while width > 0:
        middle = (lo + hi) // 2
        below = (lo < hi) & (tl.load(sorted_numbers + middle, lo < hi, 0).to(tl.int32) < number)
        hi = tl.where(below, hi, middle)
        lo = tl.where(below, middle + 1, lo)
        width = width // 2
    begin, end = tl.min(lo, 0), tl.max(lo, 0)
    first, _, _ = block_place(row, T, start, stop, B)
    store_chunks(spans, chunks, row * G + group, begin, end - begin, first, G, CHUNK)


@jit
def load_chunk(chunks):
    """Begin, end, first token and group of this program's chunk."""
    chunk = chunks + tl.program_id(0) * 4
    return tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)


@jit
def selected_kernel(
    q,
    k,
    v,
    order,
    chunks,
    out,
    lse_out,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    PQ: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """Attention of each pair: its query to its block alone, with the lse by which blocks are weighted."""
    begin, end, first, group = load_chunk(chunks)
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
    chunks,
    dq_part,
    dk_part,
    dv_part,
    dc_part,
    weight_out,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    PQ: tl.constexpr,
    FACTOR: tl.constexpr,
    INDEX: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    From the queries that chose a block: the gradients of its keys, of its values and (`FACTOR`) of its score key, and of
    each pair that of the query and π times that of the straight-through factor. To the score key, the best block of a
    query passes on its weight times 1 − π, other blocks theirs whole; `spread_kernel` subtracts what both lack.
    """
    begin, end, first, group = load_chunk(chunks)
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
        ahead = begin + row // REPP  # the loads of a step need its pairs, so they are read one step ahead
        following = tl.load(order + ahead, ahead < end, 0).to(INDEX)
        for i in range(begin, end, PQ):
            real = (i + row // REPP < end) & (row % REPP < REP)
            pair = following
            ahead = i + PQ + row // REPP
            following = tl.load(order + ahead, ahead < end, 0).to(INDEX)
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
        "spans": ((layout.num_keys, 2), torch.int32),
        "chunks": ((count // layout.chunk + layout.num_keys, 4), torch.int32),
    }


def sort_pairs(layout: Layout, number: Tensor, start: Tensor, stop: Tensor) -> Pairs:
    """
    The pairs in the order of their blocks.

    Args:
        number: `[T, G, k]`, the number of each pair's (block, group), `num_keys` for none.
    """
    pairs = Pairs(*(layout.empty(*shape, dtype=dtype) for shape, dtype in pair_shapes(layout).values()))
    pairs.chunks.zero_()
    if not layout.rows:
        return pairs
    grid = (layout.rows, layout.groups)
    sizes = {"G": layout.groups, "B": layout.sizes.block}
    if layout.max_seqlen > MAX_SCANNED_LENGTH:
        numbers, order = number.flatten().sort(stable=True)
        pairs = pairs._replace(order=order)
        chunk_kernel[grid](
            numbers,
            start,
            stop,
            pairs.spans,
            pairs.chunks,
            layout.num_tokens,
            number.numel(),
            **sizes,
            CHUNK=layout.chunk,
            num_warps=1,
        )
        return pairs
    counts = layout.empty(layout.num_keys, dtype=torch.int32)
    slots = power_of_two(layout.sizes.selected)
    sizes |= {"K": layout.sizes.selected, "KP": slots, "TOKENS": 128, "num_warps": 1}
    count_kernel[grid](number, start, stop, counts, layout.num_tokens, **sizes)
    list_kernel[grid](number, start, stop, counts, *pairs, layout.num_tokens, **sizes, CHUNK=layout.chunk)
    return pairs


def _tile(layout: Layout, name: str) -> dict[str, int]:
    """Pairs of a tile, warps and stages."""
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
            pairs.order,
            pairs.chunks,
            out,
            lse,
            **layout.heads_kw,
            **layout.rep_kw,
            B=layout.sizes.block,
            K=layout.sizes.selected,
            **layout.index,
            **layout.precision,
            **_tile(layout, "selected"),
        )
    return out, lse


class SelectedGradients(NamedTuple):
    """
    The parts of the gradients that come from selected blocks.

    Attributes:
        dq `[T, G, k, H / G, d]`: of the query of each pair, without the factor scaling.
        weight `[T, G, k]`: π times the gradient of the straight-through factor, 0 for no block.
        dk, dv `[chunks, b, d]`, dc `[chunks, d]`: of each chunk's keys, values and score key. dk and dc have a factor of
            log2(e), which the queries carry.
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
    """`terms`: `gradient_terms` of the long-term stream; `factor`: whether π has a gradient."""
    shape = (layout.num_tokens, layout.groups, layout.sizes.selected)
    chunks, block = pairs.chunks.shape[0], layout.sizes.block
    dq = layout.empty(*shape, layout.rep_kw["REP"], layout.width)
    weight = layout.empty(*(shape if factor else (0,)), dtype=torch.float32).zero_()
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
            pairs.order,
            pairs.chunks,
            dq,
            dk,
            dv,
            dc,
            weight,
            **layout.heads_kw,
            **layout.rep_kw,
            B=block,
            K=layout.sizes.selected,
            FACTOR=factor,
            **layout.index,
            **layout.precision,
            **_tile(layout, "selected_backward"),
        )
    return SelectedGradients(dq, weight, dk, dv, dc)
