"""
Serve recommendations over HTTP, for histories in the request and for users whose events the service stores.

    pip install -e ".[serve]"
    blossomrec serve --model runs/blossomrec --store events.db --port 8000

    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"history": [41, 73, 12], "top_k": 5}'
    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"user": "anna", "events": [95]}'
    curl localhost:8000/recommend -H 'content-type: application/json' \\
        -d '{"user": "anna", "events": [95], "timestamps": [1795770000], "event_types": ["view"], "now": 1795773600}'

`/docs` documents the requests (OpenAPI); `/health` and `/metrics` (Prometheus) are for monitoring.

**Storage.** Events of users are appended to an SQLite file (`--store`). Its write-ahead log is synchronized to the disk before the
response, so acknowledged events survive `kill -9` and a crash of the machine. A request that fails, or whose body is incomplete,
stores nothing. If a response is lost, its events may have been stored, and repeating the request stores them again. Events on
items outside the model's vocabulary are stored, too, and a later model with a larger vocabulary reads them. Only one process
at a time can serve a store. On SIGTERM, waiting requests are answered and the write-ahead log is merged into the file.

**Times and types.** Each event is stored with its time (`timestamps`, by default that of the request) and its type
(`event_types`), whether the model reads them or not. Times of a user never fall. A model of times is asked for a certain time
with `now`. Types that a model of types does not have are read as unknown, and the response names them (`unknown_types`). A store
of an earlier version gets both columns when it is opened, and its events stay.

**History.** The model reads all stored events of a user, up to `--max_history`. When a user exceeds it, the start of the history
moves forward by a quarter of `--max_history`, so the model always reads the latest events, between three quarters of
`--max_history` and all of it. The start depends on the number of events alone, not on restarts or cache contents. Unknown items
count as events, but are not read.

**Execution.** A worker thread answers all waiting requests (up to `--max_batch`) as one batch, with one forward pass and one
transaction. Events of one user are applied in the order of their requests. Caches of users are kept in memory up to
`--cache_mib`. The least recently used ones are evicted and rebuilt from the store when the user returns.
`model.compile_for_inference()` is not used here: it compiles passes over whole histories, and to append an event to a cache
takes a fraction of the time of such a pass (`examples/benchmarks/serving.py --sections cache`).
"""

import asyncio
import ipaddress
import logging
import os
import queue
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .. import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from ..serving.event_store import Store
from ..serving.queries import Answer, Problem, Query
from ..serving.recommender import Recommender
from ..utils.command_line import Parser, check_at_least, exit_on_error, load_checkpoint
from ..utils.progress import set_up_logging


logger = logging.getLogger(__name__)

RETRY = {"retry-after": "1"}


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
            raise HTTPException(503, "Too many requests are waiting; try again.", RETRY) from None
        try:
            return await asyncio.wrap_future(future)
        except RequestValidationError:  # times before stored ones
            raise
        except sqlite3.Error as error:  # a full disk, for example; without a traceback for each request
            logger.error("The store failed, and nothing of a request was stored: %s.", error)
            raise HTTPException(503, "The event store failed, and nothing was stored; try again.", RETRY) from error
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
    parser = Parser(description=__doc__)
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
    set_up_logging()
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
    logger.info("Serving %s with the events of %s.", args.model, args.store)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=args.drain_seconds)


if __name__ == "__main__":
    main()
