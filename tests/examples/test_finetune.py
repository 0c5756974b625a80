import json

import pytest
import torch
from example_cases import write_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf.data import build_sequences, split
from blossomrec_hf.training import evaluate


@pytest.mark.parametrize("train_only", ["all", "embeddings"])
def test_new_items_are_learned_and_old_ones_kept(run_example, trained, tmp_path, train_only):
    new_log = write_log(tmp_path / "new.csv", num_users=60, num_items=75)
    printed = run_example(
        "finetune.py", "--model", trained[0], "--data", new_log, "--max_length", 20, "--output_dir", tmp_path / "run",
        "--num_train_epochs", 3, "--train_only", train_only, "--use_cpu", "true", "--per_device_train_batch_size", 8,
    )  # fmt: skip
    assert "15 new items; the catalogue now holds 75." in printed

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    old_tokenizer, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (trained[0], tmp_path / "run"))
    assert old_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items()
    assert after.config.vocab_size == len(tokenizer) == 77
    frozen = torch.equal(before.model.layers[0].up_proj.weight, after.model.layers[0].up_proj.weight)
    assert frozen == (train_only == "embeddings")
    assert not torch.equal(before.model.item_embedding.weight[2:62], after.model.item_embedding.weight[2:62])

    dataset, _ = build_sequences(new_log, tokenizer=tokenizer)
    expected = evaluate(after, split(dataset, "test"), max_length=20, progress=False)
    figures = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert {name: figures[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
