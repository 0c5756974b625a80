"""The HTTP service: answers, bad input, order and safety of events, what is kept in memory and on the disk."""

import json
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from example_cases import REPOSITORY

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
sys.path.append(str(REPOSITORY / "examples"))
import serve  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402


ITEMS = list(range(100, 150))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BlossomRecConfig(
        vocab_size=52, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3
    )
    model = BlossomRecForSequentialRecommendation(config).eval()
    model.item_counts[2:] = torch.arange(50)
    return model


@pytest.fixture
def service(model, tmp_path):
    """Starts the service on one store, as often as it is called; the recommender is `client.recommender`."""
    clients = []

    def start(max_body=2**20, **settings) -> TestClient:
        recommender = serve.Recommender(
            model, BlossomRecTokenizer.from_items(ITEMS), serve.Store(tmp_path / "events.db"), **settings
        )
        client = TestClient(serve.create_app(recommender, max_body))
        client.recommender = recommender
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def ask(client, status=200, **query) -> dict:
    response = client.post("/recommend", json=query)
    assert response.status_code == status, response.text
    return response.json()


def expected(model, history, **kwargs) -> list[int]:
    ids = torch.tensor([[item - 98 for item in history]], dtype=torch.long)
    return [index + 98 for index in model.recommend(ids, **kwargs).item_ids[0].tolist() if index >= 0]


def recommended(answer) -> list[int]:
    return [x["item"] for x in answer["items"]]


def test_a_history_and_a_users_events_get_what_the_model_recommends(service, model):
    client = service()
    history = [100 + (7 * i) % 50 for i in range(40)]
    answer = ask(client, history=history, top_k=5)
    assert recommended(answer) == expected(model, history, top_k=5)
    scores = [x["score"] for x in answer["items"]]
    assert scores == sorted(scores, reverse=True) and answer["length"] == 40 and not answer["popular"]
    for i in range(0, 40, 8):
        answer = ask(client, user="anna", events=history[i : i + 8], top_k=5)
        assert recommended(answer) == expected(model, history[: i + 8], top_k=5)
    assert ask(client, user="anna", top_k=5) == answer
    few = ask(client, user="anna", candidates=[101, 102, 103], exclude=[102], exclude_seen=False)
    assert sorted(recommended(few)) == [101, 103]
    assert "anna" in client.recommender.caches and "bert" not in client.recommender.caches


def test_unknown_items_are_dropped_and_reported(service, model):
    client = service()
    answer = ask(client, history=[110, 7, 120, 7, 9], exclude=[8])
    assert answer["unknown"] == [7, 9, 8] and answer["length"] == 2
    assert recommended(answer) == expected(model, [110, 120])
    assert ask(client, user="u", events=[7])["popular"]


def test_an_empty_history_gets_the_popular_items(service):
    answer = ask(service(), history=[], top_k=3)
    assert recommended(answer) == [149, 148, 147] and answer["popular"] and answer["items"][0]["score"] == 49


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "history"),
        ({"history": [100], "user": "anna"}, "either"),
        ({"history": [100], "events": [101]}, "either"),
        ({"history": ["100"]}, "raw ids are int"),
        ({"history": [1.5]}, "valid"),
        ({"history": [100], "top_k": 0}, "greater than or equal to 1"),
        ({"history": [100], "top_k": 51}, "50 items"),
        ({"history": [100] * 65}, "`history` has 65 items; it may have 64"),
        ({"history": [100], "nonsense": 1}, "nonsense"),
        ({"user": ""}, "at least 1"),
        ({"user": "a" * 300}, "256"),
    ],
)
def test_bad_requests_are_told(service, query, words):
    response = service(max_history=64).post("/recommend", json=query)
    assert response.status_code == 422 and words in response.text


def test_bodies_that_cannot_be_read(service):
    client = service(max_body=1000)
    for body in (b'{"history": [1', b"\xff\xfe", b"[" * 900, b'{"user": "\\ud800"}', b""):
        response = client.post("/recommend", content=body, headers={"content-type": "application/json"})
        assert 400 <= response.status_code < 500 and response.json()["detail"], body
    assert client.post("/recommend", content=b" " * 1001).status_code == 413
    assert client.post("/recommend", content=iter([b" " * 600] * 2)).status_code == 413
    assert ask(client, history=[100])["length"] == 1


def test_events_of_one_user_at_once_are_applied_in_order_and_none_is_lost(service, tmp_path):
    client = service()
    # The worker is held up while requests come in, so that they share batches.
    order, submit = [], client.recommender.submit
    lock = threading.Lock()

    def ordered(query):
        with lock:
            order.extend((query.user, item) for item in query.events)
            return submit(query)

    client.recommender.submit = ordered
    with ThreadPoolExecutor(16) as pool:
        jobs = [(f"user{i % 3}", ITEMS[(i * 7) % 50]) for i in range(120)]
        answers = list(pool.map(lambda job: ask(client, user=job[0], events=[job[1]]), jobs))
    assert len(answers) == 120
    for user in ("user0", "user1", "user2"):
        stored = serve.Store(tmp_path / "events.db").latest(user, 100)
        assert stored == [item for who, item in order if who == user] and len(stored) == 40
        assert client.recommender.caches[user].item_ids[0].tolist() == [item - 98 for item in stored]
        lengths = [a["length"] for a, job in zip(answers, jobs) if job[0] == user]
        assert sorted(lengths) == list(range(1, 41))
    assert client.recommender.batches._sum.get() > 120 - 1


def test_users_that_were_dropped_or_before_a_restart_are_rebuilt(service, model):
    client = service(cache_bytes=30_000)
    histories = {f"user{i}": [ITEMS[(i + 3 * j) % 50] for j in range(20)] for i in range(8)}
    for user, history in histories.items():
        ask(client, user=user, events=history)
    recommender = client.recommender
    assert 0 < recommender.used_bytes <= 30_000 and len(recommender.caches) < 8
    assert recommender.used_bytes == sum(cache.nbytes for cache in recommender.caches.values())
    again = service()
    for user, history in histories.items():
        for each in (client, again):
            assert recommended(ask(each, user=user)) == expected(model, history)
    metrics = client.get("/metrics").text
    assert "blossomrec_events_stored_total 160.0" in metrics and "blossomrec_users_dropped_total" in metrics
    assert 'blossomrec_answers_total{status="200"} 16.0' in metrics


def test_a_long_history_is_cut_to_its_latest_items(service, model):
    client = service(max_history=32)
    history = [ITEMS[(11 * j) % 50] for j in range(60)]
    for i in range(0, 60, 4):
        answer = ask(client, user="anna", events=history[i : i + 4], exclude_seen=False)
        assert 24 <= answer["length"] <= 32 or i < 28
    assert recommended(answer) == expected(model, history[60 - answer["length"] :], exclude_seen=False)


def test_a_failure_stores_nothing_and_is_not_remembered(service, model, tmp_path):
    client = service()
    ask(client, user="anna", events=[100, 110, 120])
    add = client.recommender.store.add

    def disk_full(events):
        raise sqlite3.OperationalError("database or disk is full")

    client.recommender.store.add = disk_full
    assert "nothing was stored" in ask(client, 500, user="anna", events=[130])["detail"]
    client.recommender.store.add = add
    answer = ask(client, user="anna", events=[140])
    assert answer["length"] == 4 and recommended(answer) == expected(model, [100, 110, 120, 140])
    weight = model.lm_head.weight.detach()
    kept = weight.clone()
    weight.fill_(torch.nan)
    assert "nothing was stored" in ask(client, 500, user="anna", events=[149])["detail"]
    weight.copy_(kept)
    assert ask(client, user="anna", top_k=5)["items"] == answer["items"][:5]
    assert serve.Store(tmp_path / "events.db").latest("anna", 10) == [100, 110, 120, 140]


def test_too_many_waiting_and_a_dead_worker(service, model):
    client = service(max_waiting=1)
    assert client.get("/health").json() == {"status": "ok"}
    hold, held = threading.Event(), threading.Event()
    answer = client.recommender._answer

    def slow(jobs):
        held.set()
        hold.wait(10)
        answer(jobs)

    client.recommender._answer = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, history=[100])
        held.wait(10)
        second = pool.submit(ask, client, history=[100])
        while client.recommender.waiting.empty():
            pass
        assert "try again" in ask(client, 503, history=[100])["detail"]
        hold.set()
        assert first.result() == second.result()
    client.recommender.waiting.put(None)
    client.recommender.thread.join()
    assert client.get("/health").status_code == 503


def test_the_requests_are_described(service):
    paths = service().get("/openapi.json").json()["paths"]
    assert {"/recommend", "/health", "/metrics"} <= set(paths)


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(run_example, tmp_path):
    pytest.importorskip("uvicorn")
    config = BlossomRecConfig(vocab_size=302, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    BlossomRecForSequentialRecommendation(config).save_pretrained(tmp_path / "model")
    BlossomRecTokenizer.from_items([f"item {i}" for i in range(300)]).save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--clients", 6, "--seconds", 2, "--json", tmp_path / "figures.json")
    run_example("load_test.py", *arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["events_acknowledged"] > 6 and figures["errors"] == figures["lost"] == []
