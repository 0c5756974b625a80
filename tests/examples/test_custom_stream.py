"""The stream of `examples/custom_stream`: attention to compressed keys and values, trained, cached, exported and saved."""

import importlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
from example_cases import REPOSITORY
from safetensors.torch import load_file

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.data import generate_log
from blossomrec_hf.model.streams_blossomrec import STREAMS
from blossomrec_hf.sharing.export import HistoryScorer


FOLDER = REPOSITORY / "examples" / "custom_stream"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """`import stream`, without consequences for other tests."""
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.STREAMS", STREAMS.copy())
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("stream", None)
    yield importlib.import_module("stream")
    sys.modules.pop("stream", None)


def recommender(types="blossom+compressed", **kwargs) -> BlossomRecForSequentialRecommendation:
    """A model in double precision whose streams all matter; sizes drawn anew."""
    stride = random.choice([1, 2, 4])
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "attention_types": types,
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2]) + random.choice([0, 1]),
        "selection_block_size": stride * random.choice([1, 2]),
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
    }
    config = BlossomRecConfig(**(settings | kwargs))
    print(config.compress_stride, config.compress_block_size, config.selection_block_size)
    return BlossomRecForSequentialRecommendation(config).double().eval()


def test_a_query_sees_the_complete_windows_before_it():
    """The head outputs of one layer against the definition, query by query."""
    model = recommender("compressed", num_hidden_layers=1)
    layer, config = model.model.layers[0].self_attn, model.config
    n = random.randint(1, 40)
    x = torch.randn(1, n, 16, dtype=torch.float64)
    none = (torch.ones(1, n, 4, dtype=torch.float64), torch.zeros(1, n, 4, dtype=torch.float64))  # no rotation
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x, position_embeddings=none, cu_seqlens=torch.tensor([0, n]), max_seqlen=n)
    q, k, v = (f(x)[0].unflatten(-1, (-1, 4)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    stride, length = config.compress_stride, config.compress_block_size
    past = torch.zeros(length, 2, 4, dtype=torch.float64)
    k, v = torch.cat([past, k]), torch.cat([past, v])  # the row of position p is p + length
    for t in range(n):
        ends = range(stride - 1, t + 1, stride)
        if not ends:
            assert not seen[0][0, t].any()
            continue
        windows = [
            torch.stack([compressor(rows[end + 1 : end + 1 + length].transpose(0, 1)) for end in ends])
            for compressor, rows in ((layer.window_keys, k), (layer.window_values, v))
        ]
        for head in range(4):
            keys, values = (part[:, head // 2] for part in windows)
            expected = (keys @ q[t, head] / 2).softmax(0) @ values
            torch.testing.assert_close(seen[0][0, t].unflatten(-1, (4, 4))[head], expected)


@pytest.mark.parametrize("length", [1, 3, 90, 300])
def test_values_and_gradients_are_those_of_the_reference(length):
    model = recommender(["blossom+compressed", "compressed"])
    ids = torch.randint(2, 60, (3, length))
    ids[0, length // 2 + 1 :] = 0
    results = []
    for name in ("eager", "blossom"):
        model.set_attn_implementation(name)
        logits = model(ids).logits
        gradients = torch.autograd.grad((logits * torch.linspace(-1, 1, 60)).sum(), list(model.parameters()))
        results.append([logits.detach(), *gradients])
    for actual, expected in zip(*reversed(results)):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * scale)


def test_it_learns():
    torch.manual_seed(0)
    model = recommender().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = (torch.arange(120).expand(4, -1) + torch.randint(0, 9, (4, 1))) % 9 + 2
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged


@pytest.mark.parametrize("implementation", ["blossom", "eager"])
@torch.no_grad()
def test_appended_events_get_the_logits_of_whole_histories(tmp_path, implementation):
    model = recommender(["blossom+compressed", "compressed"])
    model.set_attn_implementation(implementation)
    ids = torch.randint(2, 60, (2, 150))
    whole, place = model(ids).logits, random.randint(1, 140)
    cache = model(ids[:, :place], use_cache=True).cache
    assert set(cache.layers[0].blocks) == {"long_term", "compressed"} and set(cache.layers[1].blocks) == {"compressed"}
    while place < 150:
        new = ids[:, place : place + random.choice([1, 1, 2, 30])]
        logits = model(new, cache=cache).logits
        torch.testing.assert_close(logits, whole[:, place : place + new.shape[1]], rtol=0, atol=1e-10)
        place += new.shape[1]
        cache = cache.select([1, 0]).select([1, 0])
        cache.save(tmp_path / "cache.safetensors")
        cache = BlossomRecCache.load(tmp_path / "cache.safetensors", model.model)
    assert cache.nbytes == BlossomRecCache.size_in_bytes(model.config, 2, cache.capacity, torch.float64)


def test_packed_histories_and_recommendations_are_those_of_each_alone():
    model = recommender()
    rows = [torch.randint(2, 60, (n,)) for n in (1, random.randint(2, 40), 90)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    logits = model(torch.cat(rows)[None], cu_seq_lens_q=offsets, max_length_q=90).logits[0]
    for row, start in zip(rows, offsets.tolist()):
        torch.testing.assert_close(logits[start : start + len(row)], model(row[None]).logits[0], rtol=0, atol=1e-10)
    best = model.recommend([row.tolist() for row in rows], top_k=58, exclude_seen=False)
    last = logits[offsets[1:] - 1]
    torch.testing.assert_close(best.scores, last.gather(1, best.item_ids), rtol=0, atol=1e-10)


def test_it_is_exported():
    model = recommender().float()
    ids = torch.randint(2, 60, (3, random.randint(1, 90)))
    best = model.recommend(ids, top_k=58, exclude_seen=False)
    scores = HistoryScorer(model)(ids, torch.ones_like(ids)).gather(1, best.item_ids)
    torch.testing.assert_close(scores, best.scores, rtol=0, atol=1e-5)


def test_probabilities_of_positions_are_refused():
    model = recommender()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="the stream 'compressed' does not have"):
        model(torch.tensor([[2, 3]]), output_attentions=True)


def test_the_script_trains_saves_and_loads(tmp_path, monkeypatch, capsys):
    small = {"num_users": 60, "num_items": 40, "num_rings": 1, "min_history": 24, "max_history": 48}
    small |= {"num_genres": 4, "taste_length": 4, "drift_lag": 1, "return_probability": 0.4}
    monkeypatch.setattr("blossomrec_hf.data.generate_log", partial(generate_log, **small))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")
    trained, loaded = re.findall(r"(?:NDCG@10|after loading) ([\d.]+)", capsys.readouterr().out)
    assert trained == loaded
    assert (tmp_path / "runs" / "custom_stream" / "stream.py").exists()


# Elsewhere

WITHOUT_PACKAGE = """
import importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *args):
        if name.partition(".")[0] == "blossomrec_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""
LOAD = """
import copy, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=TRUST).eval()
except (ImportError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
model = copy.deepcopy(model)
ids = torch.arange(2, 58)[None]
with torch.no_grad():
    cache = model(ids[:, :50], use_cache=True).cache
    outputs = {"whole": model(ids).logits, "appended": model(ids[:, 50:], cache=cache).logits}
save_file(outputs, sys.argv[2])
model.save_pretrained(sys.argv[1] + "-again")
print(type(model).__module__)
"""


def load_elsewhere(folder, *preparation: str, trust: bool = True) -> subprocess.CompletedProcess:
    """A new process that has not imported `stream` loads the checkpoint and computes."""
    script = "\n".join(["import sys", *preparation, LOAD.replace("TRUST", str(trust))])
    environ = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    arguments = [sys.executable, "-c", script, str(folder), str(folder.parent / "outputs")]
    return subprocess.run(arguments, env=environ, cwd=folder.parent, capture_output=True, text=True, timeout=200)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and the logits of items 2 to 57."""
    model = recommender()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        return tmp_path / "model", model(torch.arange(2, 58)[None]).logits


def test_the_file_is_copied_and_named(saved):
    folder, _ = saved
    assert (folder / "stream.py").read_text() == (FOLDER / "stream.py").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["BlossomRecStream.compressed"] == "stream.CompressedStream"
    assert "stream.py" in json.loads((folder / "checkpoint_manifest.json").read_text())["sha256"]


@pytest.mark.parametrize("preparation", ["import blossomrec_hf", ""], ids=["imported", "installed"])
def test_it_loads_where_the_package_is_installed(saved, preparation):
    folder, expected = saved
    done = load_elsewhere(folder, preparation)
    assert done.returncode == 0, done.stderr
    module = "blossomrec_hf." if preparation else "transformers_modules."
    assert done.stdout.strip().splitlines()[-1].startswith(module)
    outputs = load_file(folder.parent / "outputs")
    torch.testing.assert_close(outputs["whole"], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(outputs["appended"], expected[:, 50:], rtol=0, atol=1e-10)
    again = folder.parent / "model-again"
    assert (again / "stream.py").read_text() == (FOLDER / "stream.py").read_text()
    assert json.loads((again / "config.json").read_text())["auto_map"]["BlossomRecStream.compressed"]


def test_elsewhere_one_sentence_names_the_package(saved):
    done = load_elsewhere(saved[0], WITHOUT_PACKAGE)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("ImportError: ")]
    assert (
        "the stream 'compressed', whose code needs the package blossomrec-hf: `pip install blossomrec-hf`." in sentence
    )


def test_its_code_does_not_run_without_consent(saved):
    done = load_elsewhere(saved[0], "import blossomrec_hf", trust=False)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("ValueError: ")]
    assert "no stream is registered as 'compressed'" in sentence and "trust_remote_code=True" in sentence


def test_a_stream_that_cannot_be_imported_is_not_saved(tmp_path, registered):
    model = recommender()
    registered.CompressedStream.__module__ = "__main__"
    with pytest.raises(ValueError, match="CompressedStream.*module of its own"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
