import json

import numpy as np
import torch
from example_cases import SMALL_MODEL

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


def test_writes_a_program(run_command, tmp_path):
    model = BlossomRecForSequentialRecommendation(
        BlossomRecConfig(vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--output", tmp_path / "out" / "scorer.pt2")
    assert "it/s" not in run_command("export", *arguments, field="stderr")  # no bar where it cannot be drawn
    assert run_command("export", *arguments).startswith("Wrote")
    ids = torch.randint(2, 30, (3, 19))
    scores = torch.export.load(tmp_path / "out" / "scorer.pt2").module()(ids, torch.ones_like(ids))
    torch.testing.assert_close(scores[:, 2:], model(ids).logits[:, -1, 2:], rtol=0, atol=1e-4)
    error = run_command(
        "export", "--model", tmp_path / "model", "--output", tmp_path / "scorer.txt", status=2, field="stderr"
    )
    assert "--output" in error


def test_training_from_the_exported_file_gives_the_losses_and_ranks_of_the_folder(
    run_command, run_python, log_file, tmp_path
):
    folder, file = tmp_path / "data", tmp_path / "data.safetensors"
    (tmp_path / "titles.csv").write_text("item,title\n3,Three\n7,Seven\n")
    run_command("prepare", log_file, "--output_dir", folder, "--items", tmp_path / "titles.csv")
    assert run_command("export", "--data", folder, "--output", file).startswith(f"Wrote {file}")
    # As on a machine without these libraries: importing one of them fails.
    without = "import sys\nfor name in ('datasets', 'polars', 'pyarrow'):\n    sys.modules[name] = None\n"
    without += "from blossomrec_hf import batches, evaluation, model, training\n"
    without += "from blossomrec_hf.commands.train import main\nmain()\n"
    (tmp_path / "train.py").write_text(without)
    arguments = (*SMALL_MODEL, "--num_train_epochs", 3, "--logging_steps", 1, "--eval_negatives", 5)
    printed = run_command("train", *arguments, "--data", folder, "--output_dir", tmp_path / "a")
    others = run_python(tmp_path / "train.py", *arguments, "--data", file, "--output_dir", tmp_path / "b")
    measured = [metrics(tmp_path / name) for name in "ab"]
    assert measured[0] == measured[1] and len(measured[0]) > 5
    assert printed.splitlines()[3:] == others.splitlines()[3:]  # figures and recommendations
    for name in ("model.safetensors", "items.parquet", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    reports = []
    for data, model in ((folder, "a"), (file, "b")):
        run_command(
            "evaluate", "--data", data, "--models", tmp_path / model, "--output_dir", tmp_path / model / "eval"
        )
        reports.append(np.load(tmp_path / model / "eval" / "ranks.npz"))
    for one, other in zip(*(sorted(report) for report in reports), strict=True):
        np.testing.assert_array_equal(reports[0][one], reports[1][other])


def metrics(folder):
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "validation_seconds", "items_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
