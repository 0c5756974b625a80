"""The examples to read run as they are, here on a smaller log."""

import re
import runpy
from functools import partial

import pytest
from example_cases import REPOSITORY

from blossomrec_hf.data import generate_log


def test_quickstart_then_fine_tuning_with_trainer(tmp_path, monkeypatch, capsys):
    small = {"num_users": 100, "num_items": 60, "num_rings": 1, "min_history": 24, "max_history": 64}
    small |= {"num_genres": 6, "taste_length": 4, "drift_lag": 1, "return_probability": 0.4}
    monkeypatch.setattr("blossomrec_hf.data.generate_log", partial(generate_log, **small))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(REPOSITORY / "examples" / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"Recall@10 ([\d.]+)", printed)[1]) > 0.3  # ten of 59 items at random: 0.17
    assert (tmp_path / "runs" / "quickstart" / "model.safetensors").exists()
    runpy.run_path(str(REPOSITORY / "examples" / "trainer.py"), run_name="__main__")
    assert "'eval_ndcg@10'" in capsys.readouterr().out
    assert (tmp_path / "runs" / "trainer" / "tokenizer.json").exists()


def test_the_picture_of_the_mechanism_is_drawn(run_example, tmp_path):
    run_example("mechanism.py", tmp_path / "mechanism.png")
    assert (tmp_path / "mechanism.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["quickstart.py", "trainer.py", "train.py"])
def test_examples_to_read_are_short(name):
    assert len((REPOSITORY / "examples" / name).read_text("utf-8").splitlines()) <= 60
