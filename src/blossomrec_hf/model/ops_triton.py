"""
BlossomRec's attention as fused GPU kernels, forward and backward: `blossom_attention`, one operation for a whole layer
(rotary embedding, compressor, selection, both streams, gates). It is a `torch.library` custom op with a fake
implementation and registered autograd, so that `torch.compile` sees single nodes and activation checkpointing works.

Nothing here synchronises, and no sum is added atomically, so gradients are bitwise the same from run to run.
Conventions: `ops_reference.py`; the kernels and how they lay out blocks and tiles: `ops_triton_kernels.py`; how they are
launched: `ops_triton_launch.py`.
"""

import torch
from torch import Tensor, nn

from .ops_reference import Selection
from .ops_triton_launch import Layout, Sizes, check, short_tile


# Part of the operations' names: two versions of this package in one process must not replace each other's. It is that
# of the package, which this file cannot import where it travels with a checkpoint; a test compares them.
VERSION = "0.1.0"
NAMESPACE = "blossomrec_hf_" + VERSION.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    gates: Tensor | None,
    position: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    cu_seqlens: Tensor,
    settings: list[int],
    scaling: float,
    threshold: float,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """
    `settings` are max_seqlen, whether there is a long-term and a short-term stream, whether the importance is learned,
    whether to save for a backward pass, and the `Sizes`; few arguments, each of which costs time at every call.

    Returns head outputs `[T, H, d]`, blocks and π `[T, G, k]`, and what the backward pass needs (empty where it needs
    nothing): rotated q and k, mean q, score keys, u, lse of the scores, long-term output and lse, short-term output and
    lse, the compressor's hidden activations, its weights in the dtype of q, start, stop, tile_history.
    """
    max_seqlen, long, short, factor, save, *sizes = settings
    layout = Layout(q, k.shape[1], cu_seqlens, max_seqlen, Sizes(*sizes), scaling)
    save_scores = save and long and factor
    start, stop, tile_history = layout.plan()
    q, k, mean_q = layout.rotate(q, k, cos, sin, mean=long)
    blocks = layout.empty(0, dtype=torch.int64)
    pi, score_lse, long_lse, short_lse = (layout.empty(0, dtype=torch.float32) for _ in range(4))
    c, u, hidden, long_out, short_out, w1_cast, w2_cast = (layout.empty(0) for _ in range(7))
    if long:
        windows = layout.windows(k, position, start, stop)
        w1_cast, w2_cast = w1.to(q.dtype), w2.to(q.dtype)
        hidden = torch.addmm(b1.to(q.dtype), windows.view(-1, w1.shape[1]), w1_cast.t()).relu_()
        c = layout.pool((hidden @ w2_cast.t()).view(-1, layout.groups, layout.width))
        if not save_scores or w1.dtype == q.dtype:
            w1_cast, w2_cast = layout.empty(0), layout.empty(0)
        blocks, pi, score_lse, u = layout.select(mean_q, c, start, threshold, save_scores)
        long_out, long_lse = layout.selected(q, k, v, blocks, start, save)
        if not save_scores:
            hidden = layout.empty(0)
    if short:
        out, short_out, short_lse = layout.short(q, k, v, tile_history, long_out if long else None, gates, save)
    else:
        out, long_out = long_out, layout.empty(0)
    if not save:
        q, k, mean_q, c, u, long_out = (layout.empty(0) for _ in range(6))
    return (
        *(out, blocks, pi, q, k, mean_q, c, u, score_lse, long_out, long_lse, short_out, short_lse),
        *(hidden, w1_cast, w2_cast, start, stop, tile_history),
    )


@_attention.register_fake
def _(q, k, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, settings, scaling, threshold):
    _, long, short, factor, save, *sizes = settings
    sizes = Sizes(*sizes)
    tokens, heads, width = q.shape
    groups = k.shape[1]
    save_scores = save and long and factor
    cast = save_scores and w1.dtype != q.dtype
    rows = tokens // sizes.block
    windows = rows * (sizes.block // sizes.stride)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return q.new_empty(shape if wanted else (0,), dtype=dtype)

    blocks = (tokens, groups, sizes.selected)
    single, integer = torch.float32, torch.int32
    return (
        empty(True, *q.shape),
        empty(long, *blocks, dtype=torch.int64),
        empty(long, *blocks, dtype=single),
        empty(save, *q.shape),
        empty(save, *k.shape),
        empty(save and long, *k.shape),
        empty(save and long, rows, groups, width),
        empty(save_scores, *k.shape),
        empty(save_scores, tokens, groups, dtype=single),
        empty(save and long and short, *q.shape),
        empty(save and long, tokens, heads, dtype=single),
        empty(save and short and gates is not None, *q.shape),
        empty(save and short, tokens, heads, dtype=single),
        empty(save_scores, windows * groups, sizes.length * width),
        empty(cast, *(w1.shape if cast else ())),
        empty(cast, *(w2.shape if cast else ())),
        empty(True, tokens, dtype=integer),
        empty(True, tokens, dtype=integer),
        empty(True, tokens // short_tile(sizes.short_block) + cu_seqlens.shape[0] - 1, dtype=integer),
    )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, which a GPU can write at once."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    saved: list[Tensor],
    gates: Tensor | None,
    position: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    settings: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gates, position, w1, b1, w2; empty where there is none."""
    max_seqlen, long, short, factor, _, *sizes = settings
    v, cos, sin, cu_seqlens, out, blocks, pi, q, k, mean_q, c, u, score_lse, long_out, long_lse, short_out = saved[:16]
    short_lse, hidden, w1_cast, w2_cast, start, stop, tile_history = saved[16:]
    layout = Layout(q, k.shape[1], cu_seqlens, max_seqlen, Sizes(*sizes), scaling)
    grad = grad.contiguous()
    gated = gates is not None
    dgates = torch.empty_like(gates) if gated else layout.empty(0)
    long_part = dwindows = long_dq = None
    dposition, dw1, db1, dw2 = (layout.empty(0) for _ in range(4))
    if long:
        scored = (pi, c, u) if factor else None
        long_dq, delta, weight, weight_sum, pair = layout.selected_backward(
            *(q, k, v, long_out if short else out, grad, gates, long_lse, blocks, start, dgates, scored, factor)
        )
        if layout.rows:
            inverted = layout.invert(pair)
            pairs = (mean_q, weight) if factor else None
            parts = layout.inverted(q, k, v, grad, gates, long_lse, delta, start, stop, inverted, pairs)
            long_part = (long_lse, delta, *parts[:2], inverted[1])
        else:  # no complete block anywhere: nothing was selected
            long_part = (long_lse, delta, long_lse, long_lse, start)
        if factor:
            if layout.rows:
                spread = layout.spread(mean_q, c, score_lse, weight_sum, pair, start, stop)
                dc = layout.score_keys(parts[2], spread, inverted[1]).flatten(0, 1)
            else:
                dc = layout.empty(0, layout.width)
            windows = layout.windows(k, position, start, stop)  # cheaper to make again than to keep
            if w1.dtype == q.dtype:
                w1_cast, w2_cast = w1, w2
            dw2 = _product(dc.t(), hidden, w2.dtype)
            dhidden = torch.ops.aten.threshold_backward(dc @ w2_cast, hidden, 0)
            db1 = dhidden.sum(0, dtype=b1.dtype)
            dw1 = _product(dhidden.t(), windows.view(-1, w1.shape[1]), w1.dtype)
            dwindows = (dhidden @ w1_cast).view_as(windows)
            dposition = dwindows.sum(0, dtype=position.dtype)
    rotary = (cos, sin)
    short_part = None
    dq, short_delta = layout.query_backward(
        *(q, k, v, tile_history, short_out if gated else out, grad, gates, short_lse, long_dq, rotary, dgates, short)
    )
    if short:
        short_part = (short_lse, short_delta)
    if dwindows is not None and not layout.rows:
        dwindows = None
    dk, dv = layout.key_backward(q, k, v, tile_history, grad, gates, long_part, short_part, dwindows, rotary)
    return dq, dk, dv, dgates, dposition, dw1, db1, dw2


@_attention_backward.register_fake
def _(grad, saved, gates, position, w1, b1, w2, settings, scaling):
    q, k = saved[7], saved[8]
    learned = settings[1] and settings[3]
    return (
        *(q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)),
        torch.empty_like(gates) if gates is not None else q.new_empty(0),
        *(x.new_empty(x.shape) if learned else q.new_empty(0) for x in (position, w1, b1, w2)),
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cos, sin, gates, position, w1, b1, w2, cu_seqlens, ctx.settings, ctx.scaling, _ = inputs
    ctx.save_for_backward(v, cos, sin, cu_seqlens, *output, gates, position, w1, b1, w2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *others):
    *saved, gates, position, w1, b1, w2 = ctx.saved_tensors
    if grad is None:
        return (None,) * 14
    dq, dk, dv, dgates, *dcompressor = _attention_backward(
        grad, saved, gates, position, w1, b1, w2, ctx.settings, ctx.scaling
    )
    if not (ctx.settings[1] and ctx.settings[3]):
        dcompressor = (None,) * 4
    return dq, dk, dv, None, None, None if gates is None else dgates, *dcompressor, *(None,) * 4


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
    A whole layer: rotary embedding, and the streams asked for.

    Args:
        q, k, v: `[T, H, d]`, `[T, G, d]`, `[T, G, d]`, rotary embedding not yet applied; any strides of the first two
            dimensions.
        cos, sin: of the rotary embedding, `[T, d]`, float32.
        gates: `[T, H, 2]`, values of the long-term and the short-term stream; `None` with one stream.
        position, mlp: the compressor; `None` without the long-term stream.
        factor: whether the importance is learned (straight through).
        short: whether the short-term stream takes part.

    Returns:
        `[T, H, d]`, and the `Selection` of the long-term stream (whose importance carries no gradient here).

    Raises:
        ValueError: where the kernels do not support the device, the dtype or a size.
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
    settings = [max_seqlen, long, short, factor, save, *sizes]
    out, blocks, pi, *_ = _attention(
        *(q, k, v.contiguous(), cos.float().contiguous(), sin.float().contiguous()),
        *(gates, *weights, cu_seqlens, settings, scaling, threshold),
    )
    return out, Selection(blocks, pi) if long else None


# The functions of `ops_reference.py` one by one.
