"""The targets of a step: events of weight 0 are read, but not predicted, in the loop and in `Trainer`."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_cases import make_model
from transformers import TrainingArguments

from blossomrec_hf.batches import PackingCollator
from blossomrec_hf.data import EventTable, split
from blossomrec_hf.training import LoopArguments, SequentialRecommendationTrainer, TrainingLoop


def weighted(log, seed: int, share: float = 0.6) -> Dataset:
    """The data set with a weight of 0 for some events, drawn, and of 1 for the others."""
    rng = np.random.default_rng(seed)
    weights = [(rng.random(len(items)) < share).astype(np.float32) for items in log[0]["input_ids"]]
    return log[0].add_column("weights", weights)


def exact_model():
    torch.manual_seed(1)
    return make_model(hidden_dropout_prob=0.0).double()


def losses(dataset, folder, **changes) -> list[float]:
    """The loss of each step of one epoch of the loop."""
    args = LoopArguments(
        output_dir=str(folder), max_length=20, num_train_epochs=1, tokens_per_step=200, logging_steps=1, **changes
    )
    loop = TrainingLoop(exact_model(), split(dataset, "train"), args=args)
    loop.run()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_by_hand(model, rows: list[dict]) -> tuple[float, int]:
    """The summed loss of the targets, and their number."""
    total, number = 0.0, 0
    for row in rows:
        ids = torch.tensor(np.array(row["input_ids"], np.int64)[None])
        is_target = torch.tensor(np.array(row["weights"][1:])) > 0
        logits = model.eval()(ids).logits[0, :-1, 2:]
        of_targets = torch.nn.functional.cross_entropy(logits, ids[0, 1:] - 2, reduction="none")[is_target]
        total, number = total + of_targets.sum().item(), number + int(is_target.sum())
    return total, number


@pytest.mark.parametrize("source", [lambda dataset: dataset, EventTable.from_dataset])
def test_the_loss_is_the_mean_over_events_of_weight_above_0(log, tmp_path, seed, source):
    dataset = source(weighted(log, seed))
    view = split(dataset, "train", max_length=20)
    args = LoopArguments(output_dir=str(tmp_path), max_length=20, tokens_per_step=200, max_steps=1, logging_steps=1)
    loop = TrainingLoop(exact_model(), split(dataset, "train"), args=args)
    with torch.no_grad():
        total, number = loss_by_hand(loop.bare_model, [view[int(row)] for row in loop.plan.epoch_steps(0)[0]])
    loop.run()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(total / number, rel=1e-5)


def test_accumulation_counts_the_targets_of_the_whole_step(log, tmp_path, seed):
    dataset = weighted(log, seed)
    whole = losses(dataset, tmp_path / "whole")
    parts = losses(dataset, tmp_path / "parts", gradient_accumulation_steps=3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_weights_of_1_change_nothing(log, tmp_path, seed):
    assert losses(weighted(log, seed, share=1), tmp_path / "ones") == losses(log[0], tmp_path / "none")


def test_the_trainer_has_the_same_targets(log, tmp_path, seed):
    dataset, model = weighted(log, seed), exact_model()
    rows = split(dataset, "train", max_length=20)
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=30, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SequentialRecommendationTrainer(model, args, data_collator=PackingCollator(20), train_dataset=rows)
    with torch.no_grad():
        read = [row for batch in trainer.get_train_dataloader() for row in _histories(batch)]
        total, number = loss_by_hand(model, list(rows))
    assert len(read) == len(rows) <= 60
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / number, abs=1e-4)


def _histories(batch) -> list[list[int]]:
    assert "weights" not in batch  # their effect is in the labels
    return batch["input_ids"][0].tensor_split(batch["cu_seq_lens_q"][1:-1].long())


def test_other_weights_are_refused(log, tmp_path, seed):
    halved = log[0].add_column("weights", [[0.5] * len(items) for items in log[0]["input_ids"]])
    with pytest.raises(ValueError, match="`weights` has the value 0.5, .* prepare the log with `targets`"):
        losses(halved, tmp_path)
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = SequentialRecommendationTrainer(exact_model(), args, train_dataset=split(halved, "train"))
    with pytest.raises(ValueError, match="`weights` has the value 0.5"):
        trainer.train()
