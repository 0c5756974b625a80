"""Times and types of events from a data set to the model: planted effects are learned, by the loop and by `Trainer`."""

import json
import signal

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, List
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import make_model
from transformers import TrainingArguments

from blossomrec_hf.batches import HistoryStore, PackingCollator, PaddingCollator
from blossomrec_hf.data import EventTable, split, split_by_leave_one_out
from blossomrec_hf.evaluation import HeldOutItems, evaluate
from blossomrec_hf.training import LoopArguments, SequentialRecommendationTrainer, TrainingLoop, train
from blossomrec_hf.training.graphs import StaticPass


GAPS = (60, 3_600, 86_400, 30 * 86_400)
VOCAB_SIZE, GROUP = 2 + 4 * 5, 5
TYPES = ["view", "buy"]


@pytest.fixture(scope="module")
def timed() -> EventTable:
    """A log in which the gap before an event says which of four groups of items it is of, and nothing else does."""
    rng = np.random.default_rng(0)
    rows = {"user_id": list(range(80)), "input_ids": [], "timestamps": [], "event_type_ids": []}
    for _ in rows["user_id"]:
        groups = rng.integers(4, size=rng.integers(8, 30))
        gaps = np.array(GAPS)[groups] * rng.uniform(0.95, 1.05, len(groups))
        rows["timestamps"].append((1_600_000_000 + gaps.cumsum()).astype(np.int64))
        rows["input_ids"].append(2 + groups * GROUP + rng.integers(GROUP, size=len(groups)))
        rows["event_type_ids"].append(groups % 2)
    lengths = [len(items) for items in rows["input_ids"]]
    rows |= {f"{part}_end": lengths for part in ("train", "validation", "test")}
    dataset = Dataset.from_dict(rows).cast_column("event_type_ids", List(ClassLabel(names=TYPES)))
    return EventTable.from_dataset(split_by_leave_one_out(dataset))


def views(table: EventTable, model):
    return {part: split(table, part, columns=model.config.event_columns) for part in ("train", "validation", "test")}


def arguments(folder, **changes) -> LoopArguments:
    settings = {"tokens_per_step": 200, "learning_rate": 1e-2, "warmup_steps": 5, "num_train_epochs": 6}
    return LoopArguments(output_dir=str(folder), **{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "suffix", "least", "most"),
    [
        ({}, "", 0.0, 0.45),
        ({"time_features": ["previous_gap"]}, "", 0.0, 0.45),
        ({"time_features": ["next_gap"]}, "_now", 0.9, 1.0),
        ({"time_features": ["next_gap_input"]}, "_now", 0.9, 1.0),
        ({"time_features": ["next_gap", "previous_gap"], "scoring": "cosine"}, "_now", 0.9, 1.0),
    ],
    ids=str,
)
def test_a_planted_effect_of_the_gap_is_learned_where_now_is_known(timed, tmp_path, changes, suffix, least, most):
    torch.manual_seed(0)
    model = make_model(VOCAB_SIZE, repeat_share=1.0, **changes)
    parts = views(timed, model)
    metric = f"recall@5{suffix}"
    train(model, parts["train"], parts["validation"], args=arguments(tmp_path, metric_for_best_model=metric))
    figures = evaluate(model, parts["test"], ks=[5])
    assert least <= figures[metric] <= most
    assert figures["recall@5"] <= 0.45  # without now, one group in four is as good as any
    validated = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in validated for name in line if name.startswith("validation_recall@5")}
    assert all(name.endswith("_now") == bool(suffix) for name in names)
    # Without a time in the training data, another unit could not be recognized later.
    if model.config.time_features:
        latest = max(max(row["timestamps"]) for row in parts["train"])
        assert int(model.model.latest_time) == latest
        with pytest.raises(ValueError, match="which is in milliseconds"):
            late = [{**row, "timestamps": [1000 * time for time in row["timestamps"]]} for row in parts["test"]]
            evaluate(model, late, now=False)


def test_a_planted_effect_of_event_types_is_learned(timed, tmp_path):
    torch.manual_seed(0)
    model = make_model(VOCAB_SIZE, repeat_share=1.0, event_types=TYPES, target_event_types=TYPES)
    parts = views(timed, model)
    train(model, parts["train"], parts["validation"], args=arguments(tmp_path))
    # The type of the event to be predicted halves the items.
    assert evaluate(model, parts["test"], ks=[10])["recall@10"] > 0.95
    told = HeldOutItems.from_rows(parts["test"], columns=["event_type_ids"])
    told.target_types = 1 - told.target_types
    assert evaluate(model, told, ks=[10])["recall@10"] < 0.05


@pytest.mark.parametrize("features", [["next_gap", "weekday"], ["previous_gap", "next_gap_input"]], ids=str)
def test_a_run_with_times_and_types_resumes_bit_by_bit(timed, tmp_path, features):
    def make_loop(folder, **changes) -> TrainingLoop:
        torch.manual_seed(0)
        model = make_model(VOCAB_SIZE, repeat_share=1.0, time_features=features, event_types=TYPES)
        parts = views(timed, model)
        metric = {"metric_for_best_model": "ndcg@5_all_now", "num_train_epochs": 2}
        return TrainingLoop(model, parts["train"], parts["validation"], args=arguments(folder, **metric, **changes))

    whole = make_loop(tmp_path / "whole")
    whole.run()

    class Stopped(TrainingLoop):
        def training_step(self, rows):
            super().training_step(rows)
            if self.state.step == 9:
                signal.raise_signal(signal.SIGTERM)

    stopped = make_loop(tmp_path / "stopped")
    stopped.__class__ = Stopped
    with pytest.raises(SystemExit):
        stopped.run()
    resumed = make_loop(tmp_path / "stopped", resume=True)
    resumed.run()
    for name, value in whole.bare_model.state_dict().items():
        assert torch.equal(value, resumed.bare_model.state_dict()[name]), name

    later = EventTable(
        timed.events | {"timestamps": timed.events["timestamps"] + 1}, timed.offsets, timed.users, event_types=TYPES
    )
    model = make_model(VOCAB_SIZE, repeat_share=1.0, time_features=features, event_types=TYPES)
    other = TrainingLoop(
        model,
        split(later, "train", columns=model.config.event_columns),
        args=arguments(tmp_path / "stopped", metric_for_best_model="ndcg@5_all_now", num_train_epochs=2, resume=True),
    )
    with pytest.raises(ValueError, match="checksum"):
        other.run()


@pytest.mark.parametrize(
    "changes",
    [{"time_features": ["next_gap", "hour"]}, {"time_features": ["next_gap_input"], "event_types": TYPES}],
    ids=str,
)
def test_trainer_learns_and_evaluates_as_the_loop_does(timed, tmp_path, changes):
    def trainer(model, **options) -> SequentialRecommendationTrainer:
        settings = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "report_to": "none",
        }
        training_args = TrainingArguments(
            str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
        )
        return SequentialRecommendationTrainer(model, training_args, **options)

    torch.manual_seed(0)
    model = make_model(VOCAB_SIZE, hidden_dropout_prob=0.0, time_dropout_prob=0.0, repeat_share=1.0, **changes)
    parts = views(timed, model)
    twin = make_model(VOCAB_SIZE, hidden_dropout_prob=0.0, time_dropout_prob=0.0, repeat_share=1.0, **changes)
    twin.load_state_dict(model.state_dict())

    # One batch of all histories: the loss of the loop's only step is that of Trainer's.
    packing = trainer(model, train_dataset=parts["train"], eval_dataset=parts["test"])
    (tmp_path / "loop").mkdir()
    loop = TrainingLoop(
        twin, parts["train"], args=arguments(tmp_path / "loop", tokens_per_step=10**6, max_steps=1, max_length=10**6)
    )
    rows = loop.plan.epoch_steps(0)[0]
    loss = loop.update(rows, 1)
    batch = packing.data_collator(list(parts["train"]))
    targets = (batch["labels"] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=targets).loss.detach(), loss)

    packing.train()
    assert int(model.model.latest_time) == int(twin.model.latest_time) > 0
    figures = packing.evaluate()
    expected = evaluate(model, parts["test"], progress=False)
    assert any(name.endswith("_now") for name in expected)
    assert {name: figures[f"eval_{name}"] for name in expected} == pytest.approx(expected)

    with pytest.raises(ValueError, match="`data_collator` has no timestamps"):
        trainer(model, data_collator=PackingCollator())
    plain = split(timed, "test", columns=["timestamps", "event_type_ids"])
    rows = [{name: row[name] for name in row if not name.startswith("target_t")} for row in plain]
    with pytest.raises(ValueError, match="`eval_dataset` has no target_timestamps"):
        trainer(model, eval_dataset=rows).evaluate()


def test_steps_of_one_shape_read_the_columns(timed):
    """What the compiler and CUDA graphs are given: batches that are filled up with histories of [PAD] at time 0."""
    features = {"time_features": ["previous_gap", "next_gap", "next_gap_input", "hour"], "event_types": TYPES}
    model = make_model(VOCAB_SIZE, hidden_dropout_prob=0.0, time_dropout_prob=0.0, **features)
    for name, parameter in model.named_parameters():
        if "vectors" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # they start at zero
    columns = model.config.event_columns
    store = HistoryStore.from_rows(split(timed, "train", columns=columns), columns=columns)
    static = StaticPass(lambda batch: model(**batch).loss, max_tokens=200, max_length=int(store.lengths.max()))
    rng = np.random.default_rng()
    for _ in range(6):
        rows = rng.choice(len(store), rng.integers(1, 8), replace=False)
        batch, targets = store.pack(rows, labels=True), int(store.num_targets[rows].sum())
        torch.testing.assert_close(static(batch, targets), model(**batch, num_items_in_batch=targets).loss)


def test_what_a_model_cannot_read_is_named_before_any_work(timed, tmp_path):
    model = make_model(VOCAB_SIZE, time_features=["previous_gap"])
    parts = views(timed, model)
    with pytest.raises(ValueError, match="`now` is true, but the model's `time_features` are"):
        TrainingLoop(
            model, parts["train"], parts["validation"], args=arguments(tmp_path, metric_for_best_model="ndcg@10_now")
        )
    with pytest.raises(ValueError, match="`now` is true"):
        evaluate(model, parts["test"], now=True)
    with pytest.raises(ValueError, match=r"timestamps.*columns=\['timestamps'\]"):
        TrainingLoop(model, split(timed, "train"), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="timestamps"):
        TrainingLoop(model, HistoryStore.from_rows(split(timed, "train")), args=arguments(tmp_path))
    rows = [{name: parts["train"][user][name] for name in ("input_ids", "timestamps")} for user in range(6)]
    TrainingLoop(
        model, rows, args=arguments(tmp_path)
    )  # the next history begins before the last event of the one before
    rows[4]["timestamps"] = rows[4]["timestamps"][::-1]
    with pytest.raises(ValueError, match="times that go backwards in history 4"):
        TrainingLoop(model, rows, args=arguments(tmp_path))
    with pytest.raises(ValueError, match="`rows` has no timestamps and no target_timestamps"):
        evaluate(model, split(timed, "test"))
    with pytest.raises(ValueError, match="`view` has no timestamps"):
        evaluate(model, HeldOutItems.from_rows(split(timed, "test")))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_events_reach_the_model_with_their_columns(timed, data):
    """From the data set through splits, stores, collators and batches to the call of the model, on any rows and lengths."""
    names = data.draw(st.lists(st.sampled_from(["timestamps", "event_type_ids"]), unique=True))
    settings = {"time_features": ["hour"] if "timestamps" in names else None}
    settings["event_types"] = TYPES if "event_type_ids" in names else None
    model = make_model(VOCAB_SIZE, **settings)
    assert set(model.config.event_columns) == set(names)
    rows = data.draw(st.lists(st.integers(0, 79), min_size=1, max_size=5))
    max_length = data.draw(st.sampled_from([None, 1, 4]))
    part = data.draw(st.sampled_from(["train", "test"]))
    view = split(timed, part, columns=names)
    chosen = [view[row] for row in rows]
    ends = timed.users["train_end" if part == "train" else "validation_end"]
    expected = []
    for row in chosen:
        user = int(row["user_id"])
        events = slice(timed.offsets[user], timed.offsets[user] + ends[user])
        cut = {name: timed.events[name][events].tolist() for name in ("input_ids", *names)}
        expected.append({name: values[-max_length:] if max_length else values for name, values in cut.items()})

    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    columns = model.config.event_columns
    for collate in (PackingCollator(max_length, columns=columns), PaddingCollator(max_length, columns=columns)):
        with torch.no_grad():
            model(**collate(chosen))
    packed, padded = calls
    offsets = packed["cu_seq_lens_q"].tolist()
    for number, row in enumerate(expected):
        for name, values in row.items():
            assert packed[name][0, offsets[number] : offsets[number + 1]].tolist() == values
            assert padded[name][number][padded["attention_mask"][number] == 1].tolist() == values
