"""`blossomrec study`: one record per run, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from blossomrec_hf.commands import study
from blossomrec_hf.commands.study import costs_of, lock_study, validation_of
from blossomrec_hf.training.studies import Run


STUDY = """
data: {small: small.safetensors}
seeds: [1]
settings: {hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32, tokens_per_step: 300,
  max_length: 20, num_train_epochs: 2}
configurations:
  blossom: {}
  full: {attention_types: full}
  short: {attention_types: short_term}
comparisons: [{first: blossom, second: full}]
baselines: true
"""


@pytest.fixture
def prepared(run_command, log_file, tmp_path):
    run_command("prepare", log_file, "--output_dir", tmp_path / "prepared")
    run_command("export", "--data", tmp_path / "prepared", "--output", tmp_path / "small.safetensors")
    (tmp_path / "pair.yaml").write_text(STUDY)
    return tmp_path


@pytest.mark.slow
def test_a_killed_study_does_the_missing_runs(prepared, run_command):
    arguments = (prepared / "pair.yaml", "--data_dir", prepared, "--output_dir", prepared / "out")
    records = prepared / "out" / "pair" / "records"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "blossomrec_hf.commands.study", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(records.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in records.glob("*.json")}
    assert 1 <= len(done) < 3

    printed = run_command("study", *arguments, "--per_device", 2, spawn_by_fork=True)
    assert len(list(records.glob("*.json"))) == len(list(records.glob("*.npz"))) == 3
    for name, (written, content) in done.items():
        assert (records / name).stat().st_mtime_ns == written and (records / name).read_bytes() == content
    assert not list(records.glob("*.training")) and not list(records.glob(".*"))
    assert "| blossom | 1 | " in printed and "| blossom − full (test) | small, all users (60) | " in printed

    results = json.loads((prepared / "out" / "pair" / "pair.json").read_text())
    assert results["runs"] == {"done": 3, "of": 3}
    metrics = {
        record["configuration"]: record["evaluations"]["test"]["metrics"] for record in results["records"].values()
    }
    means = {row["configuration"]: row["ndcg@10"] for row in results["tables"]["means"]}
    assert means == pytest.approx({name: values["ndcg@10"] for name, values in metrics.items()}) and len(means) == 3
    popular = results["baselines"]["small"]["most popular"]
    assert 0 < popular["ndcg@10"] < popular["recall@10"] < 1
    assert f"| most popular | small | {popular['recall@10']:.4f} | {popular['ndcg@10']:.4f} |" in printed

    # A third time, nothing is left to do; with other code, everything would be.
    again = run_command("study", *arguments, field="stderr")
    assert "3 of 3 runs are done" in again
    assert (prepared / "out" / "pair" / "pair.md").read_text() in run_command("study", *arguments, "--tables_only")


def test_two_processes_do_not_do_the_same_runs(tmp_path, run_command):
    (tmp_path / "pair.yaml").write_text(STUDY)
    (tmp_path / "out" / "pair").mkdir(parents=True)
    arguments = (tmp_path / "pair.yaml", "--output_dir", tmp_path / "out")
    with lock_study(tmp_path / "out" / "pair"):
        error = run_command("study", *arguments, status=2, field="stderr")
        assert f"Another process does the runs of the study in {tmp_path / 'out' / 'pair'}; wait for it" in error
    error = run_command("study", *arguments, status=2, field="stderr")
    assert "small.safetensors" in error  # the lock is gone; there is no data


def test_a_study_that_cannot_run_is_refused_in_a_sentence(tmp_path, run_command):
    (tmp_path / "pair.yaml").write_text(STUDY.replace("hidden_size: 16", "hidden_size: 15"))
    error = run_command("study", tmp_path / "pair.yaml", "--output_dir", tmp_path / "out", status=2, field="stderr")
    assert "configuration blossom: `" in error and "Traceback" not in error
    (tmp_path / "pair.yaml").write_text(STUDY)
    error = run_command(
        "study", tmp_path / "pair.yaml", "--tables_only", "--output_dir", tmp_path / "out", status=2, field="stderr"
    )
    assert "has no record of a finished run of pair; run it without --tables_only." in error


def test_code_that_changed_during_the_runs_is_named(tmp_path, monkeypatch, capsys):
    """Their records are not of the code that the tables would be of."""
    (tmp_path / "pair.yaml").write_text(STUDY)
    monkeypatch.setattr(study, "run_missing", lambda *args, **kwargs: [])
    monkeypatch.setattr(sys, "argv", ["study", str(tmp_path / "pair.yaml"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    error = capsys.readouterr().err
    assert "The code has changed since the runs of pair began" in error and "with --tables_only." in error


@pytest.mark.slow
def test_the_reason_of_a_failed_run_is_one_line(prepared, run_command):
    study = STUDY.replace("[1, 2]", "[1]").replace("blossom: {}", "blossom: {event_types: [view]}")
    (prepared / "pair.yaml").write_text(study.replace("  full: {attention_types: full}\n", "").split("comparisons")[0])
    arguments = ("--data_dir", prepared, "--output_dir", prepared / "out", "--only", "runs")
    error = run_command("study", prepared / "pair.yaml", *arguments, spawn_by_fork=True, status=2, field="stderr")
    (line,) = [line for line in error.splitlines() if "A run failed" in line]
    assert "small-blossom-1-" in line and ".log: ValueError: " in line and "event_type_ids" in line
    assert error.splitlines()[-1].startswith("1 of the runs failed; correct the cause") and "Traceback" not in error


def test_every_configuration_has_the_costs_of_its_model():
    settings = {"hidden_size": 16, "max_length": 20, "learning_rate": 0.1}
    run = Run("small", "blossom", 1, settings, {"test": {}, "all": {"max_length": 50}}, checksum="", code="")
    half = replace(run, configuration="half", settings={**settings, "mixed_precision": "bf16"})
    timing = {"data": "small", "code": "c", "compiled": False, "device": "CPU", "model": {"hidden_size": 16}}
    timings = [{**timing, "microseconds_per_user": {"20": cost, "50": 7.0}} for cost in (3.0, 2.0)]
    (cost,) = costs_of([run, half], timings)
    assert cost["configuration"] == "blossom" and cost["microseconds_per_user"] == {"test": 2.0, "all": 7.0}


@pytest.mark.parametrize("metric", ["ndcg", "recall"])
def test_validation_is_the_ndcg_whatever_chose_the_weights(metric):
    record = {"settings": {}, "validation": {"recall@10": 0.3, "ndcg@10": 0.2}}
    assert validation_of(record) == 0.2
    assert validation_of(record | {"settings": {"metric_for_best_model": f"{metric}@10"}}) == 0.2
    now = {"recall@10_now": 0.5, "ndcg@10_now": 0.4}
    assert validation_of({"settings": {"metric_for_best_model": f"{metric}@10_now"}, "validation": now}) == 0.4


def test_studies_need_neither_polars_nor_datasets(run_python):
    code = (
        "import sys; sys.modules.update(polars=None, datasets=None, pyarrow=None, matplotlib=None);"
        "import blossomrec_hf.commands.study"
    )
    run_python("-c", code)
