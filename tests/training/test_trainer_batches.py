"""What `SequentialRecommendationTrainer` gives the model: packed histories, each once per epoch, on any number of processes."""

import json
import os

import pytest
import torch
from forked_commands import run_in_fork
from small_cases import make_model
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from blossomrec_hf.batches import HistoryDataLoader, HistoryStore, HistoryWindows, PackingCollator, PaddingCollator
from blossomrec_hf.data import split
from blossomrec_hf.evaluation import evaluate
from blossomrec_hf.training import SequentialRecommendationTrainer


def arguments(folder, **changes) -> TrainingArguments:
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(folder), **{**settings, "per_device_train_batch_size": 7, **changes})


class Watching(SequentialRecommendationTrainer):
    """Notes the histories, the count of targets and the loss of each batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = (loss[0] if return_outputs else loss).item()
        self.__dict__.setdefault("watched", []).append((inputs, int(num_items_in_batch), value))
        return loss


def histories(inputs: dict) -> list[list[int]]:
    """The histories of a packed or padded batch, without fill."""
    ids = inputs["input_ids"]
    if "cu_seq_lens_q" in inputs:
        offsets = inputs["cu_seq_lens_q"].tolist()
        rows = [ids[0, start:stop].tolist() for start, stop in zip(offsets, offsets[1:])]
    else:
        rows = [row[mask.bool()].tolist() for row, mask in zip(ids, inputs["attention_mask"])]
    return [row for row in rows if any(row)]


def rows_of(log, max_length: int) -> list[list[int]]:
    return sorted(row["input_ids"] for row in split(log[0], "train", max_length=max_length))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_tokens", [None, 90])
def test_every_history_once_per_epoch_and_each_step_divided_by_its_targets(log, tmp_path, max_tokens, accumulation):
    trainer = Watching(
        make_model(),
        arguments(tmp_path, num_train_epochs=2, gradient_accumulation_steps=accumulation),
        data_collator=PackingCollator(12, max_tokens=max_tokens),
        train_dataset=split(log[0], "train"),
    )
    trainer.train()
    steps = len(trainer.watched) // 2
    for watched in (trainer.watched[:steps], trainer.watched[steps:]):
        assert sorted(row for inputs, *_ in watched for row in histories(inputs)) == rows_of(log, 12)
        for first in range(0, steps, accumulation):
            step = watched[first : first + accumulation]
            targets = sum(int((inputs["labels"] != -100).sum()) for inputs, *_ in step)
            assert [counted for _, counted, _ in step] == [targets] * len(step)
    sizes = [len(histories(inputs)) for inputs, *_ in trainer.watched[:steps]]
    if max_tokens is None:
        assert sizes == [7] * (60 // 7) + [60 % 7]
    else:
        assert {tuple(inputs["input_ids"].shape) for inputs, *_ in trainer.watched} == {(1, 90)}
    assert trainer.watched[0][0]["input_ids"].tolist() != trainer.watched[steps][0]["input_ids"].tolist()


def test_the_loss_of_a_batch_is_that_of_the_padded_batch(log, tmp_path):
    """The same histories in the same order, with the same gradients: in float64, to the last digits."""
    losses, weights = [], []
    for collator in (PackingCollator(15), PaddingCollator(15), PaddingCollator(15, "left")):
        torch.manual_seed(3)
        model = make_model(hidden_dropout_prob=0.0).double()
        trainer = Watching(
            model, arguments(tmp_path, max_steps=12), data_collator=collator, train_dataset=split(log[0], "train")
        )
        trainer.train()
        losses.append([loss for *_, loss in trainer.watched])
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        kind = "cu_seq_lens_q" if isinstance(collator, PackingCollator) else "attention_mask"
        assert all(kind in inputs for inputs, *_ in trainer.watched)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0] == pytest.approx(losses[2], abs=1e-6)
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_packing_is_the_default_and_another_train_dataset_is_read(log, tmp_path):
    trainer = Watching(make_model(), arguments(tmp_path, max_steps=1), train_dataset=split(log[0], "train"))
    trainer.train()
    ((inputs, *_),) = trainer.watched
    assert len(histories(inputs)) == 7 and inputs["input_ids"].shape[0] == 1
    trainer.train_dataset = [{"input_ids": [5, 6, 7]}] * 7
    trainer.train()
    assert histories(trainer.watched[1][0]) == [[5, 6, 7]] * 7


@pytest.mark.parametrize("window", ["latest", "overlapping", "random_crop"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_resumed_inside_an_epoch_ends_with_the_same_weights(log, tmp_path, window, accumulation):
    def train(stop: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = make_model(hidden_dropout_prob=0.2)
        steps = {"save_strategy": "steps", "save_steps": 7, "gradient_accumulation_steps": accumulation}
        trainer = SequentialRecommendationTrainer(
            model,
            arguments(tmp_path, max_steps=14, **steps, per_device_train_batch_size=9, lr_scheduler_type="constant"),
            train_dataset=HistoryWindows(log[0], 9, window=window, seed=1),
        )
        trainer.train(resume_from_checkpoint=None if stop is None else f"{tmp_path}/checkpoint-{stop}")
        return [parameter.detach().clone() for parameter in model.parameters()]

    whole, resumed = train(None), train(7)
    assert all(map(torch.equal, whole, resumed))


def test_the_epoch_is_set_before_a_resumed_epoch_drops_its_first_batches(log, tmp_path):
    """`Trainer` of older `transformers` sets it on what is left of the loader only."""
    trainer = SequentialRecommendationTrainer(make_model(), arguments(tmp_path), train_dataset=split(log[0], "train"))
    loader = trainer.callback_handler.train_dataloader = trainer.get_train_dataloader()
    trainer.state.epoch = 2 + 5 / 7
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    found = [histories(batch) for batch in loader]
    loader.set_epoch(2)
    assert found == [histories(batch) for batch in loader]
    loader.set_epoch(0)
    assert found != [histories(batch) for batch in loader]


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_random_crops_change_from_epoch_to_epoch(log, tmp_path, workers):
    windows = HistoryWindows(log[0], 6, window="random_crop")
    trainer = Watching(make_model(), arguments(tmp_path, num_train_epochs=2, **workers), train_dataset=windows)
    trainer.train()
    steps = len(trainer.watched) // 2
    epochs = [
        sorted(row for inputs, *_ in part for row in histories(inputs))
        for part in (trainer.watched[:steps], trainer.watched[steps:])
    ]
    for epoch, found in enumerate(epochs):
        windows.set_epoch(epoch)
        assert found == sorted(windows[n]["input_ids"].tolist() for n in range(len(windows)))
    assert epochs[0] != epochs[1]


class Stream(IterableDataset):
    """Rows that are read in order, as from the Hub."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_is_packed_too(log, tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in split(log[0], "train")]
    trainer = Watching(make_model(), arguments(tmp_path, max_steps=9), train_dataset=Stream(rows))
    trainer.train()
    found = [row for inputs, *_ in trainer.watched for row in histories(inputs)]
    assert found == [row["input_ids"] for row in rows]
    assert all("cu_seq_lens_q" in inputs for inputs, *_ in trainer.watched)


class LongestFirst(Watching):
    def _get_train_sampler(self, train_dataset=None):
        return sorted(range(len(self.train_dataset)), key=lambda row: -len(self.train_dataset[row]["input_ids"]))


def test_collators_samplers_and_strategies_of_the_user_are_respected(log, tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in split(log[0], "train")]
    foreign = Watching(
        make_model(),
        arguments(tmp_path, num_train_epochs=1),
        data_collator=DataCollatorWithFlattening(),
        train_dataset=rows,
    )
    assert not isinstance(foreign.get_train_dataloader(), HistoryDataLoader)
    foreign.train()
    found = [inputs["input_ids"].flatten().tolist() for inputs, *_ in foreign.watched]
    assert sorted(sum(found, [])) == sorted(sum((row["input_ids"] for row in rows), []))

    longest_first = LongestFirst(make_model(), arguments(tmp_path, num_train_epochs=1), train_dataset=rows)
    longest_first.train()
    lengths = [len(row) for inputs, *_ in longest_first.watched for row in histories(inputs)]
    assert lengths == sorted((len(row["input_ids"]) for row in rows), reverse=True)

    in_order = Watching(
        make_model(),
        arguments(tmp_path, num_train_epochs=1, train_sampling_strategy="sequential"),
        train_dataset=HistoryStore.from_rows(rows),
    )
    in_order.train()
    assert [row for inputs, *_ in in_order.watched for row in histories(inputs)] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize(
    "collator", [DataCollatorWithFlattening(), PaddingCollator(), PackingCollator(max_tokens=500)]
)
def test_items_are_ranked_whatever_the_collator_of_the_training(log, tmp_path, collator):
    model, view = make_model(), split(log[0], "test")
    expected = evaluate(model, view, progress=False)
    trainer = SequentialRecommendationTrainer(model, arguments(tmp_path), collator, eval_dataset=view)
    figures = trainer.evaluate()
    assert {name: figures[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    predicted = trainer.predict(view)
    assert predicted.predictions.shape == (len(view), 1, 4) and predicted.label_ids.shape == (len(view), 1)
    assert {name: predicted.metrics[f"test_{name}"] for name in expected} == pytest.approx(expected)


def test_histories_without_items_to_predict_have_a_loss(log, tmp_path):
    """The mean over batches, as `Trainer` computes it, for packed as for padded batches."""
    model, view = make_model(), split(log[0], "train")
    losses = [
        trainer_class(
            model,
            arguments(tmp_path),
            data_collator=collator,
            eval_dataset=[{"input_ids": row["input_ids"]} for row in view],
        ).evaluate()["eval_loss"]
        for trainer_class in (SequentialRecommendationTrainer, Trainer)
        for collator in (PackingCollator(), PaddingCollator())
    ]
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


def test_without_processes_of_their_own_several_gpus_are_reported(log, tmp_path, caplog):
    settings = arguments(tmp_path)
    settings._n_gpu = 4
    trainer = SequentialRecommendationTrainer(make_model(), settings, train_dataset=split(log[0], "train"))
    assert "trains on one of 4 GPUs. Start with `accelerate launch`" in caplog.text
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 7


SCRIPT = """
import json
import sys
import torch
from small_cases import make_model, small_log
from test_trainer_batches import Watching, arguments, histories
from blossomrec_hf.batches import PackingCollator
from blossomrec_hf.data import build_sequences, split

folder, batch_size, max_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
torch.set_num_threads(1)
torch.manual_seed(1)
model = make_model(hidden_dropout_prob=0.0).double()
dataset, _ = build_sequences(small_log())
trainer = Watching(
    model,
    arguments(folder, num_train_epochs=2, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2),
    data_collator=PackingCollator(12, max_tokens=max_tokens),
    train_dataset=split(dataset, "train"),
    eval_dataset=split(dataset, "test"),
)
trainer.train()
found = {
    "batches": [histories(inputs) for inputs, *_ in trainer.watched],
    "targets": [targets for _, targets, _ in trainer.watched],
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "metrics": {k: v for k, v in trainer.evaluate().items() if "@" in k},
    "weights": sum(parameter.detach().abs().sum().item() for parameter in model.parameters()),
}
json.dump(found, open(f"{folder}/{trainer.args.process_index}-of-{trainer.args.world_size}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [0, 90])
def test_two_processes_share_an_epoch_and_train_as_one(log, tmp_path, max_tokens):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for processes, batch_size in ((0, 8), (2, 4)):
        settings = [str(tmp_path), str(batch_size), str(max_tokens)]
        done = run_in_fork(script, settings, dict(os.environ), tmp_path, num_processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads((tmp_path / "0-of-1.json").read_text())
    ranks = [json.loads((tmp_path / f"{rank}-of-2.json").read_text()) for rank in range(2)]
    steps = len(ranks[0]["batches"]) // 2
    assert len(ranks[1]["batches"]) == 2 * steps
    for epoch in (slice(0, steps), slice(steps, None)):
        found = [row for rank in ranks for batch in rank["batches"][epoch] for row in batch]
        assert sorted(found) == rows_of(log, 12)
    assert ranks[0]["targets"] == ranks[1]["targets"]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    if not max_tokens:  # the same histories per step
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=1e-4)  # as `Trainer` rounds them
        assert ranks[0]["weights"] == pytest.approx(alone["weights"], rel=1e-9)
        assert ranks[0]["metrics"] == pytest.approx(alone["metrics"])


def test_packed_steps_with_a_token_budget_are_compiled_once(log, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_BACKEND", "no"
    )  # which the arguments set, and which must not reach other tests
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        args = TrainingArguments(
            tmp_path / "out",
            max_steps=6,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            **options,
        )
        trainer = SequentialRecommendationTrainer(
            make_model(hidden_dropout_prob=0.0),
            args,
            data_collator=PackingCollator(20, max_tokens=300),
            train_dataset=split(log[0], "train"),
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
