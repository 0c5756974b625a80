import json

import pytest
import torch
from small_cases import make_model
from transformers import TrainingArguments

from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.data import split
from blossomrec_hf.training import (
    LoopArguments,
    SelectionWatch,
    SequentialRecommendationTrainer,
    selection_statistics,
    train,
)


def test_statistics_are_those_counted_query_by_query(log):
    model = make_model(attention_types=["blossom", "long_term"], gate_initial_bias=[-1.0, 1.0])
    store = HistoryStore.from_rows(split(log[0], "train"))
    statistics = selection_statistics(model.train(), store.pack(range(10)))
    assert model.training

    gates, distances, entropies, nothing = [], [], [], []
    model.eval()
    for row in range(10):
        with torch.no_grad():
            selections = model.model(**store.pack([row]), output_selection=True).selections
        gates.append(selections[0].gates[0])
        blocks, importance = selections[1].block_indices[0], selections[1].importance[0]
        for query in range(blocks.shape[0]):
            own = query // 4  # selection_block_size
            for chosen, shares in zip(blocks[query].tolist(), importance[query].tolist()):
                if own == 0:
                    continue
                shares = [share for block, share in zip(chosen, shares) if block >= 0]
                distances += [own - block for block in chosen if block >= 0]
                nothing.append(not shares)
                parts = torch.tensor([*shares, max(1 - sum(shares), 0.0)])
                entropies.append(torch.special.entr(parts).sum().item())
    means = torch.cat(gates).mean(0)
    for head in range(2):
        assert statistics[f"layer_0/gate_long_{head}"] == pytest.approx(means[head, 0].item(), abs=1e-5)
        assert statistics[f"layer_0/gate_short_{head}"] == pytest.approx(means[head, 1].item(), abs=1e-5)
    assert not any(name.startswith("layer_1/gate") for name in statistics)
    assert statistics["layer_1/entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert statistics["layer_1/nothing_selected"] == pytest.approx(sum(nothing) / len(nothing), abs=1e-6)
    for power in (1, 2, 4, 8):
        inside = sum(power <= distance < 2 * power for distance in distances)
        assert statistics.get(f"layer_1/distance_{power}", 0.0) == pytest.approx(inside / len(distances), abs=1e-6)


def test_the_loop_writes_and_draws_what_is_watched(log, tmp_path):
    pytest.importorskip("matplotlib")
    args = LoopArguments(output_dir=str(tmp_path / "run"), num_train_epochs=3, tokens_per_step=300, logging_steps=1)
    watch = SelectionWatch(split(log[0], "validation"), max_length=20, max_tokens=400)
    train(make_model(), split(log[0], "train"), split(log[0], "validation"), args=args, callbacks=[watch])
    lines = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in written if "validation_ndcg@10" in line]
    assert [line["layer_1/entropy"] for line in validations] == [line["layer_1/entropy"] for line in lines]
    assert (tmp_path / "run" / "selection.png").read_bytes().startswith(b"\x89PNG")


def test_it_watches_a_trainer_too(log, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, eval_strategy="epoch", report_to="none", use_cpu=True, save_strategy="no"
    )
    view = split(log[0], "validation")
    trainer = SequentialRecommendationTrainer(
        make_model(),
        arguments,
        train_dataset=split(log[0], "train"),
        eval_dataset=view,
        callbacks=[SelectionWatch(view)],
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [trainer.state.max_steps // 2, trainer.state.max_steps]
    assert lines[0]["layer_0/gate_long_0"] != lines[1]["layer_0/gate_long_0"]


def test_figures_reach_a_tracker(log, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = LoopArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=2,
        tokens_per_step=300,
        logging_steps=1,
        report_to="tensorboard",
    )
    result = train(make_model(), split(log[0], "train"), split(log[0], "validation"), args=args)
    (events,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents*") if file.parent.name == "run"}
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, result.steps + 1))
    best = max(event.value for event in accumulator.Scalars("validation_ndcg@10"))
    assert best == pytest.approx(result.best_metric, abs=1e-6)
