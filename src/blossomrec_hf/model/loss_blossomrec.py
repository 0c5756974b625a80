"""Training objectives over the catalog."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .configuration_blossomrec import BlossomRecConfig
from .ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS
from .objectives_blossomrec import (
    SAMPLED_OBJECTIVES,
    find_objective,
    mean_over_targets,
    register_objective,
    require_weights,
)
from .ops_triton_cross_entropy import fused_cross_entropy, why_unsupported
from .packing_blossomrec import basket_begins


MAX_LOGITS = {"cpu": 2**25, "cuda": 2**28}  # logits alive at a time, 128 MiB and 1 GiB in float32


def next_item_targets(labels: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """
    The target of each packed position: the label of the next position of the same history.

    Args:
        labels: vocabulary ids `[T]` aligned with the input; −100 is ignored.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.

    Returns:
        `[T]`, −100 for no target: at the end of a history, and for [PAD] and [UNK].
    """
    targets = nn.functional.pad(labels[1:], (0, 1), value=IGNORE_INDEX)
    first = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
    first.index_fill_(0, cu_seqlens.long(), True)  # an assignment would copy the `True` from the CPU, and wait for it
    return targets.masked_fill(first[1:] | (targets < NUM_SPECIAL_IDS), IGNORE_INDEX)


def basket_targets(
    labels: torch.Tensor, basket_starts: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The target at each packed event, and the position that predicts it: the last one before the event's basket. So no item
    of a basket is predicted from another one, and one position predicts all items of the next basket.

    Args:
        labels: vocabulary ids `[T]` aligned with the input; −100 is ignored.
        basket_starts: whether an event is the first of a basket, bool `[T]`. The first event of a history always is.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.

    Returns:
        sources `[T]`, places of the positions that predict; and targets `[T]`, −100 for no target: in the first basket of a
        history, and for [PAD] and [UNK].
    """
    first = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
    first.index_fill_(0, cu_seqlens.long(), True)
    begins = basket_begins(basket_starts.to(labels.device) | first[:-1])
    return (begins - 1).clamp(min=0), labels.masked_fill(first[begins] | (labels < NUM_SPECIAL_IDS), IGNORE_INDEX)


def given_targets(shift_labels: torch.Tensor) -> torch.Tensor:
    """
    Targets that the caller has aligned with the input, as trainers of sharded sequences do: position t predicts
    `shift_labels[t]`, also at the end of a history. [PAD] and [UNK] are no targets.

    Args:
        shift_labels: vocabulary ids `[T]`; −100 is ignored.

    Returns:
        `[T]`, −100 for no target.
    """
    return shift_labels.masked_fill(shift_labels < NUM_SPECIAL_IDS, IGNORE_INDEX)


class Targets(NamedTuple):
    """
    What the loss of packed histories predicts.

    Attributes:
        ids: vocabulary ids `[T]`, −100 for none.
        weights: the weight of each target `[T]`; `None` for 1.
        sources: the place of the position that predicts each target `[T]`; `None` if it is the target's own place.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None
    sources: torch.Tensor | None = None


def find_targets(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    basket_starts: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    shifted: bool = False,
) -> Targets:
    """
    The targets of packed histories.

    Args:
        labels: vocabulary ids `[T]`, −100 for none: aligned with the input or, if `shifted`, with the positions that predict.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.
        basket_starts: bool `[T]`, see `basket_targets`. By default, every event is a basket.
        weights: float `[T]`, the weight of each event as a target, aligned with `labels`. Defaults to 1.
    """
    if basket_starts is not None:
        sources, ids = basket_targets(labels, basket_starts, cu_seqlens)
        return Targets(ids, weights, sources)
    if shifted:
        return Targets(given_targets(labels), weights)
    ids = next_item_targets(labels, cu_seqlens)
    return Targets(ids, None if weights is None else nn.functional.pad(weights[1:], (0, 1)))


def loss_of_targets(
    states: torch.Tensor,
    item_vectors: torch.Tensor,
    targets: Targets,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    config: BlossomRecConfig,
    item_counts: torch.Tensor,
) -> torch.Tensor:
    """
    The loss under the objective of the configuration: Σ weight · loss over the targets, divided by their number.

    Args:
        states: the prediction state of each target, `[T, hidden_size]`.
        item_vectors: `[vocab_size, hidden_size]`.
        num_items_in_batch: as in `cross_entropy`.

    Returns:
        a scalar.

    Raises:
        ValueError: for weights that the objective does not take, and if a registered objective returns no scalar.
    """
    options = {"config": config, "item_counts": item_counts}
    if targets.weights is not None:
        require_weights(config.objective)
        options["weights"] = targets.weights.to(states.device)
    loss = find_objective(config.objective)(states, item_vectors, targets.ids, num_items_in_batch, **options)
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise ValueError(
            f"The objective {config.objective!r} returned a {type(loss).__name__} of shape "
            f"{list(getattr(loss, 'shape', ()))}; it must return a scalar tensor, see `mean_over_targets`."
        )
    return loss


def cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    loss_weights: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """
    Full-softmax cross-entropy over the items, at every position that has a target. Fused kernels never write the logits.
    Without them, more than `MAX_LOGITS` logits are computed for some positions at a time, together with the gradients.

    Args:
        hidden_states: `[T, hidden_size]`.
        weight: item vectors `[vocab_size, hidden_size]`; [PAD] and [UNK] are not in the softmax.
        targets: vocabulary ids `[T]`, −100 for none.
        num_items_in_batch: the divisor of the sum, the number of targets in all batches and processes of the step.
            Defaults to their number in this batch.
        loss_weights: factors of the loss of each position, float `[T]`. Defaults to 1.
        implementation: `"triton"` (the kernels of this package), `"torch"`, `"liger"` (the chunks of `liger-kernel`, without
            `loss_weights`) or `"auto"`: on a GPU in half precision `"triton"` if it supports the hidden size, otherwise
            `"torch"`, or `"liger"` if chunks are needed on a GPU and it is installed. Value and gradients are the same.

    Returns:
        a scalar, float32 or better.

    Raises:
        ValueError: if `"triton"` or `"liger"` cannot compute the input.
    """
    targets = torch.where(targets < 0, IGNORE_INDEX, targets - NUM_SPECIAL_IDS)
    if _takes_triton(hidden_states, implementation):
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        total = fused_cross_entropy(hidden_states, weight, targets, NUM_SPECIAL_IDS, loss_weights)
        return mean_over_targets(total, targets, num_items_in_batch)
    rows = max(1, MAX_LOGITS.get(weight.device.type, MAX_LOGITS["cuda"]) // weight.shape[0])
    if hidden_states.shape[0] > rows or (implementation == "liger" and hidden_states.shape[0]):
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
            weight = weight.to(hidden_states.dtype)
        fused = _fused_kernel(hidden_states, implementation, weighted=loss_weights is not None)
        losses = _ChunkedCrossEntropy.apply(hidden_states, weight, targets, loss_weights, rows, fused)
        return mean_over_targets(losses, targets, num_items_in_batch)
    logits = nn.functional.linear(hidden_states, weight[NUM_SPECIAL_IDS:])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    reduction = "sum" if loss_weights is None else "none"
    losses = nn.functional.cross_entropy(logits, targets, reduction=reduction)
    return mean_over_targets(losses, targets, num_items_in_batch, loss_weights)


def _takes_triton(hidden_states: torch.Tensor, implementation: str) -> bool:
    """Whether `implementation` (see `cross_entropy`) selects the Triton kernels for these hidden states."""
    if implementation not in ("auto", "triton") or not hidden_states.shape[0]:
        return False
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if implementation == "auto":
        return device == "cuda" and supports_fused(dtype, hidden_states.shape[1])
    reason = why_unsupported(device, dtype, hidden_states.shape[1])
    if reason is not None:
        raise ValueError(f'`implementation` is "triton", but {reason}; it may also be "auto", "torch" or "liger".')
    return True


def supports_fused(dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether `"auto"` selects the Triton kernels on a GPU, which never have all logits in memory."""
    return dtype in (torch.float16, torch.bfloat16) and why_unsupported("cuda", dtype, hidden_size) is None


def _fused_kernel(
    hidden_states: torch.Tensor, implementation: str, *, weighted: bool = False
) -> Callable[..., torch.Tensor] | None:
    """Liger's function of hidden states, weight and targets, if `implementation` (see `cross_entropy`) selects it."""
    double, on_gpu = hidden_states.dtype == torch.float64, hidden_states.device.type == "cuda"
    if implementation == "torch" or (implementation == "auto" and (double or not on_gpu)):
        return None
    reason = None
    if weighted:
        reason = "it has no weights of events"
    elif double:
        reason = "it has no float64"
    elif not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"it needs a GPU, the input is on {hidden_states.device.type}"
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        reason = f'it cannot be imported ({error}; `pip install "liger-kernel>=0.8.5"`)'
    if reason is not None:
        if implementation == "auto":
            return None
        raise ValueError(f'`implementation` is "liger", but {reason}; it may also be "auto", "torch" or "triton".')
    return liger_fused_linear_cross_entropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """
    Summed full-softmax cross-entropy without the matrix of all logits: some positions at a time, whose gradients are
    computed from the same logits in the forward pass (as in the fused linear cross-entropy of Liger Kernel, arXiv
    2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, loss_weights, rows, fused):
        make = partial(_chunks, loss_weights) if fused is None else partial(_fused_chunks, fused)
        total, grad_hidden, grad_weight = make(hidden_states, weight, targets, rows, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunks(
    loss_weights: torch.Tensor | None,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss and the needed gradients, that of the weight in float32 or better."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    items = weight[NUM_SPECIAL_IDS:]
    total = hidden_states.new_zeros((), dtype=dtype)
    grad_hidden = torch.empty_like(hidden_states) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
    for start in range(0, hidden_states.shape[0], rows):
        hidden, target = hidden_states[start : start + rows], targets[start : start + rows]
        factor, place = (target >= 0)[:, None], target.clamp(min=0)[:, None]
        log_probs = (hidden @ items.T).log_softmax(1, dtype=dtype)
        losses = torch.where(factor, log_probs.gather(1, place), 0.0)
        if loss_weights is not None:
            factor = factor * loss_weights[start : start + rows, None].to(dtype)
            losses, factor = losses * factor, factor.to(hidden.dtype)
        total += losses.sum().neg()
        if not (need_hidden or need_weight):
            continue
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, place, gradient.new_full(place.shape, -1.0))
        gradient = gradient.to(hidden.dtype)
        # Positions are masked and weighted on the small side of the products.
        if need_hidden:
            grad_hidden[start : start + rows] = (gradient @ items) * factor
        if need_weight:
            if gradient.dtype == dtype:
                grad_weight[NUM_SPECIAL_IDS:].addmm_(gradient.T, hidden * factor)
            else:
                grad_weight[NUM_SPECIAL_IDS:] += gradient.T @ (hidden * factor)
    return total, grad_hidden, grad_weight


@torch.compiler.disable
def _fused_chunks(
    fused: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same as `_chunks`, by Liger's kernel."""
    # It computes no gradient at all if the hidden states need none.
    hidden = hidden_states.detach().requires_grad_(need_hidden or need_weight)
    items = weight[NUM_SPECIAL_IDS:].detach().requires_grad_(need_weight)
    with torch.enable_grad():
        total = fused(
            hidden,
            items,
            targets,
            reduction="sum",
            accum_dtype=torch.float32,
            # By default, it computes as many logits at a time as `hidden` has elements: a few rows, for which the whole
            # gradient of a large catalog is read and written.
            chunk_mem_const=max(1, rows * weight.shape[0] // hidden.numel()),
        )
    grad_hidden = grad_weight = None
    if hidden.requires_grad:
        # Computed here, with a factor of 1: Liger's own backward multiplies the stored gradient in place at every call.
        grad_hidden, *rest = torch.autograd.grad(total, [hidden, items] if need_weight else [hidden])
        grad_weight = nn.functional.pad(rest[0], (0, 0, NUM_SPECIAL_IDS, 0)) if need_weight else None
    return total.detach(), grad_hidden if need_hidden else None, grad_weight


def sampled_loss(
    objective: str,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    loss_weights: torch.Tensor | None = None,
    item_counts: torch.Tensor,
    num_negatives: int,
    negative_sampling: str = "uniform",
    shared_negatives: bool = True,
    gbce_calibration: float = 0.75,
) -> torch.Tensor:
    """
    An objective against drawn items instead of all, at every position that has a target. A drawn item that is the
    position's own target is ignored. Items are drawn by torch's generator of the device.

    With s⁺ the logit of the target, s_j that of the drawn item j, q_j its chance to be drawn and k = `num_negatives`:

    - `"sampled_softmax"`: −s⁺ + log(exp s⁺ + Σ_j exp(s_j − log(k·q_j))), the log-Q correction (Bengio and Senécal
      2008; Yi et al. 2019), under which the sum stands for the one over the whole catalog;
    - `"bce"`: −(log σ(s⁺) + Σ_j log(1 − σ(s_j))) / (k + 1), SASRec's (Kang and McAuley 2018) for k = 1;
    - `"gbce"`: the same with β·log σ(s⁺), β = α(t(1 − 1/α) + 1/α), α = k / (number of items − 1), gSASRec's (Petrov
      and Macdonald 2023, equations 7 and 9); t = 0 is `"bce"`;
    - `"bpr"`: −Σ_j log σ(s⁺ − s_j) / k (Rendle et al. 2009).

    Args:
        hidden_states: `[T, hidden_size]`.
        weight: item vectors `[vocab_size, hidden_size]`; [PAD] and [UNK] are never drawn.
        targets: vocabulary ids `[T]`, −100 for none.
        num_items_in_batch, loss_weights: as in `cross_entropy`.
        item_counts: training frequencies `[vocab_size]`.
        negative_sampling: `"uniform"`, `"popularity"` (by frequency + 1) or `"in_batch"` (other positions' targets; q
            by the frequencies).
        shared_negatives: whether all positions of the batch share the drawn items.
        gbce_calibration: t.

    Returns:
        a scalar, float32 or better.
    """
    num_items = weight.shape[0] - NUM_SPECIAL_IDS
    is_target = targets >= 0
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    target = torch.where(is_target, targets, NUM_SPECIAL_IDS)

    frequencies = item_counts[NUM_SPECIAL_IDS:].double() + 1
    shape = (num_negatives,) if shared_negatives else (targets.shape[0], num_negatives)
    if negative_sampling == "uniform":
        negatives = torch.randint(NUM_SPECIAL_IDS, weight.shape[0], shape, device=weight.device)
        log_chance = torch.full((), -math.log(num_items), dtype=dtype, device=weight.device)
    else:
        if negative_sampling == "popularity":
            negatives = _draw(frequencies, shape) + NUM_SPECIAL_IDS
        else:
            negatives = target[_draw(is_target.double(), shape)]
        log_chance = (frequencies / frequencies.sum()).log().to(dtype)[negatives - NUM_SPECIAL_IDS]

    # One lookup has one gradient as large as the catalog; that of an index is slower where items repeat.
    rows = nn.functional.embedding(torch.cat([target, negatives.flatten()]), weight)
    positive_rows, negative_rows = rows.split([target.shape[0], negatives.numel()])
    positive = (hidden_states * positive_rows).sum(-1, dtype=dtype)[:, None]
    if shared_negatives:
        negative = (hidden_states @ negative_rows.T).to(dtype)
    else:
        negative_rows = negative_rows.unflatten(0, negatives.shape)
        negative = torch.einsum("td,tkd->tk", hidden_states, negative_rows).to(dtype)
    accidental = negatives == target[:, None]

    if objective == "sampled_softmax":
        corrected = negative - (log_chance + math.log(num_negatives))
        logits = torch.cat([positive, corrected.masked_fill(accidental, -torch.inf)], dim=1)
        losses = logits.logsumexp(1) - positive[:, 0]
    elif objective == "bpr":
        losses = nn.functional.softplus(negative - positive).masked_fill(accidental, 0.0).sum(1) / num_negatives
    else:
        rate = num_negatives / (num_items - 1)
        beta = 1.0 if objective == "bce" else rate * (gbce_calibration * (1 - 1 / rate) + 1 / rate)
        against = nn.functional.softplus(negative).masked_fill(accidental, 0.0).sum(1)
        losses = (beta * nn.functional.softplus(-positive[:, 0]) + against) / (num_negatives + 1)
    return mean_over_targets(losses, targets, num_items_in_batch, loss_weights)


def _draw(chances: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Places drawn with replacement in proportion to `chances`; unlike `multinomial`, of any number of places."""
    edges = chances.cumsum(0)
    drawn = torch.rand(shape, dtype=edges.dtype, device=edges.device) * edges[-1]
    return torch.searchsorted(edges, drawn, right=True).clamp(max=len(edges) - 1)


def _full_softmax(
    hidden_states: torch.Tensor,
    item_vectors: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    *,
    weights: torch.Tensor | None = None,
    config: BlossomRecConfig,
    item_counts: torch.Tensor,
) -> torch.Tensor:
    """`cross_entropy` as the configuration sets it."""
    options = {"loss_weights": weights, "implementation": config.cross_entropy_implementation}
    return cross_entropy(hidden_states, item_vectors, targets, num_items_in_batch, **options)


def _against_drawn_items(
    objective: str,
    hidden_states: torch.Tensor,
    item_vectors: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    *,
    weights: torch.Tensor | None = None,
    config: BlossomRecConfig,
    item_counts: torch.Tensor,
) -> torch.Tensor:
    """`sampled_loss` as the configuration sets it."""
    return sampled_loss(
        objective,
        hidden_states,
        item_vectors,
        targets,
        num_items_in_batch,
        loss_weights=weights,
        item_counts=item_counts,
        num_negatives=config.num_negatives,
        negative_sampling=config.negative_sampling,
        shared_negatives=config.shared_negatives,
        gbce_calibration=config.gbce_calibration,
    )


register_objective("cross_entropy", _full_softmax)
for _name in SAMPLED_OBJECTIVES:
    register_objective(_name, partial(_against_drawn_items, _name))
