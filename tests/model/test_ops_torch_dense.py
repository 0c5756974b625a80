"""Both streams of short histories in one operation, against the reference."""

import random

import pytest
import torch
from model_cases import recommender

from blossomrec_hf import BlossomRecConfig
from blossomrec_hf.model import ops_torch_dense, streams_blossomrec
from blossomrec_hf.model.attention_blossomrec import BlossomAttention
from blossomrec_hf.model.ops_reference import REFERENCE_OPS, Keys, every_position
from blossomrec_hf.model.ops_torch import TORCH_OPS
from blossomrec_hf.model.ops_torch_tiles import SLICE_LOGITS
from blossomrec_hf.model.streams_blossomrec import attend_streams, packed_blocks


def random_layer(**settings) -> BlossomAttention:
    heads, groups, width = random.choice([(4, 2, 4), (2, 2, 6), (4, 1, 8)])
    stride = random.choice([1, 3, 4, 16])
    config = BlossomRecConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        compress_stride=stride,
        compress_block_size=2 * stride,
        selection_block_size=stride * random.choice([1, 2]),
        num_selected_blocks=random.choice([1, 2, 4]),
        short_term_block_size=random.choice([1, 2, 5, 8]),
        short_term_window=random.choice([1, 2]),
        power_law_base=random.choice([2, 3]),
        **settings,
    )
    layer = BlossomAttention(config, 0).double().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def streams_of(ops, layer: BlossomAttention, lengths: list[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, selection, and the gradients of the inputs and of the layer's own weights."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, gates = tensors
    keys, queries = Keys(k, v, offsets[:-1]), every_position(offsets, sum(lengths), max(lengths))
    blocks = packed_blocks(ops, layer, keys, offsets)
    out, selection = attend_streams(ops, layer, q, keys, queries, blocks, gates)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    wanted = [*tensors, *(p for p in layer.compressor.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    return [out.detach(), selection.block_indices, *(torch.zeros(()) if x is None else x for x in gradients)]


@pytest.mark.parametrize("slice_logits", [2**20, 3000], ids=["whole", "sliced"])
@pytest.mark.parametrize("selection_gradient", ["straight_through", "none"])
@pytest.mark.parametrize("trial", range(8))
def test_values_and_gradients_are_those_of_the_reference(monkeypatch, trial, selection_gradient, slice_logits):
    calls = []
    monkeypatch.setattr(
        streams_blossomrec, "attend_dense", lambda *x, **y: calls.append(1) or ops_torch_dense.attend_dense(*x, **y)
    )
    monkeypatch.setattr(ops_torch_dense, "MAX_PADDING", 1.0)
    monkeypatch.setitem(SLICE_LOGITS, "cpu", slice_logits)
    layer = random_layer(selection_gradient=selection_gradient)
    lengths = [random.choice([0, 1, 2, 16, random.randint(1, 100)]) for _ in range(4)] + [random.randint(1, 100)]
    config, tokens = layer.config, sum(lengths)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    tensors = [torch.randn(tokens, h, config.head_dim, dtype=torch.float64, requires_grad=True) for h in heads]
    tensors.append(torch.rand(tokens, heads[0], 2, dtype=torch.float64, requires_grad=True))
    actual, expected = (streams_of(ops, layer, lengths, tensors) for ops in (TORCH_OPS, REFERENCE_OPS))
    assert len(calls) == 1
    for ours, reference in zip(actual, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(
            ours, reference, rtol=0, atol=1e-9 * scale, msg=lambda m: f"{m}\n{lengths} {config}"
        )


def test_only_short_histories_of_similar_lengths_are_tiles():
    def is_short(lengths):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        rows = torch.zeros(sum(lengths), 1, 2)
        return ops_torch_dense.has_short_histories(
            Keys(rows, rows, offsets[:-1]), every_position(offsets, len(rows), max(lengths))
        )

    assert is_short([50, 50, 50, 31]) and is_short([1])
    assert not is_short([50, 50, 10, 10]) and not is_short([200, 200])


@pytest.mark.parametrize("length", [30, 150], ids=["dense", "tiles"])
def test_the_backward_pass_may_run_under_autocast(length):
    model = recommender(hidden_dropout_prob=0.0).float().train()
    x, gradients = torch.randint(2, 60, (3, length)), []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, labels=x).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()
