"""The attention layer: its registered functions agree, nothing leaks, everything learns."""

import random

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from blossomrec_hf import BlossomRecConfig
from blossomrec_hf.model.attention_blossomrec import BlossomAttention
from blossomrec_hf.model.modeling_blossomrec import BlossomRecModel
from blossomrec_hf.model.ops_triton_launch import why_unsupported
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


SMALL = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
BLOCKS = [
    {},
    {"compress_block_size": 8, "compress_stride": 4, "selection_block_size": 4, "short_term_block_size": 4},
    {"compress_block_size": 4, "compress_stride": 4, "selection_block_size": 16, "num_selected_blocks": 2},
]


def model(**kwargs) -> BlossomRecModel:
    return BlossomRecModel(BlossomRecConfig(**SMALL, **kwargs)).double().eval()


def test_names_are_registered_and_eager_is_left_alone():
    names = AttentionInterface().valid_keys()
    assert {"blossom", "blossom_torch", "power_law"} <= set(names)
    assert "eager" not in names
    assert "power_law" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def test_nothing_asked_means_blossom_and_a_choice_is_kept():
    assert model().config._attn_implementation == "blossom"
    for name in ("eager", "blossom_torch"):
        assert (
            BlossomRecModel._from_config(
                BlossomRecConfig(**SMALL), attn_implementation=name
            ).config._attn_implementation
            == name
        )
    with pytest.raises(ValueError, match="not_there"):
        BlossomRecModel._from_config(BlossomRecConfig(**SMALL), attn_implementation="not_there")


def test_the_implementation_can_be_changed_later():
    one = model()
    x = torch.randint(2, 50, (2, 70))
    before = one(x).last_hidden_state
    one.set_attn_implementation("eager")
    torch.testing.assert_close(one(x).last_hidden_state, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("blocks", BLOCKS, ids=["default", "small", "large"])
def test_implementations_agree_in_values_and_gradients(attention_type, blocks):
    reference = model(attention_types=attention_type, **blocks)
    reference.set_attn_implementation("eager")
    x = torch.randint(2, 50, (3, random.choice([40, 200])))
    x[0, 20:] = 0
    direction = torch.randn(*x.shape, 16, dtype=torch.float64)
    results = {}
    for name in ("eager", "blossom", "blossom_torch"):
        reference.set_attn_implementation(name)
        reference.zero_grad()
        out = reference(x).last_hidden_state
        (out * direction).sum().backward()
        results[name] = out.detach(), {n: p.grad.clone() for n, p in reference.named_parameters()}
    for name in ("blossom", "blossom_torch"):
        torch.testing.assert_close(results[name][0], results["eager"][0], rtol=0, atol=1e-10)
        for parameter, gradient in results["eager"][1].items():
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(
                results[name][1][parameter], gradient, rtol=0, atol=1e-8 * scale, msg=f"{name}: {parameter}"
            )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_later_item_never_changes_an_earlier_output(attention_type):
    one = model(attention_types=attention_type, **BLOCKS[1])
    x = torch.randint(2, 50, (1, 300))
    cut = random.randrange(1, 300)
    other = x.clone()
    other[:, cut:] = torch.randint(2, 50, (1, 300 - cut))
    before, after = one(x).last_hidden_state, one(other).last_hidden_state
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-10)
    assert not torch.allclose(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("length", [1, 5, 15, 40])
def test_every_parameter_has_a_gradient_in_any_batch(length):
    config = BlossomRecConfig(**SMALL)
    one = BlossomRecModel(config).train()
    one(torch.randint(2, 50, (2, length))).last_hidden_state.pow(3).sum().backward()
    missing = [n for n, p in one.named_parameters() if p.grad is None]
    assert not missing


def test_the_compressor_learns_as_soon_as_a_query_has_two_candidates():
    for length, learns in ((32, False), (33, True)):
        one = model(num_hidden_layers=1)
        one(torch.randint(2, 50, (1, length))).last_hidden_state.pow(3).sum().backward()
        gradients = [p.grad.abs().max().item() for n, p in one.named_parameters() if "compressor" in n]
        assert len(gradients) == 4
        assert all((g > 0) == learns for g in gradients), (length, gradients)


def test_without_a_selection_gradient_the_compressor_is_frozen():
    one = model(selection_gradient="none")
    one(torch.randint(2, 50, (1, 80))).last_hidden_state.pow(3).sum().backward()
    assert all(p.requires_grad == ("compressor" not in n) for n, p in one.named_parameters())
    assert all(p.grad is not None for n, p in one.named_parameters() if p.requires_grad)


def test_gradients_against_finite_differences_without_a_selection_gradient():
    config = BlossomRecConfig(**SMALL, selection_gradient="none", attn_implementation="blossom", **BLOCKS[1])
    layer = BlossomAttention(config, 0).double()
    torch.nn.init.normal_(layer.compressor.position)
    angles = torch.arange(24, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=torch.float64)
    hidden = torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)

    def attend(hidden):
        return layer(
            hidden,
            position_embeddings=(angles.cos()[None], angles.sin()[None]),
            cu_seqlens=torch.tensor([0, 7, 24]),
            max_seqlen=17,
        )[0]

    assert torch.autograd.gradcheck(attend, (hidden,), eps=1e-7, atol=1e-5)


def test_gates_begin_at_their_biases():
    one = model(gate_initial_bias=(-1.0, 3.0))
    selection = one(torch.randint(2, 50, (2, 9)), output_selection=True).selections[0]
    expected = torch.tensor([-1.0, 3.0]).sigmoid().double().expand(2, 9, 4, 2)
    torch.testing.assert_close(selection.gates, expected)


@pytest.mark.parametrize("attention_type", ["blossom", "long_term", "short_term"])
def test_the_last_position_by_the_kernels(attention_type):
    if why_unsupported("cpu", torch.float32, 16) is not None:
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    settings = {"vocab_size": 50, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"num_hidden_layers": 1, "num_selected_blocks": 1, "attention_types": attention_type}
    one = BlossomRecModel(BlossomRecConfig(**settings, attn_implementation="blossom_triton")).eval()
    for weight in one.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    offsets = torch.tensor([0, 0, 50, 51, random.randint(52, 120), 150, 150])
    inputs = {"input_ids": torch.randint(2, 50, (1, 150)), "cu_seq_lens_q": offsets}
    with torch.no_grad():
        actual = one.encode(pack_histories(**inputs, vocab_size=50), last_only=True)
        one.set_attn_implementation("eager")
        expected = one.double()(**inputs).last_hidden_state[0][offsets[1:] - 1].float()
    some = offsets.diff() > 0
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[some], expected[some], rtol=0, atol=1e-4)
