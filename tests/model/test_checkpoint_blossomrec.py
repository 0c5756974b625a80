"""A checkpoint is what was saved, or refused with a sentence."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from checkpoint_cases import change_byte, change_config, change_json, error_message, same_weights, small_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import blossomrec_hf
from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecModel
from blossomrec_hf.model.configuration_blossomrec import VERSION
from blossomrec_hf.model.manifest_blossomrec import MANIFEST_NAME


load = BlossomRecForSequentialRecommendation.from_pretrained


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_parts_of_large_weights_are_covered(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(parts) > 1
    assert set(parts) <= set(json.loads((folder / MANIFEST_NAME).read_text())["sha256"])
    assert same_weights(model, load(folder))
    change_byte(folder / parts[-1])
    assert parts[-1] in error_message(lambda: load(folder), ValueError)


@pytest.mark.parametrize("place", [2, -3])  # in the header, which does not even open then, and in a weight
def test_damaged_weights_are_refused(saved, place):
    _, folder = saved
    change_byte(folder / "model.safetensors", place)
    message = error_message(lambda: load(folder), ValueError)
    assert "model.safetensors" in message and "force_download" in message
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in message
    assert message == error_message(lambda: AutoModelForCausalLM.from_pretrained(folder), ValueError)


def test_changed_code_is_named_with_its_hash(saved):
    _, folder = saved
    with (folder / "ops_torch.py").open("a") as file:
        file.write("import os\n")
    message = error_message(lambda: load(folder), ValueError)
    assert message.startswith("ops_torch.py") and "check_files=False" in message
    assert hashlib.sha256((folder / "ops_torch.py").read_bytes()).hexdigest() in message


def test_a_checkpoint_without_a_manifest_is_taken_as_it_is(saved):
    model, folder = saved
    (folder / MANIFEST_NAME).unlink()
    assert same_weights(model, load(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3, "attention_types": ["blossom"] * 3}, "the weights lack model.layers.2."),
        ({"num_hidden_layers": 1, "attention_types": ["blossom"]}, "the weights alone have model.layers.1."),
        ({"vocab_size": 50}, "model.item_embedding.weight is [42, 16] there, [50, 16] here"),
        ({"attention_types": ["blossom", "full"]}, "the weights alone have model.layers.1.self_attn.compressor"),
    ],
)
def test_weights_that_are_not_the_configuration_s_are_refused(saved, changes, said):
    _, folder = saved
    change_config(folder, **changes)
    message = error_message(lambda: load(folder), ValueError)
    assert "disagree" in message and said in message
    load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("tied", [True, False])
def test_with_and_without_head(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert same_weights(AutoModel.from_pretrained(tmp_path), model.model)
    model.model.save_pretrained(tmp_path / "base")
    if tied:
        assert same_weights(load(tmp_path / "base"), model)
    else:
        assert "lm_head.weight" in error_message(lambda: load(tmp_path / "base"), ValueError)


def test_what_from_pretrained_takes_besides(saved):
    model, folder = saved
    loaded, info = load(folder, output_loading_info=True, dtype=torch.bfloat16, attn_implementation="eager")
    assert not info["missing_keys"] and loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert same_weights(model, load(None, config=model.config, state_dict=model.state_dict()))


def test_pickled_weights_are_refused(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for call in (load, AutoModelForCausalLM.from_pretrained, BlossomRecModel.from_pretrained):
        message = error_message(lambda: call(folder), ValueError)
        assert "pytorch_model.bin" in message and "safetensors only" in message
    assert "use_safetensors" in error_message(lambda: load(folder, use_safetensors=False), ValueError)


def test_the_version_of_the_package_goes_along_and_a_newer_one_is_refused(saved):
    _, folder = saved
    assert VERSION == blossomrec_hf.__version__
    assert json.loads((folder / "config.json").read_text())["blossomrec_version"] == VERSION
    major, minor, _ = map(int, VERSION.split("."))
    for newer in (f"{major}.{minor + 1}.0", f"{major + 1}.0.0", f"{major}.{minor + 10}.0.dev1"):
        # Also where it says something that this version does not know.
        change_config(folder, blossomrec_version=newer, attention_types=["spiral", "spiral"])
        message = error_message(lambda: load(folder), ValueError)
        assert newer in message and "pip install -U" in message
    for older in (f"{major}.{minor}.99", "0.0.1", None):
        change_config(folder, blossomrec_version=older, attention_types=["blossom", "blossom"])
        assert load(folder).config.blossomrec_version == VERSION
    assert BlossomRecConfig().blossomrec_version == VERSION


SCRIPT = """
import sys
from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer

class Model(BlossomRecForSequentialRecommendation):
    pass

class Config(BlossomRecConfig):
    pass

class Tokenizer(BlossomRecTokenizer):
    pass

model = BlossomRecForSequentialRecommendation(BlossomRecConfig(vocab_size=9))
model.config = Config(vocab_size=9)
for part in (Model(BlossomRecConfig(vocab_size=9)), model, Config(vocab_size=9), Tokenizer.from_items([1, 2])):
    try:
        part.save_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)
"""


def test_what_a_script_defines_is_not_saved(tmp_path):
    """A checkpoint names the class of its model, which is looked for in a module: nobody could load it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sentences = done.stdout.splitlines()
    assert [sentence.split()[0] for sentence in sentences] == ["`Model`", "`Config`", "`Config`", "`Tokenizer`"]
    assert all("move the class to a module of its own" in sentence for sentence in sentences)
    assert not (tmp_path / "out").exists()


def test_what_a_function_defines_is_not_saved(tmp_path):
    class Model(BlossomRecForSequentialRecommendation):
        pass

    with pytest.raises(ValueError, match="Model` is defined in a script, a notebook or a function"):
        Model(small_model().config).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_parts_take_the_place_of_a_single_file_and_back(tmp_path, variant):
    whole, parts, again = small_model(), small_model(), small_model()
    for model, size in ((whole, "1GB"), (parts, "20KB"), (again, "1GB")):
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        assert same_weights(load(tmp_path, variant=variant), model)


def test_a_changed_configuration_is_refused_unless_asked_for(saved):
    _, folder = saved
    change_json(folder / "config.json", num_selected_blocks=1)  # no weight has another size for it
    for call in (load, AutoModelForCausalLM.from_pretrained):
        message = error_message(lambda: call(folder), ValueError)
        assert message.startswith("config.json of") and "check_files=False" in message
        assert call(folder, check_files=False).config.num_selected_blocks == 1
    load(folder, check_files=False).save_pretrained(folder)
    assert load(folder).config.num_selected_blocks == 1


def test_weights_that_an_ordinary_tool_rewrote_are_refused_with_the_remedy(saved):
    _, folder = saved
    other = small_model()
    Accelerator(cpu=True).save_model(other, folder)
    message = error_message(lambda: load(folder), ValueError)
    assert "`accelerator.save_model`" in message and "check_files=False" in message and "save_pretrained" in message
    loaded = load(folder, check_files=False)
    assert same_weights(loaded, other)
    loaded.save_pretrained(folder)
    assert same_weights(load(folder), other)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a/b.safetensors", "weights.bin"])
def test_an_index_of_weights_names_safetensors_of_its_own_folder_only(saved, name):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"].values()))
    (folder.parent / "secret.safetensors").write_bytes((folder / first).read_bytes())
    (folder / "weights.bin").write_bytes((folder / first).read_bytes())
    content["weight_map"] = {key: name if part == first else part for key, part in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    for call in (load, AutoModelForCausalLM.from_pretrained):
        for options in ({}, {"check_files": False}):
            message = error_message(lambda: call(folder, **options), ValueError)
            assert repr(name) in message or "model.safetensors.index.json of" in message
    (folder / MANIFEST_NAME).unlink()
    assert repr(name) in error_message(lambda: load(folder), ValueError)


def test_weights_outside_of_the_folder_are_refused(saved):
    _, folder = saved
    outside = folder.parent / f"{folder.name}-elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    message = error_message(lambda: load(folder), ValueError)
    assert "is a symbolic link to" in message and str(outside) in message


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 10**8},
        {"intermediate_size": 10**9},
        {"compress_block_size": 2**20},
        {"hidden_size": 2**14},
        {"num_hidden_layers": 1000, "attention_types": ["full"] * 1000, "intermediate_size": 10**6},
    ],
)
def test_sizes_far_beyond_the_weights_are_refused_before_memory_is_asked_for(saved, sizes, monkeypatch):
    _, folder = saved
    change_config(folder, **sizes)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model is made"))
    message = error_message(lambda: load(folder), ValueError)
    name, value = next(iter(sizes.items()))
    assert f"`{name}` {value}" in message and "disagree" in message


@pytest.mark.parametrize("content", [b"", b"{}", b"not safetensors at all", b"\xff" * 100])
def test_weights_that_are_none_are_refused_in_a_sentence(saved, content):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(content)
    (folder / MANIFEST_NAME).unlink()
    assert "The weights of" in error_message(lambda: load(folder), ValueError)
