"""
A checkpoint in an environment that knows nothing of this package: a new virtual environment with PyTorch and
`transformers` alone, from a folder and from a Hub. It installs packages, so it runs only where it is asked for:
`pytest -m clean_env`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import small_model, small_tokenizer
from safetensors.torch import load_file

from blossomrec_hf.sharing import push


pytestmark = pytest.mark.clean_env
HISTORIES = [[100 + (7 * i) % 30 for i in range(60)], [104, 139, 100]]
VERSIONS = ("5.10.1", "5.24.0")

# What a stranger types. Only `transformers`, `torch` and `safetensors` are there.
SCRIPT = """
import copy, importlib.util, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, __version__, pipeline

sources, histories, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
assert importlib.util.find_spec("blossomrec_hf") is None
raw = {}
for where, (source, options) in sources.items():
    options["trust_remote_code"] = True
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    base = AutoModel.from_pretrained(source, **options).eval()
    # Weights that are mapped from a file lie on other addresses than copies, for which BLAS may add in another order.
    model, base = copy.deepcopy(model), copy.deepcopy(base)
    for found in (model, base):
        assert type(found).__module__.startswith("transformers_modules."), type(found)
        assert found.config._attn_implementation == "blossom", found.config._attn_implementation
    batch = tokenizer(histories, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = {"logits": model(**batch).logits, "hidden": base(**batch).last_hidden_state}
    best = model.recommend(**batch, top_k=5)
    outputs |= {"item_ids": best.item_ids, "scores": best.scores}
    save_file({name: value.contiguous() for name, value in outputs.items()}, f"{out}.{where}")
    recommender = pipeline("sequential-recommendation", model=source, **options)
    raw[where] = [[answer["item"] for answer in answers] for answers in recommender(histories, top_k=5)]
    # What is saved there is a checkpoint as good as the first.
    model.save_pretrained(f"{out}-{where}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{out}-{where}-again", trust_remote_code=True).eval()
    assert torch.equal(copy.deepcopy(again)(**batch).logits, outputs["logits"])
triton = importlib.util.find_spec("triton") is not None
print(json.dumps({"transformers": __version__, "triton": triton, "raw": raw}))
"""


def pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", "install", "--no-compile", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with PyTorch, the newer `transformers` and, in folders beside it, the older and Triton."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    torch_version = torch.__version__.split("+")[0]
    pip(python, f"torch=={torch_version}", "numpy", f"transformers=={VERSIONS[1]}")
    pip(python, "--target", str(folder / VERSIONS[0]), f"transformers=={VERSIONS[0]}")
    if sys.platform == "linux":
        pip(python, "--target", str(folder / "triton"), "--no-deps", "triton>=3.6")
    return folder, python


@pytest.fixture(scope="module")
def expected():
    """A model, its tokenizer, and what they give in this environment."""
    torch.manual_seed(0)
    model, tokenizer = small_model(num_hidden_layers=2, attention_types=["blossom", "full"]), small_tokenizer()
    batch = tokenizer(HISTORIES, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = {"logits": model(**batch).logits, "hidden": model.model(**batch).last_hidden_state}
    best = model.recommend(**batch, top_k=5)
    return model, tokenizer, {**outputs, "item_ids": best.item_ids, "scores": best.scores}


@pytest.mark.parametrize("triton", [False, True], ids=["without-triton", "with-triton"])
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_are_those_of_the_package(environment, expected, local_hub, tmp_path, version, triton):
    if triton and sys.platform != "linux":
        pytest.skip("there is no Triton for this platform")
    folder, python = environment
    model, tokenizer, outputs = expected
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pushed = push(tmp_path / "model", "ada/rec", token="hf_writer", private=True)
    sources = {
        "folder": (str(tmp_path / "model"), {}),
        "hub": ("ada/rec", {"revision": pushed.oid, "token": "hf_reader"}),
    }
    beside = [folder / version] if version != VERSIONS[1] else []
    beside += [folder / "triton"] if triton else []
    private = ("PYTHON", "TRITON_", "HF_HOME", "BLOSSOMREC_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environ |= {"PYTHONPATH": os.pathsep.join(map(str, beside)), "HF_HOME": str(tmp_path / "home")}
    arguments = [json.dumps(sources), json.dumps(HISTORIES), str(tmp_path / "outputs")]
    done = subprocess.run(
        [python, "-c", SCRIPT, *arguments], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert (told["transformers"], told["triton"]) == (version, triton)
    for where in sources:
        assert told["raw"][where] == tokenizer.decode_items(outputs["item_ids"])
        found = load_file(f"{tmp_path / 'outputs'}.{where}")
        assert found.keys() == outputs.keys()
        for name in ("logits", "hidden", "item_ids"):
            assert torch.equal(found[name], outputs[name]), (where, name)
        # One product of few rows, which BLAS adds up in another order where memory lies otherwise: the last bit.
        torch.testing.assert_close(found["scores"], outputs["scores"], rtol=1e-6, atol=1e-6)
