import json

import pytest
import torch
from checkpoint_cases import same_weights
from example_cases import SMALL_MODEL
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def test_a_trained_model_is_pushed_with_its_card(local_hub, run_command, trained):
    folder, _, results_file = trained
    printed = run_command("push", "--folder", folder, "--repo_id", "ada/ring", "--private")
    repository = local_hub.repository("ada/ring")
    assert repository.refs["refs/heads/main"] in printed and repository.private
    assert same_weights(AutoModelForCausalLM.from_pretrained("ada/ring"), AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained("ada/ring")
    assert torch.equal(
        tokenizer([[1, 2]], return_tensors="pt").input_ids, torch.tensor([tokenizer.encode_items([1, 2])])
    )

    card = ModelCard.load("ada/ring")
    figures = next(run["test"] for run in json.loads(results_file.read_text()) if run["seed"] == 42)
    told = {(result.dataset_config.split(";")[0], result.metric_type): result for result in card.data.eval_results}
    ranked = told["leave-one-out, all items ranked, nothing masked", "ndcg@10"]  # users of the ring repeat items
    assert ranked.metric_value == pytest.approx(figures["ndcg@10"], abs=1e-6)
    assert ranked.dataset_name == "log.csv"
    assert "blossomrec train --recipe none --data log.csv" in card.text


def test_train_pushes_at_the_end_and_asks_for_the_token_before(
    local_hub, run_command, log_file, tmp_path, monkeypatch
):
    arguments = (*SMALL_MODEL, "--data", log_file, "--num_train_epochs", 1, "--push_to_hub", "--hub_private_repo")
    arguments += ("--hub_model_id", "ada/short", "--output_dir")
    printed = run_command("train", *arguments, tmp_path / "run")
    repository = local_hub.repository("ada/short")
    assert repository.private and repository.refs["refs/heads/main"] in printed
    assert {"README.md", "training_summary.json", "tokenizer.json", "model.safetensors"} <= set(repository.head.files)

    monkeypatch.delenv("HF_TOKEN")
    push = ("--folder", tmp_path / "run", "--repo_id", "ada/short")
    error = run_command("push", *push, status=2, field="stderr")
    assert error.splitlines()[-1].startswith("Cannot push to ada/short: no valid token was found; ")
    assert "Traceback" not in error
    error = run_command("train", *arguments, tmp_path / "again", status=2, field="stderr")
    assert error.splitlines()[-1].startswith("Cannot push to ada/short: no valid token was found; ")
    assert "hf auth login" in error and "Traceback" not in error and not (tmp_path / "again").exists()
