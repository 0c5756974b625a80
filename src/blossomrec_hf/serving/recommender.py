"""The worker of `blossomrec serve`: it answers queries in batches, keeps the caches of users and stores their events."""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..model.cache_blossomrec import BlossomRecCache
from ..model.ids_blossomrec import UNKNOWN_TIME, UNKNOWN_TYPE
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation
from ..model.packing_blossomrec import pack_histories
from ..model.time_blossomrec import unit_problem
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.command_line import check_at_least
from .event_store import Store, StoredEvent, first_read
from .queries import Answer, Query, Recommendation, refused


logger = logging.getLogger(__name__)

MAX_AHEAD = 86_400  # seconds by which the clock of a client may be ahead
Columns = dict[str, list[int]]  # the events of a history: vocabulary ids, seconds since 1970, indices of event types


@dataclass
class Job:
    """
    A query in vocabulary ids, and the future of its answer.

    Attributes:
        received: time of the request in seconds since 1970.
        times: the time of each item, given or that of the request; set by the worker thread.
    """

    query: Query
    exclude: list[int]
    candidates: list[int] | None
    unknown: list[int | str]
    received: int
    times: list[int] = field(default_factory=list)
    future: Future = field(default_factory=Future)

    @property
    def items(self) -> list[int | str]:
        """The raw ids of the query's events."""
        return self.query.events if self.query.history is None else self.query.history

    @property
    def types(self) -> list[str | None]:
        """The names of the event types."""
        return self.query.event_types or [None] * len(self.items)


@dataclass
class History:
    """
    A user's cache, the number of stored events that it stands for, and its size in memory.

    Attributes:
        lacks_times: whether events at its end have no time of their own, which depends on the next event then.
    """

    cache: BlossomRecCache
    number: int
    lacks_times: bool = False
    nbytes: int = 0


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
        self.columns = model.config.event_columns
        self.types = {name: index for index, name in enumerate(model.config.event_types or ())}
        self.latest_time = int(model.base_model.latest_time) if model.config.time_features else 0  # of the training
        if "timestamps" in self.columns and (number := store.num_without_time()):
            logger.warning(
                "%d events of %s have no time; the model reads them at the time of the user's next event with one.",
                *(number, store.path),
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
            RequestValidationError: if items have another type than the model's, a list exceeds its limit, times are missing or
                in another unit, or the model has no such target type.
            queue.Full: if too many requests are waiting.
        """
        catalog = self.tokenizer.num_items
        if query.top_k > catalog:
            raise refused("top_k", f"`top_k` is {query.top_k}; the catalog has {catalog} items.")
        self._check_signals(query)
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
        unknown = list(dict.fromkeys(unknown))
        job = Job(query, encoded["exclude"], encoded["candidates"], unknown, received=int(time.time()))
        self.waiting.put_nowait(job)
        return job.future

    def _check_signals(self, query: Query) -> None:
        """Refuse times and types that the model cannot read."""
        for name in ("timestamps", "event_types"):
            column = {"event_types": "event_type_ids"}.get(name, name)
            if query.history and getattr(query, name) is None and column in self.columns:
                raise refused(
                    name, f"`{name}` is missing; the model reads it, so give one value per item of `history`."
                )
        for name, times in (("timestamps", query.timestamps), ("now", [] if query.now is None else [query.now])):
            if times and (problem := unit_problem(max(times), self.latest_time)):
                raise refused(name, f"`{name}` contains {max(times)}, {problem}")
            if times and min(times) < 0:
                raise refused(name, f"`{name}` contains {min(times)}; times are seconds since 1970, 0 or more.")
        if query.events and query.timestamps and query.timestamps[-1] > time.time() + MAX_AHEAD:
            raise refused(
                "timestamps",
                f"`timestamps` contains {query.timestamps[-1]}, more than a day ahead of the service's clock. All later events of "
                "the user would be refused; correct it.",
            )
        target = query.target_event_type
        if target is not None and target not in self.types:
            known = ", ".join(self.types) or "none"
            raise refused("target_event_type", f"`target_event_type` is {target!r}; the model has {known}.")

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
        jobs = [job for job in jobs if self._set_times(job)]
        if not jobs:
            return
        self.batches.observe(len(jobs))
        try:
            histories, states = self._read(jobs)
            answers = self._recommend(jobs, [history.cache for history in histories], states)
            events = [
                (job.query.user, StoredEvent(*event))
                for job in jobs
                if job.query.user is not None
                for event in zip(job.items, job.times, job.types)
            ]
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

    def _set_times(self, job: Job) -> bool:
        """Set the times of a job's events. A job whose times are before stored ones fails, and nothing of it is stored."""
        query, last = job.query, None
        if query.user is not None and (query.events or query.now is not None):
            last = self.store.last_time(query.user)
        if query.timestamps is not None:
            job.times = query.timestamps
        else:
            job.times = [max(job.received, last or 0)] * len(job.items)
        for name, first in (("timestamps", job.times[:1]), ("now", [] if query.now is None else [query.now])):
            if first and last is not None and first[0] < last:
                verb = "is" if name == "now" else "begins at"
                message = f"`{name}` {verb} {first[0]}, before the latest stored event of the user at {last}."
                job.future.set_exception(refused(name, message))
                return False
        return True

    def _read(self, jobs: list[Job]) -> tuple[list[History], list[torch.Tensor]]:
        """
        The updated cache of each job's history, including the events of the job, and the state `[1, hidden_size]` that is
        compared with item vectors.
        """
        histories: list[History | None] = [None] * len(jobs)
        states: list[torch.Tensor | None] = [None] * len(jobs)
        rows: dict[int, Columns] = {}  # the events that the model reads for each job
        known = []
        groups: dict[int, list[int]] = {}  # rows of similar length, so that a long one does not pad all others
        for i, job in enumerate(jobs):
            before = self.users.get(job.query.user)
            if before is not None and before.lacks_times and job.items:
                before = None
            stored = self._stored(job) if before is None else before.number
            number = stored + len(job.query.events)
            begin = first_read(number, self.max_history)
            if before is not None and begin == first_read(stored, self.max_history):
                rows[i] = self._known_events(job.items, job.times, job.types)
                known.append(i)
                histories[i] = History(before.cache, number, before.lacks_times)
            else:
                rows[i], lacks_times = self._history(job, number - begin)
                groups.setdefault(len(rows[i]["input_ids"]).bit_length(), []).append(i)
                histories[i] = History(BlossomRecCache(self.model.config), number, lacks_times)
        if known:
            caches = [histories[i].cache for i in known]
            both = caches[0] if len(known) == 1 else BlossomRecCache.cat(caches)
            last = self._append(both, [rows[i] for i in known], [jobs[i] for i in known])
            for place, i in enumerate(known):
                histories[i].cache = both if len(known) == 1 else both.select([place])
                states[i] = last[place : place + 1]
        for group in groups.values():
            both = BlossomRecCache(self.model.config)
            last = self._append(both, [rows[i] for i in group], [jobs[i] for i in group])
            for place, i in enumerate(group):
                histories[i].cache = both.select([place])
                states[i] = last[place : place + 1]
        return histories, states

    def _stored(self, job: Job) -> int:
        """The number of stored events of the job's user."""
        return 0 if job.query.user is None else self.store.number(job.query.user)

    def _history(self, job: Job, wanted: int) -> tuple[Columns, bool]:
        """
        The latest `wanted` events of the job's user, from store and request, without unknown items; and whether events at
        its end have no time.
        """
        if job.query.user is None:
            return self._known_events(job.items, job.times, job.types), False
        self.rebuilt.inc()
        stored = self.store.latest(job.query.user, max(0, wanted - len(job.items)))
        raw = [event.item for event in stored] + job.items
        times = [event.timestamp for event in stored] + job.times
        types = [event.event_type for event in stored] + job.types
        raw, times, types = (values[max(0, len(values) - wanted) :] for values in (raw, times, types))
        lacks_times = bool(times) and times[-1] is None
        if None in times:
            latest = next((seconds for seconds in reversed(times) if seconds is not None), job.received)
            for place in range(len(times) - 1, -1, -1):  # the time of the next event with one
                latest = times[place] = latest if times[place] is None else times[place]
        if self.tokenizer.item_type == "str":  # stored as integers before the vocabulary became text
            raw = [str(item) for item in raw]
        return self._known_events(raw, times, types), lacks_times

    def _known_events(self, items: Sequence[int | str], times: Sequence[int], types: Sequence[str | None]) -> Columns:
        """The columns that the model reads of events, without unknown items."""
        columns = {"input_ids": self.tokenizer.encode_items(items)}
        if "timestamps" in self.columns:
            columns["timestamps"] = times
        if "event_type_ids" in self.columns:
            columns["event_type_ids"] = [self.types.get(name, UNKNOWN_TYPE) for name in types]
        known = [index != self.tokenizer.unk_token_id for index in columns["input_ids"]]
        return {name: list(compress(values, known)) for name, values in columns.items()}

    def _append(self, cache: BlossomRecCache, rows: list[Columns], jobs: list[Job]) -> torch.Tensor:
        """Append events to a cache; the prediction states `[B, hidden_size]` of the histories."""
        width, device = max(len(row["input_ids"]) for row in rows), self.model.device
        columns = {}
        for name in ("input_ids", *self.columns):
            padded = [row[name] + [0] * (width - len(row[name])) for row in rows]
            columns[name] = torch.tensor(padded, dtype=torch.long).to(device)
        if "timestamps" in self.columns:
            nows = [UNKNOWN_TIME if job.query.now is None else job.query.now for job in jobs]
            columns["prediction_time"] = torch.tensor(nows, device=device)
        if "event_type_ids" in self.columns:
            default = self.model.config.default_target_type
            targets = [self.types.get(job.query.target_event_type, default) for job in jobs]
            columns["target_event_type"] = torch.tensor(targets, device=device)
        events = pack_histories(**columns, vocab_size=self.model.config.vocab_size)
        return self.model.base_model.encode(events, cache=cache, last_only=True)

    def _recommend(self, jobs: list[Job], caches: list[BlossomRecCache], states: list[torch.Tensor]) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(jobs)
        for with_candidates in (False, True):
            chosen = [i for i, job in enumerate(jobs) if (job.candidates is not None) == with_candidates]
            if not chosen:
                continue
            settings = [jobs[i].query.exclude_seen for i in chosen]
            exclude_seen = [self.model.config.exclude_seen if value is None else value for value in settings]
            seen = [caches[i].item_ids[0].tolist() if exclude else [] for i, exclude in zip(chosen, exclude_seen)]
            out = self.model.recommend_from_predictions(
                torch.cat([states[i] for i in chosen]),
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
                answers[i] = Answer(
                    items=best,
                    unknown=jobs[i].unknown,
                    unknown_types=self._unknown_types(jobs[i]),
                    length=length,
                    popular=length == 0,
                )
        return answers

    def _unknown_types(self, job: Job) -> list[str]:
        """The names of a job's event types that the model lacks, if it reads types."""
        names = [name for name in job.types if name is not None and name not in self.types]
        return list(dict.fromkeys(names)) if "event_type_ids" in self.columns else []

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
