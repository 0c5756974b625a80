"""
BlossomRec's attention as fused GPU kernels, forward and backward: the functions of `ops_reference.py` under the same
names, and `blossom_attention`, one operation for a whole layer (rotary embedding, compressor, selection, both streams,
gates). Every operation is a `torch.library` custom op with a fake implementation and registered autograd, so that
`torch.compile` sees single nodes and activation checkpointing works.

Nothing here synchronises, and no sum is added atomically, so gradients are bitwise the same from run to run.
Conventions: `ops_reference.py`; the kernels and how they lay out blocks and tiles: `ops_triton_kernels.py`; how they are
launched: `ops_triton_launch.py`.
"""

import math

import torch
from torch import Tensor, nn

from .ops_reference import Ops, Selection
from .ops_torch import attend_full
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


@torch.library.custom_op(f"{NAMESPACE}::windows", mutates_args=())
def _windows(k: Tensor, position: Tensor, cu_seqlens: Tensor, max_seqlen: int, stride: int) -> Tensor:
    """`[T // stride, G, l, d]`, those of history i from row `cu_seqlens[i] // stride` on."""
    layout = Layout(k, k.shape[1], cu_seqlens, max_seqlen, _only(stride=stride, length=position.shape[1]), 1.0)
    start, stop, _ = layout.plan()
    return layout.windows(k.contiguous(), position, start, stop)


@_windows.register_fake
def _(k, position, cu_seqlens, max_seqlen, stride):
    return k.new_empty(k.shape[0] // stride, *position.shape)


@torch.library.custom_op(f"{NAMESPACE}::windows_backward", mutates_args=())
def _windows_backward(grad: Tensor, cu_seqlens: Tensor, max_seqlen: int, stride: int, num_tokens: int) -> Tensor:
    _, groups, length, width = grad.shape
    k = grad.new_empty(num_tokens, groups, width)
    layout = Layout(k, groups, cu_seqlens, max_seqlen, _only(stride=stride, length=length), 1.0)
    _, _, tile_history = layout.plan()
    return layout.key_backward(k, k, k, tile_history, k, None, None, None, grad.contiguous(), None)[0]


@_windows_backward.register_fake
def _(grad, cu_seqlens, max_seqlen, stride, num_tokens):
    return grad.new_empty(num_tokens, grad.shape[1], grad.shape[3])


def _windows_setup(ctx, inputs, output) -> None:
    k, position, cu_seqlens, ctx.max_seqlen, ctx.stride = inputs
    ctx.num_tokens, ctx.dtype = k.shape[0], position.dtype
    ctx.save_for_backward(cu_seqlens)


def _windows_grad(ctx, grad):
    dk = _windows_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.stride, ctx.num_tokens)
    return dk, grad.sum(0, dtype=torch.float32).to(ctx.dtype), None, None, None


_windows.register_autograd(_windows_grad, setup_context=_windows_setup)


def _only(**sizes: int) -> Sizes:
    """Sizes of which only some matter."""
    rest = {"length": 1, "selected": 1, "short_block": 1, "window": 1, "base": 2}
    block = sizes.get("block", sizes.get("stride", 16))
    return Sizes(**(rest | {"stride": block, "block": block} | sizes))


def _first_rows(cu_seqlens: Tensor, size: int) -> Tensor:
    """Where the complete blocks of each history begin if they lie end to end, `[S + 1]`."""
    blocks = torch.div(cu_seqlens.diff(), size, rounding_mode="floor").cumsum(0)
    return nn.functional.pad(blocks, (1, 0))


def compress(k: Tensor, compressor: nn.Module, cu_seqlens: Tensor, *, stride: int) -> Tensor:
    """As `ops_reference.compress`, with `T // stride` rows: those after the last complete window mean nothing."""
    check(k)
    num_rows = k.shape[0] // stride
    if num_rows == 0:
        return compressor(k.new_zeros(0, *compressor.position.shape))
    windows = _windows(k, compressor.position, cu_seqlens, k.shape[0], stride)
    first = _first_rows(cu_seqlens, stride)
    row = torch.arange(num_rows, device=k.device)
    history = (torch.searchsorted(first, row, right=True) - 1).clamp(max=first.shape[0] - 2)
    row = torch.div(cu_seqlens[history], stride, rounding_mode="floor") + row - first[history]
    return compressor.mlp(windows.flatten(2))[row.clamp(max=num_rows - 1)]


@torch.library.custom_op(f"{NAMESPACE}::select", mutates_args=())
def _select(
    mean_q: Tensor, c: Tensor, cu_seqlens: Tensor, max_seqlen: int, block: int, selected: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks and π `[T, G, k]`, lse `[T, G]`, u `[T, G, d]`; `c` has a row a block, mean queries carry the scale."""
    layout = Layout(mean_q, c.shape[1], cu_seqlens, max_seqlen, _only(block=block, selected=selected), 1.0)
    start, _, _ = layout.plan()
    return layout.select(mean_q.contiguous(), c.contiguous(), start, threshold, save=True)


@_select.register_fake
def _(mean_q, c, cu_seqlens, max_seqlen, block, selected, threshold):
    tokens, groups, _ = mean_q.shape
    pi = mean_q.new_empty(tokens, groups, selected, dtype=torch.float32)
    return (
        pi.new_empty(pi.shape, dtype=torch.int64),
        pi,
        pi.new_empty(tokens, groups),
        mean_q.new_empty(mean_q.shape),
    )


@torch.library.custom_op(f"{NAMESPACE}::select_backward", mutates_args=())
def _select_backward(
    grad: Tensor,
    mean_q: Tensor,
    c: Tensor,
    blocks: Tensor,
    pi: Tensor,
    lse: Tensor,
    u: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    layout = Layout(mean_q, c.shape[1], cu_seqlens, max_seqlen, _only(block=block, selected=pi.shape[2]), 1.0)
    start, stop, _ = layout.plan()
    weight = grad * pi
    group = torch.arange(layout.groups, device=c.device)[:, None]
    if not layout.rows:
        return torch.zeros_like(mean_q), torch.zeros_like(c)
    row = (torch.div(start, block, rounding_mode="floor")[:, None, None] + blocks.clamp(min=0)).long()
    pair = torch.where(blocks < 0, layout.rows, row) * layout.groups + group
    total = weight.sum(-1)
    dmean = (weight[..., None] * c[row, group].float()).sum(2) - total[..., None] * u.float()
    weight[..., 0] -= total * pi[..., 0]  # the best block's is whole; what the others lack is spread
    dc = torch.zeros(c.shape, dtype=torch.float32, device=c.device)
    dc.index_put_((row, group.expand_as(row)), weight[..., None] * mean_q[:, :, None].float(), accumulate=True)
    dc -= layout.spread(mean_q.contiguous(), c.contiguous(), lse, total, pair, start, stop).sum(0)
    return (dmean * math.log(2)).to(mean_q.dtype), (dc * math.log(2)).to(c.dtype)


@_select_backward.register_fake
def _(grad, mean_q, c, blocks, pi, lse, u, cu_seqlens, max_seqlen, block):
    return torch.empty_like(mean_q), torch.empty_like(c)


def _select_setup(ctx, inputs, output) -> None:
    mean_q, c, cu_seqlens, ctx.max_seqlen, ctx.block, _, _ = inputs
    ctx.save_for_backward(mean_q, c, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[0], *output[2:])


def _select_grad(ctx, _, grad, *others):
    return *_select_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.block), *(None,) * 5


_select.register_autograd(_select_grad, setup_context=_select_setup)


def select(
    q: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    num_selected_blocks: int,
    block_size: int,
    stride: int,
    threshold: float,
    scaling: float,
) -> Selection:
    """As `ops_reference.select`."""
    check(q, block_size=block_size, num_selected_blocks=num_selected_blocks)
    num_groups, num_blocks = c.shape[1], q.shape[0] // block_size
    mean_q = q.unflatten(1, (num_groups, -1)).mean(2, dtype=torch.float32).mul(scaling * math.log2(math.e)).to(q.dtype)
    if num_blocks:
        token = torch.arange(1, num_blocks + 1, device=q.device) * block_size - 1  # one in each row's block
        history = torch.searchsorted(cu_seqlens, token, right=True) - 1
        block = torch.arange(num_blocks, device=q.device)
        block = block - torch.div(cu_seqlens[history], block_size, rounding_mode="floor")
        per_block = block_size // stride
        window = _first_rows(cu_seqlens, stride)[history] + block * per_block
        window = window[:, None] + torch.arange(per_block, device=q.device)
        c = c[window.clamp(max=c.shape[0] - 1)].mean(1, dtype=torch.float32)
    else:  # the compressor still takes part, so that its gradients exist
        c = c[:0]
    blocks, pi, _, _ = _select(
        mean_q, c.to(q.dtype), cu_seqlens, max_seqlen, block_size, num_selected_blocks, threshold
    )
    return Selection(blocks, pi)


@torch.library.custom_op(f"{NAMESPACE}::stream", mutates_args=())
def _stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    factor: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sizes: list[int],
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """One stream and its lse: the selected `blocks`, or the short-term stream where there are none."""
    layout = Layout(q, k.shape[1], cu_seqlens, max_seqlen, Sizes(*sizes), scaling)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    start, _, tile_history = layout.plan()
    if blocks is not None:
        return layout.selected(q, k, v, blocks.contiguous(), start, save=True)
    out, _, lse = layout.short(q, k, v, tile_history, None, None, save=True)
    return out, lse


@_stream.register_fake
def _(q, k, v, blocks, factor, cu_seqlens, max_seqlen, sizes, scaling):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::stream_backward", mutates_args=())
def _stream_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    sizes: list[int],
    scaling: float,
    factor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(q, k.shape[1], cu_seqlens, max_seqlen, Sizes(*sizes), scaling)
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    start, stop, tile_history = layout.plan()
    if blocks is None:
        dq, delta = layout.query_backward(q, k, v, tile_history, out, grad, None, lse, None, None, None, short=True)
        dk, dv = layout.key_backward(q, k, v, tile_history, grad, None, None, (lse, delta), None, None)
        return dq, dk, dv, layout.empty(0)
    dq, delta, weight, _, pair = layout.selected_backward(
        *(q, k, v, out, grad, None, lse, blocks.contiguous(), start, None, None, factor)
    )
    long = (lse, delta, lse, lse, start)
    if layout.rows:
        inverted = layout.invert(pair)
        parts = layout.inverted(q, k, v, grad, None, lse, delta, start, stop, inverted, None)
        long = (lse, delta, *parts[:2], inverted[1])
    dk, dv = layout.key_backward(q, k, v, tile_history, grad, None, long, None, None, None)
    return dq, dk, dv, weight


@_stream_backward.register_fake
def _(grad, q, k, v, blocks, cu_seqlens, out, lse, max_seqlen, sizes, scaling, factor):
    weight = q.new_empty(blocks.shape if factor else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), weight


def _stream_setup(ctx, inputs, output) -> None:
    q, k, v, blocks, factor, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, blocks, cu_seqlens, *output)
    ctx.factor = None if factor is None else factor.dtype
    ctx.mark_non_differentiable(output[1])


def _stream_grad(ctx, grad, _):
    *gradients, weight = _stream_backward(grad, *ctx.saved_tensors, *ctx.settings, ctx.factor is not None)
    weight = None if ctx.factor is None else weight.to(ctx.factor)
    return *gradients, None, weight, *(None,) * 4


_stream.register_autograd(_stream_grad, setup_context=_stream_setup)


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    factor: Tensor | None,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    block_size: int,
    scaling: float,
) -> Tensor:
    """As `ops_reference.attend_selected`, for factors that are one in value (as `straight_through` makes them)."""
    check(q, block_size=block_size, num_selected_blocks=block_indices.shape[2])
    sizes = _only(block=block_size, selected=block_indices.shape[2])
    return _stream(q, k, v, block_indices, factor, cu_seqlens, max_seqlen, list(sizes), scaling)[0]


def attend_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    block_size: int,
    window: int,
    base: int,
    scaling: float,
) -> Tensor:
    """As `ops_reference.attend_short`."""
    check(q, short_block_size=block_size, heads_per_group=q.shape[1] // k.shape[1])
    sizes = _only(short_block=block_size, window=window, base=base)
    return _stream(q, k, v, None, None, cu_seqlens, max_seqlen, list(sizes), scaling)[0]


TRITON_OPS = Ops(compress, select, attend_selected, attend_short, attend_full)
