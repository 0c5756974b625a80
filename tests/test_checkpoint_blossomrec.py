"""A checkpoint is what was saved, or refused with a sentence."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import change_byte, change_config, same_weights, small_model, told
from transformers import AutoModel, AutoModelForCausalLM

import blossomrec_hf
from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecModel
from blossomrec_hf.checkpoint_blossomrec import MANIFEST_NAME, files_to_push
from blossomrec_hf.configuration_blossomrec import VERSION


load = BlossomRecForSequentialRecommendation.from_pretrained


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_manifest_holds_the_hash_of_the_weights_and_of_every_code_file(saved):
    model, folder = saved
    hashes = json.loads((folder / MANIFEST_NAME).read_text())["sha256"]
    assert set(hashes) == {"model.safetensors", *(path.name for path in folder.glob("*.py"))}
    assert {"modeling_blossomrec.py", "tokenization_blossomrec.py", "pipeline_blossomrec.py"} <= set(hashes)
    for name, saved_hash in hashes.items():
        assert saved_hash == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert same_weights(model, load(folder))


def test_parts_of_large_weights_are_covered(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(parts) > 1
    assert set(parts) <= set(json.loads((folder / MANIFEST_NAME).read_text())["sha256"])
    assert same_weights(model, load(folder))
    change_byte(folder / parts[-1])
    assert parts[-1] in told(lambda: load(folder), ValueError)


@pytest.mark.parametrize("place", [2, -3])  # in the header, which does not even open then, and in a weight
def test_damaged_weights_are_refused(saved, place):
    _, folder = saved
    change_byte(folder / "model.safetensors", place)
    message = told(lambda: load(folder), ValueError)
    assert "model.safetensors" in message and "force_download" in message
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in message
    assert message == told(lambda: AutoModelForCausalLM.from_pretrained(folder), ValueError)


def test_changed_code_is_named_with_its_hash(saved):
    _, folder = saved
    with (folder / "ops_torch.py").open("a") as file:
        file.write("import os\n")
    message = told(lambda: load(folder), ValueError)
    assert message.startswith("ops_torch.py")
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
    message = told(lambda: load(folder), ValueError)
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
        assert "lm_head.weight" in told(lambda: load(tmp_path / "base"), ValueError)


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
        message = told(lambda: call(folder), ValueError)
        assert "pytorch_model.bin" in message and "safetensors only" in message
    assert "use_safetensors" in told(lambda: load(folder, use_safetensors=False), ValueError)


def test_the_version_of_the_package_goes_along_and_a_newer_one_is_refused(saved):
    _, folder = saved
    assert VERSION == blossomrec_hf.__version__
    assert json.loads((folder / "config.json").read_text())["blossomrec_version"] == VERSION
    major, minor, _ = map(int, VERSION.split("."))
    for newer in (f"{major}.{minor + 1}.0", f"{major + 1}.0.0", f"{major}.{minor + 10}.0.dev1"):
        # Also where it says something that this version does not know.
        change_config(folder, blossomrec_version=newer, attention_types=["spiral", "spiral"])
        message = told(lambda: load(folder), ValueError)
        assert newer in message and "pip install -U" in message
    for older in (f"{major}.{minor}.99", "0.0.1", None):
        change_config(folder, blossomrec_version=older, attention_types=["blossom", "blossom"])
        assert load(folder).config.blossomrec_version == VERSION
    assert BlossomRecConfig().blossomrec_version == VERSION


def test_what_is_left_at_home(tmp_path):
    wanted = ["README.md", "config.json", "item_index/part-0.bin.npy", "item_metadata.parquet", "model.safetensors"]
    others = ["training_args.bin", "checkpoint-12/optimizer.bin", "best-3/model.safetensors", ".cache/x", "a.partial",
              "runs/events", "optimizer.pt", "scheduler.pkl", "results.json.lock"]  # fmt: skip
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_to_push(tmp_path) == wanted


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
