"""`Trainer.push_to_hub` through a Hub on loopback."""

import pytest
from checkpoint_cases import same_weights
from huggingface_hub import ModelCard
from small_cases import make_model
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.trainer_utils import HubStrategy

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.batches import PackingCollator
from blossomrec_hf.data import split
from blossomrec_hf.training import SequentialRecommendationTrainer


@pytest.fixture
def trainer(log, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    dataset, tokenizer = log
    return SequentialRecommendationTrainer(
        make_model(),
        TrainingArguments(tmp_path / "out", max_steps=2, report_to="none", use_cpu=True, save_strategy="no"),
        data_collator=PackingCollator(max_length=20),
        train_dataset=split(dataset, "train"),
        eval_dataset=split(dataset, "validation"),
        processing_class=tokenizer,
    )


def test_model_tokenizer_card_and_summary_in_one_commit(local_hub, trainer, log):
    trainer.train()
    figures = trainer.evaluate(split(log[0], "test"), metric_key_prefix="test")
    pushed = trainer.push_to_hub(private=True, dataset="a ring")
    repository = local_hub.repository("ada/out")
    assert repository.private and len(repository.commits) == 2 and pushed.oid in repository.commits
    assert {"tokenizer.json", "training_summary.json", "README.md"} <= set(repository.head.files)
    assert "training_args.bin" not in repository.head.files
    assert same_weights(AutoModelForCausalLM.from_pretrained("ada/out"), trainer.model.cpu())
    card = ModelCard.load("ada/out")
    # Users of the ring repeat items, so nothing is masked.
    told = {
        result.metric_type: result
        for result in card.data.eval_results
        if result.dataset_args["protocol"].endswith("nothing masked")
    }
    assert told["recall@10"].metric_value == pytest.approx(figures["test_recall@10"], abs=1e-6)
    assert told["recall@10"].dataset_name == "a ring" and told["recall@10"].dataset_split == "test"
    assert "`transformers.Trainer`" in card.text and "examples/train.py" not in card.text

    proposed = trainer.push_to_hub(create_pr=True, blocking=False).result()
    assert proposed.oid == pushed.oid or proposed.pr_url


def test_what_is_pushed_while_training_is_the_model_alone(local_hub, trainer, log, tmp_path):
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=2, save_steps=1, report_to="none", use_cpu=True, push_to_hub=True,
        hub_model_id="ada/rec",
    )  # fmt: skip
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "credentials.json").write_text("{}")
    views = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    SequentialRecommendationTrainer(make_model(), arguments, processing_class=log[1], **views).train()
    commits = list(local_hub.repository("ada/rec").commits.values())
    assert {f"Training in progress, step {step}" for step in (1, 2)} <= {commit.title for commit in commits}
    files = set().union(*(commit.files for commit in commits))
    assert {"model.safetensors", "tokenizer.json", "checkpoint_manifest.json"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pth")) or "credentials" in name}
    arguments.hub_strategy = HubStrategy.CHECKPOINT
    with pytest.raises(ValueError, match="hub_strategy"):
        SequentialRecommendationTrainer(make_model(), arguments, processing_class=log[1], **views)


def test_training_continues_if_the_hub_cannot_be_reached(local_hub, trainer, log, tmp_path, caplog):
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=2, save_steps=1, report_to="none", use_cpu=True, push_to_hub=True,
        hub_model_id="ada/rec",
    )  # fmt: skip
    views = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    running = SequentialRecommendationTrainer(make_model(), arguments, processing_class=log[1], **views)
    local_hub.fail("drop", path="/commit/")
    running.train()
    assert "The model of step 1 was not uploaded; training continues." in caplog.text
    titles = {commit.title for commit in local_hub.repository("ada/rec").commits.values()}
    assert "Training in progress, step 2" in titles and "Training in progress, step 1" not in titles


def test_a_missing_token_is_reported_before_training(local_hub, log, tmp_path, monkeypatch):
    arguments = {"report_to": "none", "use_cpu": True, "push_to_hub": True, "hub_model_id": "ada/later"}
    tokenizer = {"processing_class": log[1]}

    def start() -> SequentialRecommendationTrainer:
        return SequentialRecommendationTrainer(
            make_model(), TrainingArguments(tmp_path / "out", **arguments), **tokenizer
        )

    with pytest.raises(PermissionError, match="Cannot push to ada/later: no valid token was found; .*hf auth login"):
        start()
    assert not local_hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert start().hub_model_id == "ada/later" and local_hub.repository("ada/later")
    for other in (None, BlossomRecTokenizer.from_items([1, 2, 3])):
        tokenizer["processing_class"] = other
        with pytest.raises(ValueError, match="processing_class"):
            start()


def test_without_a_tokenizer_nothing_is_pushed(local_hub, trainer):
    trainer.processing_class = None
    with pytest.raises(ValueError, match="processing_class"):
        trainer.push_to_hub()
    assert not local_hub.repositories
