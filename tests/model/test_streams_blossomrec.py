"""Streams: a stream from outside in one registration, and what is refused."""

import importlib.util
import json
import random
import sys
from types import ModuleType

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


# Checkpoints

CODE = """
from blossomrec_hf import Stream, register_stream


class RecentStream(Stream):
    def attend(self, ops, layer, q, keys, queries, blocks):
        return ops.attend_short(q, keys, queries, block_size=8, window=1, base=2, scaling=layer.scaling), None


register_stream("recent", RecentStream)
"""


@pytest.fixture
def import_stream(tmp_path, monkeypatch):
    """Write a file, and import it without consequences for other tests."""
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.STREAMS", STREAMS.copy())

    def write_and_import(name: str = "recent_stream", code: str = CODE, folder: str = "mine") -> ModuleType:
        file = tmp_path / folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
        spec = importlib.util.spec_from_file_location(f"{folder}_{name}", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return write_and_import


def test_a_class_may_have_two_names(import_stream, tmp_path):
    register_stream("late", import_stream().RecentStream)
    model = recommender(["full+recent", "full+late"])
    assert [layer.self_attn.stream_names for layer in model.model.layers] == [("full", "recent"), ("full", "late")]
    model.save_pretrained(tmp_path / "model")
    places = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert places["BlossomRecStream.recent"] == places["BlossomRecStream.late"] == "recent_stream.RecentStream"
    loaded = type(model).from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    ids = torch.randint(2, 60, (2, 30))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_code_of_a_model_is_saved_also_if_another_is_registered_since(import_stream, tmp_path):
    import_stream()
    model = recommender("full+recent")
    import_stream("newer_stream", CODE.replace("block_size=8", "block_size=2"))
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "recent_stream.py").read_text() == CODE
    assert not (tmp_path / "model" / "newer_stream.py").exists()


def test_other_code_of_the_name_is_not_taken_for_that_of_a_checkpoint(import_stream, tmp_path):
    import_stream()
    model = recommender("full+recent")
    model.save_pretrained(tmp_path / "model")
    import_stream(code=CODE.replace("block_size=8", "block_size=2"), folder="newer")
    with pytest.raises(
        ValueError, match="other code of the stream 'recent' than .*newer.*without `trust_remote_code`"
    ):
        type(model).from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = torch.randint(2, 60, (1, 50))
    loaded = type(model).from_pretrained(tmp_path / "model").eval()  # with the registered code
    assert not torch.allclose(loaded(ids).logits, model(ids).logits)
    import_stream(folder="copy")
    loaded = type(model).from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_stream_without_a_file_is_not_saved(import_stream, tmp_path):
    exec(CODE, {"__name__": "nowhere"})
    with pytest.raises(ValueError, match="RecentStream` is defined in 'nowhere', which is not an imported file"):
        recommender("full+recent").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_two_files_of_one_name_are_refused(import_stream, tmp_path):
    import_stream(folder="one")
    import_stream(code=CODE.replace('"recent"', '"late"'), folder="two")
    with pytest.raises(ValueError, match="'recent' has the file .*recent_stream.py.* rename it"):
        recommender("recent+late").save_pretrained(tmp_path / "model")
    import_stream("ops_torch")
    with pytest.raises(ValueError, match="'recent' has the file .*ops_torch.py.* rename it"):
        recommender("full+recent").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_code_from_the_hub_lies_next_to_that_of_the_model(import_stream, tmp_path, monkeypatch):
    import_stream()
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.__file__", str(tmp_path / "mine" / "streams.py"))
    recommender("full+recent").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "recent_stream.py").read_text() == CODE
