"""The targets of a step and their weights, in the loop and in `Trainer`: events of weight 0 are read, but not predicted."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_cases import make_model
from transformers import TrainingArguments

from blossomrec_hf.batches import HistoryWindows, PackingCollator, PaddingCollator
from blossomrec_hf.data import EventTable, split, split_by_leave_one_out
from blossomrec_hf.training import LoopArguments, SequentialRecommendationTrainer, TrainingLoop


def weighted(log, seed: int, share: float = 0.6, values=(1.0,)) -> Dataset:
    """The data set with a weight of 0 for some events, drawn, and with one of `values` for the others."""
    rng = np.random.default_rng(seed)
    weights = [
        ((rng.random(len(items)) < share) * rng.choice(values, len(items))).astype(np.float32)
        for items in log[0]["input_ids"]
    ]
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
    """The weighted sum of the losses of the targets, and their number."""
    total, number = 0.0, 0
    for row in rows:
        ids = torch.tensor(np.array(row["input_ids"], np.int64)[None])
        weights = torch.tensor(np.array(row["weights"][1:]))
        logits = model.eval()(ids).logits[0, :-1, 2:]
        of_targets = torch.nn.functional.cross_entropy(logits, ids[0, 1:] - 2, reduction="none")
        total, number = total + (of_targets * weights).sum().item(), number + int((weights > 0).sum())
    return total, number


@pytest.mark.parametrize("warmup_steps, max_steps", [(3, 3), (100, 3), (2, 3), (0, 3)])
def test_a_warmup_as_long_as_the_run_is_reported(log, tmp_path, caplog, warmup_steps, max_steps):
    args = LoopArguments(
        str(tmp_path), max_length=20, tokens_per_step=200, max_steps=max_steps, warmup_steps=warmup_steps
    )
    TrainingLoop(exact_model(), split(log[0], "train"), args=args)
    said = f"`warmup_steps` is {warmup_steps} and the run has {max_steps} steps"
    assert any(said in message for message in caplog.messages) == (warmup_steps >= max_steps)


VALUES = [(1.0,), (0.25, 1.0, 3.0)]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("source", [lambda dataset: dataset, EventTable.from_dataset])
def test_the_loss_is_the_weighted_mean_over_events_of_weight_above_0(log, tmp_path, seed, source, values):
    dataset = source(weighted(log, seed, values=values))
    view = split(dataset, "train", max_length=20)
    args = LoopArguments(output_dir=str(tmp_path), max_length=20, tokens_per_step=200, max_steps=1, logging_steps=1)
    loop = TrainingLoop(exact_model(), split(dataset, "train"), args=args)
    with torch.no_grad():
        total, number = loss_by_hand(loop.bare_model, [view[int(row)] for row in loop.plan.epoch_steps(0)[0]])
    loop.run()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(total / number, rel=1e-5)


@pytest.mark.parametrize("values", VALUES)
def test_accumulation_counts_the_targets_of_the_whole_step(log, tmp_path, seed, values):
    dataset = weighted(log, seed, values=values)
    whole = losses(dataset, tmp_path / "whole")
    parts = losses(dataset, tmp_path / "parts", gradient_accumulation_steps=3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_weights_of_1_change_nothing(log, tmp_path, seed):
    assert losses(weighted(log, seed, share=1), tmp_path / "ones") == losses(log[0], tmp_path / "none")


@pytest.mark.parametrize("values", VALUES)
def test_the_trainer_has_the_same_targets(log, tmp_path, seed, values):
    dataset, model = weighted(log, seed, values=values), exact_model()
    rows = split(dataset, "train", max_length=20)
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=30, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SequentialRecommendationTrainer(model, args, data_collator=PackingCollator(20), train_dataset=rows)
    with torch.no_grad():
        batches = list(trainer.get_train_dataloader())
        # Weights of 0 and 1 are in the labels alone.
        assert all(("weights" in batch) == (values != (1.0,)) for batch in batches)
        read = [row for batch in batches for row in _histories(batch)]
        total, number = loss_by_hand(model, list(rows))
    assert len(read) == len(rows) <= 60
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / number, abs=1e-4)


def _histories(batch) -> list[list[int]]:
    return batch["input_ids"][0].tensor_split(batch["cu_seq_lens_q"][1:-1].long())


def test_a_weight_below_0_is_refused(log, tmp_path):
    negative = log[0].add_column("weights", [[-0.5, *[1.0] * (len(items) - 1)] for items in log[0]["input_ids"]])
    with pytest.raises(ValueError, match="`weights` has the value -0.5; weights of events may be 0 or more"):
        losses(negative, tmp_path)


def in_baskets(log, seed: int) -> Dataset:
    """The data set with random baskets, held out as a whole."""
    rng = np.random.default_rng(seed)
    starts = [[True, *(rng.random(len(items) - 1) < 0.5)] for items in log[0]["input_ids"]]
    return split_by_leave_one_out(log[0].add_column("basket_starts", starts))


@pytest.mark.parametrize("windows", ["latest", "overlapping"])
def test_baskets_in_the_loop_and_in_the_trainer(log, tmp_path, seed, windows):
    """The same model, loss and gradients' sum: one epoch in one step, whole and accumulated, in the loop and in `Trainer`."""
    dataset = in_baskets(log, seed)
    rows = [
        {"input_ids": row["input_ids"][: row["train_end"]], "basket_starts": row["basket_starts"][: row["train_end"]]}
        for row in dataset
        if row["train_end"]
    ]
    with torch.no_grad():
        total, number = basket_loss_by_hand(exact_model(), rows)
    # Where no history is longer than a window, windows are histories.
    options = {
        "max_length": 50,
        "tokens_per_step": 10**6,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "windows": windows,
    }
    for parts in (1, 3):
        folder = tmp_path / f"loop{parts}"
        args = LoopArguments(output_dir=str(folder), gradient_accumulation_steps=parts, **options)
        TrainingLoop(exact_model(), split(dataset, "train"), split(dataset, "validation"), args=args).run()
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert line["loss"] == pytest.approx(total / number, rel=1e-5)
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=30, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    source = split(dataset, "train") if windows == "latest" else HistoryWindows(dataset, 50, window=windows)
    for collate in (PackingCollator(50), PaddingCollator(50, "left")):
        trainer = SequentialRecommendationTrainer(exact_model(), args, data_collator=collate, train_dataset=source)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(total / number, abs=1e-4)


def basket_loss_by_hand(model, rows: list[dict]) -> tuple[float, int]:
    total, number = 0.0, 0
    for row in rows:
        ids, begin = torch.tensor(row["input_ids"]), 0
        log_probs = model.eval()(ids[None]).logits[0, :, 2:].log_softmax(-1)
        for place, start in enumerate(row["basket_starts"]):
            begin = place if start else begin
            if begin:
                total, number = total - log_probs[begin - 1, ids[place] - 2].item(), number + 1
    return total, number


def test_a_held_out_basket_is_ranked_from_the_events_before_it(log, seed):
    dataset = in_baskets(log, seed)
    for part, end in (("validation", "train_end"), ("test", "validation_end")):
        rows = {row["user_id"]: row for row in dataset}
        for view in split(dataset, part):
            row = rows[view["user_id"]]
            basket = [n for n, start in enumerate(row["basket_starts"]) if start] + [len(row["input_ids"])]
            assert row[end] in basket and len(view["input_ids"]) == row[end]
            following = basket[basket.index(row[end]) + 1]
            assert view["target_ids"] == row["input_ids"][row[end] : following]
