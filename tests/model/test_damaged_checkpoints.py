"""Whatever happens to the files of a checkpoint: it loads as it was saved, or it is refused in one sentence."""

import json
import shutil

import pytest
import torch
from checkpoint_cases import change_config, error_message, same_weights, small_model, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.model.manifest_blossomrec import MANIFEST_NAME


load = BlossomRecForSequentialRecommendation.from_pretrained
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", MANIFEST_NAME)
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model, its tokenizer, and their folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = small_model(), small_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture
def damaged(checkpoint, tmp_path_factory):
    """Makes a copy of the files that the tests change."""

    def copy(*, manifest: bool = True):
        folder = tmp_path_factory.mktemp("damaged")
        for name in FILES if manifest else FILES[:-1]:
            shutil.copy(checkpoint[2] / name, folder / name)
        return folder

    return copy


def one_sentence(error: Exception) -> None:
    assert str(error) and len(str(error).splitlines()) == 1, repr(error)


def change_bytes(content: bytes, data: st.DataObject) -> bytes:
    """Some bytes set, a part cut off, doubled or put elsewhere."""
    how = data.draw(st.sampled_from(["set", "cut", "double", "empty"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "set":
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)
    return {"cut": content[:place], "double": content[:place] + content, "empty": b""}[how]


@settings(FUZZ, max_examples=120)
@given(st.data())
def test_changed_bytes_are_noticed(checkpoint, damaged, data):
    """With a manifest, every change is: what loads is what was saved."""
    model, tokenizer, _ = checkpoint
    folder = damaged()
    path = folder / data.draw(st.sampled_from(FILES))
    path.write_bytes(change_bytes(path.read_bytes(), data))
    try:
        assert same_weights(load(folder), model)
    except (ValueError, OSError) as error:
        one_sentence(error)
    try:
        assert BlossomRecTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    except (ValueError, OSError) as error:
        one_sentence(error)


@settings(FUZZ, max_examples=120)
@given(st.data())
def test_changed_bytes_without_a_manifest_are_read_or_refused(damaged, data):
    folder = damaged(manifest=False)
    path = folder / data.draw(st.sampled_from(FILES[:-1]))
    path.write_bytes(change_bytes(path.read_bytes(), data))
    for kind in (BlossomRecForSequentialRecommendation, BlossomRecTokenizer):
        try:
            kind.from_pretrained(folder)
        except (ValueError, OSError) as error:
            one_sentence(error)


@settings(FUZZ, max_examples=200)
@given(st.data())
def test_any_value_in_a_configuration_is_taken_or_refused_by_its_name(damaged, data):
    folder = damaged()
    content = json.loads((folder / "config.json").read_text())
    name, value = data.draw(st.sampled_from(sorted(content))), data.draw(JSON)
    change_config(folder, **{name: value})
    try:
        model = load(folder)
    except ValueError as error:
        one_sentence(error)
    else:
        model.recommend([[2, 3, 4]], top_k=2)


@settings(FUZZ, max_examples=100)
@given(st.data())
def test_any_value_in_a_tokenizer_is_taken_or_refused(damaged, data):
    folder = damaged(manifest=False)
    path = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = json.loads(path.read_text())
    place = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    path.write_text(json.dumps(content))
    try:
        tokenizer = BlossomRecTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        one_sentence(error)
    else:
        ids = list(range(len(tokenizer)))
        items = tokenizer.decode_items(ids)
        assert tokenizer.encode_items(items[2:]) == ids[2:]


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', '{"vocab_size": {}}', "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for kind in (BlossomRecConfig, BlossomRecForSequentialRecommendation):
        try:
            kind.from_pretrained(tmp_path)
        except (ValueError, OSError) as error:
            one_sentence(error)
        else:
            pytest.fail("it was read")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 2**31),
        ("hidden_act", "gelo"),
        ("hidden_act", ["gelu"]),
        ("num_hidden_layers", 10**9),
        ("hidden_dropout_prob", "0.1"),
        ("hidden_dropout_prob", float("nan")),
        ("layer_norm_eps", -1.0),
        ("layer_norm_eps", True),
        ("gate_initial_bias", [0.0, float("inf")]),
        ("attention_bias", "no"),
        ("attention_types", 3),
        ("attention_types", [["full"]]),
        ("rope_parameters", {"rope_theta": 0}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("rope_parameters", []),
        ("dtype", "float31"),
        ("dtype", "nn"),
        ("blossomrec_version", 1),
        ("model_type", "bert"),
        ("num_negatives", 0.5),
        ("max_position_embeddings", -1),
    ],
)
def test_values_of_a_wrong_kind_are_named(name, value):
    message = error_message(lambda: BlossomRecConfig(**{name: value}), ValueError)
    assert message.startswith(f"`{name}") and len(message.splitlines()) == 1


def test_dtypes_and_scaled_rotary_embeddings_are_taken():
    for dtype in (torch.bfloat16, "bfloat16", None):
        BlossomRecConfig(dtype=dtype)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for rope in ({"rope_type": "yarn", "factor": 2.0}, {"rope_type": "llama3", **llama3}, {"rope_theta": 5e5}, None):
        BlossomRecConfig(rope_parameters=rope)
