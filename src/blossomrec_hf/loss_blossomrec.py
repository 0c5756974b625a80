"""Training objectives over the catalogue."""

import torch
from torch import nn


NUM_SPECIAL_IDS = 2  # [PAD] and [UNK] stand before the items


def next_item_targets(labels: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """
    What each packed position has to predict: the label of the next position of the same history.

    Args:
        labels: vocabulary ids `[T]` aligned with the input; −100 is ignored.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.

    Returns:
        `[T]`, −100 where there is no target: at the end of a history, and for [PAD] and [UNK].
    """
    targets = nn.functional.pad(labels[1:], (0, 1), value=-100)
    first = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
    first[cu_seqlens.long()] = True
    return targets.masked_fill(first[1:] | (targets < NUM_SPECIAL_IDS), -100)


def cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Full-softmax cross-entropy over the items, at every position that has a target.

    Args:
        hidden_states: `[T, hidden_size]`.
        weight: output embedding `[vocab_size, hidden_size]`; [PAD] and [UNK] take no part in the softmax.
        targets: vocabulary ids `[T]`, −100 for none.
        num_items_in_batch: what the sum is divided by: the number of targets in all batches and processes of the
            step. Their number in this batch where it is `None`.

    Returns:
        a scalar, float32 or better.
    """
    logits = nn.functional.linear(hidden_states, weight[NUM_SPECIAL_IDS:])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.where(targets < 0, -100, targets - NUM_SPECIAL_IDS)
    total = nn.functional.cross_entropy(logits, targets, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (targets >= 0).sum().clamp(min=1)
    return total / num_items_in_batch
