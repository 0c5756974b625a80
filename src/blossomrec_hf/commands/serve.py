"""
Serve recommendations over HTTP, for histories in the request and for users whose events the service stores.

    pip install -e ".[serve]"
    blossomrec serve --model runs/blossomrec --store events.db --port 8000

    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"history": [41, 73, 12], "top_k": 5}'
    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"user": "anna", "events": [95]}'

`/docs` documents the requests (OpenAPI); `/health` and `/metrics` (Prometheus) are for monitoring.

**Storage.** Events of users are appended to an SQLite file (`--store`). Its write-ahead log is synchronized to the disk before the
response, so acknowledged events survive `kill -9` and a crash of the machine. A request that fails, or whose body is incomplete,
stores nothing. If a response is lost, its events may have been stored, and repeating the request stores them again. Events on
items outside the model's vocabulary are stored, too, and a later model with a larger vocabulary reads them. Only one process
at a time can serve a store. On SIGTERM, waiting requests are answered and the write-ahead log is merged into the file.

**History.** The model reads all stored events of a user, up to `--max_history`. When a user exceeds it, the start of the history
moves forward by a quarter of `--max_history`, so the model always reads the latest events, between three quarters of
`--max_history` and all of it. The start depends on the number of events alone, not on restarts or cache contents. Unknown items
count as events, but are not read.

**Execution.** A worker thread answers all waiting requests (up to `--max_batch`) as one batch, with one forward pass and one
transaction. Events of one user are applied in the order of their requests. Caches of users are kept in memory up to
`--cache_mib`. The least recently used ones are evicted and rebuilt from the store when the user returns.
"""

import argparse
import asyncio
import ipaddress
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from .. import BlossomRecCache, BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..model.packing_blossomrec import pack_histories
from ..serving.event_store import Store, StoredEvent, first_read
from ..utils.command_line import HelpFormatter, exit_on_error, load_checkpoint


logger = logging.getLogger(__name__)
Item = StrictInt | StrictStr


class Query(BaseModel):
    """Either a history, or a user with new events (possibly none)."""

    model_config = ConfigDict(extra="forbid")
    history: list[Item] | None = Field(None, description="raw item ids, latest item last; nothing is stored")
    user: str | None = Field(None, min_length=1, max_length=256)
    events: list[Item] = Field([], description="raw ids of the user's new items, latest item last; all are stored")
    top_k: int = Field(10, ge=1)
    exclude_seen: bool | None = Field(
        None,
        description="whether to exclude items of the history (the part that the model reads); by default, they are excluded "
        "unless users of the training log repeat items",
    )
    exclude: list[Item] = Field([], description="further items to exclude")
    candidates: list[Item] | None = Field(None, description="items to choose from; by default, the whole catalog")

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
        description="items of the request outside the model's vocabulary, which are not read"
    )
    length: int = Field(description="number of items that the model read")
    popular: bool = Field(
        description="whether the history was empty; the items are then the most frequent ones, scored by their counts"
    )


class Problem(BaseModel):
    """The body of a response with another status than 200 and 422."""

    detail: str


@dataclass
class Job:
    """A query in vocabulary ids, and the future of its answer."""

    query: Query
    events: list[int]
    exclude: list[int]
    candidates: list[int] | None
    unknown: list[int | str]
    future: Future = field(default_factory=Future)


@dataclass
class History:
    """A user's cache, the number of stored events that it stands for, and its size in memory."""

    cache: BlossomRecCache
    number: int
    nbytes: int = 0


def check_at_least(least: int, **settings: int) -> None:
    """
    Raises:
        ValueError: if one of the settings is less than `least`.
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


class Recommender:
    """
    The model, the caches of users, the event store, and the worker thread.

    Raises:
        ValueError: if a setting is out of range, or the items of the store are text and those of the model integers.
    """

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
        check_at_least(1, max_history=max_history, max_batch=max_batch, max_waiting=max_waiting)
        check_at_least(0, cache_bytes=cache_bytes)
        last = store.last_item()
        if tokenizer.item_type == "int" and isinstance(last, str):
            raise ValueError(
                f"`store` is {store.path}, whose items are text (the latest is {last!r}), but the items of the model are "
                "integers; give the model for which the store was made, or another file."
            )
        self.model, self.tokenizer, self.store = model.eval(), tokenizer, store
        self.max_history, self.max_batch, self.cache_bytes = max_history, max_batch, cache_bytes
        self.users: OrderedDict[str, History] = OrderedDict()  # the most recently active user comes last
        self.used_bytes = 0
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.registry = CollectorRegistry()
        self.answers = Counter("blossomrec_answers", "Responses by HTTP status", ["status"], registry=self.registry)
        self.seconds = Histogram("blossomrec_seconds", "Seconds from request to response", registry=self.registry)
        buckets = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batches = Histogram("blossomrec_batch", "Requests in a batch", buckets=buckets, registry=self.registry)
        self.stored = Counter("blossomrec_events_stored", "Events stored", registry=self.registry)
        self.rebuilt = Counter(
            "blossomrec_users_rebuilt", "User caches rebuilt from the store", registry=self.registry
        )
        self.dropped = Counter("blossomrec_users_dropped", "User caches evicted", registry=self.registry)
        for name, value in (("cache_bytes", lambda: self.used_bytes), ("cached_users", lambda: len(self.users))):
            Gauge(f"blossomrec_{name}", "User caches in memory", registry=self.registry).set_function(value)
        self.thread = threading.Thread(target=self._work, daemon=True)

    def submit(self, query: Query) -> Future:
        """
        Queue a query and return the future of its answer.

        Raises:
            RequestValidationError: if items have another type than the model's, or a list exceeds its limit.
            queue.Full: if too many requests are waiting.
        """
        catalog = self.tokenizer.num_items
        if query.top_k > catalog:
            raise refused("top_k", f"`top_k` is {query.top_k}; the catalog has {catalog} items.")
        unknown: list[int | str] = []
        encoded: dict[str, list[int] | None] = {}
        limits = {"history": self.max_history, "events": self.max_history, "exclude": catalog, "candidates": catalog}
        for name, limit in limits.items():
            items = getattr(query, name)
            if items is None:
                encoded[name] = None
                continue
            if len(items) > limit:
                raise refused(name, f"`{name}` has {len(items)} items; it may have {limit}.")
            try:
                ids = self.tokenizer.encode_items(items)
            except ValueError as error:
                raise refused(name, str(error)) from error
            unknown += [item for item, index in zip(items, ids) if index == self.tokenizer.unk_token_id]
            encoded[name] = self._known(ids)
        events = encoded["events"] if query.history is None else encoded["history"]
        job = Job(query, events, encoded["exclude"], encoded["candidates"], list(dict.fromkeys(unknown)))
        self.waiting.put_nowait(job)
        return job.future

    def close(self) -> None:
        """Answer all waiting requests, then close the store."""
        while self.thread.is_alive():
            with suppress(queue.Full):
                self.waiting.put(None, timeout=1)
                self.thread.join()
        self.store.close()

    def _known(self, ids: list[int]) -> list[int]:
        return [index for index in ids if index != self.tokenizer.unk_token_id]

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                jobs = [self.waiting.get()]
                while jobs[-1] is not None and len(jobs) < self.max_batch and not self.waiting.empty():
                    jobs.append(self.waiting.get())
                # From here on, a request cannot be canceled.
                rest = [job for job in jobs if job is not None and job.future.set_running_or_notify_cancel()]
                while rest:  # each user once per batch; further requests of the user follow in order
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
            histories = self._read(jobs)
            answers = self._recommend(jobs, [history.cache for history in histories])
            events = [(job.query.user, StoredEvent(item)) for job in jobs for item in job.query.events]
            if events:
                self.store.add(events)
                self.stored.inc(len(events))
        except Exception as error:
            # Nothing was stored, but the caches of these users may include the new events: drop them.
            for job in jobs:
                self._forget(job.query.user)
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # one by one, so that a single request does not fail the others
                self._answer([job])
            return
        for job, history, answer in zip(jobs, histories, answers):
            if job.query.user is not None:
                self._keep(job.query.user, history)
            job.future.set_result(answer)

    def _read(self, jobs: list[Job]) -> list[History]:
        """The updated cache of each job's history, including the events of the job."""
        histories: list[History | None] = [None] * len(jobs)
        rows: dict[int, list[int]] = {}  # the items that the model reads for each job
        known = []
        groups: dict[int, list[int]] = {}  # rows of similar length, so that a long one does not pad all others
        for i, job in enumerate(jobs):
            before = self.users.get(job.query.user)
            stored = self._stored(job) if before is None else before.number
            number = stored + len(job.query.events)
            begin = first_read(number, self.max_history)
            if before is not None and begin == first_read(stored, self.max_history):
                rows[i] = job.events
                known.append(i)
                histories[i] = History(before.cache, number)
            else:
                rows[i] = self._history(job, number - begin)
                groups.setdefault(len(rows[i]).bit_length(), []).append(i)
                histories[i] = History(BlossomRecCache(self.model.config), number)
        if known:
            caches = [histories[i].cache for i in known]
            both = caches[0] if len(known) == 1 else BlossomRecCache.cat(caches)
            self._append(both, [rows[i] for i in known])
            for place, i in enumerate(known):
                histories[i].cache = both if len(known) == 1 else both.select([place])
        for group in groups.values():
            both = BlossomRecCache(self.model.config)
            self._append(both, [rows[i] for i in group])
            for place, i in enumerate(group):
                histories[i].cache = both.select([place])
        return histories

    def _stored(self, job: Job) -> int:
        """The number of stored events of the job's user."""
        return 0 if job.query.user is None else self.store.number(job.query.user)

    def _history(self, job: Job, wanted: int) -> list[int]:
        """The latest `wanted` events of the job's user, from store and request, without unknown items."""
        if job.query.user is None:
            return job.events
        self.rebuilt.inc()
        stored = self.store.latest(job.query.user, max(0, wanted - len(job.query.events)))
        raw = [event.item for event in stored] + job.query.events
        if self.tokenizer.item_type == "str":  # stored as integers before the vocabulary became text
            raw = [str(item) for item in raw]
        return self._known(self.tokenizer.encode_items(raw[-wanted:]))

    def _append(self, cache: BlossomRecCache, rows: list[list[int]]) -> None:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
        events = pack_histories(ids.to(self.model.device), vocab_size=self.model.config.vocab_size)
        self.model.base_model.encode(events, cache=cache)

    def _recommend(self, jobs: list[Job], caches: list[BlossomRecCache]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(jobs)
        for with_candidates in (False, True):
            chosen = [i for i, job in enumerate(jobs) if (job.candidates is not None) == with_candidates]
            if not chosen:
                continue
            settings = [jobs[i].query.exclude_seen for i in chosen]
            exclude_seen = [self.model.config.exclude_seen if value is None else value for value in settings]
            seen = [caches[i].item_ids[0].tolist() if exclude else [] for i, exclude in zip(chosen, exclude_seen)]
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
        history = self.users.pop(user, None)
        if history is not None:
            self.used_bytes -= history.nbytes

    def _keep(self, user: str, history: History) -> None:
        self._forget(user)
        self.users[user] = history
        history.nbytes = history.cache.nbytes
        self.used_bytes += history.nbytes
        while self.used_bytes > self.cache_bytes:
            self._forget(next(iter(self.users)))
            self.dropped.inc()


def refused(name: str, message: str) -> RequestValidationError:
    """An error with status 422 about the field `name` of the body."""
    return RequestValidationError([{"loc": ("body", name), "msg": message, "type": "value_error"}])


class BodyLimit:
    """
    Middleware that reads the whole body of a request first and responds with 413 if it is longer than `limit` bytes. An
    incomplete body is dropped, even if it could be parsed.
    """

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
        cut_off = message["type"] == "http.disconnect"
        messages = [message if cut_off else {"type": "http.request", "body": body}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


def create_app(recommender: Recommender, max_body: int = 2**20) -> FastAPI:
    """
    Create the HTTP application. It starts the worker thread and stops it at shutdown.

    Raises:
        ValueError: if `max_body`, in bytes, is less than 1.
    """
    check_at_least(1, max_body=max_body)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recommender.thread.start()
        yield
        recommender.close()

    app = FastAPI(title="BlossomRec", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=max_body)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input, which may not be valid text.
        detail = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
        return JSONResponse({"detail": detail}, 422)

    described = {status: {"model": Problem} for status in (400, 413, 500, 503)}

    @app.post("/recommend", responses=described)
    async def recommend(query: Query) -> Answer:
        try:
            future = recommender.submit(query)
        except queue.Full:
            raise HTTPException(503, "Too many requests are waiting; try again.", {"retry-after": "1"}) from None
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

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> dict[str, str]:
        if not recommender.thread.is_alive():
            raise HTTPException(503, "The worker thread has ended; restart the service.")
        if not recommender.store.in_place():
            raise HTTPException(503, "The store file was deleted or replaced; restart the service.")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(recommender.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: if PyTorch has no such device on this machine.
    """
    try:
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`device` is {device}, which PyTorch cannot use here ({reason}); give cpu or cuda."
        ) from error


async def check_address(host: str, port: int) -> None:
    """
    Warn if the address can be reached from other machines.

    Raises:
        ValueError: if the service cannot listen at the address.
    """
    try:
        async with await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port) as server:
            addresses = [listening.getsockname()[0] for listening in server.sockets]
    except (OSError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"`host` is {host} and `port` is {port}, where the service cannot listen ({reason}); give another address."
        ) from error
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        logger.warning(
            "The service listens at %s without authentication: every client can read and store events of every user. Put an "
            "authenticating proxy in front of it.",
            ", ".join(addresses),
        )


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a trained model, or a Hub id.")
    parser.add_argument("--store", type=Path, default=Path("events.db"), help="SQLite file of the users' events.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all addresses of the machine."
    )
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="Device of the model.")
    threads = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument(
        "--threads", type=int, default=threads, help="Number of PyTorch threads. HTTP needs further cores."
    )
    parser.add_argument(
        "--max_history", type=int, default=2048, help="Maximum number of events that the model reads of each user."
    )
    parser.add_argument("--max_batch", type=int, default=64, help="Maximum number of requests per batch.")
    parser.add_argument("--cache_mib", type=int, default=1024, help="Memory for the caches of users, in MiB.")
    parser.add_argument("--max_body", type=int, default=2**20, help="Maximum size of a request body, in bytes.")
    parser.add_argument(
        "--drain_seconds", type=int, default=30, help="Seconds that SIGTERM waits for running requests."
    )
    args = parser.parse_args()
    check_at_least(0, cache_mib=args.cache_mib, drain_seconds=args.drain_seconds)
    check_at_least(
        1, threads=args.threads, max_history=args.max_history, max_batch=args.max_batch, max_body=args.max_body
    )
    check_device(args.device)
    asyncio.run(check_address(args.host, args.port))
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
    app = create_app(recommender, args.max_body)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=args.drain_seconds)


if __name__ == "__main__":
    main()
