"""
Recommendations over HTTP, for histories that come with the request and for users whose events the service keeps.

    pip install -e ".[serve]"
    python examples/serve.py --model runs/blossomrec --store events.db --port 8000

    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"history": [41, 73, 12], "top_k": 5}'
    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"user": "anna", "events": [95]}'

`/docs` describes the requests (OpenAPI), `/health` and `/metrics` (Prometheus) are for machines.

**What is kept.** A user's events go to an SQLite file (`--store`) in its write-ahead log, synchronised to the disk before
the answer: what was acknowledged survives `kill -9` and a crash of the machine. A request that fails stored nothing; one
whose answer was lost on the way may have stored its events, and sending it again stores them again. What the model knows
of a user is a `BlossomRecCache` in memory, up to `--cache_mib` for all; the users that were away longest are dropped, and
rebuilt from the store when they come back.

**How.** One worker thread takes all requests that wait (up to `--max_batch`) as one batch: one pass of the model, one
transaction of the store. Events of one user are applied in the order in which the requests came in. A user with more
than `--max_history` events is rebuilt from the latest three quarters of that, so that not every later event rebuilds it.
"""

import argparse
import asyncio
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from blossomrec_hf import BlossomRecCache, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.command_line import HelpFormatter, exit_on_error, load_checkpoint


logger = logging.getLogger(__name__)
Item = StrictInt | StrictStr


class Query(BaseModel):
    """A history, or a user and the events that are new (none just asks again)."""

    model_config = ConfigDict(extra="forbid")
    history: list[Item] | None = Field(None, description="raw item ids, the latest last; nothing is stored")
    user: str | None = Field(None, min_length=1, max_length=256)
    events: list[Item] = Field([], description="raw ids of the user's new items, the latest last; they are stored")
    top_k: int = Field(10, ge=1)
    exclude_seen: bool = Field(True, description="leave out the items of the history (the part that the model reads)")
    exclude: list[Item] = Field([], description="more items to leave out")
    candidates: list[Item] | None = Field(None, description="items to choose from; all where there are none")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Query":
        if (self.history is None) == (self.user is None) or (self.user is None and self.events):
            raise ValueError("give either `history`, or `user` with `events`")
        return self


class Recommendation(BaseModel):
    item: int | str
    score: float


class Answer(BaseModel):
    items: list[Recommendation]
    unknown: list[int | str] = Field(
        description="items of the request that the model does not know; they were dropped"
    )
    length: int = Field(description="how many items the model read")
    popular: bool = Field(
        description="whether there was no history, and these are the most frequent items (and counts)"
    )


@dataclass
class Job:
    """A query in vocabulary ids, and where its answer goes."""

    query: Query
    events: list[int]
    exclude: list[int]
    candidates: list[int] | None
    unknown: list[int | str]
    future: Future = field(default_factory=Future)


class Store:
    """Users' events in an SQLite file; see the top of this file."""

    def __init__(self, path: str | Path) -> None:
        self.db = sqlite3.connect(path, check_same_thread=False)  # used by the worker alone
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
        self.db.execute("CREATE INDEX IF NOT EXISTS by_user ON events (user, id)")

    def add(self, events: list[tuple[str, int | str]]) -> None:
        """Appends (user, raw item id) pairs; all of them are on the disk when it returns, or none is stored."""
        with self.db:
            rows = [(user, json.dumps(item)) for user, item in events]
            self.db.executemany("INSERT INTO events (user, item) VALUES (?, ?)", rows)

    def latest(self, user: str, number: int) -> list[int | str]:
        """The user's latest items, in the order in which they came."""
        rows = self.db.execute("SELECT item FROM events WHERE user = ? ORDER BY id DESC LIMIT ?", (user, number))
        return [json.loads(item) for (item,) in rows][::-1]


class Recommender:
    """The model, its users' caches and the store, and the thread that works on them."""

    def __init__(
        self,
        model: BlossomRecForSequentialRecommendation,
        tokenizer: BlossomRecTokenizer,
        store: Store,
        *,
        max_history: int = 2048,
        max_batch: int = 64,
        max_waiting: int = 1024,
        cache_bytes: int = 2**30,
    ) -> None:
        self.model, self.tokenizer, self.store = model.eval(), tokenizer, store
        self.max_history, self.max_batch, self.cache_bytes = max_history, max_batch, cache_bytes
        self.caches: OrderedDict[str, BlossomRecCache] = OrderedDict()  # the user seen last comes last
        self.sizes: dict[str, int] = {}
        self.used_bytes = 0
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.registry = CollectorRegistry()
        self.answers = Counter("blossomrec_answers", "Answers by HTTP status", ["status"], registry=self.registry)
        self.seconds = Histogram("blossomrec_seconds", "From request to answer", registry=self.registry)
        buckets = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batches = Histogram("blossomrec_batch", "Requests in a batch", buckets=buckets, registry=self.registry)
        self.stored = Counter("blossomrec_events_stored", "Events stored", registry=self.registry)
        self.rebuilt = Counter("blossomrec_users_rebuilt", "Users read from the store", registry=self.registry)
        self.dropped = Counter("blossomrec_users_dropped", "Users dropped for room", registry=self.registry)
        for name, value in (("cache_bytes", lambda: self.used_bytes), ("cached_users", lambda: len(self.caches))):
            Gauge(f"blossomrec_{name}", "What is in memory", registry=self.registry).set_function(value)
        self.thread = threading.Thread(target=self._work, daemon=True)

    def submit(self, query: Query) -> Future:
        """
        Queues a query; the answer comes in the future.

        Raises:
            ValueError: for items of another type than the model's, and sizes over the limits.
            queue.Full: when too many wait.
        """
        catalogue = len(self.tokenizer) - 2
        if query.top_k > catalogue:
            raise ValueError(f"`top_k` is {query.top_k}; the catalogue has {catalogue} items.")
        events = query.events if query.history is None else query.history
        unknown: list[int | str] = []
        given = [("history" if query.history is not None else "events", events, self.max_history)]
        given += [("exclude", query.exclude, catalogue), ("candidates", query.candidates or [], catalogue)]
        encoded = []
        for name, items, limit in given:
            if len(items) > limit:
                raise ValueError(f"`{name}` has {len(items)} items; it may have {limit}.")
            ids = self.tokenizer.encode_items(items)
            unknown += [item for item, index in zip(items, ids) if index == self.tokenizer.unk_token_id]
            encoded.append([index for index in ids if index != self.tokenizer.unk_token_id])
        candidates = None if query.candidates is None else encoded[2]
        job = Job(query, encoded[0], encoded[1], candidates, list(dict.fromkeys(unknown)))
        self.waiting.put_nowait(job)
        return job.future

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                jobs = [self.waiting.get()]
                while jobs[-1] is not None and len(jobs) < self.max_batch and not self.waiting.empty():
                    jobs.append(self.waiting.get())
                rest = [job for job in jobs if job is not None]
                while rest:  # each user once in a batch; the others wait for the next one, in their order
                    batch: dict[object, Job] = {}
                    later = []
                    for i, job in enumerate(rest):
                        key = i if job.query.user is None else job.query.user
                        later.append(job) if key in batch else batch.setdefault(key, job)
                    self._answer(list(batch.values()))
                    rest = later
                if jobs[-1] is None:
                    return

    def _answer(self, jobs: list[Job]) -> None:
        self.batches.observe(len(jobs))
        try:
            caches = self._read(jobs)
            answers = self._recommend(jobs, caches)
            users = [job for job in jobs if job.query.user is not None]
            events = [(job.query.user, self.tokenizer.decode_items(i)) for job in users for i in job.events]
            if events:
                self.store.add(events)
                self.stored.inc(len(events))
        except Exception as error:
            # Nothing was stored. What the model knows of these users may be ahead of the store: forget it.
            for job in jobs:
                self._forget(job.query.user)
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # the others shall not suffer for one
                self._answer([job])
            return
        for job, cache, answer in zip(jobs, caches, answers):
            if job.query.user is not None:
                self._keep(job.query.user, cache)
            job.future.set_result(answer)

    def _read(self, jobs: list[Job]) -> list[BlossomRecCache]:
        """The cache of each job's history, its events included."""
        caches: list[BlossomRecCache | None] = [self.caches.get(job.query.user) for job in jobs]
        for i, (job, cache) in enumerate(zip(jobs, caches)):
            if cache is not None and cache.get_seq_length() + len(job.events) > self.max_history:
                caches[i] = None
        known = [i for i, cache in enumerate(caches) if cache is not None]
        rows = {i: jobs[i].events for i in known}
        if known:
            both = caches[known[0]] if len(known) == 1 else BlossomRecCache.cat([caches[i] for i in known])
            self._append(both, [rows[i] for i in known])
            for place, i in enumerate(known):
                caches[i] = both if len(known) == 1 else both.select([place])
        new = [i for i, cache in enumerate(caches) if cache is None]
        groups: dict[int, list[int]] = {}  # rows of about the same length, so that a long one does not widen all
        for i in new:
            rows[i] = self._history(jobs[i])
            groups.setdefault(len(rows[i]).bit_length(), []).append(i)
        for group in groups.values():
            cache = BlossomRecCache(self.model.config)
            self._append(cache, [rows[i] for i in group])
            for place, i in enumerate(group):
                caches[i] = cache.select([place])
        return caches

    def _history(self, job: Job) -> list[int]:
        """The whole history that the model is to read, from the store and the request."""
        if job.query.user is None:
            return job.events
        self.rebuilt.inc()
        ids = self.tokenizer.encode_items(self.store.latest(job.query.user, self.max_history))
        ids = [index for index in ids if index != self.tokenizer.unk_token_id] + job.events
        return ids if len(ids) <= self.max_history else ids[-(self.max_history * 3 // 4) :]

    def _append(self, cache: BlossomRecCache, rows: list[list[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
        self.model.base_model(ids.to(self.model.device), past_key_values=cache)

    def _recommend(self, jobs: list[Job], caches: list[BlossomRecCache]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(jobs)
        for with_candidates in (False, True):
            chosen = [i for i, job in enumerate(jobs) if (job.candidates is not None) == with_candidates]
            if not chosen:
                continue
            seen = [caches[i].item_ids[0].tolist() if jobs[i].query.exclude_seen else [] for i in chosen]
            out = self.model.recommend_from_states(
                torch.cat([caches[i].last_hidden_state for i in chosen]),
                [row + jobs[i].exclude for row, i in zip(seen, chosen)],
                empty=torch.tensor([caches[i].get_seq_length() == 0 for i in chosen], device=self.model.device),
                top_k=max(jobs[i].query.top_k for i in chosen),
                candidate_ids=[jobs[i].candidates for i in chosen] if with_candidates else None,
            )
            for i, ids, scores in zip(chosen, out.item_ids.tolist(), out.scores.tolist()):
                pairs = [(index, score) for index, score in zip(ids, scores) if index >= 0][: jobs[i].query.top_k]
                items = self.tokenizer.decode_items([index for index, _ in pairs])
                length = caches[i].get_seq_length()
                best = [Recommendation(item=item, score=score) for item, (_, score) in zip(items, pairs)]
                answers[i] = Answer(items=best, unknown=jobs[i].unknown, length=length, popular=length == 0)
        return answers

    def _forget(self, user: str | None) -> None:
        self.caches.pop(user, None)
        self.used_bytes -= self.sizes.pop(user, 0)

    def _keep(self, user: str, cache: BlossomRecCache) -> None:
        self._forget(user)
        self.caches[user], self.sizes[user] = cache, cache.nbytes
        self.used_bytes += cache.nbytes
        while self.used_bytes > self.cache_bytes:
            self._forget(next(iter(self.caches)))
            self.dropped.inc()


class BodyLimit:
    """Reads a request's body before anything else does, and answers 413 where it is longer than `limit` bytes."""

    def __init__(self, app, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.limit:
                detail = {"detail": f"The body is longer than {self.limit} bytes."}
                return await JSONResponse(detail, 413)(scope, receive, send)
        messages = [{"type": "http.request", "body": body}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


def create_app(recommender: Recommender, max_body: int = 2**20) -> FastAPI:
    """The service; the worker thread lives as long as the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recommender.thread.start()
        yield
        recommender.waiting.put(None)
        recommender.thread.join()

    app = FastAPI(title="BlossomRec", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=max_body)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent, which need not be text that can be sent back.
        return JSONResponse({"detail": [{"loc": e["loc"], "msg": e["msg"]} for e in error.errors()]}, 422)

    @app.post("/recommend")
    async def recommend(query: Query) -> Answer:
        try:
            future = recommender.submit(query)
        except queue.Full:
            raise HTTPException(503, "Too many requests are waiting; try again.", {"retry-after": "1"}) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        try:
            return await asyncio.wrap_future(future)
        except Exception as error:
            logger.exception("A request failed")
            raise HTTPException(500, "The recommendation failed, and nothing was stored.") from error

    @app.middleware("http")
    async def measure(request: Request, call_next):
        started = time.perf_counter()
        response = await call_next(request)
        if request.url.path == "/recommend":
            recommender.seconds.observe(time.perf_counter() - started)
            recommender.answers.labels(response.status_code).inc()
        return response

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not recommender.thread.is_alive():
            raise HTTPException(503, "The worker has ended; restart the service.")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(recommender.registry), media_type=CONTENT_TYPE_LATEST)

    return app


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model with its tokenizer, or a Hub id")
    parser.add_argument("--store", type=Path, default=Path("events.db"), help="the SQLite file of the users' events")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is all of the machine's"
    )
    parser.add_argument("--port", type=int, default=8000, help="the port to listen at")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where the model runs")
    threads = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--threads", type=int, default=threads, help="threads of PyTorch; HTTP needs cores of its own")
    parser.add_argument("--max_history", type=int, default=2048, help="events that the model reads at most")
    parser.add_argument("--max_batch", type=int, default=64, help="requests that are answered together at most")
    parser.add_argument("--cache_mib", type=int, default=1024, help="MiB of memory for what the model knows of users")
    parser.add_argument("--max_body", type=int, default=2**20, help="bytes of a request at most")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_checkpoint(BlossomRecForSequentialRecommendation, args.model).to(args.device)
    recommender = Recommender(
        model,
        load_checkpoint(BlossomRecTokenizer, args.model),
        Store(args.store),
        max_history=args.max_history,
        max_batch=args.max_batch,
        cache_bytes=args.cache_mib * 2**20,
    )
    uvicorn.run(create_app(recommender, args.max_body), host=args.host, port=args.port, access_log=False)


if __name__ == "__main__":
    main()
