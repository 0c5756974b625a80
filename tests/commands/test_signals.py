"""Times and event types through the commands: train, evaluate, compare, recommend, finetune, in one process for speed."""

import json
import sys

import numpy as np
import polars as pl
import pytest
from accelerate.state import AcceleratorState, GradientState

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.commands import compare, evaluate, finetune, recommend, train


GAPS = (60, 3_600, 86_400, 30 * 86_400)
LAST = 1_700_000_000  # no event of the log is later
SMALL = "--hidden_size 16 --num_attention_heads 2 --num_key_value_heads 1 --intermediate_size 32 --num_hidden_layers 1"
SHORT = "--tokens_per_step 200 --warmup_steps 5 --learning_rate 1e-2 --num_train_epochs 30 --hidden_dropout_prob 0"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command and returns what it printed; `fails` returns the sentence on stderr."""

    def run(module, *arguments, fails=False) -> str:
        words = [
            word for argument in arguments for word in (argument.split() if isinstance(argument, str) else [argument])
        ]
        monkeypatch.setattr(sys, "argv", ["blossomrec", *map(str, words)])
        if not fails:
            module.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as exit:
            module.main()
        assert exit.value.code == 2
        return capsys.readouterr().err

    return run


def write_log(path, num_users: int, seed: int, first: int = 0):
    """A log in which the gap before an event says which of four groups of five items it is of; others are views."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(first, first + num_users):
        groups = rng.integers(4, size=rng.integers(8, 20))
        gaps = (np.array(GAPS)[groups] * rng.uniform(0.95, 1.05, len(groups))).astype(int)
        times = LAST - gaps.sum() + gaps.cumsum()
        items = groups * 5 + rng.integers(5, size=len(groups))
        types = np.where(np.arange(len(groups)) % 3 == 0, "view", "buy")
        rows += zip([user] * len(groups), items.tolist(), times.tolist(), types.tolist())
    pl.DataFrame(rows, ["user", "item", "timestamp", "kind"], orient="row").write_csv(path)
    return path


def test_times_and_types_through_the_commands(command, tmp_path):
    log, run = write_log(tmp_path / "log.csv", 70, 0), tmp_path / "run"
    data = f"--data {log} --event_type kind --targets buy"
    features = "--time_features previous_gap,next_gap --event_types true"
    printed = command(
        train,
        data,
        features,
        SMALL,
        SHORT,
        "--metric_for_best_model ndcg@10_now --eval_ks 5 10",
        f"--output_dir {run}",
    )
    assert "all items, now known" in printed
    config = BlossomRecConfig.from_pretrained(run)
    assert config.time_features == ["previous_gap", "next_gap"]
    assert config.event_types == ["view", "buy"] and config.target_event_types == ["buy"]
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["test"]["recall@5_now"] > 0.9 > 0.6 > summary["test"]["recall@5"]
    assert summary["changed_arguments"]["time_features"] == "previous_gap,next_gap"
    card = (run / "README.md").read_text()
    assert "previous_gap, next_gap" in card and "the time of the event to be predicted is known" in card

    # Both evaluations of one model, next to the baselines that fit.
    report = tmp_path / "report"
    printed = command(evaluate, f"--models {run} {data} --ks 5 --samples 20 --num_negatives 0 --output_dir {report}")
    reports = json.loads((report / "evaluation.json").read_text())["reports"]
    gap = "popular after such a gap, with now"
    assert {name for name, entry in reports.items() if entry["sees_now"]} == {f"{run}, with now", gap}
    assert "most recently viewed" in reports
    assert reports[gap]["metrics"]["recall@5"] > 0.9 and f"| {gap} |" in printed
    for name, suffix in ((f"{run}, with now", "_now"), (str(run), "")):
        assert reports[name]["metrics"]["recall@5"] == pytest.approx(summary["test"][f"recall@5{suffix}"])
    compared = command(compare, "--reports", report, "--first", run, "--second", run, "--k 5")
    assert f"first: {run}\nsecond: {run}\n" in compared
    late = f"--test_after {LAST - 86_500}"
    printed = command(evaluate, f"--models {run} {data} --ks 5 --samples 20 {late} --output_dir {tmp_path / 'late'}")
    entry = json.loads((tmp_path / "late" / "evaluation.json").read_text())["reports"][str(run)]
    frame = pl.read_csv(log).filter(pl.col("kind") == "buy")
    assert 0 < entry["users"] < frame["user"].n_unique()
    assert f"held-out events are after {LAST - 86_500}: {entry['users']} users" in printed

    # Recommendations for all users at one time: those of the model.
    out = tmp_path / "recommendations"
    options = f"--model {run} {data} --top_k 5 --output_dir {out}"
    command(recommend, options, f"--now {LAST + GAPS[2]}")
    shard = pl.read_parquet(out / "recommendations-00000.parquet")
    model = BlossomRecForSequentialRecommendation.from_pretrained(run).eval()
    assert int(model.model.latest_time) <= LAST
    assert np.mean([[10 <= item < 15 for item in items] for items in shard["item_id"]]) > 0.9  # the group of this gap
    assert "another model, log or setting" in command(recommend, options, f"--now {LAST + GAPS[0]}", fails=True)
    assert "before the latest event of the log" in command(
        recommend, options.replace(str(out), f"{out}2"), "--now 1000000000", fails=True
    )

    # New events continue the old ones, with their times and types.
    new, tuned = write_log(tmp_path / "new.csv", 30, 1, first=60), tmp_path / "tuned"
    command(
        finetune, f"--model {run} --data {new} --event_type kind --targets buy --output_dir {tuned} --min_steps 20",
        "--num_train_epochs 1 --use_cpu true --metric_for_best_model ndcg@10_now",
    )  # fmt: skip
    figures = json.loads((tuned / "test_results.json").read_text())
    assert figures["test_recall@5_now"] > max(0.6, figures["test_recall@5"] + 0.15)
    summarized = json.loads((tuned / "training_summary.json").read_text())["test"]
    assert summarized == {name: figures[f"test_{name}"] for name in summarized} and "recall@5_now" in summarized
    card = (tuned / "README.md").read_text()
    assert "next_gap" in card and "`lr_scheduler_type` linear" in card
    assert "determines what is read of events" in command(
        finetune, f"--model {run} --data {new} --output_dir {tmp_path / 'none'} --time_features next_gap", fails=True
    )

    bare = tmp_path / "bare.csv"
    pl.read_csv(log).select("user", "item").write_csv(bare)
    timeless = tmp_path / "timeless.csv"
    pl.read_csv(log).select("user", "item", "kind").write_csv(timeless)
    for module, arguments in (
        (evaluate, f"--models {run}"), (recommend, f"--model {run}"), (finetune, f"--model {run} --use_cpu true")
    ):  # fmt: skip
        sentence = command(module, arguments, f"--data {bare} --output_dir {tmp_path / 'none'}", fails=True)
        assert "event types" in sentence and "Traceback" not in sentence
        options = f"--data {timeless} --event_type kind --targets buy --output_dir {tmp_path / 'none'}"
        sentence = command(module, arguments, options, fails=True)
        assert "he model reads timestamps of events, but the data has" in sentence, module


def test_a_new_model_of_finetune_reads_times_and_types(command, tmp_path):
    log, run = write_log(tmp_path / "log.csv", 30, 0), tmp_path / "run"
    command(
        finetune, f"--data {log} --event_type kind --targets buy --output_dir {run} --max_steps 2 --use_cpu true",
        "--time_features next_gap,weekday --time_zone Europe/Berlin --event_types true",
    )  # fmt: skip
    model = BlossomRecForSequentialRecommendation.from_pretrained(run)
    assert model.config.time_features == ["next_gap", "weekday"] and model.config.time_zone == "Europe/Berlin"
    assert model.config.event_types == ["view", "buy"] and model.config.target_event_types == ["buy"]
    assert model.item_counts.sum() > 0 and model.model.prediction_vectors.next_gap.any()
    assert "ndcg@10_now" in json.loads((run / "training_summary.json").read_text())["test"]


def test_early_stopping_drops_targets_that_never_occur_in_training(command, tmp_path, caplog):
    rows = [(user, item % 9) for user in range(20) for item in range(user, user + 6)]
    rows += [(3, 50), (4, 51), (5, 1), (5, 52)]  # test items, and one of validation, that nobody has in training
    rows += [(6, 53), (6, 2)]
    pl.DataFrame(rows, ["user", "item"], orient="row").write_csv(tmp_path / "log.csv")
    run = tmp_path / "run"
    arguments = f"--data {tmp_path / 'log.csv'} {SMALL} --num_train_epochs 1 --eval_ks 5 --output_dir {run}"
    command(train, arguments, "--known_targets true")
    assert "validation: 1 of 20 targets never seen in training, dropped" in caplog.text
    assert "test: 3 of 20 targets never seen in training, dropped" in caplog.text
    assert json.loads((run / "training_summary.json").read_text())["configuration"]["known_targets"] is True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--time_features next", "`time_features` is 'next'"),
        ("--time_features next_gap", "The model reads timestamps of events, but the data has"),
        (
            "--time_features next_gap --time_zone Asia/Kolkata",
            "`time_zone` is 'Asia/Kolkata', but `time_features` is 'next_gap'",
        ),
        ("--event_types true", "`event_types` is true, but the data has no event types"),
        ("--metric_for_best_model ndcg@10_now", "`now` is true, but the model's `time_features` are None"),
    ],
)
def test_what_the_data_do_not_have_is_named_before_the_training(command, tmp_path, options, words):
    rows = [(user, item % 9) for user in range(20) for item in range(user, user + 6)]
    pl.DataFrame(rows, ["user", "item"], orient="row").write_csv(tmp_path / "log.csv")
    arguments = f"--data {tmp_path / 'log.csv'} {SMALL} --output_dir {tmp_path / 'run'}"
    assert words in command(train, arguments, options, fails=True)
