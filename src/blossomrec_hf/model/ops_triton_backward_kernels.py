"""The kernels of the backward pass. Conventions: `ops_triton_kernels.py`."""

from .ops_triton_kernels import among_columns, block_place, jit, next_distance, own_columns, tl, unrotate


@jit
def selected_dq_kernel(
    q,
    k,
    v,
    out,
    grad,
    gates,
    lse,
    blocks,
    pi,
    c,
    u,
    start,
    dq,
    delta_out,
    dgates,
    weight_out,
    weight_sum_out,
    pair_out,
    T,
    num_keys,
    scale2,
    scaling,
    sg_t,
    sg_h,
    sg_s,
    sdg_t,
    sdg_h,
    sdg_s,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    BQ: tl.constexpr,
    GATED: tl.constexpr,
    FACTOR: tl.constexpr,
    SCORED: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    Gradients of `selected_kernel` that belong to a query: its own, its gate's, that of the straight-through factor
    of each block (`FACTOR`) and through it that of the scores (`SCORED`), all of them in the tiles of the forward pass.
    The weight of a query's best block is whole, those of others lack what `spread_kernel` adds.
    Also the number of the (block, group) of every selected pair, by which `inverted_kernel` reads.
    """
    first, group = tl.program_id(0) * BQ, tl.program_id(1)
    row = tl.arange(0, BQ * REPP)
    query = tl.minimum(first + row // REPP, T - 1)
    head = group * REP + row % REPP
    real = row % REPP < REP
    stored = (first + row // REPP < T) & real
    d = tl.arange(0, D)[None, :]
    at = query.to(tl.int64) * H + head
    queries = tl.load(q + at[:, None] * D + d, real[:, None], 0.0)
    do = tl.load(grad + at[:, None] * D + d, real[:, None], 0.0).to(tl.float32)
    o = tl.load(out + at[:, None] * D + d, real[:, None], 0.0).to(tl.float32)
    delta = tl.sum(do * o, 1)
    if GATED:
        gate = tl.load(gates + query.to(tl.int64) * sg_t + head * sg_h, real, 0.0).to(tl.float32)
        tl.store(dgates + query.to(tl.int64) * sdg_t + head * sdg_h, delta, stored)
        delta = delta * gate
        do = do * gate[:, None]
    tl.store(delta_out + at, delta, stored)
    do = do.to(queries.dtype)
    norm = tl.load(lse + at, real, 0.0)

    own = first + tl.arange(0, BQ)
    kept = own < T
    own = tl.minimum(own, T - 1)
    own_at = own.to(tl.int64) * G + group
    own_row = tl.load(start + own) // B
    column = tl.arange(0, BQ * 16)
    reader = tl.minimum(first + column // 16, T - 1)
    same = (row // REPP)[:, None] == (column // 16)[None, :]
    lo = tl.load(start + reader)
    place = reader - lo
    chosen = blocks + (reader.to(tl.int64) * G + group) * K
    row_place = (query - tl.load(start + query))[:, None]
    row_chosen = blocks + (query.to(tl.int64) * G + group) * K
    acc = tl.zeros((BQ * REPP, D), tl.float32)
    dmean = tl.zeros((BQ, D), tl.float32)
    weight_sum = tl.zeros((BQ,), tl.float32)
    best = tl.zeros((BQ,), tl.float32)
    dcolumn = tl.arange(0, D)[None, :]
    for j in range(K + 1):
        past = column < j * (BQ * 16)  # all or none
        block = tl.where(past, tl.load(chosen + j - 1, mask=past, other=0).to(tl.int32), place // B)
        row_past = row < j * (BQ * REPP)
        row_block = tl.load(row_chosen + j - 1, mask=row_past, other=0).to(tl.int32)[:, None]
        row_block = tl.where(row_past[:, None], row_block, row_place // B)
        dfactor = tl.zeros((BQ * REPP,), tl.float32)
        for i in tl.static_range(B // 16):
            key = block * B + i * 16 + column % 16
            seen = (block >= 0) & (key <= place)
            source = ((lo + key).to(tl.int64) * G + group)[:, None] * D + d
            keys = tl.load(k + source, seen[:, None], 0.0)
            values = tl.load(v + source, seen[:, None], 0.0)
            s = own_columns(tl.dot(queries, tl.trans(keys), input_precision=PREC), same, BQ, BQ * REPP) * scale2
            row_key = row_block * B + i * 16 + tl.arange(0, 16)[None, :]
            p = tl.where((row_block >= 0) & (row_key <= row_place), tl.exp2(s - norm[:, None]), 0.0)
            dp = own_columns(tl.dot(do, tl.trans(values), input_precision=PREC), same, BQ, BQ * REPP)
            ds = p * (dp - delta[:, None])
            dfactor += tl.sum(ds * s, 1)
            ds = among_columns(ds, same, BQ, BQ * REPP).to(keys.dtype)
            acc += tl.dot(ds, keys, input_precision=PREC)
        past = kept & (tl.arange(0, BQ) < j * BQ)
        mine = tl.load(blocks + own_at * K + j - 1, mask=past, other=-1).to(tl.int32)
        pair = tl.where(mine >= 0, (own_row + mine) * G + group, num_keys)
        tl.store(pair_out + own_at * K + j - 1, pair.to(pair_out.dtype.element_ty), past)
        if FACTOR:
            weight = tl.sum(tl.reshape(dfactor, (BQ, REPP)), 1) * 0.6931471805599453  # natural logits
            weight = tl.where(mine >= 0, weight, 0.0)
            if SCORED:
                weight *= tl.load(pi + own_at * K + j - 1, mask=past, other=0.0)
                source = c + ((own_row + mine).to(tl.int64) * G + group)[:, None] * D + dcolumn
                dmean += weight[:, None] * tl.load(source, (mine >= 0)[:, None], 0.0).to(tl.float32)
                weight_sum += weight
                best = tl.where(j == 1, weight, best)
                past &= j > 1
            tl.store(weight_out + own_at * K + j - 1, weight, past)
    acc *= scaling
    if SCORED:
        tl.store(weight_sum_out + own_at, weight_sum, kept)
        # Near π = 1 this difference is all there is; of sums over many queries it would be rounding.
        tl.store(weight_out + own_at * K, best - weight_sum * tl.load(pi + own_at * K), kept)
        dmean -= weight_sum[:, None] * tl.load(u + own_at[:, None] * D + dcolumn).to(tl.float32)
        dmean *= scaling / REP
        acc = tl.reshape(tl.reshape(acc, (BQ, REPP, D)) + dmean[:, None, :], (BQ * REPP, D))
    tl.store(dq + at[:, None] * D + d, acc, stored[:, None])


@jit
def short_dq_kernel(
    q,
    k,
    v,
    cu_seqlens,
    tile_history,
    out,
    grad,
    gates,
    lse,
    long_dq,
    cos,
    sin,
    dq,
    delta_out,
    dgates,
    scale2,
    scaling,
    sg_t,
    sg_h,
    sg_s,
    sdg_t,
    sdg_h,
    sdg_s,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    BASE: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    GATED: tl.constexpr,
    ROTARY: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradient of the queries: the short-term stream's added to the long-term one's, rotary embedding undone."""
    tile, group = tl.program_id(0), tl.program_id(1)
    history = tl.load(tile_history + tile)
    lo = tl.load(cu_seqlens + history).to(tl.int32)
    n = tl.load(cu_seqlens + history + 1).to(tl.int32) - lo
    p0 = (tile - lo // TILE - history) * TILE
    if p0 < n:
        row = tl.arange(0, N * REPP)
        place = p0 + row // REPP
        stored = (row // REPP < TILE) & (place < n) & (row % REPP < REP)
        head = group * REP + row % REPP
        d = tl.arange(0, D)[None, :]
        token = (lo + place).to(tl.int64)
        at = token * H + head
        acc = tl.zeros((N * REPP, D), tl.float32)
        if SHORT:
            queries = tl.load(q + at[:, None] * D + d, stored[:, None], 0.0)
            do = tl.load(grad + at[:, None] * D + d, stored[:, None], 0.0).to(tl.float32)
            o = tl.load(out + at[:, None] * D + d, stored[:, None], 0.0).to(tl.float32)
            delta = tl.sum(do * o, 1)
            if GATED:
                gate = tl.load(gates + token * sg_t + head * sg_h + sg_s, stored, 0.0).to(tl.float32)
                tl.store(dgates + token * sdg_t + head * sdg_h + sdg_s, delta, stored)
                delta = delta * gate
                do = do * gate[:, None]
            tl.store(delta_out + at, delta, stored)
            do = do.to(queries.dtype)
            norm = tl.load(lse + at, stored, 0.0)
            column = tl.arange(0, N)
            local = row // REPP
            outside = (local // B)[:, None] == (column // B)[None, :]
            outside = tl.where(outside & (local < TILE)[:, None] & (column < TILE)[None, :], 0.0, float("-inf"))
            farthest = tl.minimum(p0 + TILE, n) - 1
            i = 0
            distance = 0
            while distance * B <= farthest:
                key0 = p0 - distance * B
                key = key0 + column
                seen = (column < TILE) & (key >= 0) & (key < n)
                source = ((lo + key).to(tl.int64) * G + group)[:, None] * D + d
                keys = tl.load(k + source, seen[:, None], 0.0)
                values = tl.load(v + source, seen[:, None], 0.0)
                s = tl.dot(queries, tl.trans(keys), acc=outside, input_precision=PREC) * scale2
                if (distance == 0) | (key0 < 0):
                    s = tl.where(seen[None, :] & (key[None, :] <= place[:, None]), s, float("-inf"))
                p = tl.exp2(s - norm[:, None])
                ds = p * (tl.dot(do, tl.trans(values), input_precision=PREC) - delta[:, None])
                acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PREC)
                i += 1
                distance = next_distance(i, distance, WINDOW, POWER, BASE)
            acc *= scaling
        if LONG:
            acc += tl.load(long_dq + at[:, None] * D + d, stored[:, None], 0.0).to(tl.float32)
        if ROTARY:
            angle = token[:, None] * D + d
            c, s = tl.load(cos + angle, stored[:, None], 0.0), tl.load(sin + angle, stored[:, None], 0.0)
            first, second = unrotate(acc, c, s, N * REPP, D)
            target = dq + at[:, None] * D + tl.arange(0, D // 2)[None, :]
            tl.store(target, first, stored[:, None])
            tl.store(target + D // 2, second, stored[:, None])
        else:
            tl.store(dq + at[:, None] * D + d, acc, stored[:, None])


@jit
def invert_kernel(sorted_pairs, offsets, chunk_key, num_pairs, num_keys, CHUNK: tl.constexpr, BK: tl.constexpr):
    """
    Where the pairs of each (block, group) begin among the sorted ones, and whose pairs each chunk of them holds: key
    number i owns the chunks from offsets[i] // CHUNK + i on.
    """
    key = tl.program_id(0) * BK + tl.arange(0, BK)
    lo = tl.zeros((BK,), tl.int32)
    lo_hi = lo + num_pairs
    hi = tl.zeros((BK,), tl.int32)
    hi_hi = hi + num_pairs
    width = num_pairs
    while width > 0:  # two binary searches at once, for the first pair not below `key` and not below `key + 1`
        middle = (lo + lo_hi) // 2
        below = (lo < lo_hi) & (tl.load(sorted_pairs + middle, lo < lo_hi, 0).to(tl.int32) < key)
        lo_hi = tl.where(below, lo_hi, middle)
        lo = tl.where(below, middle + 1, lo)
        middle = (hi + hi_hi) // 2
        below = (hi < hi_hi) & (tl.load(sorted_pairs + middle, hi < hi_hi, 0).to(tl.int32) <= key)
        hi_hi = tl.where(below, hi_hi, middle)
        hi = tl.where(below, middle + 1, hi)
        width = width // 2
    tl.store(offsets + key, lo, key < num_keys)
    tl.store(offsets + key + 1, hi, key == num_keys - 1)
    first = lo // CHUNK + key
    count = tl.where(key < num_keys, hi // CHUNK + key + 1 - first, 0)
    for i in range(tl.max(count, 0)):
        tl.store(chunk_key + first + i, key, i < count)


@jit
def inverted_kernel(
    q,
    k,
    v,
    grad,
    gates,
    lse,
    delta,
    mean_q,
    weight,
    order,
    offsets,
    chunk_key,
    start,
    stop,
    dk_part,
    dv_part,
    dc_part,
    T,
    num_keys,
    scale2,
    sg_t,
    sg_h,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    PQ: tl.constexpr,
    CHUNK: tl.constexpr,
    GATED: tl.constexpr,
    SCORED: tl.constexpr,
    PREC: tl.constexpr,
):
    """Gradients of a block's keys, values and score key from one chunk of the queries that chose it."""
    chunk = tl.program_id(0)
    owned = chunk < tl.load(offsets + num_keys) // CHUNK + num_keys  # behind these, nobody needs a chunk
    number = tl.load(chunk_key + chunk, owned, 0)
    lo, hi = tl.load(offsets + number), tl.load(offsets + number + 1)
    begin = lo + (chunk - lo // CHUNK - number) * CHUNK
    end = tl.minimum(begin + CHUNK, hi)
    if owned & (begin < end):
        group = number % G
        first, _, _ = block_place(number // G, T, start, stop, B)
        token = tl.arange(0, B)
        d = tl.arange(0, D)[None, :]
        source = ((first + token).to(tl.int64) * G + group)[:, None] * D + d
        keys, values = tl.load(k + source), tl.load(v + source)
        dk = tl.zeros((B, D), tl.float32)
        dv = tl.zeros((B, D), tl.float32)
        dc = tl.zeros((D,), tl.float32)
        row = tl.arange(0, PQ * REPP)
        head = group * REP + row % REPP
        for i in range(begin, end, PQ):
            real = (i + row // REPP < end) & (row % REPP < REP)
            query = tl.load(order + i + row // REPP, real, 0) // (G * K)
            at = query * H + head
            queries = tl.load(q + at[:, None] * D + d, real[:, None], 0.0)
            do = tl.load(grad + at[:, None] * D + d, real[:, None], 0.0)
            if GATED:
                gate = tl.load(gates + query * sg_t + head * sg_h, real, 0.0).to(tl.float32)
                do = (do.to(tl.float32) * gate[:, None]).to(queries.dtype)
            s = tl.dot(keys, tl.trans(queries), input_precision=PREC) * scale2
            p = tl.where(real[None, :], tl.exp2(s - tl.load(lse + at, real, 0.0)[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision=PREC)
            ds = tl.dot(values, tl.trans(do), input_precision=PREC) - tl.load(delta + at, real, 0.0)[None, :]
            dk += tl.dot((p * ds).to(queries.dtype), queries, input_precision=PREC)
            if SCORED:
                j = i + tl.arange(0, PQ)
                pair = tl.load(order + j, j < end, 0)
                w = tl.load(weight + pair, j < end, 0.0)
                mean = tl.load(mean_q + (pair // K)[:, None] * D + d)
                dc += tl.sum(w[:, None] * mean.to(tl.float32), 0)
        target = (chunk.to(tl.int64) * B + token)[:, None] * D + d
        tl.store(dk_part + target, dk)
        tl.store(dv_part + target, dv)
        if SCORED:
            tl.store(dc_part + chunk.to(tl.int64) * D + tl.arange(0, D), dc)


@jit
def spread_kernel(
    mean_q,
    c,
    lse,
    weight_sum,
    pair,
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
    What the score keys get through the softmax of all later queries, of which each program takes `span`, other than as the
    best block of a query.
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
        best = tl.load(pair + at * K, real, 0).to(tl.int32) // G
        p = tl.where(row[:, None] == best[None, :], 0.0, p)
        lo = tl.load(start + i)
        one_history = lo == tl.load(start + tl.minimum(i + BQ, end) - 1)
        if (one_history == 0) | (i + BQ > end) | (lo // B > r0) | (lo // B + (i - lo) // B < r0 + BM):
            first = tl.load(start + t, real, 0)
            last = tl.where(real, first // B + (t - first) // B, 0)
            p = tl.where((row[:, None] >= (first // B)[None, :]) & (row[:, None] < last[None, :]), p, 0.0)
        weighted = queries.to(tl.float32) * tl.load(weight_sum + at, real, 0.0)[:, None]
        acc += tl.dot(p.to(queries.dtype), weighted.to(queries.dtype), input_precision=PREC)
    target = ((split.to(tl.int64) * num_rows + row) * G + group)[:, None] * D + d
    tl.store(dc_part + target, acc, (row < num_rows)[:, None])


@jit
def score_key_kernel(
    chosen_part,
    spread_part,
    offsets,
    dc,
    num_rows,
    num_splits,
    factor,
    G: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BR: tl.constexpr,
):
    """Sums the parts of the score keys' gradient, and hands each window of a block its share."""
    key = tl.program_id(0) * BR + tl.arange(0, BR)  # row · G + group
    real = key < num_rows * G
    lo, hi = tl.load(offsets + key, real, 0), tl.load(offsets + key + 1, real, 0)
    first, count = lo // CHUNK + key, (hi - lo + CHUNK - 1) // CHUNK
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


@jit
def keys_kernel(
    q,
    k,
    v,
    cu_seqlens,
    tile_history,
    grad,
    gates,
    long_lse,
    long_delta,
    short_lse,
    short_delta,
    dk_part,
    dv_part,
    offsets,
    dwindows,
    cos,
    sin,
    dk,
    dv,
    scale2,
    scaling,
    sg_t,
    sg_h,
    sg_s,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    SB: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    BASE: tl.constexpr,
    TILE: tl.constexpr,
    N: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    WINDOWS: tl.constexpr,
    GATED: tl.constexpr,
    ROTARY: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    Gradients of the keys and values of a tile of TILE positions: from short-term queries (the tile moved ahead), from
    queries of the own selection block, from the chunks of `inverted_kernel`, and from the compressed windows.
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    history = tl.load(tile_history + tile)
    lo = tl.load(cu_seqlens + history).to(tl.int32)
    n = tl.load(cu_seqlens + history + 1).to(tl.int32) - lo
    p0 = (tile - lo // TILE - history) * TILE
    if p0 < n:
        column = tl.arange(0, N)
        key = p0 + column
        real = (column < TILE) & (key < n)
        d = tl.arange(0, D)[None, :]
        token = (lo + key).to(tl.int64)
        at = token * G + group
        keys = tl.load(k + at[:, None] * D + d, real[:, None], 0.0)
        values = tl.load(v + at[:, None] * D + d, real[:, None], 0.0)
        dkeys = tl.zeros((N, D), tl.float32)
        dvalues = tl.zeros((N, D), tl.float32)
        row = tl.arange(0, N * REPP)
        head = group * REP + row % REPP
        if SHORT:
            local = row // REPP
            outside = (local // B)[None, :] == (column // B)[:, None]
            outside = tl.where(outside & (local < TILE)[None, :] & (column < TILE)[:, None], 0.0, float("-inf"))
            i = 0
            distance = 0
            while p0 + distance * B < n:
                place = p0 + distance * B + row // REPP
                asked = (row // REPP < TILE) & (place < n) & (row % REPP < REP)
                query = (lo + place).to(tl.int64)
                source = (query * H + head)[:, None] * D + d
                queries = tl.load(q + source, asked[:, None], 0.0)
                do = tl.load(grad + source, asked[:, None], 0.0)
                if GATED:
                    gate = tl.load(gates + query * sg_t + head * sg_h + sg_s, asked, 0.0).to(tl.float32)
                    do = (do.to(tl.float32) * gate[:, None]).to(queries.dtype)
                s = tl.dot(keys, tl.trans(queries), acc=outside, input_precision=PREC) * scale2
                if distance == 0:
                    s = tl.where(key[:, None] <= place[None, :], s, float("-inf"))
                # Where nobody asks, q, dO, lse and delta are zero, and so is what follows.
                lse = tl.load(short_lse + query * H + head, asked, 0.0)
                p = tl.exp2(s - lse[None, :])
                dvalues += tl.dot(p.to(do.dtype), do, input_precision=PREC)
                delta = tl.load(short_delta + query * H + head, asked, 0.0)
                ds = p * (tl.dot(values, tl.trans(do), input_precision=PREC) - delta[None, :])
                dkeys += tl.dot(ds.to(queries.dtype), queries, input_precision=PREC)
                i += 1
                distance = next_distance(i, distance, WINDOW, POWER, BASE)
        if LONG:
            end = tl.minimum(n, ((p0 + TILE - 1) // SB + 1) * SB)
            for i in range(p0, end, N):
                place = i + row // REPP
                asked = (place < end) & (row % REPP < REP)
                query = (lo + place).to(tl.int64)
                source = (query * H + head)[:, None] * D + d
                queries = tl.load(q + source, asked[:, None], 0.0)
                do = tl.load(grad + source, asked[:, None], 0.0)
                if GATED:
                    gate = tl.load(gates + query * sg_t + head * sg_h, asked, 0.0).to(tl.float32)
                    do = (do.to(tl.float32) * gate[:, None]).to(queries.dtype)
                s = tl.dot(keys, tl.trans(queries), input_precision=PREC) * scale2
                near = ((place // SB)[None, :] == (key // SB)[:, None]) & (key[:, None] <= place[None, :])
                lse = tl.load(long_lse + query * H + head, asked, 0.0)
                p = tl.where(near & asked[None, :] & real[:, None], tl.exp2(s - lse[None, :]), 0.0)
                dvalues += tl.dot(p.to(do.dtype), do, input_precision=PREC)
                delta = tl.load(long_delta + query * H + head, asked, 0.0)
                ds = p * (tl.dot(values, tl.trans(do), input_precision=PREC) - delta[None, :])
                dkeys += tl.dot(ds.to(queries.dtype), queries, input_precision=PREC)
            number = (lo // SB + key // SB) * G + group
            whole = real & ((key // SB + 1) * SB <= n)
            before, after = tl.load(offsets + number, whole, 0), tl.load(offsets + number + 1, whole, 0)
            first, count = before // CHUNK + number, (after - before + CHUNK - 1) // CHUNK
            for i in range(tl.max(count, 0)):
                source = ((first + i).to(tl.int64) * SB + key % SB)[:, None] * D + d
                dkeys += tl.load(dk_part + source, (i < count)[:, None], 0.0)
                dvalues += tl.load(dv_part + source, (i < count)[:, None], 0.0)
        dkeys *= scaling
        if WINDOWS:
            for i in tl.static_range((LENGTH + STRIDE - 1) // STRIDE):
                j = key // STRIDE + i
                slot = key - (j + 1) * STRIDE + LENGTH
                inside = real & (slot >= 0) & (slot < LENGTH) & (j < n // SB * (SB // STRIDE))
                window = (lo // SB * (SB // STRIDE) + j).to(tl.int64) * G + group
                source = dwindows + (window * LENGTH + slot)[:, None] * D + d
                dkeys += tl.load(source, inside[:, None], 0.0).to(tl.float32)
        tl.store(dv + at[:, None] * D + d, dvalues, real[:, None])
        if ROTARY:
            angle = token[:, None] * D + d
            c, s = tl.load(cos + angle, real[:, None], 0.0), tl.load(sin + angle, real[:, None], 0.0)
            first, second = unrotate(dkeys, c, s, N, D)
            target = dk + at[:, None] * D + tl.arange(0, D // 2)[None, :]
            tl.store(target, first, real[:, None])
            tl.store(target + D // 2, second, real[:, None])
        else:
            tl.store(dk + at[:, None] * D + d, dkeys, real[:, None])
