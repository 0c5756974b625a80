"""Batches of one shape: what the compiler compiles once and a CUDA graph replays."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .ids_blossomrec import IGNORE_INDEX, UNKNOWN_TIME
from .packing_blossomrec import PackedHistories, pack_histories


logger = logging.get_logger(__name__)


class StaticBatch:
    """
    A packed batch of fixed shape in fixed memory that batches are copied into. The remainder is filled with histories
    of [PAD] without targets.

    Args:
        tokens: T, number of positions.
        histories: S, number of histories.
        max_length: length of the longest history; also of those that fill the remainder.
        device: where its tensors are.
        columns: dtypes of the columns of the events. `labels` are filled with −100, all others with 0.
        history_columns: names of int64 columns with one value per history, such as `prediction_time`, and the value for
            histories that fill the remainder.

    Attributes:
        columns: the columns, `[1, T]` each.
        history_columns: the columns with one value per history, `[S]` each.
        cu_seq_lens: offsets, int32 `[S + 1]`; those behind the last history are T.
    """

    def __init__(
        self,
        tokens: int,
        histories: int,
        max_length: int,
        device: torch.device,
        columns: Mapping[str, torch.dtype],
        history_columns: Mapping[str, int] | None = None,
    ) -> None:
        self.tokens, self.histories, self.max_length = tokens, histories, max_length
        self.columns = {name: torch.zeros(1, tokens, dtype=dtype, device=device) for name, dtype in columns.items()}
        self._defaults = dict(history_columns or {})
        self.history_columns = {
            name: torch.full((histories,), value, device=device) for name, value in self._defaults.items()
        }
        self.cu_seq_lens = torch.zeros(histories + 1, dtype=torch.int32, device=device)
        self._filling = torch.arange(1, histories + 1, dtype=torch.int32, device=device) * max_length
        self.load({name: column[:, :0] for name, column in self.columns.items()}, self.cu_seq_lens[:1])

    def has_room(self, tokens: int, histories: int) -> bool:
        """Whether so many positions and histories fit, and the histories that fill the remainder."""
        rest = self.tokens - tokens
        return rest >= 0 and histories + -(-rest // self.max_length) <= self.histories

    def load(
        self,
        columns: Mapping[str, torch.Tensor],
        cu_seq_lens: torch.Tensor,
        history_columns: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Copies a batch that has room.

        Args:
            columns: the columns, `[1, T]` each, T up to `tokens`.
            cu_seq_lens: offsets, `[S + 1]`, S up to `histories`.
            history_columns: the columns with one value per history, `[S]` each; one that is missing is filled.
        """
        offsets, tokens = cu_seq_lens.shape[0], next(iter(columns.values())).shape[1]
        for name, column in self.columns.items():
            column[:, :tokens].copy_(columns[name])
            column[:, tokens:].fill_(IGNORE_INDEX if name == "labels" else 0)
        given = history_columns or {}
        for name, column in self.history_columns.items():
            if name in given:
                column[: offsets - 1].copy_(given[name])
            column[offsets - 1 if name in given else 0 :].fill_(self._defaults[name])
        self.cu_seq_lens[:offsets].copy_(cu_seq_lens)
        filling = self._filling[: self.histories + 1 - offsets] + tokens
        self.cu_seq_lens[offsets:].copy_(filling.clamp_(max=self.tokens))


def warm_up(run: Callable[[], Any], device: torch.device) -> None:
    """Runs what will be captured once, so that kernels are compiled and libraries set up outside the graph."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def capture(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
    """
    Captures operations as a CUDA graph.

    Returns:
        the graph and the output, which each replay writes again; `None` if capturing fails (an operation waits for the
        device), which is reported on the log.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        # Other threads may use the device meanwhile, as the one does that watches the exchange between processes.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
    except RuntimeError as error:
        # A capture that fails at its end leaves its own stream, and the random generator believing that it goes on.
        torch.cuda.set_stream(current)
        fresh = torch.Generator(device).graphsafe_get_state()
        torch.cuda.default_generators[device.index].graphsafe_set_state(fresh)
        logger.warning("Steps cannot be captured as a CUDA graph and are launched operation by operation: %s", error)
        return None
    return graph, output


class StaticEncoder:
    """
    `BlossomRecModel.run_layers` for the last positions of batches of one shape, compiled and, on a GPU, captured as a CUDA
    graph. Weights may change between calls, in place. Threads take turns.

    Args:
        model: the base model, on its device.
        max_tokens: number of positions of the largest batch.
        max_histories: number of histories of the largest batch.
        max_length: length of the longest history.
    """

    def __init__(self, model: nn.Module, *, max_tokens: int, max_histories: int, max_length: int) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_histories", max_histories), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.sizes = (max_tokens, max_histories, max_length)
        self.max_length = min(max_length, max_tokens)
        self.device = model.item_counts.device
        room = max_histories + -(-max_tokens // self.max_length)
        config, names, defaults = model.config, ["input_ids"], {}
        if config.time_features:
            names, defaults = [*names, "timestamps"], {"prediction_time": UNKNOWN_TIME}
        if config.event_types:
            names, defaults = [*names, "event_type_ids"], {**defaults, "target_event_type": config.default_target_type}
        dtypes = dict.fromkeys(names, torch.long)
        self.batch = StaticBatch(max_tokens, room, self.max_length, self.device, dtypes, defaults)

        # Item vectors with features are computed once for all batches, into memory that a graph can read.
        self._model = model
        self._vectors: torch.Tensor | None = None
        self._vectors_of: Callable[[], torch.Tensor | None] = lambda: None

        def encode(
            columns: dict[str, torch.Tensor], cu_seq_lens: torch.Tensor, item_vectors: torch.Tensor | None
        ) -> torch.Tensor:
            packing = {"cu_seq_lens_q": cu_seq_lens, "max_length_q": self.max_length}
            histories = pack_histories(vocab_size=config.vocab_size, **columns, **packing)
            return model.run_layers(histories, last_only=True, item_vectors=item_vectors, compiled=False)[0]

        self._encode = torch.compile(encode, dynamic=False)
        self._lock = threading.Lock()
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}

    def takes(self, model: nn.Module, *sizes: int) -> bool:
        """Whether it was made for batches of these sizes and for where the model is now."""
        return self.sizes == sizes and self.device == model.item_counts.device

    def has_room(self, histories: PackedHistories) -> bool:
        """Whether a batch fits and is at least half as large, so that it does not take longer than by itself."""
        if histories.item_ids is None or histories.lengths is not None or histories.max_seqlen > self.max_length:
            return False
        tokens, device = histories.position.shape[0], histories.cu_seqlens.device
        full_enough = 2 * tokens >= self.batch.tokens and device == self.device
        return full_enough and self.batch.has_room(tokens, histories.cu_seqlens.shape[0] - 1)

    def __call__(self, histories: PackedHistories) -> torch.Tensor:
        """The last layer's hidden states `[S, hidden_size]` of each history's last position."""
        with self._lock:
            given = {**histories._asdict(), "input_ids": histories.item_ids}
            columns = {name: histories.pack(given[name])[None] for name in self.batch.columns}
            of_histories = {name: given[name] for name in self.batch.history_columns if given[name] is not None}
            self.batch.load(columns, histories.cu_seqlens, of_histories)
            return self._run()[: histories.cu_seqlens.shape[0] - 1].clone()

    def _run(self) -> torch.Tensor:
        self._update_vectors()

        def run() -> torch.Tensor:
            columns = {**self.batch.columns, **self.batch.history_columns}
            return self._encode(columns, self.batch.cu_seq_lens, self._vectors)

        if self.device.type != "cuda":
            return run()
        # A graph is that of one precision.
        precision = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        if precision not in self._captured:
            warm_up(run, self.device)
            self._captured[precision] = capture(run, self.device)
        captured = self._captured[precision]
        if captured is None:
            return run()
        graph, output = captured
        graph.replay()
        return output

    def _update_vectors(self) -> None:
        if self._model.item_features is None:
            return
        vectors = self._model.item_vectors()
        if self._vectors is None or self._vectors.shape != vectors.shape:
            self._vectors = torch.empty_like(vectors)
        if vectors is not self._vectors_of():
            self._vectors.copy_(vectors)
            self._vectors_of = weakref.ref(vectors)

    def warm_up(self) -> None:
        """Compiles, and reports on the log how long it took."""
        started = time.perf_counter()
        with self._lock, torch.no_grad():
            self._run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        logger.info(
            "Compiled for inference in %.1f s: batches of up to %d items.",
            time.perf_counter() - started,
            self.batch.tokens,
        )
