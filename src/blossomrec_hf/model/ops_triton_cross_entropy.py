"""
Full-softmax cross-entropy as fused GPU kernels. The matrix of logits is never written: each tile of it is computed from the
hidden states and the item vectors where it is needed, once for the normalization and once for either gradient, as in
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009). Nothing is added atomically, so gradients are bitwise the same
from run to run. Both directions are `torch.library` custom ops, so that `torch.compile` sees single nodes.
"""

import functools

import torch
from torch import Tensor

from .ops_triton import NAMESPACE
from .ops_triton_launch import DTYPES, INTERPRETED, jit, tl, triton


WIDTHS = (16, 32, 64, 128, 256)
# Rows of the grid of the weight gradient, at least: two for each multiprocessor of an H100.
MIN_PROGRAMS = 264


def why_unsupported(device: str, dtype: torch.dtype, width: int) -> str | None:
    """A sentence that says what the kernels cannot do, or `None` if they can do everything that is asked."""
    if triton is None:
        return "it needs Triton, which is not installed"
    if device != "cuda" and not INTERPRETED:
        return f"it needs a GPU, the input is on {device}"
    if dtype not in DTYPES:
        return f"it has no kernels for {dtype}"
    if width not in WIDTHS:
        return f"it has no kernels for a hidden size of {width} (only {', '.join(map(str, WIDTHS))})"
    return None


@jit
def _normalization_kernel(
    x_ptr, w_ptr, target_ptr, lse_ptr, picked_ptr, T, num_items,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of each position: the logarithm of the sum of exponentials over all items, and the logit of the target."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    inside = t < T
    x = tl.load(x_ptr + t.to(tl.int64)[:, None] * D + d, mask=inside[:, None], other=0.0)
    target = tl.load(target_ptr + t, mask=inside, other=-1)
    top = tl.full((BT,), -float("inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    picked = tl.zeros((BT,), tl.float32)
    for start in range(0, num_items, BV):
        v = start + tl.arange(0, BV)
        w = tl.load(w_ptr + v.to(tl.int64)[None, :] * D + d[:, None], mask=v[None, :] < num_items, other=0.0)
        logits = tl.dot(x, w, input_precision="ieee")
        picked += tl.sum(tl.where(v[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where(v[None, :] < num_items, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    tl.store(lse_ptr + t, top + tl.log(total), mask=inside)
    tl.store(picked_ptr + t, picked, mask=inside)


@jit
def _hidden_gradient_kernel(
    x_ptr, w_ptr, target_ptr, lse_ptr, scale_ptr, loss_weight_ptr, dx_ptr, T, num_items,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Gradient of the hidden states: probabilities less the target's one, times the item vectors."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    inside = t < T
    place = t.to(tl.int64)[:, None] * D + d
    x = tl.load(x_ptr + place, mask=inside[:, None], other=0.0)
    target = tl.load(target_ptr + t, mask=inside, other=-1)
    lse = tl.load(lse_ptr + t, mask=inside, other=0.0)
    out = tl.zeros((BT, D), tl.float32)
    for start in range(0, num_items, BV):
        v = start + tl.arange(0, BV)
        w = tl.load(w_ptr + v.to(tl.int64)[:, None] * D + d, mask=v[:, None] < num_items, other=0.0)
        p = tl.exp(tl.dot(x, tl.trans(w), input_precision="ieee") - lse[:, None])
        p = tl.where(v[None, :] == target[:, None], p - 1.0, p)
        p = tl.where(v[None, :] < num_items, p, 0.0)  # may be infinite behind the last item, which times zero is NaN
        out += tl.dot(p.to(w.dtype), w, input_precision="ieee")
    scale = tl.where(target >= 0, tl.load(scale_ptr), 0.0)
    if WEIGHTED:
        scale *= tl.load(loss_weight_ptr + t, mask=inside, other=0.0)
    tl.store(dx_ptr + place, (out * scale[:, None]).to(dx_ptr.dtype.element_ty), mask=inside[:, None])


@jit
def _weight_gradient_kernel(
    x_ptr, w_ptr, target_ptr, lse_ptr, loss_weight_ptr, dw_ptr, T, num_items, span,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Gradient of the item vectors over `span` of the positions, not yet scaled: `[splits, num_items, D]`."""
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    split = tl.program_id(1)
    d = tl.arange(0, D)
    w = tl.load(w_ptr + v.to(tl.int64)[:, None] * D + d, mask=v[:, None] < num_items, other=0.0)
    out = tl.zeros((BV, D), tl.float32)
    for start in range(split * span, tl.minimum(T, (split + 1) * span), BT):
        t = start + tl.arange(0, BT)
        inside = t < T
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * D + d, mask=inside[:, None], other=0.0)
        target = tl.load(target_ptr + t, mask=inside, other=-1)
        # A position without a target has no probabilities: its normalization counts as infinite.
        lse = tl.where(target >= 0, tl.load(lse_ptr + t, mask=inside, other=0.0), float("inf"))
        p = tl.exp(tl.dot(w, tl.trans(x), input_precision="ieee") - lse[None, :])
        p = tl.where(v[:, None] == target[None, :], p - 1.0, p)
        if WEIGHTED:
            p *= tl.load(loss_weight_ptr + t, mask=inside, other=0.0)[None, :]
        out += tl.dot(p.to(x.dtype), x, input_precision="ieee")
    place = (split.to(tl.int64) * num_items + v[:, None]) * D + d
    tl.store(dw_ptr + place, out, mask=v[:, None] < num_items)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; unlimited where kernels are interpreted."""
    if INTERPRETED:
        return 2**30
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 2**16)  # AMD's GPUs have 64 KiB and no such property


def _launch(kernel: str, width: int, dtype: torch.dtype, shared_memory: int) -> dict[str, int]:
    """
    Tile sizes, warps and pipeline stages, the fastest of six for each kernel on an H100 (bfloat16, 65,536 positions, width
    128 and 16,384 positions, width 256; 3,416 and 100,000 items). Smaller tiles where they need more than
    `shared_memory` bytes.
    """
    if INTERPRETED:
        return {"BT": 16, "BV": 32}
    if dtype == torch.float32:  # takes twice the room, and has no fast products
        return {"BT": 32, "BV": 32, "num_warps": 4, "num_stages": 1}
    wide = width > 128
    tiles = {
        "normalization": (128, 64, 4, 4),
        "hidden": (64, 64, 4, 3),
        "weight": (64, 128, 8, 3) if wide else (128, 128, 8, 2),
    }
    for tile in (tiles[kernel], (64, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)):
        rows, columns, _, stages = tile
        kept, streamed = (columns, rows) if kernel == "weight" else (rows, columns)
        if ((kept + stages * streamed) * width + rows * columns) * dtype.itemsize <= shared_memory:
            break
    return dict(zip(("BT", "BV", "num_warps", "num_stages"), tile))


def _items(weight: Tensor, num_special: int, dtype: torch.dtype) -> Tensor:
    return weight[num_special:].to(dtype).contiguous()


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None, num_special: int
) -> tuple[Tensor, Tensor]:
    """The summed loss, float32 `[]`, and the normalization of each position, float32 `[T]`."""
    num_positions, width = x.shape
    items = _items(weight, num_special, x.dtype)
    lse, picked = (torch.empty(num_positions, device=x.device, dtype=torch.float32) for _ in range(2))
    launch = _launch("normalization", width, x.dtype, _shared_memory(x.device))
    grid = (triton.cdiv(num_positions, launch["BT"]),)
    _normalization_kernel[grid](x, items, targets, lse, picked, num_positions, len(items), D=width, **launch)
    losses = lse - picked
    losses = losses if loss_weights is None else losses * loss_weights
    return torch.where(targets >= 0, losses, 0.0).sum(), lse


@_cross_entropy.register_fake
def _(x, weight, targets, loss_weights, num_special):
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    lse: Tensor,
    num_special: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `weight` where `needed`, else empty."""
    num_positions, width = x.shape
    items = _items(weight, num_special, x.dtype)
    sizes = (num_positions, len(items))
    scale, weighted = scale.float(), loss_weights is not None
    loss_weights = lse if loss_weights is None else loss_weights  # any pointer
    dx, dw = x.new_empty(0), weight.new_empty(0)
    if needed[0]:
        dx = torch.empty_like(x)
        launch = _launch("hidden", width, x.dtype, _shared_memory(x.device))
        grid = (triton.cdiv(num_positions, launch["BT"]),)
        arguments = (x, items, targets, lse, scale, loss_weights, dx, *sizes)
        _hidden_gradient_kernel[grid](*arguments, D=width, WEIGHTED=weighted, **launch)
    if needed[1]:
        launch = _launch("weight", width, x.dtype, _shared_memory(x.device))
        tiles, rows = triton.cdiv(len(items), launch["BV"]), triton.cdiv(num_positions, launch["BT"])
        splits = max(1, min(rows, triton.cdiv(MIN_PROGRAMS, tiles)))
        span = triton.cdiv(rows, splits) * launch["BT"]
        parts = torch.empty(splits, len(items), width, device=x.device, dtype=torch.float32)
        arguments = (x, items, targets, lse, loss_weights, parts, *sizes, span)
        _weight_gradient_kernel[(tiles, splits)](*arguments, D=width, WEIGHTED=weighted, **launch)
        dw = torch.zeros_like(weight)
        dw[num_special:] = parts.sum(0) * scale
    return dx, dw


@_cross_entropy_backward.register_fake
def _(scale, x, weight, targets, loss_weights, lse, num_special, needed):
    return (
        x.new_empty(x.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if needed[1] else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, loss_weights, ctx.num_special = inputs
    ctx.save_for_backward(x, weight, targets, loss_weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, scale, _):
    needed = [bool(need) for need in ctx.needs_input_grad[:2]]
    dx, dw = _cross_entropy_backward(scale, *ctx.saved_tensors, ctx.num_special, needed)
    return dx if needed[0] else None, dw if needed[1] else None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def fused_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, num_special: int, loss_weights: Tensor | None = None
) -> Tensor:
    """
    The summed cross-entropy of a full softmax over the rows of `weight` from `num_special` on.

    Args:
        x: hidden states `[T, hidden_size]`, contiguous, T ≥ 1; products are computed in their dtype and summed in float32.
        weight: `[vocab_size, hidden_size]`, any dtype; its gradient is in that dtype.
        targets: `[T]` int64, places among the rows from `num_special` on; negative for none.
        loss_weights: factors of the loss of each position `[T]`; by default, 1.

    Returns:
        a scalar, float32.
    """
    if loss_weights is not None:
        loss_weights = loss_weights.float().contiguous()
    return _cross_entropy(x.contiguous(), weight, targets, loss_weights, num_special)[0]
