"""The worker of the service with models of times and event types: its answers are those of the model on whole histories."""

import logging
import random
import sqlite3
import time
from contextlib import ExitStack

import pytest
import torch
from small_cases import make_model

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.model.ids_blossomrec import UNKNOWN_TIME


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient  # noqa: E402

from blossomrec_hf.commands.serve import create_app  # noqa: E402
from blossomrec_hf.serving.event_store import Store, StoredEvent  # noqa: E402
from blossomrec_hf.serving.recommender import Recommender  # noqa: E402


ITEMS = list(range(100, 140))
TYPES = ["view", "cart", "buy"]
START = 1_700_000_000
FEATURES = {
    "hidden": {"time_features": ["previous_gap", "next_gap"]},
    "input": {"time_features": ["next_gap_input", "hour"]},
    "types": {"event_types": TYPES, "target_event_types": ["cart", "buy"]},
    "all": {"time_features": ["previous_gap", "next_gap", "next_gap_input", "hour", "weekday"], "event_types": TYPES},
}


def model_of(features: str):
    model = make_model(42, initializer_range=0.3, repeat_share=1.0, **FEATURES[features]).eval()
    for name, parameter in model.named_parameters():
        if "vectors" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)  # they start at zero
    return model


@pytest.fixture
def start(tmp_path):
    """Starts the service on one store, and ends the one before."""
    running = ExitStack()

    def serve(model, **settings) -> TestClient:
        running.close()
        recommender = Recommender(
            model, BlossomRecTokenizer.from_items(ITEMS), Store(tmp_path / "events.db"), **settings
        )
        client = TestClient(create_app(recommender))
        client.recommender = recommender
        return running.enter_context(client)

    with running:
        yield serve


def ask(client, status=200, **query):
    response = client.post("/recommend", json=query)
    assert response.status_code == status, response.text
    return response.json()


def expected(model, events, now=None, target=None) -> list[int]:
    """What the model recommends for a whole history of (item, time, type)."""
    events = [event for event in events if event[0] in ITEMS]
    types = {name: index for index, name in enumerate(TYPES)}
    out = model.recommend(
        [[item - 98 for item, _, _ in events]],
        timestamps=[[seconds for _, seconds, _ in events]],
        event_type_ids=[[types.get(name, -1) for _, _, name in events]],
        prediction_time=UNKNOWN_TIME if now is None else now,
        target_event_type=model.config.default_target_type if target is None else types[target],
        top_k=5,
    )
    return [index + 98 for index in out.item_ids[0].tolist()]


def draw_events(number: int, seconds: int) -> list[tuple]:
    """Events with gaps from 0 seconds to months; some items and types are unknown to the model."""
    events = []
    for _ in range(number):
        seconds += int(random.choice([0, 1, 60, 3_600, 86_400, 10**7]) * random.random())
        events.append((random.choice([*ITEMS, 99]), seconds, random.choice([*TYPES, "gift", None])))
    return events


def fields(events) -> dict:
    return {"timestamps": [x[1] for x in events], "event_types": [x[2] for x in events]}


@pytest.mark.parametrize("features", FEATURES)
def test_answers_are_those_of_the_model_on_whole_histories(start, features):
    model = model_of(features)
    client = start(model, max_history=64)
    known = {user: [(100, START, "view")] for user in ("anna", "ben")}
    for user, events in known.items():
        ask(client, user=user, events=[events[0][0]], **fields(events))
    for step in range(14):
        user = random.choice(["anna", "ben"])
        new = draw_events(random.choice([0, 1, 1, 3]), known[user][-1][1])
        known[user] += new
        query = {"now": known[user][-1][1] + random.choice([0, 5, 10**6])} if random.random() < 0.7 else {}
        target = random.choice([None, "buy"]) if "event_types" in FEATURES[features] else None
        if target is not None:
            query["target_event_type"] = target
        if step == 9:  # caches are gone, the store remains
            client = start(model, max_history=64)
        answer = ask(client, user=user, events=[x[0] for x in new], top_k=5, **fields(new), **query)
        wanted = expected(model, known[user], query.get("now"), target)
        assert [x["item"] for x in answer["items"]] == wanted
        history = ask(client, history=[x[0] for x in known[user]], top_k=5, **fields(known[user]), **query)
        assert [x["item"] for x in history["items"]] == wanted
    stored = dict.fromkeys(known, client.recommender.store)
    for user, store in stored.items():
        reader = Store(store.path, read_only=True)
        assert reader.latest(user, -1) == [StoredEvent(*event) for event in known[user]]


def test_events_without_times_get_that_of_the_request(start, monkeypatch):
    client = start(model_of("hidden"))
    path = client.recommender.store.path
    before = int(time.time())
    ask(client, user="anna", events=[100, 101])
    ask(client, user="anna", events=[102], timestamps=[before + 1_000])
    ask(client, user="anna", events=[103])  # the clock is behind: times never fall
    times = [event.timestamp for event in Store(path, read_only=True).latest("anna", -1)]
    assert before <= times[0] == times[1] <= time.time() and times[2:] == [before + 1_000] * 2
    ask(client, user="anna", now=before + 1_000)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"history": [100, 101]}, "`timestamps` is missing; the model reads it"),
        ({"history": [100], "timestamps": [START]}, "`event_types` is missing; the model reads it"),
        ({"user": "anna", "events": [100], "timestamps": [START, START]}, "2 values for 1 items"),
        ({"user": "anna", "events": [100], "event_types": []}, "0 values for 1 items"),
        ({"user": "anna", "events": [100, 101], "timestamps": [START, START - 1]}, "goes backwards"),
        ({"user": "anna", "events": [100], "timestamps": [START * 1000]}, "which is in milliseconds"),
        ({"user": "anna", "events": [100], "timestamps": [-1]}, "0 or more"),
        ({"user": "anna", "events": [100], "timestamps": [int(time.time()) + 90_000]}, "more than a day ahead"),
        ({"user": "anna", "events": [100], "timestamps": [START + 0.5]}, "valid integer"),
        ({"user": "anna", "events": [100], "timestamps": [START], "now": START - 1}, "before the last item"),
        ({"user": "anna", "now": START * 1000}, "`now` contains 1700000000000, which is in milliseconds"),
        ({"user": "anna", "events": [100], "target_event_type": "gift"}, "the model has view, cart, buy"),
        ({"user": "ben", "events": [100], "timestamps": [START]}, "before the latest stored event of the user"),
        ({"user": "ben", "now": START}, "`now` is 1700000000, before the latest stored event"),
    ],
)
def test_times_and_types_that_cannot_be_read_store_nothing(start, query, words):
    client = start(model_of("all"))
    ask(client, user="ben", events=[101], timestamps=[START + 60], event_types=["view"])
    assert words in str(ask(client, 422, **query)["detail"])
    reader = Store(client.recommender.store.path, read_only=True)
    assert reader.number("anna") == 0 and reader.number("ben") == 1
    ask(client, user="ben", events=[102], timestamps=[START + 60])  # the service goes on


def test_unknown_event_types_are_named(start):
    events = {"user": "anna", "events": [100, 101, 102, 103], "event_types": ["gift", "view", None, "gift"]}
    client = start(model_of("types"))
    assert ask(client, **events)["unknown_types"] == ["gift"]
    assert ask(client, user="anna")["unknown_types"] == []  # they are stored, and the request has none
    assert [event.event_type for event in client.recommender.store.latest("anna", -1)] == events["event_types"]
    assert ask(start(model_of("hidden")), **events)["unknown_types"] == []  # a model that reads no types


@pytest.mark.parametrize("features", ["hidden", "input"])
def test_events_of_an_earlier_version_have_the_time_of_the_next_one(start, tmp_path, caplog, features):
    old = sqlite3.connect(tmp_path / "events.db")
    old.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
    old.executemany("INSERT INTO events (user, item) VALUES ('anna', ?)", [["100"], ["103"], ["101"]])
    old.commit()
    model = model_of(features)
    with caplog.at_level(logging.WARNING):
        client = start(model)
    assert "3 events of" in caplog.text and "have no time" in caplog.text
    assert ask(client, user="anna")["length"] == 3
    now = START + 3_600
    answer = ask(client, user="anna", events=[105], timestamps=[START], now=now, top_k=5)
    whole = [(item, START, None) for item in (100, 103, 101, 105)]
    assert [x["item"] for x in answer["items"]] == expected(model, whole, now)
    client = start(model)
    again = ask(client, user="anna", now=now, top_k=5)
    assert [x["item"] for x in again["items"]] == [x["item"] for x in answer["items"]]
