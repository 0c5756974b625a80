import pytest
import torch
from small_cases import make_model
from transformers import Trainer, TrainingArguments

from blossomrec_hf.data import PaddingCollator, split
from blossomrec_hf.training import RankingCollator, SequentialRecommendationTrainer, evaluate


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
        model, training_arguments(tmp_path), data_collator=RankingCollator(max_length=max_length), eval_dataset=view
    )
    figures = trainer.evaluate()
    expected = evaluate(model, view, max_length=max_length, progress=False)
    assert {name: figures[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert "eval_loss" not in figures


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


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0, got 0.1"):
        SequentialRecommendationTrainer(make_model(), training_arguments(tmp_path, label_smoothing_factor=0.1))
