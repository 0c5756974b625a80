"""Weights of the authors' layer shapes, in a model written here for the eye, score as our conversion of them does."""

import random

import pytest
import torch
from checkpoint_cases import small_model, told
from torch import nn

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.conversion import AUTHORS_CONSTANTS, from_authors, to_authors


ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": torch.relu, "swish": nn.functional.silu}


def turn_pairs(x, freqs):
    """Rotary embedding of neighbouring pairs; `x` is `[..., L, d]`."""
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


@pytest.fixture
def authors():
    return AuthorsModel(30, 16, 4).double().eval()


@pytest.mark.parametrize("act", ["gelu", "relu", "swish"])
def test_the_authors_weights_score_the_same(act):
    theirs = AuthorsModel(30, 16, 4, act=act).double().eval()
    scores_agree(theirs, from_authors(theirs.state_dict(), num_attention_heads=4, hidden_act=act))


def test_there_and_back():
    theirs = AuthorsModel(30, 16, 4).double().eval()
    ours = from_authors(theirs.state_dict(), num_attention_heads=4)
    again = AuthorsModel(30, 16, 4).double().eval()
    again.load_state_dict(to_authors(ours))
    scores_agree(again, ours)

    settings = {**AUTHORS_CONSTANTS, "compress_block_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = small_model(num_items=30, **settings).double()
    back = AuthorsModel(30, 16, 4, inner=32).double().eval()
    back.load_state_dict(to_authors(model))
    scores_agree(back, model)


def test_a_converted_model_is_a_checkpoint_like_any_other(authors, tmp_path):
    from_authors(authors.float().state_dict(), num_attention_heads=4).save_pretrained(tmp_path)
    model = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    history = torch.randint(1, 31, (40,))
    with torch.no_grad():
        logits = model(history[None] + 1).logits[0, :, 2:]
    torch.testing.assert_close(logits, authors(history)[:, 1:], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_the_same_function_is_refused(authors):
    state = authors.state_dict()
    assert "must be 4" in told(lambda: from_authors(state), ValueError)
    extra = {**state, "trm_encoder.layer.0.adapter.weight": torch.ones(1)}
    assert "adapter.weight" in told(lambda: from_authors(extra, num_attention_heads=4), ValueError)
    learned = {**state, "position_embedding.weight": torch.ones(50, 16)}
    assert "learned positions" in told(lambda: from_authors(learned, num_attention_heads=4), ValueError)
    gsasrec = {"item_embedding.weight": torch.ones(9, 4), "position_embedding.weight": torch.ones(5, 4)}
    gsasrec |= {"transformer_blocks.0.first_norm.weight": torch.ones(4)}
    message = told(lambda: from_authors(gsasrec), ValueError)
    assert "learned positions" in message and "normalises before" in message and "'full'" in message
    assert "no weights of the authors'" in told(lambda: from_authors({"a": torch.ones(1)}), ValueError)
    for changes, named in (({}, "short_term_block_size"), ({"attention_types": "full"}, "attention_types")):
        assert named in told(lambda changes=changes: to_authors(small_model(**changes)), ValueError)


def test_weights_with_parts_missing_or_of_other_shapes_are_refused_in_a_sentence(authors):
    state = authors.state_dict()
    for name, value in state.items():
        for other in (None, value[:0], value.flatten(), torch.zeros(3, 5, 7, dtype=value.dtype)):
            changed = {key: item for key, item in state.items() if key != name}
            if other is not None:
                changed[name] = other
            try:
                from_authors(changed, num_attention_heads=4)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
