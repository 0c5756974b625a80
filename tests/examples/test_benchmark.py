import importlib.util
import json
import random

import pytest
import torch
from example_cases import REPOSITORY

from blossomrec_hf import BlossomRecConfig


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
        "benchmark.py",
        *TINY,
        *("--contestants", "blossom,full (SDPA),full (eager)", "--baseline_module", f"{tmp_path}/outside.py:LastItem"),
        *("--json", tmp_path / "f.json", "--png", tmp_path / "f.png"),
    )
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    named = {(f["what"], f["length"], f["contestant"]) for f in figures}
    contestants = ("blossom", "full (SDPA)", "full (eager)", "LastItem")
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
        (("--baseline_module", "nowhere.py:Attention"), 1, "'nowhere.py' is no file"),
    ],
)
def test_bad_arguments_are_named(run_example, arguments, status, words):
    told = run_example("benchmark.py", *TINY, *arguments, status=status, field="stderr")
    assert words in told and "Traceback" not in told


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", REPOSITORY / "examples" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_floor_counts_the_pairs_that_the_mechanism_attends_to(benchmark):
    for _ in range(20):
        config = BlossomRecConfig(
            num_selected_blocks=random.randint(1, 5),
            short_term_block_size=random.randint(1, 9),
            short_term_window=random.randint(1, 4),
            power_law_base=random.randint(2, 3),
        )
        length, b, short = random.randint(1, 300), config.selection_block_size, config.short_term_block_size
        near = {*range(config.short_term_window), *(config.power_law_base**i for i in range(10))}
        pairs = scored = 0
        for t in range(length):
            scored += t // b
            pairs += b * min(t // b, config.num_selected_blocks) + t % b + 1  # selected blocks and the own one
            pairs += sum(t // short - u // short in near for u in range(t + 1))
        assert benchmark.attended(config, length) == (pairs, scored)
        full = BlossomRecConfig(attention_types="full")
        assert benchmark.attended(full, length) == (length * (length + 1) // 2, 0)


def test_full_attention_laid_out_is_full_attention(benchmark):
    query, key, value = torch.randn(3, 1, 2, 60, 16).unbind()
    angle = torch.randn(60, 8).repeat(1, 2)[None]
    settings = {
        "cu_seqlens": torch.tensor([0, 20, 40, 60]),
        "max_seqlen": 20,
        "position_embeddings": (angle.cos(), angle.sin()),
        "scaling": 0.25,
        "gates": None,
    }
    module = benchmark.build(benchmark.CONTESTANTS[2], "cpu").model.layers[0].self_attn
    attend = benchmark.AttentionInterface()
    expected, _ = attend["blossom_torch"](module, query, key, value, None, **settings)
    module.scaling = 0.25
    actual, _ = attend["eager_full"](module, query, key, value, None, **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
