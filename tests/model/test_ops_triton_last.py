"""The kernels of last positions, against PyTorch's operations and against the kernels of all positions."""

import random

import pytest
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.attention_blossomrec import BlossomAttention, attend_last_positions
from blossomrec_hf.model.ops_triton_launch import INTERPRETED, triton


if triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")


def config_of(heads: int = 4, groups: int = 2, width: int = 16, **changes) -> BlossomRecConfig:
    settings = {"vocab_size": 60, "hidden_size": heads * width, "num_hidden_layers": 1, "initializer_range": 0.2}
    settings |= {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": 24}
    return BlossomRecConfig(**(settings | changes))


@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ([50, 0, 1, 33, 16], {}),
        ([49, 18, 0], {"attention_types": "long_term", "num_selected_blocks": 2}),
        ([30, 1, 37], {"attention_types": "short_term", "heads": 3, "groups": 1, "short_term_block_size": 5}),
        ([120, 7], {"num_selected_blocks": 5, "compress_block_size": 7, "compress_stride": 4, "width": 32}),
        ([90], {"selection_block_size": 32, "short_term_window": 3, "power_law_base": 3, "heads": 2, "groups": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_last_positions_are_those_of_pytorch(lengths, changes):
    config = config_of(**changes)
    layer = BlossomAttention(config, 0).to(DEVICE)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tokens, last = sum(lengths), len(lengths)
    q, k, v = (
        2 * torch.randn(1, h, n, width, device=DEVICE) for h, n in ((heads, last), (groups, tokens), (groups, tokens))
    )
    angle = 3 * torch.randn(tokens, width // 2).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos()[None], angle.sin()[None]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    keep = (offsets[1:] - 1).clamp(min=0)
    where = {"cu_seqlens": offsets, "max_seqlen": max(lengths), "position_embeddings": (cos, sin)}
    where["gates"] = torch.rand(1, last, heads, 2, device=DEVICE) if len(layer.streams) == 2 else None
    if hasattr(layer, "compressor"):
        torch.nn.init.normal_(layer.compressor.position, std=0.25)
    results = []
    for implementation in ("blossom_torch", "blossom_triton"):
        config._attn_implementation = implementation
        at_keep = (cos[:, keep], sin[:, keep])
        results.append(attend_last_positions(layer, q, k, v, **where, query_embeddings=at_keep))
    (expected, selection), (out, actual_selection) = results
    some = torch.tensor(lengths, device=DEVICE) > 0
    torch.testing.assert_close(out[:, some], expected[:, some], rtol=1e-5, atol=1e-5)
    assert not out[:, ~some].any()
    if selection is not None:
        torch.testing.assert_close(actual_selection.block_indices[some], selection.block_indices[some])
        torch.testing.assert_close(actual_selection.importance[some], selection.importance[some], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_model_has_the_logits_of_all_positions(dtype, compiled):
    model = BlossomRecForSequentialRecommendation(config_of(num_hidden_layers=2, attn_implementation="blossom_triton"))
    model = model.to(DEVICE, dtype).eval()
    lengths = [random.randint(30, 70), 1, 0, 17]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    ids = torch.randint(2, 60, (1, sum(lengths)), device=DEVICE)
    packing = {"cu_seq_lens_q": offsets, "max_length_q": max(lengths)}
    expected = model(ids, **packing).logits[0, offsets[1:][[0, 1, 3]] - 1]
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    actual = forward(ids, **packing, logits_to_keep=1).logits[[0, 1, 3], 0]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
