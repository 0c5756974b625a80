"""The ways of attending that `attention.py` times: BlossomRec, full attention by several implementations, and others."""

import argparse
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.attention_blossomrec import BlossomAttention
from blossomrec_hf.model.modules_blossomrec import project
from blossomrec_hf.model.ops_reference import Keys, every_position, rotate
from blossomrec_hf.model.ops_torch import attend_full, varlen_attn


@dataclass(frozen=True)
class Contestant:
    """One way of attending: `attention_types` of the model, and the function that computes it."""

    name: str
    attention_types: str
    implementation: str
    autocast: bool = True
    module: type[nn.Module] | None = None
    any_lengths: bool = False  # whether full attention takes histories of different lengths
    compiled: bool = True

    @property
    def is_peer(self) -> bool:
        return self.attention_types == "full"


def _rows(max_seqlen: int, *packed: torch.Tensor) -> list[torch.Tensor]:
    """`[1, heads, T, d]` → `[histories, heads, L, d]`, for packed histories of one length."""
    return [x[0].unflatten(1, (-1, max_seqlen)).transpose(0, 1) for x in packed]


def _rotated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_embeddings):
    """Queries and keys with rotary embeddings applied, unless there are none to apply (the core)."""
    if position_embeddings is None:
        return query, key
    return tuple(rotate(x, *position_embeddings).to(value.dtype) for x in (query, key))


def eager_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention with the matrix of all probabilities, as most recommenders compute it; histories of equal length."""
    query, key = _rotated(query, key, value, position_embeddings)
    query, key, value = _rows(max_seqlen, query, key, value)
    mask = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool, device=query.device).tril()
    logits = (query @ key.transpose(-1, -2) * module.scaling).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(0, 1)[None], None


@cache
def _causal_blocks(length: int, device: torch.device):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


_flex_attention = torch.compile(flex_attention, dynamic=False)


def flex_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention through FlexAttention; histories of equal length."""
    query, key = _rotated(query, key, value, position_embeddings)
    query, key, value = _rows(max_seqlen, query, key, value)
    blocks = _causal_blocks(max_seqlen, query.device)
    out = _flex_attention(query, key, value, block_mask=blocks, scale=module.scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None


def rows_full_attention(module, query, key, value, attention_mask=None, *, position_embeddings, max_seqlen, **kwargs):
    """Full attention by PyTorch's fused attention on rows; histories of equal length."""
    query, key = _rotated(query, key, value, position_embeddings)
    query, key, value = _rows(max_seqlen, query, key, value)
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=module.scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None


def varlen_full_attention(
    module, query, key, value, attention_mask=None, *, position_embeddings, cu_seqlens, max_seqlen, **kwargs
):
    """Full attention by FlashAttention on packed histories of any lengths."""
    query, key = _rotated(query, key, value, position_embeddings)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    queries = every_position(cu_seqlens, q.shape[0], max_seqlen)
    return attend_full(q, Keys(k, v, cu_seqlens[:-1]), queries, scaling=module.scaling)[None], None


class LastPositions(nn.Module):
    """A layer of full attention that computes the last positions of the histories alone, in inference."""

    def __init__(self, attention: BlossomAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *, position_embeddings, cu_seqlens, max_seqlen, keep, **kwargs):
        attention, (cos, sin) = self.attention, position_embeddings
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        k, v = project([attention.k_proj, attention.v_proj], hidden_states, joined=True)
        q, k, v = (
            x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for x in (attention.q_proj(hidden_states[:, keep]), k, v)
        )
        q, k = rotate(q, cos[:, keep], sin[:, keep]).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if attention.config._attn_implementation == "rows_full":
            k, v = _rows(max_seqlen, k, v)
            q = q[0].transpose(0, 1)[:, :, None]
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scaling)[:, :, 0]
        else:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            offsets = cu_seqlens.to(torch.int32)
            each = torch.arange(len(offsets), device=q.device, dtype=torch.int32)
            out = varlen_attn(q, k, v, each, offsets, 1, max_seqlen, scale=attention.scaling)
        return attention.o_proj(out.flatten(1))[None], None, None, None


AttentionInterface.register("eager_full", eager_full_attention)
AttentionInterface.register("flex_full", flex_full_attention)
AttentionInterface.register("rows_full", rows_full_attention)
AttentionInterface.register("varlen_full", varlen_full_attention)

FUSED_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CONTESTANTS = [
    Contestant("blossom", "blossom", "blossom"),
    Contestant("blossom (uncompiled)", "blossom", "blossom", compiled=False),
    Contestant("blossom_torch", "blossom", "blossom_torch"),
    Contestant("full (cuDNN)", "full", "rows_full"),
    Contestant("full (varlen)", "full", "varlen_full", any_lengths=True),
    Contestant("full (flex)", "full", "flex_full"),
    Contestant("full (eager)", "full", "eager_full"),
    Contestant("full (eager fp32)", "full", "eager_full", autocast=False),
]


class OutsideAttention(nn.Module):
    """An attention module that knows rows and a padding mask, in the place of a layer's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden_states: torch.Tensor, *, max_seqlen: int, keep=None, **kwargs):
        rows = hidden_states[0].unflatten(0, (-1, max_seqlen))
        out = self.module(rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)).flatten(0, 1)[None]
        return out if keep is None else out[:, keep], None, None, None


def load_contestant(spec: str) -> Contestant:
    """The contestant of `--baseline_module`."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"`baseline_module` is {spec!r}; it must be file.py:Class, and {path!r} is no file.")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return Contestant(name, "full", "blossom_torch", module=getattr(module, name))


def make_config(contestant: Contestant, args: argparse.Namespace) -> BlossomRecConfig:
    return BlossomRecConfig(
        vocab_size=3418,
        attention_types=contestant.attention_types,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=8,
        num_key_value_heads=8 if contestant.is_peer else args.num_key_value_heads,
        attn_implementation=contestant.implementation,
        hidden_dropout_prob=0.0,
    )


def build(
    contestant: Contestant, args: argparse.Namespace, training: bool = True
) -> BlossomRecForSequentialRecommendation:
    """
    The model. In inference, the last layer of fused full attention computes the last positions alone, as BlossomRec's does.
    """
    config = make_config(contestant, args)
    model = BlossomRecForSequentialRecommendation(config)
    if contestant.module is not None:
        for layer in model.model.layers:
            layer.self_attn = OutsideAttention(contestant.module(config.hidden_size, config.num_attention_heads))
    on_packed = contestant.implementation == "varlen_full" and args.device == "cuda"
    if not training and (on_packed or contestant.implementation == "rows_full"):
        model.model.layers[-1].self_attn = LastPositions(model.model.layers[-1].self_attn)
    return model.to(args.device)
