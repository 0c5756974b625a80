"""Forward and backward passes recorded once as a CUDA graph, and replayed."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..batches.histories import IGNORE_INDEX


logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor | int]


class StaticBatch:
    """
    A packed batch of fixed shape in fixed memory, that batches are copied into. The rest is filled up with histories
    of [PAD] without targets.

    Args:
        tokens: T, positions that it holds.
        histories: S, histories that it holds.
        max_length: the longest history; a multiple of it takes what is left of `tokens`.
        device: where it lies.
    """

    def __init__(self, tokens: int, histories: int, max_length: int, device: torch.device):
        self.tokens, self.histories, self.max_length = tokens, histories, max_length
        self.input_ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self.labels = torch.full((1, tokens), IGNORE_INDEX, device=device)
        self.cu_seq_lens = torch.zeros(histories + 1, dtype=torch.int32, device=device)
        self.num_targets = torch.ones((), dtype=torch.long, device=device)
        self._filling = torch.arange(1, histories + 1, dtype=torch.int32, device=device) * max_length

    @classmethod
    def room_for(cls, batch: Batch, max_tokens: int, max_length: int, device: torch.device) -> "StaticBatch":
        """One that holds `batch` and most others of its kind, of up to `max_tokens` positions."""
        tokens, histories = batch["input_ids"].shape[1], batch["cu_seq_lens_q"].shape[0] - 1
        tokens = max(tokens, min(max_tokens, -(-tokens * 9 // 8)))
        return cls(tokens, -(-histories * 5 // 4) + -(-tokens // max_length), max_length, device)

    def holds(self, batch: Batch) -> bool:
        """Whether `batch` and what fills it up have room."""
        rest = self.tokens - batch["input_ids"].shape[1]
        histories = batch["cu_seq_lens_q"].shape[0] - 1
        return rest >= 0 and histories + -(-rest // self.max_length) <= self.histories

    def load(self, batch: Batch, num_targets: int) -> None:
        """Copies `batch`, for which `holds` must be true."""
        tokens, offsets = batch["input_ids"].shape[1], batch["cu_seq_lens_q"].shape[0]
        self.input_ids[:, :tokens].copy_(batch["input_ids"])
        self.input_ids[:, tokens:].zero_()
        self.labels[:, :tokens].copy_(batch["labels"])
        self.labels[:, tokens:].fill_(IGNORE_INDEX)
        self.cu_seq_lens[:offsets].copy_(batch["cu_seq_lens_q"])
        filling = self._filling[: self.histories + 1 - offsets] + tokens
        self.cu_seq_lens[offsets:].copy_(filling.clamp_(max=self.tokens))
        self.num_targets.fill_(num_targets)

    def arguments(self) -> Batch:
        """The model's arguments: always the same tensors."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "cu_seq_lens_q": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "num_items_in_batch": self.num_targets,
        }


class GraphedPass:
    """
    Forward and backward of packed batches as one launch in place of hundreds, which bound the steps of small models: a
    step of 16,384 items, width 128, takes 3.4 ms on an H100 instead of 13 to 21, by the CPU (2026-11-25).
    Recorded at the first batch, and again when one comes that has no room. Where recording fails (an operation in it
    waits for the device), passes are run as they are from then on. What the recorded passes hold of memory stays theirs,
    and what Python decides in them is decided once: settings changed and hooks added later have no effect.

    Args:
        run: forward and backward of the model's arguments; returns the loss. Gradients must be `None` before it.
        parameters: what gets the gradients.
        max_tokens: most positions of a batch.
        max_length: the longest history.
    """

    def __init__(
        self,
        run: Callable[[Batch], torch.Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        max_tokens: int,
        max_length: int,
    ):
        self.run, self.parameters = run, parameters
        self.max_tokens, self.max_length = max_tokens, max_length
        self.works = True
        self._batch: StaticBatch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, num_targets: int) -> torch.Tensor:
        """The loss of a batch of [`HistoryStore.pack`], on the device; the gradients are in the parameters."""
        if self.works and (self._batch is None or not self._batch.holds(batch)):
            self._record(batch, num_targets)
        if not self.works:
            return self.run(batch | {"num_items_in_batch": num_targets})
        self._batch.load(batch, num_targets)
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _record(self, batch: Batch, num_targets: int) -> None:
        self._graph = self._gradients = None  # their memory first
        device = batch["input_ids"].device
        room = StaticBatch.room_for(batch, self.max_tokens, self.max_length, device)
        if self._batch is not None:  # never less than before, or two kinds of batches would take turns in recording
            larger = max(room.tokens, self._batch.tokens), max(room.histories, self._batch.histories)
            room = StaticBatch(*larger, self.max_length, device)
        self._batch = room
        self._batch.load(batch, num_targets)
        arguments, random_state = self._batch.arguments(), torch.cuda.get_rng_state(device)
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside the graph
            self.run(arguments)
        current.wait_stream(stream)
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loss = self.run(arguments)
        except RuntimeError as error:
            self.works = False
            # A capture that fails at its end leaves its own stream, and the random generator believing that it goes on.
            torch.cuda.set_stream(current)
            fresh = torch.Generator(device).graphsafe_get_state()
            torch.cuda.default_generators[device.index].graphsafe_set_state(fresh)
            logger.warning(
                "Training steps cannot be recorded as a CUDA graph and are launched piece by piece: %s", error
            )
        self._gradients = [parameter.grad for parameter in self.parameters]
        self._forget_gradients()
        self._graph = graph
        torch.cuda.set_rng_state(random_state, device)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
