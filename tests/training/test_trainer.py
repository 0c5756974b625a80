import logging

import pytest
import torch
from checkpoint_cases import small_tokenizer
from small_cases import make_model
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import PackingCollator, PaddingCollator
from blossomrec_hf.data import split
from blossomrec_hf.evaluation import evaluate
from blossomrec_hf.model import packing_blossomrec
from blossomrec_hf.training import (
    LogLinesCallback,
    LoopArguments,
    SequentialRecommendationTrainer,
    TrainingLoop,
)
from blossomrec_hf.utils import progress


def training_arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 7,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


@pytest.mark.parametrize("max_length", [None, 6])
def test_figures_are_those_of_evaluate(log, tmp_path, max_length):
    model = make_model()
    view = split(log[0], "test")
    trainer = SequentialRecommendationTrainer(
        model, training_arguments(tmp_path), data_collator=PackingCollator(max_length=max_length), eval_dataset=view
    )
    figures = trainer.evaluate()
    expected = evaluate(model, view, max_length=max_length, progress=False)
    assert {name: figures[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert "eval_loss" not in figures


def test_a_plain_trainer_that_removes_columns_names_the_remedy(log, tmp_path):
    args = training_arguments(tmp_path, remove_unused_columns=True)
    trainer = Trainer(make_model(), args, data_collator=PackingCollator(), train_dataset=split(log[0], "train"))
    with pytest.raises(
        ValueError, match="set `remove_unused_columns=False`, or use `SequentialRecommendationTrainer`"
    ):
        trainer.train()


def test_several_items_to_predict(tmp_path):
    model = make_model(40)
    rows = [
        {"user_id": 0, "input_ids": [2, 3, 4], "target_ids": [5], "seen_ids": [9, 2, 3, 4]},
        {"user_id": 1, "input_ids": [], "target_ids": [7, 8, 7], "seen_ids": []},
        {"user_id": 2, "input_ids": [5, 6], "target_ids": [5, 1, 20], "seen_ids": [5, 6]},
    ]
    arguments = training_arguments(tmp_path, per_device_eval_batch_size=2)
    figures = SequentialRecommendationTrainer(model, arguments, eval_dataset=rows).evaluate()
    expected = evaluate(model, rows, progress=False)
    assert {name: figures[f"eval_{name}"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("trainer_class", [Trainer, SequentialRecommendationTrainer])
def test_the_loss_is_divided_by_the_targets_of_all_accumulated_batches(log, tmp_path, trainer_class):
    class Watching(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            watched.append((inputs, int(num_items_in_batch)))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    watched = []
    arguments = training_arguments(tmp_path, gradient_accumulation_steps=3, logging_steps=1, learning_rate=1e-12)
    model = make_model(hidden_dropout_prob=0.0)
    rows = list(split(log[0], "train", max_length=20))
    rows[3]["input_ids"][2] = 1  # an unknown item is no target
    trainer = Watching(model, arguments, train_dataset=rows, data_collator=PaddingCollator())
    trainer.train()

    assert len(watched) == 12
    for start in range(0, 12, 3):
        step = watched[start : start + 3]
        histories = [ids[ids > 0] for inputs, _ in step for ids in inputs["input_ids"]]
        targets = sum(int((ids[1:] > 1).sum()) for ids in histories)
        assert [counted for _, counted in step] == [targets] * 3
        total = 0.0
        with torch.no_grad():
            for ids in histories:
                loss = model.eval()(ids[None], labels=ids[None]).loss.item()
                total += loss * int((ids[1:] > 1).sum())
        logged = trainer.state.log_history[start // 3]["loss"]
        assert logged == pytest.approx(total / targets, abs=1e-3)


def test_trains_to_the_best_and_saves_it(log, tmp_path):
    torch.manual_seed(1)
    arguments = training_arguments(
        tmp_path,
        num_train_epochs=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="ndcg@10",
    )
    model = make_model(hidden_dropout_prob=0.0)
    view = split(log[0], "validation")
    before = evaluate(model, view, progress=False)["ndcg@10"]
    trainer = SequentialRecommendationTrainer(
        model, arguments, train_dataset=split(log[0], "train"), eval_dataset=view
    )
    trainer.train()
    assert trainer.state.best_metric > before + 0.1
    assert evaluate(trainer.model, view, progress=False)["ndcg@10"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.parametrize(("steps", "named"), [(-1, {"num_train_epochs": 1}), (3, {"max_steps": 3})])
def test_the_summary_names_what_bounded_the_training(log, tmp_path, steps, named):
    """`Trainer` ignores `num_train_epochs` if `max_steps` is given."""
    args = training_arguments(tmp_path, max_steps=steps)
    trainer = SequentialRecommendationTrainer(make_model(), args, train_dataset=split(log[0], "train"))
    configuration = trainer.training_summary()["configuration"]
    assert {name: configuration[name] for name in ("num_train_epochs", "max_steps") if name in configuration} == named


def test_without_a_terminal_log_lines_take_the_place_of_bars(log, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="blossomrec_hf")
    trainer = SequentialRecommendationTrainer(
        make_model(),
        training_arguments(tmp_path, num_train_epochs=2, eval_strategy="epoch", metric_for_best_model="ndcg@10"),
        train_dataset=split(log[0], "train"),
        eval_dataset=split(log[0], "validation"),
        callbacks=[LogLinesCallback()],
    )
    trainer.train()
    told = [record.message for record in caplog.records]
    values = [entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    steps = trainer.state.max_steps // 2
    for number, (line, value) in enumerate(zip(told, values, strict=True), start=1):
        assert line.startswith(f"Epoch {number}, step {number * steps}: loss ")
        assert line.endswith(f", eval_ndcg@10 {value:.4f}")

    caplog.clear()
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)  # each step and batch takes longer than a minute
    trainer.args.num_train_epochs = 1
    trainer.train()
    told = [record.message for record in caplog.records]
    assert sum(line.startswith("Training: ") for line in told) == steps
    assert sum(line.startswith("Evaluating: ") for line in told) == -(-60 // 7)


# What plain `transformers.Trainer` makes of the model


def wide_model(**changes):
    """A model whose predictions differ much, so that a loss over the wrong targets is seen."""
    model = make_model(hidden_dropout_prob=0.0, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def log_probabilities(model, rows):
    """Of every position that has a next item, over the whole vocabulary `[T, vocab_size]`; and the next items `[T]`."""
    with torch.no_grad():
        logits = [model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1] for row in rows]
    targets = torch.cat([torch.tensor(row["input_ids"][1:]) for row in rows])
    return torch.cat(logits), targets


def losses_of_one_step(trainer_class, model, tmp_path, rows, collator, **changes):
    """What the trainer logs for one step over all rows, and for an evaluation of them; the model stays as it is."""
    settings = {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-12, "prediction_loss_only": True, **changes}
    arguments = training_arguments(tmp_path, per_device_eval_batch_size=len(rows), **settings)
    trainer = trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]


def rows_of_lengths(*lengths):
    return [{"input_ids": torch.randint(2, 62, (length,)).tolist()} for length in lengths]


def collate_with_labels(rows):
    """Of rows that have `labels` already: all items."""
    return DataCollatorForSeq2Seq(small_tokenizer(60))([{**row, "labels": row["input_ids"]} for row in rows])


COLLATORS = {
    "DataCollatorForLanguageModeling": DataCollatorForLanguageModeling(small_tokenizer(60), mlm=False),
    "DataCollatorForSeq2Seq": collate_with_labels,
    "DataCollatorWithFlattening": DataCollatorWithFlattening(),
    "PaddingCollator": PaddingCollator(padding_side="left"),
    "PackingCollator": PackingCollator(),
}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("collator", COLLATORS)
def test_the_loss_is_the_mean_over_targets_with_any_collator(tmp_path, caplog, collator, batch_size, accumulation):
    packing_blossomrec.logger.warning_once.cache_clear()
    model, rows = wide_model(), rows_of_lengths(2, 3, 5, 20)
    logits, targets = log_probabilities(model, rows)
    expected = torch.nn.functional.cross_entropy(logits[:, 2:], targets - 2).item()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    losses = losses_of_one_step(Trainer, model, tmp_path, rows, COLLATORS[collator], **sizes)
    assert losses == pytest.approx((expected, expected), rel=1e-4)
    assert "`labels`" not in caplog.text


def collate_left_padded(rows):
    """The first item of a shorter history is not in the first column, which `Trainer` does not count."""
    tokenizer = small_tokenizer(60)
    tokenizer.padding_side = "left"
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)


def collate_packed_with_all_labels(rows):
    """The first items of all histories but the first one are labels, too."""
    batch = DataCollatorWithFlattening()(rows)
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize("collate", [collate_left_padded, collate_packed_with_all_labels])
def test_labels_that_trainer_counts_in_vain_are_reported(tmp_path, caplog, collate):
    packing_blossomrec.logger.warning_once.cache_clear()
    losses_of_one_step(Trainer, wide_model(), tmp_path, rows_of_lengths(2, 3, 5, 20), collate)
    assert "`labels` has ids that are no targets" in caplog.text


class OwnRecommender(BlossomRecForSequentialRecommendation):
    """A user's own class."""


def as_own_class(model):
    own = OwnRecommender(model.config)
    own.load_state_dict(model.state_dict())
    return own


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("wrap", [lambda model: model, as_own_class, with_lora], ids=["model", "subclass", "lora"])
@pytest.mark.parametrize("trainer_class", [Trainer, SequentialRecommendationTrainer])
def test_smoothed_labels_are_those_of_the_next_items(tmp_path, trainer_class, wrap):
    model, rows = wide_model(), rows_of_lengths(2, 3, 5, 20)
    logits, targets = log_probabilities(model, rows)  # of all ids: the smoothing covers [PAD] and [UNK]
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item()
    settings = {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 4}
    losses = losses_of_one_step(trainer_class, wrap(model), tmp_path, rows, PaddingCollator(), **settings)
    assert losses == pytest.approx((expected, expected), rel=1e-4)


def test_smoothing_does_not_replace_another_objective(tmp_path):
    arguments = training_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match='`label_smoothing_factor` is 0.1.*"gbce".*set it to 0'):
        SequentialRecommendationTrainer(make_model(objective="gbce", num_negatives=8), arguments)


@pytest.mark.parametrize("column, values", [("basket_starts", [True, True, False]), ("weights", [1.0, 0.5, 2.0])])
def test_smoothing_does_not_ignore_baskets_or_weights(tmp_path, column, values):
    rows = [{"input_ids": [5, 6, 7], column: values}]
    with pytest.raises(ValueError, match=f"`label_smoothing_factor` is 0.1, but a smoothed loss ignores .* {column}"):
        losses_of_one_step(
            SequentialRecommendationTrainer,
            wide_model(),
            tmp_path,
            rows,
            PaddingCollator(),
            label_smoothing_factor=0.1,
        )


def test_a_class_that_cannot_be_loaded_is_refused_before_training(log, tmp_path):
    class Own(BlossomRecForSequentialRecommendation):
        pass

    model = Own(make_model().config)
    SequentialRecommendationTrainer(model, training_arguments(tmp_path))  # saves nothing
    with pytest.raises(ValueError, match="Own` is defined in a script, a notebook or a function"):
        SequentialRecommendationTrainer(model, training_arguments(tmp_path, save_strategy="epoch"))
    with pytest.raises(ValueError, match="Own` is defined in a script, a notebook or a function"):
        TrainingLoop(model, split(log[0], "train"), args=LoopArguments(output_dir=str(tmp_path)))


def test_neftune_adds_the_noise_that_any_model_gets(tmp_path):
    """Uniform in ±alpha / √(length of the padded row · hidden_size), in training only."""
    model, seen = wide_model(), []
    model.model.embedding_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    settings = {"per_device_train_batch_size": 1, "neftune_noise_alpha": 5.0}
    losses_of_one_step(Trainer, model, tmp_path, rows_of_lengths(20), PaddingCollator(), **settings)
    in_training, in_evaluation = seen
    widest = (in_training - in_evaluation).abs().max().item()
    assert 0.9 < widest / (5 / (20 * 16) ** 0.5) <= 1 + 1e-5

    ids = model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([[0, 0, 5], [6, 7, 8]]))
    ids.remove()
    assert seen[2].shape == (2, 3)  # of the padded rows


def test_nothing_of_a_checkpoint_remains_that_could_not_be_written(log, tmp_path, monkeypatch):
    """A resumption of `Trainer` would pick it."""
    trainer = SequentialRecommendationTrainer(
        make_model(), training_arguments(tmp_path, save_strategy="epoch"), train_dataset=split(log[0], "train")
    )

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []
