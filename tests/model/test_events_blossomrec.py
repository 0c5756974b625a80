"""Times and types of events in the model: against plain Python, alone, padded, packed and cached."""

import bisect
import random
from datetime import datetime
from zoneinfo import ZoneInfo

import hypothesis
import numpy as np
import pytest
import torch
from event_cases import TYPES, Log, draw_features, event_recommender, timed
from hypothesis import strategies
from model_cases import recommender

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.configuration_blossomrec import TIME_FEATURES
from blossomrec_hf.model.events_blossomrec import read_moments
from blossomrec_hf.model.ids_blossomrec import UNKNOWN_TIME, UNKNOWN_TYPE
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.model.time_blossomrec import GAP_BOUNDS


EXACT = {"rtol": 0, "atol": 1e-10}
EVERYTHING = {"time_features": TIME_FEATURES, "event_types": TYPES, "time_zone": "Europe/Berlin"}


def plain_logits(model, items, times, types, now, target) -> torch.Tensor:
    """The logits of one history, event by event in plain Python around the layers of a model without features."""
    config, inner = model.config, model.model
    plain = recommender(**{**config.to_dict(), "time_features": None, "event_types": None, "target_event_types": None})
    plain.load_state_dict(model.state_dict(), strict=False)
    times, types, now = times.tolist(), types.tolist(), int(now)
    following = [*times[1:], None if now == UNKNOWN_TIME else now]
    next_types = [*types[1:], int(target)]

    def row(vectors, kind, value, before=None):
        known = value is not None and not (kind == "gap" and before is None)
        if not known or (kind == "type" and value == UNKNOWN_TYPE):
            return vectors[-1]
        if kind == "gap":
            return vectors[bisect.bisect_right(GAP_BOUNDS, value - before)]
        local = datetime.fromtimestamp(value, ZoneInfo(config.time_zone)) if kind in ("hour", "weekday") else None
        return vectors[{"hour": lambda: local.hour, "weekday": local and local.weekday, "type": lambda: value}[kind]()]

    inputs = inner.item_embedding(items).unbind()
    vectors = {} if inner.event_vectors is None else dict(inner.event_vectors.named_parameters())
    reads = {
        "previous_gap": lambda t: ("gap", times[t], times[t - 1] if t else None),
        "next_gap_input": lambda t: ("gap", following[t], times[t]),
        "hour": lambda t: ("hour", times[t]),
        "weekday": lambda t: ("weekday", times[t]),
        "event_types": lambda t: ("type", types[t]),
    }
    inputs = [x + sum(row(v, *reads[name](t)) for name, v in vectors.items()) for t, x in enumerate(inputs)]
    states = plain.model(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0]
    vectors = {} if inner.prediction_vectors is None else dict(inner.prediction_vectors.named_parameters())
    reads = {
        "next_gap": lambda t: ("gap", following[t], times[t]),
        "hour": lambda t: ("hour", following[t]),
        "weekday": lambda t: ("weekday", following[t]),
        "event_types": lambda t: ("type", next_types[t]),
    }
    moved = []
    for t, state in enumerate(states.unbind()):
        changes = [row(v, *reads[name](t)) for name, v in vectors.items()]
        scale, shift = sum(changes).chunk(2) if changes else (0, 0)
        moved.append(state * (1 + scale) + shift)
    return plain.model.prediction_states(torch.stack(moved)) @ plain.item_vectors().T


def assert_plain(model, log: Log, logits: list[torch.Tensor], begins: list[int] | None = None) -> None:
    for i, (*events, found) in enumerate(zip(*log, logits, strict=True)):
        begin = begins[i] if begins else 0
        if len(events[0]) > begin:
            torch.testing.assert_close(found, plain_logits(model, *events)[begin:], **EXACT)


def of_rows(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[real == 1] for row, real in zip(logits, mask)]


@pytest.mark.parametrize("side", ["left", "right", "anywhere", "packed"])
@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@torch.no_grad()
def test_features_are_what_plain_python_computes(side, scoring):
    for _ in range(2):
        model, log = event_recommender(**draw_features(), scoring=scoring), timed(1, 30, 2, 13)
        if side == "packed":
            logits = model(**log.packed()).logits[0].split([len(x) for x in log.items])
        else:
            batch = log.padded(side, extra=2)
            logits = of_rows(model(**batch).logits, batch["attention_mask"])
        assert_plain(model, log, logits)


@hypothesis.settings(
    max_examples=12,
    deadline=None,
    phases=[hypothesis.Phase.generate],  # histories are drawn by a seed, which cannot be shrunk
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(data=strategies.data())
@torch.no_grad()
def test_appends_are_recomputation(data):
    """With any features, cut and "now"; with crops, selections and events that do not stay in between."""
    seed = data.draw(strategies.integers(0, 2**31))
    random.seed(seed)
    torch.manual_seed(seed)
    always = data.draw(strategies.sampled_from([(), ("next_gap_input",), ("next_gap",)]))
    model, log = event_recommender(**draw_features(always)), timed(25, 0, 1, 12)
    cache, lengths, begins = BlossomRecCache(model.config), [len(x) for x in log.items], [0] * 4
    for step in range(4):
        if step == 2 and data.draw(strategies.booleans()):
            begins = [data.draw(strategies.integers(0, n)) for n in begins]
            cache.crop(torch.tensor(begins))
        if step and data.draw(strategies.booleans()):
            cache = BlossomRecCache.cat([cache.select([0, 1]), cache.select([2, 3])])
        ends = lengths if step == 3 else [data.draw(strategies.integers(n, m)) for n, m in zip(begins, lengths)]
        for use_cache in (False, True):
            seen = log.part([0] * 4, ends).with_now()
            new = seen.part(begins, ends).padded("anywhere", extra=1)
            out = model(**new, cache=cache, use_cache=use_cache)
            assert_plain(model, seen, of_rows(out.logits, new["attention_mask"]), begins)
        begins = ends
    assert cache.lengths.tolist() == lengths
    assert cache.item_ids[0].tolist() == log.items[0].tolist()


@pytest.mark.parametrize("feature", ["next_gap", "next_gap_input"])
@torch.no_grad()
def test_a_cache_is_asked_again_with_another_now(feature):
    model, log = event_recommender(time_features=["previous_gap", feature, "hour"], event_types=TYPES), timed(20, 3, 8)
    model(**log.padded("left"), cache=(cache := BlossomRecCache(model.config)))
    nothing, scores = log.part([20, 3, 8], [20, 3, 8]).padded(extra=1), []
    for _ in range(3):
        log = log.with_now()
        asked = nothing | {"prediction_time": log.now}
        found = model.recommend(**asked, cache=cache, exclude_seen=False, top_k=58)
        expected = model.recommend(**log.lists(), exclude_seen=False, top_k=58)
        torch.testing.assert_close(found.scores, expected.scores, **EXACT)
        assert torch.equal(found.item_ids, expected.item_ids)
        scores.append(found.scores)
    log = log._replace(now=torch.stack([t[-1] + 1000 for t in log.times]))
    far = model.recommend(**nothing | {"prediction_time": log.now + 10**7}, cache=cache, top_k=5)
    assert not torch.equal(
        far.scores, model.recommend(**nothing | {"prediction_time": log.now}, cache=cache, top_k=5).scores
    )
    # From the states alone, as a service does that computes them when events arrive.
    if feature == "next_gap":
        times, now = cache.last_timestamps, log.now
        states = model.recommend_from_states(
            cache.last_hidden_state, timestamps=times, prediction_time=now, target_event_type=log.target
        )
        expected = model.recommend(**log.lists(), exclude_seen=False)
        torch.testing.assert_close(states.scores, expected.scores, **EXACT)


@torch.no_grad()
def test_outputs_of_layers_are_those_of_the_new_events():
    model, log = event_recommender(**EVERYTHING, attention_types="blossom"), timed(17, 5)
    whole = model(**log.padded(), output_hidden_states=True, output_selection=True)
    first = log.part([0, 0], [9, 5])._replace(now=torch.full((2,), UNKNOWN_TIME))
    cache = model(**first.padded(), use_cache=True).cache
    rest = log.part([9, 5], [17, 5])
    out = model(**rest.padded(), cache=cache, output_hidden_states=True, output_selection=True)
    for found, expected in zip(out.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(found[0], expected[0, 9:], **EXACT)
    for found, expected in zip(out.selections, whole.selections, strict=True):
        torch.testing.assert_close(found.gates[0], expected.gates[0, 9:], **EXACT)
        assert torch.equal(found.block_indices[0], expected.block_indices[0, 9:])


def test_an_untrained_feature_changes_nothing():
    plain = recommender()
    timed_model = recommender(**EVERYTHING)
    missing, unexpected = timed_model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all("_vectors." in name or name.endswith("latest_time") for name in missing)
    log = timed(20, 7)
    items = {name: x for name, x in log.padded().items() if name in ("input_ids", "attention_mask")}
    assert torch.equal(timed_model(**log.padded()).logits, plain(**items).logits)
    assert torch.equal(
        plain(**log.padded()).logits, plain(**items).logits
    )  # models without features ignore the columns


def test_every_vector_learns_as_by_lookups():
    """In training, the sum of vectors is a matrix product; its value and gradients are those of lookups."""
    model, log = event_recommender(**EVERYTHING), timed(200)
    histories = pack_histories(**log.padded(), vocab_size=60)
    moments = read_moments(histories, model.config)
    for vectors in (model.model.event_vectors, model.model.prediction_vectors):
        found = vectors(moments)
        with torch.no_grad():
            expected = vectors(moments)
        torch.testing.assert_close(found, expected, **EXACT)
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
        for name, rows in vectors._values(moments).items():
            by_row = torch.zeros_like(getattr(vectors, name)).index_add(0, rows, weight)
            torch.testing.assert_close(getattr(vectors, name).grad, by_row, **EXACT)
            assert by_row.any()


def test_the_next_event_is_unknown_at_a_share_of_the_positions_in_training():
    config, log = BlossomRecConfig(**EVERYTHING, time_dropout_prob=0.25), timed(4000)
    histories = pack_histories(**log.padded(), vocab_size=config.vocab_size)
    moments = read_moments(histories, config, training=True)
    whole = read_moments(histories, config)
    for dropped, all_known, unknown in (
        (moments.next_time, whole.next_time, UNKNOWN_TIME),
        (moments.next_type, whole.next_type, UNKNOWN_TYPE),
    ):
        known = dropped != unknown
        assert torch.equal(dropped[known], all_known[known])
        share = float((~known & (all_known != unknown)).sum() / (all_known != unknown).sum())
        assert 0.2 < share < 0.3
    for name in ("time", "previous_time", "event_type"):
        assert torch.equal(getattr(moments, name), getattr(whole, name))


@torch.no_grad()
def test_without_now_is_the_unknown_vector_and_the_default_type_is_the_first_target():
    model, log = event_recommender(**EVERYTHING, target_event_types=["buy", "cart"]), timed(9, 14)
    batch = log.padded()
    given = batch | {"prediction_time": torch.full((2,), UNKNOWN_TIME), "target_event_type": torch.tensor([2, 2])}
    omitted = {name: x for name, x in batch.items() if name not in ("prediction_time", "target_event_type")}
    assert torch.equal(model(**given).logits, model(**omitted).logits)
    assert torch.equal(model(**given | {"target_event_type": 2}).logits, model(**omitted).logits)


def test_checkpoints_keep_tables_and_vectors(tmp_path):
    model = event_recommender(**EVERYTHING | {"time_zone": "America/New_York"}).float()
    model.model.latest_time.fill_(1_600_000_000)
    model.save_pretrained(tmp_path)
    again = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    for name in EVERYTHING:
        assert getattr(again.config, name) == getattr(model.config, name)
    log = timed(20, 4)
    assert torch.equal(again(**log.padded()).logits, model(**log.padded()).logits)
    assert int(again.model.latest_time) == 1_600_000_000
    with pytest.raises(
        ValueError, match="`time_zone` is 'UTC', but the checkpoint was trained with .*America/New_York"
    ):
        BlossomRecForSequentialRecommendation.from_pretrained(tmp_path, time_zone="UTC")


def test_features_are_added_to_an_older_checkpoint(tmp_path):
    plain = recommender().float()
    plain.save_pretrained(tmp_path)
    model = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path, **EVERYTHING, ignore_mismatched_sizes=True)
    log = timed(20, 4)
    items = log.padded()["input_ids"]
    assert torch.equal(model(**log.padded()).logits, plain(items).logits)
    assert model.model.event_vectors.gap_bounds.tolist() == GAP_BOUNDS


def test_a_cache_keeps_times_and_types_on_disk(tmp_path):
    model, log = event_recommender(**EVERYTHING), timed(30, 2, 11)
    seen = log.part([0] * 3, [20, 2, 0])._replace(now=torch.full((3,), UNKNOWN_TIME))
    with torch.no_grad():
        model(**seen.padded(), use_cache=True).cache.save(tmp_path / "cache")
        cache = BlossomRecCache.load(tmp_path / "cache", model)
        assert cache.last_timestamps.tolist() == [int(log.times[0][19]), int(log.times[1][1]), UNKNOWN_TIME]
        found = model.recommend(**log.part([20, 2, 0], [30, 2, 11]).lists(), cache=cache)
        expected = model.recommend(**log.lists())
    torch.testing.assert_close(found.scores, expected.scores, **EXACT)
    assert cache.nbytes == BlossomRecCache.size_in_bytes(model.config, 3, cache.capacity, torch.float64)
    other = event_recommender(**EVERYTHING | {"time_zone": "UTC"})
    with pytest.raises(ValueError, match="`time_zone` is 'UTC' and 'Europe/Berlin'"):
        BlossomRecCache.load(tmp_path / "cache", other)


BAD = {
    "`timestamps` goes backwards inside a history, from 1000000500 to 1000000400; sort": {
        "timestamps": torch.tensor([[10**9, 10**9 + 500, 10**9 + 400]])
    },
    "`prediction_time` is 999999999, before the last event of its history at 1000000500; give": {
        "prediction_time": 999_999_999
    },
    "contains 1000000500000, which is in milliseconds; times are in seconds, so divide them by 1,000.": {
        "timestamps": torch.tensor([[10**12, 10**12 + 1, 10**12 + 500_000]])
    },
    "contains 1500000000000000, which is in microseconds; .* divide them by 1,000,000.": {
        "prediction_time": 15 * 10**14
    },
    "`timestamps` is None, but the model reads times": {"timestamps": None},
    "`event_type_ids` is None, but the model reads event types": {"event_type_ids": None},
    "`timestamps` is of torch.float64; it must be an int64 tensor, seconds": {
        "timestamps": torch.tensor([[1e9, 1e9, 1e9]], dtype=torch.float64)
    },
    r"`timestamps` has shape \[1, 2\]; it must be \[1, 3\], one value per event": {
        "timestamps": torch.tensor([[10**9, 10**9]])
    },
    r"`prediction_time` has shape \[2\]; it must be \[1\], one value per history": {
        "prediction_time": torch.tensor([2 * 10**9] * 2)
    },
    "`event_type_ids` contains 3; types are 0 to 2, as in `config.event_types` .view, cart, buy., or −1": {
        "event_type_ids": torch.tensor([[0, 3, 1]])
    },
    "`target_event_type` contains -2; types are": {"target_event_type": -2},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_a_sentence(message):
    model = event_recommender(**EVERYTHING)
    good = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "timestamps": torch.tensor([[10**9, 10**9 + 400, 10**9 + 500]]),
        "event_type_ids": torch.tensor([[0, -1, 2]]),
    }
    model(**good)
    with pytest.raises(ValueError, match=message):
        model(**good | BAD[message])
    cache = model(**good, use_cache=True).cache
    with pytest.raises(ValueError, match="backwards inside a history, from 1000000500 to 1000000499"):
        model(**good | {"timestamps": torch.tensor([[10**9 + 499, 10**9 + 600, 10**9 + 700]])}, cache=cache)
    nothing = torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="`prediction_time` is 1000000499, before the last event"):
        model.recommend(nothing, timestamps=nothing, event_type_ids=nothing, cache=cache, prediction_time=10**9 + 499)
    assert cache.lengths.tolist() == [3]


def test_now_and_the_target_type_are_whole_numbers_of_any_kind():
    model, log = event_recommender(**EVERYTHING), timed(3, 5)
    batch = log.padded()
    now, target = 2_000_000_000, 2
    expected = model.recommend(**batch | {"prediction_time": now, "target_event_type": target}).scores
    for convert in (np.int64, torch.tensor, lambda x: [x, x], lambda x: np.array([x, x])):
        given = {"prediction_time": convert(now), "target_event_type": convert(target)}
        torch.testing.assert_close(model.recommend(**batch | given).scores, expected, **EXACT)
    for name, values, message in (
        ("prediction_time", 2**70, f"is {2**70}; it must be an int64 number, seconds"),
        ("prediction_time", [2**70, 0], ".*; it must be one integer, or one per history, seconds since 1970"),
        ("prediction_time", [now, None], ".*; it must be one integer, or one per history, seconds since 1970"),
        ("target_event_type", "buy", "is 'buy'; it must be one integer, or one per history, indices of `config.event"),
        ("event_type_ids", [["buy"] * 5] * 2, "must contain whole numbers, indices of `config.event_types`"),
        ("input_ids", None, "is None; it must be a list or tensor of vocabulary ids"),
        ("attention_mask", [[1] * 5] * 2, "is of list; it must be a tensor"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            model.recommend(**batch | {name: values})


def test_without_events_there_are_no_times_and_types_to_give():
    model, log, now = event_recommender(**EVERYTHING), timed(3, 5), 2_000_000_000
    cache = model(**log.padded(), use_cache=True).cache
    found = model.recommend([[], []], cache=cache, prediction_time=now, target_event_type=1)
    expected = model.recommend(**log.padded() | {"prediction_time": now, "target_event_type": 1})
    torch.testing.assert_close(found.scores, expected.scores, **EXACT)
    assert model.recommend([[], []], prediction_time=now).item_ids.shape == (2, 10)
    with pytest.raises(ValueError, match="`timestamps` is None, but the model reads it"):
        model.recommend([[5], []], cache=cache)


def test_states_are_recommended_from_with_checked_times_and_types():
    model, log = event_recommender(**EVERYTHING | {"time_features": ["next_gap", "hour"]}), timed(3, 5)
    cache = model(**log.padded(), use_cache=True).cache
    states, times, now = cache.last_hidden_state, cache.last_timestamps, 2_000_000_000
    expected = model.recommend(**log.padded() | {"prediction_time": now, "target_event_type": 1}, exclude_seen=False)
    found = model.recommend_from_states(states, timestamps=times, prediction_time=now, target_event_type=1)
    torch.testing.assert_close(found.scores, expected.scores, **EXACT)
    for changes, message in (
        ({"prediction_time": now * 1000}, "which is in milliseconds"),
        ({"prediction_time": 5}, "`prediction_time` is 5, before the last event"),
        ({"prediction_time": [now]}, r"`prediction_time` has shape \[1\]; it must be \[2\]"),
        (
            {"prediction_time": [1.5, 2.5]},
            "`prediction_time` is of torch.float32; it must be an int64 tensor, seconds",
        ),
        ({"target_event_type": 9}, "`target_event_type` contains 9; types are 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.recommend_from_states(states, **{"timestamps": times, "prediction_time": now} | changes)


def test_another_unit_than_in_training_is_named():
    model = event_recommender(time_features=["previous_gap"])
    model.model.latest_time.fill_(1_600_000_000)
    items = torch.tensor([[5, 6]])
    model(items, timestamps=torch.tensor([[1_400_000_000, 1_790_000_000]]))
    with pytest.raises(
        ValueError, match="contains 1500000, 1,000 times less than .* training data, 1600000000; multiply"
    ):
        model(items, timestamps=torch.tensor([[1_400_000, 1_500_000]]))
    with pytest.raises(ValueError, match="contains 17000, far less than .* give seconds since 1970"):
        model(items, timestamps=torch.tensor([[16_000, 17_000]]))


def test_lists_of_other_lengths_than_the_items_are_refused():
    model = event_recommender(time_features=["hour"])
    with pytest.raises(ValueError, match=r"`timestamps\[1\]` has 1 values, `input_ids\[1\]` 2 items"):
        model.recommend([[5, 6, 7], [8, 9]], timestamps=[[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="`timestamps` has dtype torch.float32; it must contain whole numbers"):
        model.recommend([[5, 6, 7], [8]], timestamps=[[1, 2.5, 3], [4]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_features": ["next_gap", "month"]}, "`time_features` is 'month'; it must be one of 'previous_gap'"),
        ({"time_features": "hour"}, "`time_features` is 'hour'; it must be a list of different names, or None"),
        ({"event_types": ["a", "a"]}, "`event_types` is .* it must be a list of different names"),
        ({"target_event_types": ["buy"]}, "`target_event_types` has 'buy', which is not among `event_types`"),
        ({"time_zone": None}, "`time_zone` is None; it must be an IANA name"),
        ({"time_dropout_prob": 1.5}, "`time_dropout_prob` is 1.5; it must be a number"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BlossomRecConfig(**settings)


def test_equal_features_in_another_order_are_equal():
    first, second = (BlossomRecConfig(time_features=names) for names in (["hour", "next_gap"], ("next_gap", "hour")))
    assert first.time_features == second.time_features == ["next_gap", "hour"]
    assert BlossomRecConfig(time_features=[]).time_features is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training_compiles_without_graph_breaks(layout):
    layers = {"num_hidden_layers": 1, "attention_types": "blossom", "hidden_dropout_prob": 0.0}
    model = event_recommender(**EVERYTHING, **layers, time_dropout_prob=0.0).train()
    log = timed(20, 3, 60)
    batch = log.packed() if layout == "packed" else log.padded("left")
    losses, gradients = [], []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = step(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_encode_compiles_without_graph_breaks():
    model, log = event_recommender(**EVERYTHING).model, timed(20, 3, 60)
    histories = pack_histories(**log.packed(), vocab_size=60)
    encode = torch.compile(model.encode, fullgraph=True, backend="eager")
    with torch.no_grad():
        for last_only in (False, True):
            expected = model.encode(histories, last_only=last_only)
            torch.testing.assert_close(encode(histories, last_only=last_only), expected)


def test_compiled_inference_reads_the_columns(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    model, log = event_recommender(**EVERYTHING, target_event_types=["buy"]), timed(20, 3, 30, 7)
    expected = [model.recommend(**log.lists())]
    unknown = {**log.lists(), "prediction_time": None, "target_event_type": None}
    expected.append(model.recommend(**unknown))
    model.compile_for_inference(max_tokens=80, max_histories=10, max_length=40)
    encoder, calls = model.model._static_encoders[0], []
    run = encoder._run
    encoder._run = lambda: calls.append(1) or run()
    for batch, before in zip((log.lists(), unknown), expected):
        found = model.recommend(**batch)
        assert torch.equal(found.item_ids, before.item_ids)
        torch.testing.assert_close(found.scores, before.scores, **EXACT)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="goes backwards"):
        model.recommend(**{**log.lists(), "timestamps": [t.flip(0).tolist() for t in log.times]})
    with pytest.raises(ValueError, match="`timestamps` is None"):
        model.recommend(log.lists()["input_ids"], event_type_ids=log.lists()["event_type_ids"])


def test_embeddings_in_place_of_items_cannot_be_computed_again():
    model, log = event_recommender(time_features=["next_gap_input"]), timed(4)
    embeds = torch.randn(1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="`inputs_embeds` cannot be combined with a cache"):
        model(inputs_embeds=embeds, timestamps=log.padded()["timestamps"], use_cache=True)
