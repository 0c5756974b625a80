"""Forward and backward passes over batches of one shape: compiled once, and captured as a CUDA graph."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..model.ids_blossomrec import IGNORE_INDEX


logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor | int]


class StaticBatch:
    """
    A packed batch of fixed shape in fixed memory that batches are copied into. The remainder is filled with histories
    of [PAD] without targets.

    Args:
        tokens: T, number of positions.
        histories: S, number of histories.
        max_length: length of the longest history; also of those that fill the remainder.
        device: where its tensors are.
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
        """One with room for `batch` and for most batches like it of up to `max_tokens` positions."""
        tokens, histories = batch["input_ids"].shape[1], batch["cu_seq_lens_q"].shape[0] - 1
        tokens = max(tokens, min(max_tokens, -(-tokens * 9 // 8)))
        return cls(tokens, -(-histories * 5 // 4) + -(-tokens // max_length), max_length, device)

    def has_room(self, batch: Batch) -> bool:
        """Whether `batch` and the histories that fill the remainder fit."""
        rest = self.tokens - batch["input_ids"].shape[1]
        histories = batch["cu_seq_lens_q"].shape[0] - 1
        return rest >= 0 and histories + -(-rest // self.max_length) <= self.histories

    def load(self, batch: Batch, num_targets: int) -> None:
        """Copies `batch`, for which `has_room` must be true."""
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


class StaticPass:
    """
    Forward and backward passes over batches of one shape, so that the compiler compiles once. A batch that does not fit
    enlarges the shape.

    Args:
        run: forward and backward pass of the model's arguments; returns the loss.
        max_tokens: number of positions of the largest batch.
        max_length: length of the longest history.
    """

    def __init__(self, run: Callable[[Batch], torch.Tensor], *, max_tokens: int, max_length: int):
        self.run = run
        self.max_tokens, self.max_length = max_tokens, max_length
        self._batch: StaticBatch | None = None

    def __call__(self, batch: Batch, num_targets: int) -> torch.Tensor:
        """The loss of a batch of [`HistoryStore.pack`], on the device; the gradients are in the parameters."""
        self._load(batch, num_targets)
        return self.run(self._batch.arguments())

    def _load(self, batch: Batch, num_targets: int) -> bool:
        """Copies the batch into fixed memory; returns whether that is new."""
        enlarge = self._batch is None or not self._batch.has_room(batch)
        if enlarge:
            device = batch["input_ids"].device
            room = StaticBatch.room_for(batch, self.max_tokens, self.max_length, device)
            if self._batch is not None:  # never less than before, or two kinds of batches would alternate
                larger = max(room.tokens, self._batch.tokens), max(room.histories, self._batch.histories)
                room = StaticBatch(*larger, self.max_length, device)
            self._batch = room
        self._batch.load(batch, num_targets)
        return enlarge


class GraphedPass(StaticPass):
    """
    Such passes in one launch instead of hundreds, which bound the steps of small models: a step of 16,384 items, width
    128, takes 3.4 ms on an H100 instead of 13 to 21, by the CPU (2026-11-25).

    The passes are captured at the first batch, and again when the shape is enlarged. If capturing fails (an operation
    waits for the device), this is reported on the log and passes are launched operation by operation from then on. The
    memory of the captured passes stays in use. Decisions of Python code are captured, too: settings changed and hooks
    added later have no effect.

    Args:
        run, max_tokens, max_length: see [`StaticPass`].
        parameters: the parameters that get gradients. Before a call, each gradient is `None`, or a tensor that `run` adds
            to and that stays the same tensor in every call.
    """

    def __init__(
        self,
        run: Callable[[Batch], torch.Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        max_tokens: int,
        max_length: int,
    ):
        super().__init__(run, max_tokens=max_tokens, max_length=max_length)
        self.parameters = parameters
        self.works = True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, num_targets: int) -> torch.Tensor:
        if self._load(batch, num_targets) and self.works:
            self._capture()
        if not self.works:
            return self.run(self._batch.arguments())
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _capture(self) -> None:
        self._graph = self._gradients = None  # frees their memory first
        arguments, device = self._batch.arguments(), self._batch.input_ids.device
        random_state = torch.cuda.get_rng_state(device)
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside the graph
            self.run(arguments)
        current.wait_stream(stream)
        self._set_gradients(gradients)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile, as the one does that watches the exchange between processes.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self.run(arguments)
        except RuntimeError as error:
            self.works = False
            # A capture that fails at its end leaves its own stream, and the random generator believing that it goes on.
            torch.cuda.set_stream(current)
            fresh = torch.Generator(device).graphsafe_get_state()
            torch.cuda.default_generators[device.index].graphsafe_set_state(fresh)
            logger.warning(
                "Training steps cannot be captured as a CUDA graph and are launched operation by operation: %s", error
            )
        self._gradients = [parameter.grad for parameter in self.parameters]
        self._set_gradients(gradients)
        self._graph = graph
        torch.cuda.set_rng_state(random_state, device)

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(gradient)
