"""Exported graphs give the model's scores, for any batch and length."""

import random

import numpy as np
import pytest
import torch
from event_cases import TYPES, Log, draw_features, event_recommender, timed

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.configuration_blossomrec import TIME_FEATURES
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES
from blossomrec_hf.sharing.export import HistoryScorer, export_onnx, export_program


BLOCKS = {"compress_block_size": 8, "compress_stride": 4, "selection_block_size": 8, "short_term_block_size": 4}

GENRES = [[f"genre {item % 7}", f"genre {item % 3}"] for item in range(58)]
FEATURES = ItemFeatures.from_columns({"genre": GENRES, "plot": np.random.default_rng(0).normal(size=(58, 6))})
ONE_LAYER = {"num_hidden_layers": 1, "attention_types": ["full"]}
MODELS = [  # layers of both kinds, then input and scores of every kind
    {"attention_types": ["blossom", "full"]},
    {"scoring": "cosine"} | ONE_LAYER,
    {"scoring": "cosine", "item_features": FEATURES.config()} | ONE_LAYER,
    {"item_features": FEATURES.config()} | ONE_LAYER,
]


def build(**kwargs) -> BlossomRecForSequentialRecommendation:
    settings = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24} | BLOCKS
    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(**(settings | kwargs))).eval()
    if model.config.item_features is not None:
        model.set_item_features(FEATURES)
    for parameter in model.parameters():  # large enough that what is selected matters
        if parameter.dim() > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.item_counts.random_(9)
    return model


def batches():
    """Padded batches of every kind: one item, more than 256, ragged, with unknown items, an empty history."""
    for lengths in ([1], [300, 1, 0, 17], [random.randint(1, 70) for _ in range(3)], [8], [16, 5]):
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in zip(ids, lengths):
            start = random.choice([0, len(row) - length])
            row[start : start + length] = torch.randint(2, 60, (length,))
            row[start : start + length // 3] = torch.where(
                torch.rand(length // 3) < 0.3, 1, row[start : start + length // 3]
            )
        yield ids, (ids != 0).long()


def expected(model, ids, mask) -> torch.Tensor:
    out = model.recommend(ids, mask, top_k=58, exclude_seen=False)
    return torch.full((len(ids), 60), -torch.inf).scatter(1, out.item_ids, out.scores.float())


def columns(model, log: Log) -> dict[str, torch.Tensor]:
    """The inputs of the graph, padded anywhere, of which it takes those that the model reads."""
    names = ["input_ids", "attention_mask"]
    names += ["timestamps", "prediction_time"] if model.config.time_features else []
    names += ["event_type_ids", "target_event_type"] if model.config.event_types else []
    batch = log.padded("anywhere", extra=1)
    return {name: batch[name] for name in names}


def event_scores(model, log: Log) -> torch.Tensor:
    out = model.recommend(**log.lists(), top_k=58, exclude_seen=False)
    return torch.full((len(log.items), 60), -torch.inf).scatter(1, out.item_ids, out.scores.float())


@pytest.mark.parametrize("attention_type", [*ATTENTION_TYPES, "defaults"])
def test_the_module_gives_the_models_scores(attention_type):
    model = build() if attention_type == "defaults" else build(attention_types=attention_type)
    if attention_type == "defaults":
        model = BlossomRecForSequentialRecommendation(BlossomRecConfig(vocab_size=60))
    for ids, mask in batches():
        torch.testing.assert_close(HistoryScorer(model)(ids, mask), expected(model, ids, mask), rtol=0, atol=1e-5)


def test_the_module_reads_times_and_types():
    for _ in range(4):
        features = draw_features() | random.choice([{}, {"time_features": TIME_FEATURES, "event_types": TYPES}])
        model = event_recommender(**features).float()
        for log in (timed(1), timed(300, 1, 17), timed(8, 16)):
            found = HistoryScorer(model)(**columns(model, log))
            torch.testing.assert_close(found, event_scores(model, log), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", MODELS)
def test_torch_export_takes_any_batch_and_length(tmp_path, settings):
    model = build(**settings)
    torch.export.save(export_program(model), tmp_path / "scorer.pt2")
    scorer = torch.export.load(tmp_path / "scorer.pt2").module()
    for ids, mask in batches():
        torch.testing.assert_close(scorer(ids, mask), expected(model, ids, mask), rtol=0, atol=1e-5)


def test_exported_programs_read_times_and_types(tmp_path):
    model = event_recommender(time_features=TIME_FEATURES, event_types=TYPES, time_zone="Europe/Berlin").float()
    torch.export.save(export_program(model), tmp_path / "scorer.pt2")
    scorer = torch.export.load(tmp_path / "scorer.pt2").module()
    for log in (timed(1), timed(90, 1, 17), timed(8, 16)):
        inputs = columns(model, log)
        found = scorer(inputs.pop("input_ids"), inputs.pop("attention_mask"), **inputs)
        torch.testing.assert_close(found, event_scores(model, log), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [{"time_features": ["next_gap", "weekday"]}, {"event_types": TYPES}])
def test_onnx_reads_times_and_types(tmp_path, features):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = event_recommender(**features, **ONE_LAYER, time_zone="Europe/Berlin").float()
    export_onnx(model, tmp_path / "scorer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "scorer.onnx")
    dimensions = ["batch", "length"]
    assert all(x.shape == dimensions[: len(x.shape)] for x in session.get_inputs())
    for log in (timed(1), timed(90, 1, 17), timed(8, 16)):
        inputs = columns(model, log)
        assert [x.name for x in session.get_inputs()] == list(inputs)
        (scores,) = session.run(["scores"], {name: x.numpy() for name, x in inputs.items()})
        np.testing.assert_allclose(scores, event_scores(model, log), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [MODELS[0], MODELS[2]])
def test_onnx_takes_any_batch_and_length(tmp_path, settings):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(**settings)
    export_onnx(model, tmp_path / "scorer.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "scorer.onnx")
    dimensions = {x.name: x.shape for x in (*session.get_inputs(), *session.get_outputs())}
    inputs = dict.fromkeys(["input_ids", "attention_mask"], ["batch", "length"])
    assert dimensions == {**inputs, "scores": ["batch", model.config.vocab_size]}
    for ids, mask in batches():
        (scores,) = session.run(["scores"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        np.testing.assert_allclose(scores, expected(model, ids, mask), rtol=0, atol=1e-5)


def test_onnx_of_a_bfloat16_model_is_float32(tmp_path, caplog):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(num_hidden_layers=1, attention_types="full").bfloat16()
    export_onnx(model, tmp_path / "scorer.onnx")
    assert model.dtype == torch.bfloat16 and "written in float32" in caplog.text
    session = onnxruntime.InferenceSession(tmp_path / "scorer.onnx")
    ids = torch.randint(2, 60, (2, 9))
    mask = torch.ones_like(ids)
    (scores,) = session.run(["scores"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(scores, expected(model.float(), ids, mask), rtol=0, atol=1e-4)
