import copy
import json

import numpy as np
import pytest
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.model.static_blossomrec import StaticBatch
from blossomrec_hf.training import LoopArguments, TrainingLoop
from blossomrec_hf.training.graphs import GraphedPass, StaticPass


VOCABULARY = 50


def make_store(lengths) -> HistoryStore:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.random.default_rng().integers(2, VOCABULARY, size=offsets[-1], dtype=np.int32)
    return HistoryStore(items, offsets)


def make_model(**changes) -> BlossomRecForSequentialRecommendation:
    settings = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_dropout_prob": 0.0}
    return BlossomRecForSequentialRecommendation(BlossomRecConfig(vocab_size=VOCABULARY, **{**settings, **changes}))


def test_a_filled_up_batch_has_the_loss_and_the_gradients_of_the_batch():
    model = make_model().double()
    rng = np.random.default_rng()
    store = make_store(rng.integers(1, 60, size=30))
    static = StaticPass(
        lambda arguments: model(**arguments).loss, max_tokens=1200, max_length=int(store.lengths.max())
    )
    shapes = set()
    for size in (20, 1, 9):  # what an earlier, larger batch left must not show
        rows = rng.permutation(30)[:size]
        batch, num_targets = store.pack(rows, labels=True), max(1, int(store.num_targets[rows].sum()))
        results = []
        for loss in (model(**batch, num_items_in_batch=num_targets).loss, static(batch, num_targets)):
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
        shapes.add(static._batch.tokens)
    assert len(shapes) == 1


def test_room_is_for_the_batch_and_what_fills_it_up():
    rng = np.random.default_rng()
    for _ in range(50):
        store = make_store(rng.integers(1, 40, size=rng.integers(1, 50)))
        batch = store.pack(np.arange(len(store)), labels=True)
        static_pass = StaticPass(lambda arguments: None, max_tokens=400, max_length=int(store.lengths.max()))
        static_pass(batch, 1)
        static = static_pass._batch
        assert static.tokens >= batch["input_ids"].shape[1]
        offsets = static.cu_seq_lens
        assert offsets[-1] == static.tokens and (offsets.diff() >= 0).all()
        assert offsets.diff().max() <= static.max_length
    static = StaticBatch(100, 10, 10, torch.device("cpu"), {"input_ids": torch.long})
    assert static.has_room(100, 10) and static.has_room(50, 5)
    assert not static.has_room(101, 1) and not static.has_room(100, 11) and not static.has_room(5, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, tolerance", [("no", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("attention_types", ["blossom", "full", "long_term+full"])
def test_captured_and_compiled_training_is_the_training(attention_types, precision, tolerance, tmp_path):
    lengths = np.random.default_rng().integers(2, 200, size=80)
    items = make_store(lengths).items.numpy()
    state, losses, weights = make_model(attention_types=attention_types).state_dict(), [], []
    for graphs, compiled in ((False, False), (True, False), (True, True)):
        model = make_model(attention_types=attention_types)
        model.load_state_dict(state)
        args = LoopArguments(
            output_dir=str(tmp_path / f"{graphs}-{compiled}"),
            tokens_per_step=2048,
            num_train_epochs=4,
            logging_steps=1,
            mixed_precision=precision,
            cuda_graphs=graphs,
            torch_compile=compiled,
        )
        loop = TrainingLoop(model, HistoryStore(items, np.concatenate([[0], np.cumsum(lengths)])), args=args)
        loop.run()
        assert not graphs or loop.update.run_pass.works
        lines = (tmp_path / f"{graphs}-{compiled}" / "metrics.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for loss, weight in zip(losses[1:], weights[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=tolerance, atol=tolerance)
        assert (weight - weights[0]).norm() < max(1e-2, 2 * tolerance) * weights[0].norm()


ITEM_FEATURES = {
    "genre": [[str(i % 7), str(i % 3)] if i % 5 else None for i in range(VOCABULARY - 2)],
    "title": np.random.default_rng(0).standard_normal((VOCABULARY - 2, 12)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("signals", ["times", "types", "features", "all"])
def test_captured_and_compiled_training_reads_times_types_and_features(signals, tmp_path):
    settings, features = {"scoring": "cosine", "time_dropout_prob": 0.0, "id_dropout_prob": 0.0}, None
    if signals in ("times", "all"):
        settings |= {"time_features": ["previous_gap", "next_gap", "next_gap_input", "hour", "weekday"]}
    if signals in ("types", "all"):
        settings |= {"event_types": ["view", "buy"], "target_event_types": ["buy"]}
    if signals in ("features", "all"):
        features = ItemFeatures.from_columns(ITEM_FEATURES)
        settings |= {"item_features": features.config()}
    rng = np.random.default_rng()
    lengths = rng.integers(2, 200, size=80)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {
        "timestamps": 1_500_000_000 + rng.integers(0, 10**6, size=offsets[-1]).cumsum(),
        "event_type_ids": rng.integers(-1, 2, size=offsets[-1]),
    }
    items, losses, state = make_store(lengths).items.numpy(), [], None
    for graphs in (False, True):
        model = make_model(**settings)
        if features is not None:
            model.set_item_features(features)
        state = copy.deepcopy(model.state_dict()) if state is None else state
        model.load_state_dict(state)
        read = {name: columns[name] for name in model.config.event_columns}
        args = LoopArguments(
            output_dir=str(tmp_path / f"{graphs}"),
            tokens_per_step=2048,
            num_train_epochs=3,
            logging_steps=1,
            mixed_precision="no",
            cuda_graphs=graphs,
            torch_compile=graphs,
        )
        loop = TrainingLoop(model, HistoryStore(items, offsets, columns=read), args=args)
        loop.run()
        assert not graphs or loop.update.run_pass.works
        lines = (tmp_path / f"{graphs}" / "metrics.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_cannot_be_captured_is_run_operation_by_operation(caplog, dropout):
    model = make_model(hidden_dropout_prob=dropout).cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(arguments):
        loss = model(**arguments).loss
        loss.item()  # waits for the device
        loss.backward()
        return loss.detach()

    store = make_store([5, 30, 17]).to("cuda")
    graphed = GraphedPass(run, parameters, max_tokens=64, max_length=30)
    batch = store.pack([0, 1, 2], labels=True)
    loss = graphed(batch, 49)
    assert not graphed.works and "cannot be captured" in caplog.text
    if dropout:
        assert loss != graphed(batch, 49)
    else:
        torch.testing.assert_close(loss, model(**batch, num_items_in_batch=49).loss.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in_batch"])
@pytest.mark.parametrize("objective", ["cross_entropy", "sampled_softmax", "bce", "gbce", "bpr"])
def test_every_replay_draws_anew(objective, sampling, shared):
    model = make_model(
        objective=objective, negative_sampling=sampling, num_negatives=8, shared_negatives=shared
    ).cuda()
    model.item_counts.copy_(torch.arange(VOCABULARY))

    def run(arguments):
        loss = model(**arguments).loss
        loss.backward()
        return loss.detach()

    graphed = GraphedPass(run, list(model.parameters()), max_tokens=64, max_length=30)
    batch = make_store([5, 30, 17]).to("cuda").pack([0, 1, 2], labels=True)
    losses = [float(graphed(batch, 49)) for _ in range(4)]
    assert graphed.works
    assert len(set(losses)) == (1 if objective == "cross_entropy" else 4)


@pytest.mark.gpu
def test_compiled_replays_draw_new_dropout():
    model = make_model(hidden_dropout_prob=0.3).cuda().train()
    compiled = torch.compile(model, dynamic=False)

    def run(arguments):
        loss = compiled(**arguments).loss
        loss.backward()
        return loss.detach()

    graphed = GraphedPass(run, list(model.parameters()), max_tokens=64, max_length=30)
    batch = make_store([5, 30, 17]).to("cuda").pack([0, 1, 2], labels=True)
    assert len({float(graphed(batch, 49)) for _ in range(4)}) == 4 and graphed.works


@pytest.mark.gpu
def test_two_kinds_of_batches_do_not_take_turns_in_recording():
    model = make_model().cuda()

    def run(arguments):
        loss = model(**arguments).loss
        loss.backward()
        return loss.detach()

    graphed, recorded = GraphedPass(run, list(model.parameters()), max_tokens=2048, max_length=2000), []
    record = graphed._capture
    graphed._capture = lambda: recorded.append(1) or record()
    store = make_store([2000] + [5] * 300).to("cuda")
    for _ in range(3):
        for rows in ([0], list(range(1, 301))):
            graphed(store.pack(rows, labels=True), 100)
    assert graphed.works and len(recorded) == 2
