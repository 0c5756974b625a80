"""
The GPU kernels behind `ops_triton.py`, in Triton: the forward pass, and what it shares with the backward pass
(`ops_triton_backward_kernels.py`). Conventions:

- Layouts are those of `ops_reference.py`, contiguous unless strides are passed: `[T, H, D]` queries, `[T, G, D]` keys.
  `REP` query heads share a key/value head; tiles of query rows hold `REPP` (a power of two) rows a query.
- A history that begins at token `lo` owns the rows from `lo // N` on in every array with one row for N complete
  positions, and the tiles from `lo // N + i` on among tiles that may be incomplete (i is its number). Both follow
  from the offset alone, so nothing is counted, scanned or read back; a few rows and tiles stay unused.
- `start` and `stop` `[T]` are the offsets of the history around each token; `tile_history` is the history of a tile.
- Softmaxes work in base 2: `scale2` is scaling · log2(e), and a saved `lse` is a base-2 logarithm.
- Nothing is added atomically: every sum has one writer and a fixed order, so results are bitwise reproducible.
"""

from types import SimpleNamespace


try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["T", "num_rows", "num_keys", "num_pairs", "num_splits", "span"])
except ImportError:  # `ops_triton.why_unsupported` says so before any of these is called
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(function):
        return function


@jit
def block_place(row, T, start, stop, B: tl.constexpr):
    """The first token of the complete block in a `row`, the start of its history, and whether there is one."""
    token = tl.minimum((row + 1) * B - 1, T - 1)  # lies in the block wherever there is one
    lo = tl.load(start + token)
    first = lo + (row - lo // B) * B
    return first, lo, first + B <= tl.load(stop + token)


@jit
def next_distance(i, distance, WINDOW: tl.constexpr, POWER: tl.constexpr, BASE: tl.constexpr):
    """Short-term block distance number `i`, after `distance`; `POWER` is the first power of `BASE` not in the window."""
    return tl.where(i < WINDOW, i, tl.where(i == WINDOW, POWER, distance * BASE))


@jit
def unrotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Gradient of a rotary embedding, as two halves `[ROWS, D / 2]`; `cos` and `sin` `[ROWS, D]`."""
    x1, x2 = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
    c1, c2 = tl.split(tl.permute(tl.reshape(cos, (ROWS, 2, D // 2)), (0, 2, 1)))
    s1, s2 = tl.split(tl.permute(tl.reshape(sin, (ROWS, 2, D // 2)), (0, 2, 1)))
    return x1 * c1 + x2 * s2, x2 * c2 - x1 * s1


@jit
def own_columns(x, same, BQ: tl.constexpr, ROWS: tl.constexpr):
    """Of `[ROWS, BQ · 16]` the 16 columns that are the `same` query's as each row."""
    return tl.sum(tl.reshape(tl.where(same, x, 0.0), (ROWS, BQ, 16)), 1)


@jit
def among_columns(x, same, BQ: tl.constexpr, ROWS: tl.constexpr):
    """The inverse of `own_columns`: zero in the columns of other queries."""
    return tl.where(same, tl.reshape(tl.broadcast_to(x[:, None, :], (ROWS, BQ, 16)), (ROWS, BQ * 16)), 0.0)


@jit
def plan_kernel(cu_seqlens, start, stop, tile_history, TILE: tl.constexpr, CHUNK: tl.constexpr):
    history = tl.program_id(0)
    lo = tl.load(cu_seqlens + history).to(tl.int32)
    hi = tl.load(cu_seqlens + history + 1).to(tl.int32)
    index = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = lo + index < hi
    tl.store(start + lo + index, tl.zeros_like(index) + lo, mask=inside)
    tl.store(stop + lo + index, tl.zeros_like(index) + hi, mask=inside)
    tile = lo // TILE + history + index
    tl.store(tile_history + tile, tl.zeros_like(index) + history, mask=tile < hi // TILE + history + 1)


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
    """Rotary embedding of queries and keys, and the scaled mean query of each group."""
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
        y1 = (x1 * c1 - x2 * s1).to(q_out.dtype.element_ty)
        y2 = (x2 * c2 + x1 * s2).to(q_out.dtype.element_ty)
        target = q_out + (t * H + head) * D + half
        tl.store(target, y1, mask)
        tl.store(target + D // 2, y2, mask)
        mean1 += y1.to(tl.float32)
        mean2 += y2.to(tl.float32)
    if MEAN:
        target = mean_out + (t * G + group) * D + half
        tl.store(target, mean1 * (scale2 / REP), mask)
        tl.store(target + D // 2, mean2 * (scale2 / REP), mask)
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


@jit
def select_kernel(
    mean_q,
    c,
    start,
    block_out,
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
    """Scores, softmax and the top blocks in one pass, and (`SAVE`) u = sum of π · c for the backward pass."""
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
    tl.store(pi_out + target, tl.where(kept, pi, 0.0), mask)
    if SAVE:
        tl.store(lse_out + at, lse, t < T)
        tl.store(u_out + at[:, None] * D + d, u / norm[:, None], (t < T)[:, None])


@jit
def selected_kernel(
    q,
    k,
    v,
    blocks,
    start,
    out,
    lse_out,
    T,
    scale2,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    REP: tl.constexpr,
    REPP: tl.constexpr,
    BQ: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    Attention over the selected blocks and the own one. BQ queries with all their heads make the rows of a tile, and
    16 keys of each of them its columns, of which a row sees those of its own query.
    """
    first, group = tl.program_id(0) * BQ, tl.program_id(1)
    row = tl.arange(0, BQ * REPP)
    query = tl.minimum(first + row // REPP, T - 1)
    head = group * REP + row % REPP
    stored = (first + row // REPP < T) & (row % REPP < REP)
    d = tl.arange(0, D)[None, :]
    at = query.to(tl.int64) * H + head
    queries = tl.load(q + at[:, None] * D + d, (row % REPP < REP)[:, None], 0.0)

    column = tl.arange(0, BQ * 16)
    reader = tl.minimum(first + column // 16, T - 1)
    same = (row // REPP)[:, None] == (column // 16)[None, :]
    lo = tl.load(start + reader)
    place = reader - lo
    chosen = blocks + (reader.to(tl.int64) * G + group) * K
    row_place = (query - tl.load(start + query))[:, None]
    row_chosen = blocks + (query.to(tl.int64) * G + group) * K
    m = tl.zeros((BQ * REPP,), tl.float32) - 1e30
    norm = tl.zeros((BQ * REPP,), tl.float32)
    acc = tl.zeros((BQ * REPP, D), tl.float32)
    for j in range(K + 1):  # the own block first, so that every row has a key
        past = column < j * (BQ * 16)  # all or none
        block = tl.where(past, tl.load(chosen + j - 1, mask=past, other=0).to(tl.int32), place // B)
        row_past = row < j * (BQ * REPP)
        row_block = tl.load(row_chosen + j - 1, mask=row_past, other=0).to(tl.int32)[:, None]
        row_block = tl.where(row_past[:, None], row_block, row_place // B)
        for i in tl.static_range(B // 16):
            key = block * B + i * 16 + column % 16
            seen = (block >= 0) & (key <= place)
            source = ((lo + key).to(tl.int64) * G + group)[:, None] * D + d
            keys = tl.load(k + source, seen[:, None], 0.0)
            values = tl.load(v + source, seen[:, None], 0.0)
            s = own_columns(tl.dot(queries, tl.trans(keys), input_precision=PREC), same, BQ, BQ * REPP) * scale2
            row_key = row_block * B + i * 16 + tl.arange(0, 16)[None, :]
            s = tl.where((row_block >= 0) & (row_key <= row_place), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s - m_new[:, None])
            norm = norm * alpha + tl.sum(p, 1)
            p = among_columns(p, same, BQ, BQ * REPP).to(values.dtype)
            acc = acc * alpha[:, None] + tl.dot(p, values, input_precision=PREC)
            m = m_new
    tl.store(out + at[:, None] * D + d, acc / norm[:, None], stored[:, None])
    if SAVE:
        tl.store(lse_out + at, m + tl.log2(norm), stored)


@jit
def short_kernel(
    q,
    k,
    v,
    cu_seqlens,
    tile_history,
    long_out,
    gates,
    out,
    short_out,
    lse_out,
    scale2,
    sg_t,
    sg_h,
    sg_s,
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
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
):
    """
    Short-term attention of a tile of TILE positions (a multiple of B, padded to N), and (`GATED`) the gated sum of
    both streams. The keys at one block distance are the tile itself moved back.
    """
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
        at = (lo + place).to(tl.int64) * H + head
        queries = tl.load(q + at[:, None] * D + d, stored[:, None], 0.0)
        column = tl.arange(0, N)
        m = tl.zeros((N * REPP,), tl.float32) - 1e30
        norm = tl.zeros((N * REPP,), tl.float32)
        acc = tl.zeros((N * REPP, D), tl.float32)
        # −∞ outside of what the blocks of the tile share with those at any distance.
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
            m_new = tl.maximum(m, tl.max(s, 1))
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s - m_new[:, None])
            norm = norm * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PREC)
            m = m_new
            i += 1
            distance = next_distance(i, distance, WINDOW, POWER, BASE)
        norm = tl.where(stored, norm, 1.0)
        acc = acc / norm[:, None]
        if SAVE:
            tl.store(short_out + at[:, None] * D + d, acc, stored[:, None])
            tl.store(lse_out + at, m + tl.log2(norm), stored)
        if GATED:
            gate = gates + (lo + place).to(tl.int64) * sg_t + head * sg_h
            long_gate = tl.load(gate, stored, 0.0).to(tl.float32)
            short_gate = tl.load(gate + sg_s, stored, 0.0).to(tl.float32)
            long = tl.load(long_out + at[:, None] * D + d, stored[:, None], 0.0).to(tl.float32)
            acc = acc * short_gate[:, None] + long * long_gate[:, None]
        tl.store(out + at[:, None] * D + d, acc, stored[:, None])
