"""Saved caches: what is loaded continues the histories, or is refused in one sentence."""

import copy
import random

import hypothesis
import pytest
import torch
from cache_cases import append, assert_continues, recommender
from model_cases import histories
from safetensors import safe_open
from safetensors.torch import save_file

from blossomrec_hf import BlossomRecCache
from blossomrec_hf.model.cache_files_blossomrec import _file_digest


def test_save_and_load(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.crop([49, 0, 7, 21])
    rows = [rows[0][:-1], *rows[1:]]
    cache.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["cache.safetensors"]
    assert path.stat().st_size < cache.nbytes
    loaded = BlossomRecCache.load(path, model, max_length=70)
    assert loaded.capacity == 49
    torch.testing.assert_close(loaded.select([2]).last_hidden_state, cache.select([2]).last_hidden_state)
    with pytest.raises(ValueError, match="history 0"):
        _ = loaded.last_hidden_state
    assert_continues(model, loaded, rows)
    with pytest.raises(ValueError, match="max_length.*48.*49 events"):
        BlossomRecCache.load(path, model, max_length=48)


def test_a_file_that_does_not_fit_is_refused(held, tmp_path):
    model, cache, _ = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    other = recommender(
        attention_types="full", **{"rope_parameters": model.config.rope_parameters | {"rope_theta": 7.0}}
    )
    with pytest.raises(ValueError, match="num_hidden_layers` is 2 and 4") as error:
        BlossomRecCache.load(path, other)
    assert "attention_types" in str(error.value) and "rope_parameters" in str(error.value)
    assert "vocab_size" not in str(error.value)
    with pytest.raises(ValueError, match="another configuration"):
        other(torch.tensor([[5]] * 4), cache=cache)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cache.safetensors"):
        BlossomRecCache.load(path, model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors.*not written"):
        BlossomRecCache.load(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="no histories yet; append"):
        BlossomRecCache(model.config).save(path)


def test_histories_of_other_weights_are_refused(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    other = copy.deepcopy(model)
    assert_continues(other, copy.deepcopy(cache), rows)
    with torch.no_grad():
        other.model.layers[1].up_proj.weight[3, 5] += 1e-4
    event = torch.tensor([[5]] * 4)
    refused = (
        lambda: BlossomRecCache.load(path, other),
        lambda: other(event, cache=cache),
        lambda: other.recommend(event, cache=cache),
        lambda: BlossomRecCache.cat([cache, append(other, None, rows)[0].cache]),
    )
    for action in refused:
        with pytest.raises(ValueError, match="weights"):
            action()
    assert_continues(model, BlossomRecCache.load(path, model), rows)


def test_histories_outlive_a_vocabulary_that_grows(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    model.resize_token_embeddings(70)
    for kept in (cache, BlossomRecCache.load(path, model)):
        append(model, kept, [torch.tensor([69])] * 4)
        assert_continues(model, kept, [torch.cat([row, torch.tensor([69])]) for row in rows])
    with torch.no_grad():
        model.get_input_embeddings().weight[69] += 1
    with pytest.raises(ValueError, match="other weights"):
        append(model, cache, rows)


@pytest.mark.parametrize(
    "damage",
    "zeroed states, wrong length, huge length, negative length, no states, cut states, nan, other items, "
    "half the block keys, another dtype".split(", "),
)
def test_a_damaged_file_is_refused(held, tmp_path, damage):
    """Even if what was changed fits in shape: a digest of all tensors is part of the file."""
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if damage == "zeroed states":
        tensors["layers.1.states"].zero_()
    elif damage.endswith("length"):
        tensors["lengths"][1] = {"wrong": 5, "huge": 2**40, "negative": -1}[damage.split()[0]]
    elif damage == "no states":
        del tensors["layers.1.states"]
    elif damage == "cut states":
        tensors["layers.1.states"] = tensors["layers.1.states"][:, :-1].contiguous()
    elif damage == "nan":
        tensors["last_hidden_state"][0, 0] = torch.nan
    elif damage == "other items":
        tensors["item_ids"][0, 0] = 2 + tensors["item_ids"][0, 0] % 50
    elif damage == "half the block keys":
        name = "layers.0.blocks.long_term"
        tensors[name] = tensors[name][..., :1].contiguous()
    else:
        tensors["last_hidden_state"] = tensors["last_hidden_state"].float()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="cache.safetensors is damaged"):
        BlossomRecCache.load(path, model)
    if damage not in (
        "no states",
        "cut states",
        "half the block keys",
        "zeroed states",
        "other items",
        "wrong length",
    ):
        # Nor does a digest that fits help: a length of 2**40 is refused before anything of this size is made.
        save_file(tensors, path, metadata | {"digest": _file_digest(tensors, metadata)})
        with pytest.raises(ValueError, match="cache.safetensors is damaged"):
            BlossomRecCache.load(path, model)


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=False,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=hypothesis.strategies.data())
def test_no_damage_of_a_file_is_silent_or_a_foreign_error(saved_cache, data):
    """Bytes changed, cut or inserted anywhere: a `ValueError` with one sentence, or the very cache that was saved."""
    path, model, tensors, original = saved_cache
    raw = bytearray(original)
    header = int.from_bytes(raw[:8], "little") + 8
    integers = hypothesis.strategies.integers
    for _ in range(data.draw(integers(1, 3))):
        place = data.draw(hypothesis.strategies.one_of(integers(0, header - 1), integers(0, len(raw) - 1)))
        kind = data.draw(hypothesis.strategies.sampled_from(["change", "cut", "insert", "truncate"]))
        if kind == "change":
            raw[place % len(raw)] = data.draw(integers(0, 255))
        elif kind == "insert":
            raw[place:place] = data.draw(hypothesis.strategies.binary(min_size=1, max_size=9))
        else:
            del raw[place : place + data.draw(integers(1, 9)) if kind == "cut" else len(raw)]
        if not raw:
            break
    path.write_bytes(raw)
    try:
        loaded = BlossomRecCache.load(path, model)
    except ValueError as error:
        assert type(error) is ValueError and path.name in str(error) or "configuration" in str(error)
        return
    torch.testing.assert_close(loaded._tensors(), tensors, rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved_cache(tmp_path_factory):
    """A file of a small cache, the model, the tensors that loading it gives, and its bytes."""
    torch.manual_seed(0)
    random.seed(0)
    model = recommender(torch.float32, attention_types=["blossom", "full"])
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    append(model, cache := BlossomRecCache(model.config), histories(12, 0, 3))
    cache.save(path)
    return path, model, BlossomRecCache.load(path, model)._tensors(), path.read_bytes()
