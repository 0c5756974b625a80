"""Which positions have a target, and what the loss divides by."""

import torch

from blossomrec_hf.model.loss_blossomrec import cross_entropy, next_item_targets


def test_targets_are_the_next_items_of_the_same_history():
    labels = torch.tensor([5, 6, 7, 8, 9, 1, 4, 0, 3, -100, 2])
    cu_seqlens = torch.tensor([0, 3, 3, 4, 11])
    expected = [6, 7, -100, -100, -100, 4, -100, 3, -100, 2, -100]  # [UNK], [PAD] and −100 are no targets
    assert next_item_targets(labels, cu_seqlens).tolist() == expected


def test_cross_entropy_is_the_mean_over_targets_and_leaves_out_special_ids():
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([2, 8, -100, 5, -100, 3])
    expected = [
        -(weight[t] @ h - (weight[2:] @ h).exp().sum().log()) for h, t in zip(hidden, targets.tolist()) if t != -100
    ]
    torch.testing.assert_close(cross_entropy(hidden, weight, targets), torch.stack(expected).mean())
    torch.testing.assert_close(cross_entropy(hidden, weight, targets, 8), torch.stack(expected).sum() / 8)


def test_a_batch_without_targets_has_loss_zero_and_gradients():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(hidden, torch.randn(9, 4), torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()
