"""The authors' model, written anew from their layers, for tests of conversion."""

import random

import torch
from torch import nn


ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": torch.relu, "swish": nn.functional.silu}


def turn_pairs(x, freqs):
    """Rotary embedding of neighboring pairs; `x` is `[..., L, d]`."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * freqs.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(
        -2
    )


def module(**children):
    parent = nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


class AuthorsModel(nn.Module):
    """Names and shapes of the authors' weights, and what they compute, by dense masks; for one unpadded history."""

    def __init__(
        self, items, width, heads, groups=2, inner=24, layers=2, length=32, stride=16, selected=4, act="gelu"
    ):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, width // heads
        self.length, self.stride, self.selected, self.act = length, stride, selected, ACTIVATIONS[act]
        d, wide = self.d, length * self.d
        self.item_embedding = nn.Embedding(items + 1, width, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

        def compressor():
            return nn.Sequential(nn.Identity(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, d))

        def layer():
            sparse = module(
                to_qkv=nn.Linear(width, width + 2 * groups * d, bias=False),
                k_compress=compressor(),
                v_compress=compressor(),
                to_strategy_combine=nn.Sequential(nn.Linear(width, 2 * heads)),
                combine_heads=nn.Linear(width, width, bias=False),
                rotary_emb=module(freqs=nn.Parameter(10000.0 ** -(torch.arange(0, d, 2) / d), requires_grad=False)),
            )
            sparse.compress_mem_kv = nn.Parameter(torch.zeros(2, groups, 1, d))
            sparse.k_intrablock_positions = nn.Parameter(torch.zeros(groups, length, d))
            sparse.v_intrablock_positions = nn.Parameter(torch.zeros(groups, length, d))
            norm = nn.LayerNorm(width, eps=1e-12)
            attention = module(dense=nn.Linear(width, width), LayerNorm=norm, sparse_attention=sparse)
            first, second = nn.Linear(width, inner), nn.Linear(inner, width)
            feed_forward = module(dense_1=first, dense_2=second, LayerNorm=nn.LayerNorm(width, eps=1e-12))
            return module(blossom_attention=attention, feed_forward=feed_forward)

        self.trm_encoder = module(layer=nn.ModuleList([layer() for _ in range(layers)]))
        for name, parameter in self.named_parameters():
            if "freqs" not in name:
                nn.init.normal_(parameter, std=0.3)

    def attend(self, sparse, x):
        size, groups, d = len(x), self.groups, self.d
        q, k, v = sparse.to_qkv(x).split([self.heads * d, groups * d, groups * d], -1)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(0, 1) for t in (q, k, v))
        q, k = (turn_pairs(t, sparse.rotary_emb.freqs) for t in (q, k))
        t, u = torch.arange(size)[:, None], torch.arange(size)

        windows = [torch.cat([k.new_zeros(groups, self.length, d), k], 1)[:, end : end + self.length]
                   for end in range(self.stride, size + 1, self.stride)]  # fmt: skip
        selected = torch.zeros(groups, size, size, dtype=torch.bool)
        if windows:
            c = torch.stack(windows, 1) + sparse.k_intrablock_positions[:, None]
            c = sparse.k_compress(c.flatten(-2))
            scores = torch.einsum("ghtd,gwd->ghtw", q.unflatten(0, (groups, -1)), c).mean(1) / d**0.5
            ends = torch.arange(1, len(windows) + 1) * self.stride - 1
            scores = scores.masked_fill(ends >= t, -torch.inf)
            pi = nn.functional.pad(scores, (1, 0), value=-1e3).softmax(-1)[..., 1:]
            best = pi.topk(min(self.selected, len(windows)), -1)
            chosen = torch.zeros_like(pi, dtype=torch.bool).scatter(-1, best.indices, best.values > 1e-10)
            selected = chosen[..., (u // self.stride).clamp(max=len(windows) - 1)] & (u // self.stride < len(windows))
        selected = selected | (u // self.stride == t // self.stride)
        far = t - u
        near = (far < 8) | (far & (far - 1) == 0)
        outs = []
        for mask in (selected, near.expand_as(selected)):
            mask = (mask & (u <= t)).repeat_interleave(self.heads // groups, 0)
            keys, values = (z.repeat_interleave(self.heads // groups, 0) for z in (k, v))
            logits = (q @ keys.transpose(1, 2) / d**0.5).masked_fill(~mask, -torch.inf)
            outs.append(logits.softmax(-1) @ values)
        gates = sparse.to_strategy_combine(x).sigmoid().unflatten(-1, (self.heads, 2)).permute(2, 1, 0)[..., None]
        return sparse.combine_heads((gates[0] * outs[0] + gates[1] * outs[1]).transpose(0, 1).flatten(1))

    @torch.no_grad()
    def forward(self, history):
        """Scores of all ids after each item of one history."""
        x = self.LayerNorm(self.item_embedding(history))
        for layer in self.trm_encoder.layer:
            attention, feed = layer.blossom_attention, layer.feed_forward
            x = attention.LayerNorm(attention.dense(self.attend(attention.sparse_attention, x)) + x)
            x = feed.LayerNorm(feed.dense_2(self.act(feed.dense_1(x))) + x)
        return x @ self.item_embedding.weight.T


def scores_agree(theirs, ours, items=30, tolerance=1e-9):
    for length in (1, 7, 16, random.randint(17, 60), 130):
        history = torch.randint(1, items + 1, (length,))
        with torch.no_grad():
            logits = ours(history[None] + 1).logits[0, :, 2:]
        torch.testing.assert_close(logits, theirs(history)[:, 1:], rtol=tolerance, atol=tolerance)
