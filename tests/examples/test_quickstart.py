"""The examples to read run as they are."""

import re

import pytest
from example_cases import REPOSITORY


@pytest.mark.slow
def test_quickstart_then_fine_tuning_with_trainer(run_example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_example("quickstart.py")
    assert float(re.search(r"Recall@10 ([\d.]+)", printed)[1]) > 0.3  # ten of 239 items at random: 0.04
    assert (tmp_path / "runs" / "quickstart" / "model.safetensors").exists()
    printed = run_example("trainer.py")
    assert "'eval_ndcg@10'" in printed
    assert (tmp_path / "runs" / "trainer" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["quickstart.py", "trainer.py", "train.py"])
def test_examples_to_read_are_short(name):
    assert len((REPOSITORY / "examples" / name).read_text("utf-8").splitlines()) <= 60
