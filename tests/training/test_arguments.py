import json
import sys
import threading

import pytest

from blossomrec_hf.evaluation import append_result, read_results
from blossomrec_hf.training import LogArguments, LoopArguments, parse_arguments, save_arguments
from blossomrec_hf.training import arguments as arguments_module


def parse(monkeypatch, *words, **options):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return parse_arguments(LogArguments, LoopArguments, **options)


def test_command_line_then_file_then_built_in_then_default(monkeypatch, tmp_path):
    built_in = {"learning_rate": 5.0, "warmup_steps": 3, "tokens_per_step": 77}
    (tmp_path / "run.yaml").write_text("warmup_steps: 9\nweight_decay: 1e-3\n")  # YAML reads 1e-3 as text
    _, args = parse(monkeypatch, "--config", tmp_path / "run.yaml", "--learning_rate", 7, built_in=built_in)
    assert (args.learning_rate, args.warmup_steps, args.tokens_per_step) == (7.0, 9, 77)
    assert (args.weight_decay, args.adam_beta1) == (1e-3, LoopArguments().adam_beta1)
    _, args = parse(monkeypatch, "--data", "log.csv", built_in=built_in)
    assert args == LoopArguments()


def test_saved_arguments_come_back(monkeypatch, tmp_path):
    log_args, args = LogArguments(data="a b.csv", k_core=5), LoopArguments(mixed_precision="bf16", learning_rate=3e-5)
    save_arguments(tmp_path / "run.yaml", log_args, args)
    assert parse(monkeypatch, "--config", tmp_path / "run.yaml") == (log_args, args)


def test_unknown_names_in_a_file_are_told(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse(monkeypatch, "--config", tmp_path / "run.yaml")


def test_results_of_runs_that_end_together_are_all_kept(tmp_path):
    path = tmp_path / "results.json"

    def run(seed):
        append_result(path, configuration={"types": ("full",), "seed_free": 1}, seed=seed, commit="c", figure=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result["figure"] for result in read_results(path)) == list(range(8))
    append_result(path, configuration={"types": ["full"], "seed_free": 1}, seed=3, commit="c", figure=33)
    assert sorted(result["figure"] for result in read_results(path)) == [0, 1, 2, 4, 5, 6, 7, 33]
    assert [child.name for child in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_is_no_list_of_results_is_left_alone(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="has a dict instead of a list"):
        append_result(path, configuration={}, seed=0, commit=None)
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_tracker_that_is_not_installed_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(arguments_module, "get_available_trackers", lambda: ["tensorboard"])
    LoopArguments(report_to="tensorboard")
    with pytest.raises(ValueError, match=r"`report_to` is 'mlflow', .*`pip install mlflow`.* tensorboard or none\.$"):
        LoopArguments(report_to="mlflow")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"a: [", "is not a valid YAML file"),
        (b"\xff\x00", "is not a valid YAML file"),
        (b"3", "has 3; it must be a mapping"),
        (b"data: 3", "has 3 for `data`"),
        (b"max_length: [1]", r"has \[1\] for `max_length`"),
        (b"max_length: true", "has True for `max_length`"),
        (b"max_length: null", "has None for `max_length`"),
        (b"k_core: {}", "has {} for `k_core`"),
    ],
)
def test_a_damaged_file_of_arguments_is_named(monkeypatch, tmp_path, content, named):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"run.yaml {named}"):
        parse(monkeypatch, "--config", tmp_path / "run.yaml")
