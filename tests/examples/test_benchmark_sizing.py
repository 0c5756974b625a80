import dataclasses
import json

import pytest
import torch
from example_cases import load_example

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


sizing = load_example("benchmarks/sizing.py")
SHARDED = {"max_length": 4096, "num_negatives": 1024, "sharded": True}


@pytest.mark.parametrize(("items", "hidden_size", "layers", "kv_heads"), [(1000, 32, 1, 2), (500, 64, 3, 8)])
def test_memory_between_steps_is_that_of_the_tensors(items, hidden_size, layers, kv_heads):
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
    training = sizing.Training(items=items, **sizes)
    config = BlossomRecConfig(vocab_size=items + 2, intermediate_size=2 * hidden_size, **sizes)
    model = BlossomRecForSequentialRecommendation(config)
    assert training.weights == model.num_parameters()

    model.train()
    ids = torch.randint(2, items + 2, (2, 40))
    model(ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [state for of_one in optimizer.state.values() for state in of_one.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    tensors = [*model.parameters(), *gradients, *states, model.item_counts]
    workspaces = sizing.GRAPH_WORKSPACES * sizing.WORKSPACE
    assert training.persistent_bytes() - workspaces == pytest.approx(sum(x.nbytes for x in tensors), rel=1e-2)


def test_sharding_divides_what_stays_and_not_the_gathered_table():
    alone = sizing.Training(items=20_000_000, sharded=True, num_negatives=1024)
    eight = dataclasses.replace(alone, gpus=8)
    whole = 8 * alone.items + sizing.EAGER_WORKSPACES * sizing.WORKSPACE
    assert 8 * (eight.persistent_bytes() - whole) == pytest.approx(alone.persistent_bytes() - whole, rel=1e-6)
    assert eight.peak_bytes() - eight.persistent_bytes() == 3 * sizing.HALF * alone.table
    largest = sizing.largest_catalog(eight, 78 * 2**30)
    assert dataclasses.replace(eight, items=largest).peak_bytes() <= 78 * 2**30
    assert dataclasses.replace(eight, items=largest + 1).peak_bytes() > 78 * 2**30
    assert sizing.largest_catalog(eight, 2**20) == 0


def test_rates_are_found_from_measured_times():
    made_up = sizing.Rates(1e12, 1e14, 2e11, 3e-4, 3e-8, 0.1, 0.03)
    alone, pair = sizing.Training(items=3416), sizing.Training(items=100_000, gpus=2)
    trainings = [alone, pair, dataclasses.replace(alone, max_length=8192), dataclasses.replace(pair, gpus=1)]
    trainings += [sizing.Training(items=5_000_000, num_negatives=1024), dataclasses.replace(alone, gpus=4)]
    trainings.append(sizing.Training(items=5_000_000, num_negatives=1024, sharded=True))
    reports = []
    for training in trainings:
        settings = dataclasses.asdict(training) | {"processes": training.gpus, "num_negatives": 1024}
        settings["objective"] = "sampled_softmax" if training.num_negatives else "cross_entropy"
        settings["kind"] = "sharded" if training.sharded else "replicated"
        reports.append(settings | {"step_ms": 1e3 * training.step_seconds(made_up)})
        assert sizing.of_report(reports[-1]) == training
    assert dataclasses.astuple(sizing.fit_rates(reports)) == pytest.approx(dataclasses.astuple(made_up), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "persistent", "peak", "step_ms"),
    [
        ({"items": 100_000, "max_length": 4096}, 371.0, 1019.8, 31.11),
        ({"items": 100_000, "max_length": 4096, "gpus": 2}, 371.5, 1135.9, 31.56),
        ({"items": 100_000, "gpus": 4}, 372.0, 1136.4, 31.58),
        ({"items": 3416, "max_length": 4096, "gpus": 4}, 182.4, 922.7, 4.42),
        (SHARDED | {"items": 5_000_000}, 7438.2, 12325.5, 45.14),
        (SHARDED | {"items": 5_000_000, "gpus": 2}, 3770.7, 8045.7, 40.72),
        (SHARDED | {"items": 20_000_000, "gpus": 2}, 14871.3, 31964.2, 69.73),
    ],
)
def test_the_formula_is_within_a_tenth_of_measured_lines(settings, persistent, peak, step_ms):
    # MiB and ms on H200s (2026-11-27). No rate was fitted to these lines.
    training = sizing.Training(**settings)
    assert training.persistent_bytes() / 2**20 == pytest.approx(persistent, rel=0.03)
    assert training.peak_allocated_bytes() / 2**20 == pytest.approx(peak, rel=0.1)
    assert training.step_seconds() * 1e3 == pytest.approx(step_ms, rel=0.1)


def test_results_are_compared_on_the_command_line(run_example, tmp_path):
    report = {
        "processes": 1,
        "kind": "replicated",
        "execution": {"compiled": True},
        "objective": "cross_entropy",
        "items": 3416,
        "max_length": 1024,
        "num_negatives": 1024,
        "items_per_second": 16507708,
        "persistent_MiB": 181.6,
        "peak_MiB": 898.2,
        "step_ms": 3.97,
    }
    results = tmp_path / "scaling.jsonl"
    results.write_text(json.dumps(report) + "\n")
    line = run_example("benchmarks/sizing.py", "--results", results).strip().splitlines()[-1]
    assert line.startswith("| 1 | replicated, compiled | 3,416 | 1,024 | 2 x 128 | 0.18 (")
    assert line.endswith("| 1.00 | 1.00 |")


@pytest.mark.parametrize(
    "settings",
    [
        {"items": 0},
        {"items": "3416"},
        {"gpus": 0},
        {"num_hidden_layers": 0},
        {"max_length": -1},
        {"num_negatives": -1},
        {"hidden_size": 100},
        {"num_key_value_heads": 3},
    ],
)
def test_numbers_that_no_model_has_are_named(settings):
    with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` is "):
        sizing.Training(**{"items": 100} | settings)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"processes": 1}', "\udcff"])
def test_results_that_cannot_be_read_are_named(tmp_path, content, monkeypatch, capsys):
    results = tmp_path / "scaling.jsonl"
    results.write_bytes(content.encode(errors="surrogateescape"))
    monkeypatch.setattr("sys.argv", ["sizing.py", "--results", str(results)])
    with pytest.raises(SystemExit, match="2"):
        sizing.main()
    printed = capsys.readouterr()
    assert "scaling.jsonl, " in printed.err and printed.err.count("\n") == 1 and not printed.out
