"""Streams: a stream from outside in one registration, and what is refused."""

import random

import pytest
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.attention_blossomrec import BlossomAttention
from blossomrec_hf.model.ops_reference import Queries, last_positions
from blossomrec_hf.model.streams_blossomrec import STREAMS, Stream, build_streams, register_stream, stream_names


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"compress_block_size": 6, "compress_stride": 4, "selection_block_size": 4, "initializer_range": 0.3}


class OddStream(Stream):
    """Toy: attends to the positions at an even distance from the query."""

    gate_bias = 0.5

    def attend(self, ops, layer, q, keys, queries, blocks):
        place = queries.position[:, None] - 2 * torch.arange((queries.max_length + 1) // 2)
        return ops.attend_places(q, keys, queries, place[:, None], scaling=layer.scaling), None


@pytest.fixture
def toy(monkeypatch) -> str:
    """The layer type of both streams of the package and the toy."""
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.STREAMS", STREAMS.copy())
    register_stream("odd", OddStream)
    return "blossom+odd"


def recommender(attention_types, **kwargs) -> BlossomRecForSequentialRecommendation:
    config = BlossomRecConfig(**(SMALL | {"attention_types": attention_types} | kwargs))
    return BlossomRecForSequentialRecommendation(config).double().eval()


def test_a_stream_from_outside_needs_one_registration(toy):
    model = recommender([toy, "odd"])
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.stream_names == ("long_term", "short_term", "odd") and first.gate.bias.shape == (3 * 4,)
    torch.testing.assert_close(first.gate.bias.view(3, 4)[:, 0], torch.tensor([-2, 2, 0.5], dtype=torch.float64))
    assert not hasattr(second, "gate") and second.stream_names == ("odd",)
    ids = torch.randint(2, 60, (2, random.randint(30, 300)))
    before = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-10)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("implementation", ["blossom", "eager"])
@torch.no_grad()
def test_it_is_cached_and_recommends(toy, implementation):
    model = recommender([toy, "odd"])
    model.set_attn_implementation(implementation)
    ids = torch.randint(2, 60, (2, 90))
    whole, cut = model(ids).logits, random.randint(1, 88)
    cache = model(ids[:, :cut], use_cache=True).cache
    for start in (cut, 89):
        logits = model(ids[:, start : 89 if start < 89 else 90], cache=cache).logits
        torch.testing.assert_close(logits, whole[:, start : start + logits.shape[1]], rtol=0, atol=1e-10)
    best = model.recommend(ids, top_k=58, exclude_seen=False)
    torch.testing.assert_close(best.scores, whole[:, -1].gather(1, best.item_ids), rtol=0, atol=1e-10)


def test_names_are_checked_when_the_model_is_built(tmp_path):
    config = BlossomRecConfig(**SMALL, attention_types=["blossom", "full+spiral"])
    config.save_pretrained(tmp_path)
    config = BlossomRecConfig.from_pretrained(tmp_path)
    for types, words in (
        (config.attention_types, "no stream is registered as 'spiral'"),
        (["blossom+long_term", "full"], "a layer has each stream once"),
        (["", "full"], "no stream is registered as ''"),
    ):
        config.attention_types = types
        with pytest.raises(ValueError, match="`attention_types` names") as error:
            BlossomRecForSequentialRecommendation(config)
        assert words in str(error.value)


def test_names_of_combinations():
    assert stream_names("blossom") == ("long_term", "short_term") == stream_names("long_term+short_term")
    assert stream_names("full+blossom") == ("full", "long_term", "short_term")


def test_combinations_have_the_weights_and_values_of_their_short_names():
    one, other = recommender("blossom"), recommender("long_term+short_term")
    other.load_state_dict(one.state_dict())
    ids = torch.randint(2, 60, (2, 70))
    assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    ("name", "stream", "words"),
    [
        ("long term", OddStream, "must be an identifier"),
        ("a+b", OddStream, "must be an identifier"),
        ("blossom", OddStream, "which the package uses"),
        ("full", OddStream, "which the package uses"),
        ("odd", OddStream(None), "must be a subclass"),
    ],
)
def test_bad_registrations_are_refused(name, stream, words):
    before = dict(STREAMS)
    with pytest.raises(ValueError, match=words):
        register_stream(name, stream)
    assert STREAMS == before


def test_modules_of_two_streams_with_one_name_are_refused(toy):
    class Clashing(Stream):
        def modules(self):
            return {"compressor": torch.nn.Linear(1, 1)}

    register_stream("clashing", Clashing)
    with pytest.raises(ValueError, match="'clashing' adds a module 'compressor'"):
        BlossomAttention(BlossomRecConfig(**SMALL, attention_types="blossom+clashing"), 0)


def test_masks_show_what_the_reference_attends_to():
    """Values that are one-hot come out with weights above zero just where the mask says."""
    config = BlossomRecConfig(**SMALL, num_selected_blocks=2, short_term_block_size=3, num_hidden_layers=3)
    config.attention_types = ["long_term", "short_term", "full"]
    n = random.randint(1, 60)
    offsets = torch.tensor([0, n])
    for i in range(3):
        layer = BlossomAttention(config, i).double().eval()
        (stream,) = build_streams(config, i)
        x = torch.randn(1, n, 16, dtype=torch.float64)
        none = (torch.ones(1, n, 4, dtype=torch.float64), torch.zeros(1, n, 4, dtype=torch.float64))
        where = {"position_embeddings": none, "cu_seqlens": offsets, "max_seqlen": n}
        layer.config._attn_implementation = "eager"
        _, selection, _, probs = layer(x, **where, output_attentions=True)
        queries = Queries(torch.zeros(n, dtype=torch.long), torch.arange(n), n, n)
        mask = stream.mask(queries, torch.arange(n), selection)  # [n, G or 1, n]
        seen = probs.unflatten(0, (2, 2)).transpose(1, 2)[:, :, 0] > 0  # [G, n, n], of the first head of each group
        assert torch.equal(seen, mask.transpose(0, 1).expand(2, n, n))
        last = last_positions(offsets, n)
        chosen = None if selection is None else type(selection)(*(x[-1:] for x in selection))
        assert torch.equal(stream.mask(last, torch.arange(n), chosen)[0], mask[-1])
