"""The study of attention: what it reads is what the model computes, and its measures are those of loops over all queries."""

import importlib
import json
import random

import pytest
import torch
from example_cases import REPOSITORY, SMALL_MODEL
from small_cases import make_model


SETTINGS = {
    **dict(zip((name.removeprefix("--") for name in SMALL_MODEL[::2]), map(json.loads, SMALL_MODEL[1::2]))),
    **{"max_length": 40, "num_hidden_layers": 1, "num_train_epochs": 1, "eval_epochs": 1, "mixed_precision": "no"},
    **{"compress_block_size": 4, "compress_stride": 4, "selection_block_size": 4, "num_selected_blocks": 2},
}


@pytest.fixture
def measures(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples" / "studies")
    return importlib.import_module("attention_measures")


@pytest.fixture
def history():
    return torch.randint(2, 62, (1, random.randint(30, 60)))


@pytest.fixture
def model():
    heads = {"num_attention_heads": 4, "num_key_value_heads": random.choice([1, 2, 4])}
    return make_model(
        **heads, attn_implementation="eager", initializer_range=0.3, gate_initial_bias=[0.5, -0.5]
    ).eval()


def test_readings_are_the_attention_of_the_model(measures, model, history):
    readings = measures.read_layers(model, history)
    implementation = model.config._attn_implementation
    expected = model(input_ids=history, output_attentions=True, output_selection=True)
    assert model.config._attn_implementation == implementation and len(readings) == len(expected.attentions)
    for reading, probabilities, selection in zip(readings, expected.attentions, expected.selections):
        gated = sum(g[..., None] * p for g, p in zip(reading.gates.unbind(-1), reading.probabilities.values()))
        torch.testing.assert_close(gated.transpose(0, 1), probabilities[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(reading.selection.block_indices, selection.block_indices[0])
        torch.testing.assert_close(reading.full.sum(-1), torch.ones_like(reading.full[..., 0]))
        # All candidates are ranked, and what was selected comes first.
        number = reading.selection.block_indices.shape[-1]
        kept = torch.where(reading.selection.block_indices >= 0, reading.importance[..., :number], 0.0)
        torch.testing.assert_close(kept, reading.selection.importance)
        later = reading.queries.position >= reading.streams["long_term"].block_size
        sums = reading.importance.sum(-1)[later]
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_agreement_is_the_weight_on_the_keys_that_get_attention(measures, model, history):
    reading = measures.read_layers(model, history)[0]
    choice = measures.Choice(reading, torch.Generator().manual_seed(0))
    groups = choice.selected.shape[1]
    weights = reading.full.unflatten(1, (groups, -1)).mean(2)
    shares = measures.measure_agreement(choice, weights)
    attended = sum(reading.probabilities.values()).unflatten(1, (groups, -1)).amax(2) > 0
    expected = (weights * attended).sum(-1)[choice.queries].mean()
    torch.testing.assert_close(shares["selected"], expected)
    torch.testing.assert_close(
        shares["share of the keys, selected"],
        (attended.float().mean(1).sum(-1) / torch.arange(1, history.shape[1] + 1))[choice.queries].mean(),
    )
    others = ("no selected block", "random", "latest", "selected")
    assert all(shares[name] <= shares["best"] + 1e-6 for name in others)
    assert all(shares["no selected block"] <= shares[name] for name in others)
    together = measures.measure_agreement(choice, weights.mean(1, keepdim=True), together=True)
    apart = measures.measure_agreement(choice, weights.mean(1, keepdim=True))
    assert all(together[name] >= apart[name] - 1e-6 for name in together)


def test_other_selections_have_as_many_candidates(measures, model, history):
    choice = measures.Choice(measures.read_layers(model, history)[0], torch.Generator().manual_seed(0))
    for indices in (choice.random, choice.latest, choice.best(torch.rand(choice.seen(choice.selected).shape))):
        for query in torch.nonzero(choice.queries)[:, 0].tolist():
            for head in range(indices.shape[1]):
                blocks = [block for block in indices[query, head].tolist() if block >= 0]
                assert len(set(blocks)) == len(blocks) == (choice.selected[query, head] >= 0).sum()
                assert all(block < query // choice.size for block in blocks)
    assert choice.latest[-1, 0, 0] == (history.shape[1] - 1) // choice.size - 1


def test_diversity_and_distances_equal_those_of_loops(measures, model, history):
    choice = measures.Choice(measures.read_layers(model, history)[0], torch.Generator().manual_seed(0))
    queries = torch.nonzero(choice.queries)[:, 0].tolist()
    heads = range(choice.selected.shape[1])
    sets = {
        (t, g): {b for b in choice.selected[t, g].tolist() if b >= 0}
        for t in range(len(choice.queries))
        for g in heads
    }
    found = {name: value.item() for name, value in measures.measure_diversity(choice, choice.selected).items()}
    last = (history.shape[1] - 1) // choice.size
    total = sum(len(sets[t, g]) for t in queries for g in heads)
    ever = [set().union(*(sets[t, g] for t in range(len(choice.queries)))) for g in heads]
    assert list(found.values()) == pytest.approx(
        [
            total / len(queries) / len(heads),
            sum(map(len, ever)) / len(heads) / last,
            len(set().union(*ever)) / last,
            sum(len(set().union(*(sets[t, g] for g in heads))) for t in queries) / total,
            sum(len(sets[t, g] & sets[t - 1, g]) for t in queries for g in heads) / total,
        ]
    )
    back = [t // choice.size - block for t in queries for g in heads for block in sets[t, g]]
    limits = [1, *measures.BLOCK_EDGES, 10**9]
    shares = [sum(low <= x < high for x in back) / len(back) for low, high in zip(limits, limits[1:])]
    assert measures.measure_block_distances(choice, choice.selected).tolist() == pytest.approx(shares)
    assert measures.measure_candidate_distances(choice).sum().item() == pytest.approx(1)


def test_mass_by_distance_equals_that_of_a_loop(measures):
    n, edges = 12, (1, 2, 5)
    probabilities, chosen = torch.rand(n, 3, n).tril(), torch.rand(n) < 0.7
    chosen[-1] = True
    distance = torch.arange(n)[:, None] - torch.arange(n)
    probabilities *= (distance >= 0)[:, None]
    expected = torch.zeros(4)
    for t in torch.nonzero(chosen)[:, 0].tolist():
        for u in range(t + 1):
            kind = sum(t - u >= edge for edge in edges)
            expected[kind] += (probabilities[t, :, u] / probabilities[t].sum(-1)).mean() / chosen.sum()
    torch.testing.assert_close(measures.measure_distances(probabilities, chosen, distance, edges), expected)


def test_averages_have_intervals(measures):
    first, second = (
        {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3.0)]},
        {"a": torch.tensor([3.0, 2.0]), "b": [torch.tensor(5.0)]},
    )
    averaged = measures.average([first, second])
    assert averaged["a"] == {"mean": [2.0, 2.0], "half": [1.96, 0.0]}
    assert averaged["b"] == [{"mean": 4.0, "half": 1.96}]


def test_the_study_trains_measures_and_draws_again(run_example, log_file, tmp_path):
    arguments = ("--data", log_file, "--settings", json.dumps(SETTINGS), "--after", 0, "--histories", 3)
    for number, words in ((999, "no history has so many events"), (12, "shorter histories than 13 have no choice")):
        told = run_example("studies/attention.py", *arguments, "--min_events", number, status=2, field="stderr")
        assert f"`min_events` is {number}" in told and words in told
        assert "Traceback" not in told and "Epoch" not in told
    printed = run_example("studies/attention.py", *arguments, "--min_events", 20, "--folder", tmp_path / "first")
    results = json.loads((tmp_path / "first" / "attention.json").read_text())
    assert len(results["layers"]) == 1 and results["histories"]["number"] == 3
    assert [line["step"] for line in results["records"]["blossom"]["gates"]][0] == 0
    again = run_example(
        "studies/attention.py", "--from", tmp_path / "first" / "attention.json", "--folder", tmp_path / "second"
    )
    assert again == printed
    for name in ("attention.md", "attention.png"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
