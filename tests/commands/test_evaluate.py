import json

import numpy as np
import pytest

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.evaluation import HeldOutItems, evaluate


def test_reports_models_and_baselines(run_command, trained, log_file, tmp_path):
    arguments = ("--models", trained[0], "--data", log_file, "--max_length", 20, "--samples", 50, "--ks", 10)
    arguments += ("--all_and_unseen",)
    printed = run_command("evaluate", *arguments, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())["reports"]
    assert list(report) == [
        str(trained[0]), "most popular", "user's most frequent", "after the last item", "popular in the last 7 days"
    ]  # fmt: skip
    assert (tmp_path / "evaluation.md").read_text().strip() in printed

    tokenizer = BlossomRecTokenizer.from_pretrained(trained[0])
    dataset, _ = build_sequences(log_file, tokenizer=tokenizer)
    model = BlossomRecForSequentialRecommendation.from_pretrained(trained[0])
    view = split(dataset, "test")
    expected = evaluate(model, view, ks=(10,), max_length=20, all_and_unseen=True, progress=False)
    figures = report[str(trained[0])]["metrics"]
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert not report[str(trained[0])]["exclude_seen"] and "ndcg@10_new" in figures  # this log's users repeat items
    assert figures["ndcg@10"] > report["most popular"]["metrics"]["ndcg@10"] + 0.2

    ranks = np.load(tmp_path / "ranks.npz")
    assert np.mean(ranks[f"{trained[0]}_unseen"] <= 10) == pytest.approx(expected["recall@10_unseen"])

    names = ("--first", f"*{trained[0].name}", "--second", "most*")
    told = run_command("compare", "--reports", tmp_path, *names)
    for name in ("ndcg@10_unseen", "ndcg@10_new"):
        better = figures[name] - report["most popular"]["metrics"][name]
        assert f"| {better:+.4f} ± " in next(line for line in told.splitlines() if line.startswith(f"| {name} |"))


def test_given_negatives(run_command, trained, log_file, tmp_path):
    """Seven given items per user, of which one is unknown in the second file."""
    tokenizer = BlossomRecTokenizer.from_pretrained(trained[0])
    rows = split(build_sequences(log_file, tokenizer=tokenizer)[0], "test")
    lines = []
    for row in rows:
        others = [item for item in range(2, len(tokenizer)) if item not in row["target_ids"]][:7]
        lines.append(" ".join(map(str, [row["user_id"], *tokenizer.decode_items(others)])))
    (tmp_path / "sample.txt").write_text("\n".join(lines) + "\n")
    arguments = ("--models", trained[0], "--data", log_file, "--samples", 20, "--output_dir", tmp_path / "out")
    run_command("evaluate", *arguments, "--negatives", tmp_path / "sample.txt")
    metrics = json.loads((tmp_path / "out/evaluation.json").read_text())["reports"][str(trained[0])]["metrics"]
    model = BlossomRecForSequentialRecommendation.from_pretrained(trained[0])
    held_out = HeldOutItems.from_rows(rows, max_length=200)
    negatives = held_out.read_negatives(tmp_path / "sample.txt", tokenizer, held_out.user_ids)
    expected = evaluate(model, held_out, ks=(10,), negatives=negatives, progress=False)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "ndcg@10_given7" in metrics and not any("_uni" in name for name in metrics)

    (tmp_path / "sample.txt").write_text("\n".join([*lines[:-1], lines[-1] + "9"]) + "\n")
    refused = run_command("evaluate", *arguments, "--negatives", tmp_path / "sample.txt", status=2, field="stderr")
    assert f"`negatives`: line {len(lines)} of {tmp_path}/sample.txt has the item" in refused
    refused = run_command("evaluate", *arguments, "--negatives", tmp_path / "none", status=2, field="stderr")
    assert "which is no file; give the path of one" in refused


def test_targets_that_never_occur_in_training_are_dropped_and_counted(run_command, trained, tmp_path):
    """Of the test targets of three users, the first occurs in training."""
    a, b, c, d, e = BlossomRecTokenizer.from_pretrained(trained[0]).decode_items([2, 3, 4, 5, 6])
    histories = [[a, b, a, b, a], [b, a, b, a, c], [a, b, d, b, e]]
    rows = [f"{user},{item},{time}" for user, items in enumerate(histories) for time, item in enumerate(items)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    command = ("evaluate", "--models", trained[0], "--data", tmp_path / "log.csv", "--samples", 5, "--ks", 1)
    command += ("--output_dir", tmp_path)
    run_command(*command)
    assert np.load(tmp_path / "ranks.npz")["user_ids"].tolist() == [0, 1, 2]
    told = run_command(*command, "--known_targets", field="stderr")
    assert "test: 2 of 3 targets never seen in training, dropped" in told
    assert np.load(tmp_path / "ranks.npz")["user_ids"].tolist() == [0]


def test_models_of_both_protocols_need_a_decision(run_command, trained, log_file, tmp_path):
    model = BlossomRecForSequentialRecommendation.from_pretrained(trained[0])
    assert not model.config.exclude_seen
    model.config.repeat_share = 0.0
    model.save_pretrained(tmp_path / "other")
    BlossomRecTokenizer.from_pretrained(trained[0]).save_pretrained(tmp_path / "other")
    command = ("evaluate", "--models", trained[0], tmp_path / "other", "--data", log_file, "--output_dir", tmp_path)
    refused = run_command(*command, "--samples", 2, status=2, field="stderr")
    assert "differ in whether seen items are excluded; give --exclude_seen true or --exclude_seen false" in refused
    run_command(*command, "--samples", 2, "--exclude_seen", "false")
    reports = json.loads((tmp_path / "evaluation.json").read_text())["reports"]
    assert reports[str(trained[0])]["metrics"] == reports[str(tmp_path / "other")]["metrics"]


def test_what_cannot_be_compared_is_named(run_command, tmp_path):
    for folder, users, excluded in (("a", [0, 1], False), ("b", [0, 1, 2], False), ("d", [0, 1], True)):
        (tmp_path / folder).mkdir()
        ranks, common = np.arange(1.0, len(users) + 1), {"users": users, "user_ids": users, "exclude_seen": excluded}
        repeated = np.zeros(len(users), bool)
        np.savez(tmp_path / folder / "ranks.npz", **common, repeated=repeated, model=ranks, model_unseen=ranks)
    for arguments, status, words in (
        (("--reports", tmp_path / "c"), 2, "c has no ranks.npz; run blossomrec evaluate"),
        (("--reports", tmp_path / "a", tmp_path / "b"), 2, "b has other users than"),
        (("--reports", tmp_path / "a", tmp_path / "d"), 2, "excludes seen items; run blossomrec evaluate"),
        (("--reports", tmp_path / "a"), 2, "--second is other; the reports have model"),
    ):
        told = run_command(
            "compare", *arguments, "--first", "mod*", "--second", "other", status=status, field="stderr"
        )
        assert words in told and "Traceback" not in told
