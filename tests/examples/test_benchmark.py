import argparse
import importlib
import json

import numpy as np
import pytest
import torch
from example_cases import REPOSITORY
from transformers import AttentionInterface

from blossomrec_hf.model.ops_reference import rotate


OUTSIDE = """
import torch
from torch import nn

class LastItem(nn.Module):
    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        assert (hidden_size, num_attention_heads) == (128, 8)
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, mask):
        assert hidden_states.shape[:2] == mask.shape and mask.dtype == torch.bool and mask.all()
        return self.linear(hidden_states)
"""
TINY = ("--device", "cpu", "--tokens", 96, "--lengths", "24,48", "--seconds", 0)


def test_every_contestant_gets_every_figure(run_example, tmp_path):
    (tmp_path / "outside.py").write_text(OUTSIDE)
    run_example(
        "benchmarks/attention.py",
        *TINY,
        *(
            "--contestants",
            "blossom,full (cuDNN),full (eager)",
            "--baseline_module",
            f"{tmp_path}/outside.py:LastItem",
        ),
        *("--json", tmp_path / "f.json", "--png", tmp_path / "f.png"),
    )
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    named = {(f["what"], f["length"], f["contestant"]) for f in figures}
    contestants = ("blossom", "full (cuDNN)", "full (eager)", "LastItem")
    whats = ("core", "training", "inference")
    assert named == {(what, length, c) for what in whats for length in (24, 48) for c in contestants}
    assert all(figure["ms"] > 0 for figure in figures)
    assert all(0 < f["floor_ms"] < f["ms"] for f in figures if f["contestant"] != "LastItem")
    assert (tmp_path / "f.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--contestants", "blossom,sasrec"), 2, "--contestants has sasrec; it may name blossom,"),
        (("--lengths", "200"), 2, "--lengths has 200, more than --tokens, 96"),
        (("--baseline_module", "nowhere.py:Attention"), 2, "'nowhere.py' is no file"),
    ],
)
def test_bad_arguments_are_named(run_example, arguments, status, words):
    told = run_example("benchmarks/attention.py", *TINY, *arguments, status=status, field="stderr")
    assert words in told and "Traceback" not in told


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples" / "benchmarks")
    return importlib.import_module("attention")


def test_real_lengths_are_packed_as_the_loop_packs_them(benchmark, monkeypatch, tmp_path):
    lengths = np.random.default_rng().integers(2, 40, 30)
    np.save(tmp_path / "lengths.npy", lengths)
    arguments = (
        *("--device", "cpu", "--tokens", 96, "--seconds", 0, "--contestants", "blossom,full (cuDNN),full (varlen)"),
        *("--lengths_from", tmp_path / "lengths.npy", "--max_length", 20, "--steps", 2, "--json", tmp_path / "f.json"),
    )
    monkeypatch.setattr("sys.argv", ["attention.py", *map(str, arguments)])
    monkeypatch.setattr(benchmark, "machine_rates", lambda args: (1e10, 1e11))  # which take seconds: measured above
    benchmark.main()
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    # Neither the core nor attention on rows of equal length.
    whats, contestants = ("training", "inference"), ("blossom", "full (varlen)")
    assert [(f["what"], f["contestant"]) for f in figures] == [(what, c) for what in whats for c in contestants]
    assert all(figure["ms"] > 0 and figure["length"] is None for figure in figures)


def test_steps_of_real_lengths_have_one_shape_and_no_history_over_the_limit(benchmark, tmp_path):
    lengths = np.random.default_rng().integers(0, 60, 200)
    np.save(tmp_path / "lengths.npy", lengths)
    row = benchmark.real_histories(str(tmp_path / "lengths.npy"), 50, 300, 5)
    assert len(row.lengths) == 5 and not row.equal
    assert {(len(step), step.sum()) for step in row.lengths} == {(len(row.lengths[0]), row.tokens)}
    assert row.tokens <= 300 and max(step.max() for step in row.lengths) <= row.longest == 50


def test_the_strongest_peer_is_the_fastest_full_attention(benchmark):
    figures = [
        {"contestant": "blossom", "is_peer": False, "ms": 1.0},
        {"contestant": "full (cuDNN)", "is_peer": True, "ms": 3.0},
        {"contestant": "full (varlen)", "is_peer": True, "ms": 2.0},
        {"contestant": "full (eager)", "is_peer": True, "ms": None},
    ]
    assert benchmark.strongest(figures)["contestant"] == "full (varlen)"
    assert benchmark.strongest(figures[:1]) is None


@pytest.mark.parametrize("implementation", ["rows_full", "varlen_full", "eager_full"])
@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
def test_every_peer_computes_full_attention(benchmark, implementation, rotated):
    query, key, value = torch.randn(3, 1, 8, 60, 16).unbind()
    angle = torch.randn(60, 8).repeat(1, 2)[None]
    embeddings = (angle.cos(), angle.sin())
    settings = {"cu_seqlens": torch.tensor([0, 20, 40, 60]), "max_seqlen": 20, "gates": None}
    args = argparse.Namespace(device="cpu", hidden_size=128, num_hidden_layers=1, num_key_value_heads=2)
    peer = next(c for c in benchmark.CONTESTANTS if c.implementation == implementation)
    module = benchmark.build(peer, args).model.layers[0].self_attn
    module.scaling = 0.25
    attend = AttentionInterface()
    expected, _ = attend["blossom_torch"](module, query, key, value, None, position_embeddings=embeddings, **settings)
    if rotated:  # the core's queries and keys
        query, key = (rotate(x, *embeddings) for x in (query, key))
        embeddings = None
    actual, _ = attend[implementation](module, query, key, value, None, position_embeddings=embeddings, **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
