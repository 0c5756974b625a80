"""
BlossomRec's attention as fused GPU kernels, forward and backward: `blossom_attention`, one operation for a whole layer
(rotary embedding, compressor, selection, both streams, gates). It is a `torch.library` custom op with a fake
implementation and registered autograd, so `torch.compile` sees a single node and activation checkpointing works.

Nothing here synchronizes, and no sum is added atomically, so gradients are bitwise the same from run to run.
Conventions: `ops_reference.py`; the kernels and their layout: `ops_triton_launch.py`.
"""

import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .ops_reference import Selection
from .ops_triton_launch import Layout, Sizes, check
from .ops_triton_rotate import plan, rotate, windows
from .ops_triton_select import pool, select, select_backward
from .ops_triton_selected import Pairs, pair_shapes, selected, selected_backward, sort_pairs
from .ops_triton_streams import Stream, reads_all_keys, streams
from .ops_triton_streams_backward import LongGradients, gradient_terms, key_backward, query_backward


# Part of the operations' names: two versions of this package in one process must not replace each other's operations. It
# equals the version of the package, which this file cannot import when it travels with a checkpoint; a test compares them.
VERSION = "0.1.0"
NAMESPACE = "blossomrec_hf_" + VERSION.replace(".", "_")


class Settings(NamedTuple):
    """
    The integers of an operation, which takes them as one list: few arguments, each of which costs time at every call.

    Attributes:
        long, short: whether there is a long-term and a short-term stream.
        factor: whether the importance is learned.
        save: whether to save what the backward pass needs.
        The others are those of `Sizes`.
    """

    max_seqlen: int
    long: int
    short: int
    factor: int
    save: int
    stride: int
    length: int
    block: int
    selected: int
    short_block: int
    window: int
    base: int

    @property
    def sizes(self) -> Sizes:
        return Sizes(*self[5:])


class Results(NamedTuple):
    """
    What the forward operation returns. From `q` on, it is what the backward pass takes, empty if it needs nothing.

    Attributes:
        out `[T, H, d]`: head outputs.
        blocks, pi `[T, G, k]`: the selection.
        q, k: with rotary embeddings.
        mean_q `[T, G, d]`, c `[rows, G, d]`, score_lse `[T, G]`, u `[T, G, d]`: mean queries, score keys, lse of the
            scores, and the sum of π · c.
        order, spans, chunks: the `Pairs`.
        long_out, long_lse, short_out, short_lse: each `Stream`.
        hidden: the hidden activations of the compressor.
        w1, w2: its weights in the dtype of q, if theirs is another.
        start, stop, query_tiles, key_tiles: of `ops_triton_rotate.plan`.
    """

    out: Tensor
    blocks: Tensor
    pi: Tensor
    q: Tensor
    k: Tensor
    mean_q: Tensor
    c: Tensor
    score_lse: Tensor
    u: Tensor
    order: Tensor
    spans: Tensor
    chunks: Tensor
    long_out: Tensor
    long_lse: Tensor
    short_out: Tensor
    short_lse: Tensor
    hidden: Tensor
    w1: Tensor
    w2: Tensor
    start: Tensor
    stop: Tensor
    query_tiles: Tensor
    key_tiles: Tensor


def _wanted(settings: Settings, gated: bool, cast: bool) -> set[str]:
    """Which of the results are not empty; `cast`: whether the compressor's weights have another dtype than q."""
    names = {"out"}
    if settings.long:
        names |= {"blocks", "pi"}
    if settings.save:
        names |= {"q", "k", "start", "stop", "query_tiles", "key_tiles"}
        for stream in ("long",) * settings.long + ("short",) * settings.short:
            names |= {f"{stream}_lse"} | ({f"{stream}_out"} if gated else set())
        if settings.long:
            names |= {"order", "spans", "chunks"}
        if settings.factor:
            names |= {"mean_q", "c", "score_lse", "u", "hidden"} | ({"w1", "w2"} if cast else set())
    return names


def _schema(arguments: str, results: int) -> str:
    """The schema of an operation that returns so many tensors."""
    return f"({arguments}) -> ({', '.join(['Tensor'] * results)})"


def compress(
    layout: Layout, k: Tensor, start: Tensor, stop: Tensor, position: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden activations of the compressor, whose weights have the dtype of `k`, and the score keys `[rows, G, d]`."""
    inputs = windows(layout, k, position, start, stop).view(-1, w1.shape[1])
    hidden = torch._addmm_activation(b1, inputs, w1.t())  # with ReLU
    return hidden, pool(layout, (hidden @ w2.t()).view(-1, layout.groups, layout.width))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? gates, Tensor? position, Tensor? w1"
_INPUTS += ", Tensor? b1, Tensor? w2, Tensor cu_seqlens, SymInt[] settings, float scaling, float threshold"


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=(), schema=_schema(_INPUTS, len(Results._fields)))
def _attention(q, k, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, settings, scaling, threshold):
    """The `Results` of one layer; `settings`: `Settings`."""
    settings = Settings(*settings)
    layout = Layout(q, k.shape[1], cu_seqlens, settings.max_seqlen, settings.sizes, scaling)
    start, stop, query_tiles, key_tiles = plan(layout)
    q, k, mean_q = rotate(layout, q, k, cos, sin, mean=settings.long)
    found = {"q": q, "k": k, "mean_q": mean_q}
    found |= {"start": start, "stop": stop, "query_tiles": query_tiles, "key_tiles": key_tiles}
    blocks = parts = None
    if settings.long:
        w1_cast, w2_cast = w1.to(q.dtype), w2.to(q.dtype)
        hidden, c = compress(layout, k, start, stop, position, w1_cast, b1.to(q.dtype), w2_cast)
        blocks, number, pi, score_lse, u = select(
            layout, mean_q, c, start, threshold, settings.save and settings.factor
        )
        found |= {"blocks": blocks, "pi": pi, "c": c, "score_lse": score_lse, "u": u, "hidden": hidden}
        found |= {"w1": w1_cast, "w2": w2_cast}
        if settings.save or not reads_all_keys(layout):
            pairs = sort_pairs(layout, number, start, stop)
            parts = selected(layout, q, k, v, pairs)
            found |= pairs._asdict()
    out, long_stream, short_stream = streams(
        layout, q, k, v, query_tiles, blocks, parts, gates, settings.short, settings.save
    )
    found |= {"out": out, "long_out": long_stream.out, "long_lse": long_stream.lse}
    found |= {"short_out": short_stream.out, "short_lse": short_stream.lse}
    wanted = _wanted(settings, gates is not None, settings.long and w1.dtype != q.dtype)
    return tuple(found[name] if name in wanted else q.new_empty(0) for name in Results._fields)


@_attention.register_fake
def _(q, k, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, settings, scaling, threshold):
    settings = Settings(*settings)
    layout = Layout(q, k.shape[1], cu_seqlens, settings.max_seqlen, settings.sizes, scaling)
    single, integer = torch.float32, torch.int32
    blocks = (layout.num_tokens, layout.groups, settings.selected)
    per_head, per_group = q.shape[:2], blocks[:2]
    shapes = dict.fromkeys(("out", "q", "long_out", "short_out"), (q.shape, q.dtype))
    shapes |= dict.fromkeys(("k", "mean_q", "u"), (k.shape, q.dtype))
    shapes |= dict.fromkeys(("long_lse", "short_lse"), (per_head, single))
    shapes |= {"blocks": (blocks, torch.int64), "pi": (blocks, single), "score_lse": (per_group, single)}
    shapes["c"] = ((layout.rows, layout.groups, layout.width), q.dtype)
    shapes |= pair_shapes(layout)
    if settings.long:
        num_windows = layout.num_keys * (settings.block // settings.stride)
        shapes["hidden"] = ((num_windows, w1.shape[0]), q.dtype)
        shapes |= {"w1": (w1.shape, q.dtype), "w2": (w2.shape, q.dtype)}
    shapes |= dict.fromkeys(("start", "stop"), ((layout.num_tokens,), integer))
    shapes["query_tiles"] = ((layout.num_tiles(layout.query_tile), 4), integer)
    shapes["key_tiles"] = ((layout.num_tiles(layout.key_tile), 4), integer)
    wanted = _wanted(settings, gates is not None, settings.long and w1.dtype != q.dtype)
    empty = ((0,), q.dtype)
    made = (shapes[name] if name in wanted else empty for name in Results._fields)
    return tuple(q.new_empty(shape, dtype=dtype) for shape, dtype in made)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """
    A stream for small kernels next to large ones, if a CUDA graph is captured, where a second stream costs no time of the
    CPU. Its kernels come first. What they read must not be freed before the current stream has waited for them.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return side


class Gradients(NamedTuple):
    """The gradients of the inputs, empty if there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    position: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, which a GPU can write at once."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the columns of a matrix, as a product, which is several times faster on a GPU."""
    return _product(x.new_ones(1, x.shape[0]), x, dtype)[0]


_SAVED = "Tensor grad, Tensor v, Tensor cos, Tensor sin, Tensor? gates, Tensor? position, Tensor? w1"
_SAVED += ", Tensor? b1, Tensor? w2, Tensor cu_seqlens, Tensor[] results, SymInt[] settings, float scaling"


@torch.library.custom_op(
    f"{NAMESPACE}::attention_backward", mutates_args=(), schema=_schema(_SAVED, len(Gradients._fields))
)
def _attention_backward(grad, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, results, settings, scaling):
    """The `Gradients` of one layer from its `Results`."""
    settings, results = Settings(*settings), Results(*results)
    q, k, start, stop = results.q, results.k, results.start, results.stop
    layout = Layout(q, k.shape[1], cu_seqlens, settings.max_seqlen, settings.sizes, scaling)
    grad, rotary = grad.contiguous(), (cos, sin)
    dposition, dw1, db1, dw2 = (layout.empty(0) for _ in range(4))
    gated = gates is not None  # a stream without a gate is the output
    long_stream = Stream(results.long_out if gated else results.out, results.long_lse) if settings.long else None
    short_stream = Stream(results.short_out if gated else results.out, results.short_lse) if settings.short else None
    long_terms, short_terms, dgates = gradient_terms(layout, grad, gates, long_stream, short_stream)
    long = chosen = dwindows = None
    if settings.long:
        pairs = Pairs(results.order, results.spans, results.chunks)
        parts = selected_backward(layout, q, k, v, grad, long_terms, results.pi, pairs, settings.factor)
        factor = (parts.weight, results.c, results.u) if settings.factor else None
        long = LongGradients(long_terms, results.blocks, parts.dq, factor)
        chosen = (parts.dk, parts.dv, pairs.spans) if layout.rows else None
    side = fork(q.device) if settings.factor else None
    with nullcontext() if side is None else torch.cuda.stream(side):
        if settings.factor:
            scores = (results.mean_q, results.c, results.score_lse, parts.weight, results.blocks, start, stop)
            dc = select_backward(layout, *scores, parts.dc, pairs.spans).flatten(0, 1)
            inputs = windows(layout, k, position, start, stop)  # cheaper to make again than to keep
            w1_cast, w2_cast = (w1, w2) if w1.dtype == q.dtype else (results.w1, results.w2)
            dhidden = torch.ops.aten.threshold_backward(dc @ w2_cast, results.hidden, 0)
            dwindows = (dhidden @ w1_cast).view_as(inputs)
            windows_done = None if side is None else side.record_event()
            dw2 = _product(dc.t(), results.hidden, w2.dtype)
            db1 = _column_sums(dhidden, b1.dtype)
            dw1 = _product(dhidden.t(), inputs.view(-1, w1.shape[1]), w1.dtype)
            dposition = _column_sums(dwindows.flatten(1), position.dtype).view_as(position)
            dwindows = dwindows if layout.rows else None
    dq = query_backward(layout, q, k, v, results.query_tiles, grad, long, short_terms, rotary)
    if side is not None:
        torch.cuda.current_stream(q.device).wait_event(windows_done)
    dk, dv = key_backward(layout, q, k, v, results.key_tiles, grad, long_terms, short_terms, chosen, dwindows, rotary)
    if side is not None:
        torch.cuda.current_stream(q.device).wait_stream(side)
    return Gradients(dq, dk, dv, dgates, dposition, dw1, db1, dw2)


@_attention_backward.register_fake
def _(grad, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, results, settings, scaling):
    q, k = Results(*results)[3:5]
    learned = Settings(*settings).factor
    return Gradients(
        *(q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)),
        torch.empty_like(gates) if gates is not None else q.new_empty(0),
        *(x.new_empty(x.shape) if learned else q.new_empty(0) for x in (position, w1, b1, w2)),
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, ctx.settings, ctx.scaling, _ = inputs
    ctx.save_for_backward(v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    if grad is None:
        return (None,) * 14
    saved = ctx.saved_tensors  # to be read once, or checkpointing fails
    inputs, results = saved[:9], saved[9:]
    gradients = Gradients(*_attention_backward(grad, *inputs, list(results), ctx.settings, ctx.scaling))
    compressor = gradients[4:] if Settings(*ctx.settings).factor else (None,) * 4
    gates = None if inputs[3] is None else gradients.gates
    return *gradients[:3], None, None, gates, *compressor, *(None,) * 4


_attention.register_autograd(_backward, setup_context=_setup_context)


def blossom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sizes: Sizes,
    scaling: float,
    threshold: float,
    gates: Tensor | None = None,
    position: Tensor | None = None,
    mlp: nn.Sequential | None = None,
    factor: bool = True,
    short: bool = True,
) -> tuple[Tensor, Selection | None]:
    """
    A whole layer: rotary embedding, compressor, selection, streams and gates.

    Args:
        q, k, v: `[T, H, d]`, `[T, G, d]`, `[T, G, d]`, rotary embedding not yet applied; any strides of the first two
            dimensions.
        cos, sin: of the rotary embedding, `[T, d]`, float32.
        gates: `[T, H, 2]`, values (not negative) of the long-term and the short-term stream; `None` with one stream.
        position, mlp: the compressor; `None` without the long-term stream.
        factor: whether the importance is learned (straight through).
        short: whether the short-term stream takes part.

    Returns:
        `[T, H, d]`, and the `Selection` of the long-term stream (whose importance carries no gradient here).

    Raises:
        ValueError: if the kernels do not support the device, the dtype or a size.
    """
    check(
        q,
        block_size=sizes.block,
        num_selected_blocks=sizes.selected,
        short_block_size=sizes.short_block,
        heads_per_group=q.shape[1] // k.shape[1],
    )
    long = mlp is not None
    weights = (position, mlp[0].weight, mlp[0].bias, mlp[2].weight) if long else (None,) * 4
    inputs = (q, k, v, gates, *(weights if factor else ()))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    # Symbolic lengths and `bool` do not mix in a list.
    flags = (int(flag) for flag in (long, short, factor and long, save))
    settings = Settings(max_seqlen, *flags, *sizes)
    results = _attention(
        *(q, k, v.contiguous(), cos.float().contiguous(), sin.float().contiguous()),
        *(gates, *weights, cu_seqlens, list(settings), scaling, threshold),
    )
    out, blocks, pi = results[:3]
    return out, Selection(blocks, pi) if long else None
