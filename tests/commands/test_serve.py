"""The HTTP service: answers, bad input, order and safety of events, what is kept in memory and on the disk."""

import asyncio
import copy
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecTokenizer


pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient  # noqa: E402

from blossomrec_hf.commands import serve  # noqa: E402
from blossomrec_hf.serving.event_store import StoredEvent  # noqa: E402


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model of 300 items with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = BlossomRecConfig(vocab_size=302, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    BlossomRecForSequentialRecommendation(config).save_pretrained(folder)
    BlossomRecTokenizer.from_items([f"item {i}" for i in range(300)]).save_pretrained(folder)
    return folder


@pytest.fixture
def service(model, tmp_path):
    """Starts the service on one store, and ends the one before; the recommender is `client.recommender`."""
    running = ExitStack()

    def start(max_body=2**20, model=model, items=ITEMS, **settings) -> TestClient:
        running.close()
        store = serve.Store(tmp_path / "events.db")
        recommender = serve.Recommender(model, BlossomRecTokenizer.from_items(items), store, **settings)
        client = TestClient(serve.create_app(recommender, max_body))
        client.recommender = recommender
        return running.enter_context(client)

    with running:
        yield start


def ask(client, status=200, **query) -> dict:
    response = client.post("/recommend", json=query)
    assert response.status_code == status, response.text
    return response.json()


def as_described(client, response) -> bool:
    """Whether a response of `/recommend` has the form that `/openapi.json` gives for its status."""
    described = client.get("/openapi.json").json()
    content = described["paths"]["/recommend"]["post"]["responses"][str(response.status_code)]["content"]

    def fits(value, schema) -> bool:
        if "$ref" in schema:
            return fits(value, described["components"]["schemas"][schema["$ref"].split("/")[-1]])
        if "anyOf" in schema:
            return any(fits(value, one) for one in schema["anyOf"])
        if schema["type"] == "array":
            return isinstance(value, list) and all(fits(each, schema["items"]) for each in value)
        if schema["type"] == "object":
            properties = schema["properties"]
            return set(schema.get("required", ())) <= set(value) <= set(properties) and all(
                fits(each, properties[name]) for name, each in value.items()
            )
        return isinstance(value, {"string": str, "integer": int}[schema["type"]])

    return fits(response.json(), content["application/json"]["schema"])


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_seen_items_are_excluded_unless_users_of_the_log_repeat_items(model, service, monkeypatch, share):
    monkeypatch.setattr(model.config, "repeat_share", share)
    client = service()
    for query, excluded in (({}, share != 0.5), ({"exclude_seen": True}, True), ({"exclude_seen": False}, False)):
        everything = {entry["item"] for entry in ask(client, history=[101, 102], top_k=50, **query)["items"]}
        assert everything & {101, 102} == (set() if excluded else {101, 102})


def expected(model, history, **kwargs) -> list[int]:
    ids = torch.tensor([[item - 98 for item in history]], dtype=torch.long)
    return [index + 98 for index in model.recommend(ids, **kwargs).item_ids[0].tolist() if index >= 0]


def kept(folder, user) -> list:
    """The user's events in the store, as another process reads them."""
    return [event.item for event in serve.Store(folder / "events.db", read_only=True).latest(user, -1)]


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
    assert list(client.recommender.users) == ["anna"]


def test_unknown_items_are_reported_and_not_read(service, model):
    client = service()
    answer = ask(client, history=[110, 7, 120, 7, 9], exclude=[8])
    assert answer["unknown"] == [7, 9, 8] and answer["length"] == 2
    assert recommended(answer) == expected(model, [110, 120])
    assert ask(client, user="u", events=[7])["popular"]


def test_events_on_unknown_items_are_read_when_the_vocabulary_has_grown(service, model, tmp_path):
    history = [110, 151, 120, 150, 130]
    for i in (0, 3):
        answer = ask(service(), user="anna", events=history[i : i + 3])
    assert answer["unknown"] == [150] and recommended(answer) == expected(model, [110, 120, 130])
    assert kept(tmp_path, "anna") == history

    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(54)
    answer = ask(service(model=grown, items=[*ITEMS, 150, 151]), user="anna", top_k=5)
    assert answer["length"] == 5 and recommended(answer) == expected(grown, history, top_k=5)
    text = ask(service(model=grown, items=[*map(str, ITEMS), "150", "151"]), user="anna", top_k=5)
    assert recommended(text) == [str(item) for item in recommended(answer)]


def test_a_store_of_text_ids_is_refused_to_a_model_of_integers(service, model, tmp_path):
    ask(service(items=[f"item {item}" for item in ITEMS]), user="anna", events=["item 100"])
    with pytest.raises(ValueError, match="items are text .*'item 100'.* integers"):
        service()


def test_an_empty_history_gets_the_popular_items(service):
    answer = ask(service(), history=[], top_k=3)
    assert recommended(answer) == [149, 148, 147] and answer["popular"] and answer["items"][0]["score"] == 49


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "history"),
        ({"history": [100], "user": "anna"}, "either"),
        ({"history": [100], "events": [101]}, "either"),
        ({"history": ["100"]}, "raw ids of this tokenizer are int"),
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
    client = service(max_history=64)
    response = client.post("/recommend", json=query)
    assert response.status_code == 422 and words in response.text
    assert as_described(client, response)


def test_bodies_that_cannot_be_read(service):
    client = service(max_body=1000)
    for body in (b'{"history": [1', b"\xff\xfe", b"[" * 900, b'{"user": "\\ud800"}', b""):
        response = client.post("/recommend", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422) and as_described(client, response), body
    for long in (b" " * 1001, iter([b" " * 600] * 2)):
        response = client.post("/recommend", content=long)
        assert response.status_code == 413 and as_described(client, response)
    assert ask(client, history=[100])["length"] == 1


def test_a_body_that_was_cut_off_is_not_stored(service, tmp_path):
    client = service()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/recommend",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    # What came is a request by itself. A whole body of two parts is answered.
    first = {"type": "http.request", "body": b'{"user": "anna", "events": [100]}', "more_body": True}
    for last in ({"type": "http.request", "body": b" "}, {"type": "http.disconnect"}):
        messages, sent = [first, last], []

        async def receive(messages=messages):
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message, sent=sent):
            sent.append(message)

        asyncio.run(client.app(dict(scope), receive, send))
        assert sent[0]["status"] == (400 if last["type"] == "http.disconnect" else 200)
    assert kept(tmp_path, "anna") == [100]


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
        stored = kept(tmp_path, user)
        assert stored == [item for who, item in order if who == user] and len(stored) == 40
        assert client.recommender.users[user].cache.item_ids[0].tolist() == [item - 98 for item in stored]
        lengths = [a["length"] for a, job in zip(answers, jobs) if job[0] == user]
        assert sorted(lengths) == list(range(1, 41))
    assert client.recommender.batches._sum.get() > 120 - 1


def test_users_that_were_dropped_or_before_a_restart_are_rebuilt(service, model):
    client = service(cache_bytes=30_000)
    histories = {f"user{i}": [ITEMS[(i + 3 * j) % 50] for j in range(20)] for i in range(8)}
    for user, history in histories.items():
        ask(client, user=user, events=history)
    recommender = client.recommender
    assert 0 < recommender.used_bytes <= 30_000 and len(recommender.users) < 8
    assert recommender.used_bytes == sum(history.cache.nbytes for history in recommender.users.values())
    for user, history in histories.items():
        assert recommended(ask(client, user=user)) == expected(model, history)
    metrics = client.get("/metrics").text
    assert "blossomrec_events_stored_total 160.0" in metrics and "blossomrec_users_dropped_total" in metrics
    assert 'blossomrec_answers_total{status="200"} 16.0' in metrics
    again = service()
    for user, history in histories.items():
        assert recommended(ask(again, user=user)) == expected(model, history)


@pytest.mark.parametrize("max_history", [1, 3, 30, 32])
def test_what_is_read_of_a_long_history_depends_on_its_length_alone(service, model, max_history):
    history = [ITEMS[(11 * j) % 50] for j in range(75)]
    cached = service(max_history=max_history)
    lengths = []
    for i in range(75):
        answer = ask(cached, user="one by one", events=[history[i]], exclude_seen=False)
        lengths.append(answer["length"])
        assert recommended(answer) == expected(model, history[i + 1 - answer["length"] : i + 1], exclude_seen=False)
    shortest = max_history - max(1, max_history // 4) + 1
    assert lengths[:max_history] == list(range(1, max_history + 1))
    assert set(lengths[max_history:]) == set(range(shortest, max_history + 1))

    for number in random.sample(range(1, 76), 5):
        user = f"{number} in chunks"
        for i in range(0, number, max_history):
            ask(cached, user=user, events=history[i : min(i + max_history, number)])
        assert ask(cached, user=user)["length"] == lengths[number - 1]
        restarted = cached = service(max_history=max_history)
        assert ask(restarted, user=user)["length"] == lengths[number - 1]
    assert cached.recommender.rebuilt._value.get() == 1


def test_a_failure_stores_nothing_and_is_not_remembered(service, model, tmp_path, caplog):
    client = service()
    ask(client, user="anna", events=[100, 110, 120])
    add = client.recommender.store.add

    def disk_full(events):
        raise sqlite3.OperationalError("database or disk is full")

    client.recommender.store.add = disk_full
    assert "nothing was stored" in ask(client, 503, user="anna", events=[130])["detail"]
    (record,) = [record for record in caplog.records if "The store failed" in record.message]
    assert "database or disk is full" in record.message and record.exc_info is None
    client.recommender.store.add = add
    answer = ask(client, user="anna", events=[140])
    assert answer["length"] == 4 and recommended(answer) == expected(model, [100, 110, 120, 140])
    weight = model.lm_head.weight.detach()
    sound = weight.clone()
    weight.fill_(torch.nan)
    assert "nothing was stored" in ask(client, 500, user="anna", events=[149])["detail"]
    weight.copy_(sound)
    assert ask(client, user="anna", top_k=5)["items"] == answer["items"][:5]
    assert kept(tmp_path, "anna") == [100, 110, 120, 140]


def test_too_many_waiting_and_a_dead_worker(service, model):
    client = service(max_waiting=1)
    assert client.get("/health").json() == {"status": "ok"}
    hold, held = threading.Event(), threading.Event()
    answer = client.recommender._answer

    def slow(jobs):
        held.set()
        hold.wait(60)
        answer(jobs)

    client.recommender._answer = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, history=[100])
        held.wait(60)
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


def test_a_store_is_served_once_at_a_time(tmp_path):
    first = serve.Store(tmp_path / "events.db")
    first.add([("anna", StoredEvent(100))])
    (tmp_path / "link.db").symlink_to(tmp_path / "events.db")
    for name in ("events.db", "link.db"):
        with pytest.raises(ValueError, match="another process serves"):
            serve.Store(tmp_path / name)
    assert kept(tmp_path, "anna") == [100]
    first.close()
    serve.Store(tmp_path / "link.db").close()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "unable to open"), (b"SQLite format 3, but not really\n" * 99, "not a database")]
)
def test_what_is_no_store_is_refused_and_stays_as_it_is(tmp_path, content, words):
    path = tmp_path / "events.db"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        serve.Store(path)
    assert list(tmp_path.iterdir()) == [path] and (content is None or path.read_bytes() == content)


def test_a_table_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "events.db") as other:
        other.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, user TEXT, page TEXT)")
    with pytest.raises(ValueError, match="no such column: item"):
        serve.Store(tmp_path / "events.db")


@pytest.mark.parametrize("file", ["events.db", "events.db-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_was_deleted_turns_health_red_and_takes_no_events(service, tmp_path, file, replaced):
    client = service()
    ask(client, user="anna", events=[100])
    assert client.get("/health").json() == {"status": "ok"}
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if replaced:
        (tmp_path / file).write_bytes(content)
    response = client.get("/health")
    assert response.status_code == 503 and "deleted or replaced" in response.json()["detail"]
    assert "nothing was stored" in ask(client, 503, user="anna", events=[110])["detail"]
    assert ask(client, history=[100])["length"] == 1


def test_closing_answers_what_waits_and_empties_the_write_ahead_log(model, tmp_path):
    store = serve.Store(tmp_path / "events.db")
    recommender = serve.Recommender(model, BlossomRecTokenizer.from_items(ITEMS), store, max_waiting=4)
    recommender.thread.start()
    begun, go_on, answer = threading.Event(), threading.Event(), recommender._answer

    def slow(jobs):
        begun.set()
        go_on.wait(60)
        answer(jobs)

    recommender._answer = slow
    futures = [recommender.submit(serve.Query(user="anna", events=[100]))]
    assert begun.wait(60)
    futures += [recommender.submit(serve.Query(user="anna", events=[item])) for item in (110, 120, 130, 140)]
    assert futures[3].cancel()  # a request that was given up before its turn
    closing = threading.Thread(target=recommender.close)
    closing.start()
    go_on.set()
    closing.join()
    assert [future.result().length for future in futures if not future.cancelled()] == [1, 2, 3, 4]
    assert not (tmp_path / "events.db-wal").exists()
    with sqlite3.connect(tmp_path / "events.db") as db:
        assert db.execute("SELECT item FROM events ORDER BY id").fetchall() == [("100",), ("110",), ("120",), ("140",)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_history", 0), ("max_batch", 0), ("max_waiting", 0), ("cache_bytes", -1), ("max_body", 0)],
)
def test_settings_that_cannot_work_are_refused(service, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value}; it must be at least"):
        service(**{setting: value})


def test_nothing_is_kept_in_memory_if_there_is_no_room(service, model):
    client = service(cache_bytes=0)
    for length in (1, 2):
        assert ask(client, user="anna", events=[100])["length"] == length
    assert client.recommender.used_bytes == len(client.recommender.users) == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--cache_mib", "-1", "`cache_mib` is -1; it must be at least 0"),
        ("--threads", "0", "`threads` is 0"),
        ("--max_history", "0", "`max_history` is 0"),
        ("--max_batch", "0", "`max_batch` is 0"),
        ("--max_body", "-5", "`max_body` is -5"),
        ("--drain_seconds", "-1", "`drain_seconds` is -1"),
        ("--port", "70000", "`port` is 70000"),
        ("--port", "-1", "`port` is -1"),
        ("--port", "taken", "in use"),
        ("--host", "192.0.2.1", "`host` is 192.0.2.1"),
        ("--device", "gpu", "`device` is gpu"),
        ("--device", "meta", "`device` is meta"),
        ("--store", "no/such/folder/events.db", "`store` is no/such/folder/events.db"),
    ],
)
def test_bad_arguments_end_with_one_sentence(saved, monkeypatch, tmp_path, capsys, option, value, words):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        value = str(taken.getsockname()[1]) if value == "taken" else value
        arguments = {"--model": str(saved), "--port": "0", option: value}
        monkeypatch.setattr(sys, "argv", ["serve", *(word for pair in arguments.items() for word in pair)])
        with pytest.raises(SystemExit) as ended:
            serve.main()
    *progress, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and words in error
    assert all("Loading weights" in line for line in progress if line)
    assert os.listdir() == []


@pytest.mark.parametrize(("host", "public"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_public_address_warns_that_there_is_no_authentication(caplog, host, public):
    asyncio.run(serve.check_address(host, 0))
    assert ("without authentication" in caplog.text) == public


@pytest.mark.slow
def test_the_process_serves_its_store_alone_and_leaves_one_whole_file(run_command, saved, tmp_path):
    httpx = pytest.importorskip("httpx")
    arguments = ["--model", saved, "--store", tmp_path / "events.db", "--port", 0]
    command = [sys.executable, "-m", "blossomrec_hf.commands.serve", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = []
            while not log or "running on" not in log[-1]:
                log.append(process.stderr.readline())
                assert log[-1], "".join(log)
            base = re.search(r"http://127\.0\.0\.1:\d+", log[-1])[0]
            for i in range(3):
                body = {"user": "anna", "events": [f"item {i}", f"new {i}"], "timestamps": [60 * i, 60 * i]}
                assert httpx.post(f"{base}/recommend", json=body, timeout=60).json()["length"] == i + 1

            refused = run_command("serve", *arguments, status=2, field="stderr")
            assert "another process serves" in refused.splitlines()[-1] and "Traceback" not in refused

            body = b'{"user": "anna", "events": ["item 9"]}'
            head = (
                "POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", int(base.split(":")[-1]))) as connection:
                connection.sendall(head.encode() + body)
            assert httpx.post(f"{base}/recommend", json={"user": "anna"}, timeout=60).json()["length"] == 3
        finally:
            process.terminate()
            process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM)
    assert not (tmp_path / "events.db-wal").exists()
    assert kept(tmp_path, "anna") == [name for i in range(3) for name in (f"item {i}", f"new {i}")]
    events = serve.Store(tmp_path / "events.db", read_only=True).latest("anna", -1)
    assert [event.timestamp for event in events] == [0, 0, 60, 60, 120, 120]


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_kill(run_example, saved, tmp_path):
    pytest.importorskip("uvicorn")
    arguments = ("--model", saved, "--clients", 6, "--seconds", 2, "--json", tmp_path / "figures.json")
    run_example("benchmarks/load_test.py", *arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["events_acknowledged"] > 6 and figures["errors"] == figures["lost"] == []
