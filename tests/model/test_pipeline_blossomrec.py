"""`pipeline("sequential-recommendation")`, with the package and from a checkpoint alone."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from event_cases import event_recommender, timed
from transformers import pipeline

from blossomrec_hf import (
    BlossomRecConfig,
    BlossomRecForSequentialRecommendation,
    BlossomRecTokenizer,
    SequentialRecommendationPipeline,
)


ITEMS = [f"item {i}" if i % 3 else f"{i}%[x]" for i in range(40)]


def build(items=ITEMS) -> tuple[BlossomRecForSequentialRecommendation, BlossomRecTokenizer]:
    tokenizer = BlossomRecTokenizer.from_items(items)
    config = BlossomRecConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=4, intermediate_size=24)
    model = BlossomRecForSequentialRecommendation(config).eval()
    model.item_counts[2:] = torch.randperm(len(items))
    return model, tokenizer


def draw(length: int) -> list[str]:
    return random.sample(ITEMS, length)


def expected(model, tokenizer, history, **kwargs) -> list[tuple[str, float]]:
    out = model.recommend([tokenizer.encode_items(history)], **kwargs)
    items = tokenizer.decode_items(out.item_ids[0].clamp(min=0))
    return [
        (item, pytest.approx(score, abs=1e-5))
        for item, score in zip(items, out.scores[0].tolist())
        if score > -torch.inf
    ]


def as_pairs(answer: list[dict]) -> list[tuple[str, float]]:
    return [(entry["item"], entry["score"]) for entry in answer]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, tokenizer = build()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.mark.parametrize("trust_remote_code", [None, True, False])
def test_from_a_folder(saved, trust_remote_code):
    folder, model, tokenizer = saved
    pipe = pipeline("sequential-recommendation", model=str(folder), trust_remote_code=trust_remote_code)
    assert type(pipe) is SequentialRecommendationPipeline
    history = draw(12)
    assert as_pairs(pipe(history, top_k=5)) == expected(model, tokenizer, history, top_k=5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_lists_dictionaries_generators_and_batches(saved, batch_size):
    _, model, tokenizer = saved
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, top_k=6, batch_size=batch_size)
    inputs, answers = [], []
    for _ in range(8):
        history, candidates, exclude = draw(random.randint(1, 30)), draw(random.randint(1, 9)), draw(3)
        kind = random.randrange(4)
        if kind == 0:
            inputs.append(history)
            answers.append(expected(model, tokenizer, history, top_k=6))
        else:
            ids = {"candidate_ids": [tokenizer.encode_items(candidates)]} if kind != 1 else {}
            ids |= {"exclude_ids": [tokenizer.encode_items(exclude)]} if kind != 2 else {}
            inputs.append({"items": history})
            if kind != 1:
                inputs[-1]["candidates"] = candidates
            if kind != 2:
                inputs[-1]["exclude"] = exclude
            answers.append(expected(model, tokenizer, history, top_k=6, **ids))
    assert [as_pairs(answer) for answer in pipe(inputs)] == answers
    assert [as_pairs(answer) for answer in pipe(entry for entry in inputs)] == answers
    assert as_pairs(pipe(inputs[0])) == answers[0]
    assert pipe([]) == []


def test_candidates_and_exclusions_for_all_inputs(saved):
    _, model, tokenizer = saved
    candidates, exclude, own = draw(9), draw(3), draw(4)
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, top_k=6, exclude=exclude)
    histories = [draw(12), draw(3)]

    def wanted(history, candidates, exclude):
        ids = {"candidate_ids": candidates and [tokenizer.encode_items(candidates)]}
        return expected(model, tokenizer, history, top_k=6, exclude_ids=[tokenizer.encode_items(exclude)], **ids)

    answers = [wanted(history, candidates, exclude) for history in histories]
    assert [as_pairs(answer) for answer in pipe(histories, candidates=candidates)] == answers
    inputs = [{"items": histories[0], "candidates": own, "exclude": own[:1]}, histories[1]]
    answers = [wanted(histories[0], own, exclude + own[:1]), wanted(histories[1], candidates, exclude)]
    assert [as_pairs(answer) for answer in pipe(inputs, candidates=candidates)] == answers
    assert as_pairs(pipe(histories[0])) == wanted(histories[0], None, exclude)
    for bad in ({"candidates": "item 1"}, {"exclude": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}.*list of raw item ids"):
            pipe(histories, **bad)


def test_similar_items_in_raw_ids(saved, caplog):
    folder, model, tokenizer = saved
    recommender, items, candidates = pipeline("sequential-recommendation", model=str(folder)), draw(3), draw(20)
    ids = tokenizer.encode_items(items)
    for given, options in (
        ({}, {}),
        ({"min_score": 0.1}, {"min_score": 0.1}),
        ({"candidates": [*candidates, "new"]}, {"candidate_ids": tokenizer.encode_items(candidates)}),
        ({"exclude": candidates}, {"exclude_ids": tokenizer.encode_items(candidates)}),
    ):
        out = model.similar_items(ids, 15, **options)
        answers = recommender.similar_items(items, 15, **given)
        for answer, found, scores in zip(answers, out.item_ids.tolist(), out.scores.tolist(), strict=True):
            found = [index for index in found if index != -1]
            assert as_pairs(answer) == list(zip(tokenizer.decode_items(found), scores))
    assert caplog.messages == ["Dropped 1 unknown items from the candidates."]
    assert recommender.similar_items([]) == []
    with pytest.raises(ValueError, match="`items` contains 'new', which is not in the model's vocabulary"):
        recommender.similar_items([items[0], "new"])
    with pytest.raises(ValueError, match="`items` is 'item 1'; it must be a list of raw item ids"):
        recommender.similar_items("item 1")


def test_integer_ids_and_parameters():
    items = random.sample(range(10**6), 30)
    model, tokenizer = build(items)
    pipe = SequentialRecommendationPipeline(model=model, tokenizer=tokenizer)
    history = items[:8]
    plain = pipe(history, top_k=30, exclude_seen=False)
    assert sorted(entry["item"] for entry in plain) == sorted(items)
    assert not {entry["item"] for entry in pipe(history, top_k=30)} & set(history)
    lowest = plain[9]["score"]
    assert pipe(history, top_k=30, exclude_seen=False, min_score=lowest) == plain[:10]
    assert pipe(history, max_length=3, top_k=5) != pipe(history, top_k=5)
    assert pipe(torch.tensor(history)) == pipe(history) == pipe(tuple(history))


def test_unknown_items_are_dropped_and_empty_histories_get_the_popular_ones(saved, caplog):
    _, model, tokenizer = saved
    pipe = SequentialRecommendationPipeline(model=model, tokenizer=tokenizer)
    history = draw(5)
    assert pipe([*history, "never seen"]) == pipe(history)
    popular = tokenizer.decode_items(model.item_counts.argsort(descending=True)[:3])
    for nothing in ({"items": []}, ["never seen"]):
        assert [entry["item"] for entry in pipe(nothing, top_k=3)] == popular
    assert [entry["item"] for entry in pipe([[], history], top_k=3)[0]] == popular
    assert pipe({"items": history, "candidates": ["never seen"]}) == []
    assert pipe({"items": history, "candidates": []}) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"candidates": ["item 1"]}, "items"),
        ({"items": ["item 1"], "candidate": []}, "'candidate'"),
        ({"items": "item 1"}, "items"),
        ([["item 1"], [3]], "3, a int"),
    ],
)
def test_bad_input_is_named(saved, bad, message):
    _, model, tokenizer = saved
    with pytest.raises(ValueError, match=message):
        SequentialRecommendationPipeline(model=model, tokenizer=tokenizer)(bad)


@pytest.fixture(scope="module")
def with_events():
    _, tokenizer = build()
    features = {"time_features": ["previous_gap", "next_gap", "hour"], "event_types": ["view", "buy"]}
    model = event_recommender(**features, vocab_size=len(tokenizer)).float()
    return SequentialRecommendationPipeline(model=model, tokenizer=tokenizer, top_k=5), model, tokenizer


@pytest.mark.parametrize("batch_size", [1, 3])
def test_times_and_types_of_events_are_read(with_events, batch_size):
    pipe, model, tokenizer = with_events
    inputs, answers = [], []
    for number in range(6):
        log = timed(random.randint(1, 20))
        history, times = draw(len(log.items[0])), log.times[0].tolist()
        types = random.choices(["view", "buy", "never seen"], k=len(history))
        inputs.append({"items": history, "timestamps": times, "event_types": types})
        columns = {"timestamps": [times], "event_type_ids": [[{"view": 0, "buy": 1}.get(x, -1) for x in types]]}
        if number % 2:
            inputs[-1] |= {"now": times[-1] + 999, "target_event_type": "buy"}
            columns |= {"prediction_time": [times[-1] + 999], "target_event_type": 1}
        answers.append(expected(model, tokenizer, history, top_k=5, **columns))
    assert [as_pairs(answer) for answer in pipe(inputs, batch_size=batch_size)] == answers
    own = [entry | {"now": entry["timestamps"][-1] + 5, "target_event_type": "view"} for entry in inputs[:1]]
    assert pipe(own) == pipe(inputs[:1], now=own[0]["now"], target_event_type="view")
    assert pipe([{"items": []}, inputs[0]])[1] == pipe(inputs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamps": None}, "`timestamps` is None for 2 items; the model reads timestamps, so give a dictionary"),
        ({"timestamps": [1]}, r"`timestamps` is \[1\] for 2 items"),
        ({"timestamps": [1, 2.5]}, "`timestamps` contains 2.5; it must be an int64 number, seconds since 1970"),
        ({"timestamps": [1, 2**63]}, "`timestamps` contains 9223372036854775808; it must be an int64 number"),
        ({"timestamps": {1, 2}}, r"`timestamps` is \{1, 2\} for 2 items"),
        ({"event_types": "view"}, "`event_types` is 'view' for 2 items"),
        ({"event_types": [0, 1]}, "`event_types` contains 0; it must be the name of a type, or None"),
        ({"event_types": [["view"], None]}, r"`event_types` contains \['view'\]; it must be the name of a type"),
        ({"now": "2026-11-27"}, "`now` contains '2026-11-27'; it must be an int64 number"),
        ({"now": True}, "`now` contains True; it must be an int64 number"),
        ({"now": 1}, "`prediction_time` is 1, before the last event of its history at 20"),
        ({"target_event_type": "cart"}, "`target_event_type` is 'cart'; it must be one of 'view', 'buy'"),
        ({"target_event_type": ["buy"]}, r"`target_event_type` is \['buy'\]; it must be one of"),
    ],
)
def test_bad_times_and_types_are_named(with_events, changes, message):
    pipe, _, _ = with_events
    good = {"items": ["item 1", "item 2"], "timestamps": [10, 20], "event_types": ["view", "buy"], "now": 30}
    assert len(pipe(good)) == 5
    with pytest.raises(ValueError, match=message):
        pipe(good | changes)


def test_a_tokenizer_of_another_size_or_a_model_without_a_head_is_refused(saved):
    _, model, tokenizer = saved
    with pytest.raises(ValueError, match="40 ids.*42"):
        SequentialRecommendationPipeline(model=model, tokenizer=BlossomRecTokenizer.from_items(ITEMS[:38]))
    with pytest.raises(ValueError, match="recommend"):
        SequentialRecommendationPipeline(model=model.model, tokenizer=tokenizer)


def test_saving_the_pipeline_saves_all(saved, tmp_path):
    folder, model, tokenizer = saved
    SequentialRecommendationPipeline(model=model, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["blossomrec_hf"] = None  # importing it fails, as where it is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
first, second = sys.argv[1:3]
try:
    pipeline("sequential-recommendation", model=first, trust_remote_code=False)
    raise SystemExit("ran code that nobody trusted")
except ValueError:
    pass
model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
model.save_pretrained(second)
AutoTokenizer.from_pretrained(first, trust_remote_code=True).save_pretrained(second)
pipe = pipeline("sequential-recommendation", model=second, trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe).__module__
assert type(pipe.tokenizer).__module__.startswith("transformers_modules"), type(pipe.tokenizer).__module__
print(json.dumps(pipe(json.loads(sys.argv[3]), top_k=5)))
"""


def test_a_checkpoint_and_its_copy_work_where_the_package_is_not_installed(saved, tmp_path):
    folder, model, tokenizer = saved
    history = draw(9)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), str(tmp_path / "copy"), json.dumps(history)],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert as_pairs(answer) == expected(model, tokenizer, history, top_k=5)
    copied, original = ({path.name for path in f.iterdir() if path.is_file()} for f in (tmp_path / "copy", folder))
    assert copied == original
