"""Forward and backward passes over batches of one shape: compiled once, and captured as a CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..model.static_blossomrec import StaticBatch, capture, warm_up


Batch = dict[str, torch.Tensor | int]

# The arguments that describe packed histories; the others are columns of the events.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


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
        return self.run(self._arguments())

    def _load(self, batch: Batch, num_targets: int) -> bool:
        """Copies the batch into fixed memory; returns whether that is new."""
        columns = {name: batch[name] for name in batch.keys() - _PACKING}
        offsets = batch["cu_seq_lens_q"]
        tokens, histories = batch["input_ids"].shape[1], offsets.shape[0] - 1
        enlarge = self._batch is None or not self._batch.has_room(tokens, histories)
        if enlarge:
            room = self._room_for(tokens, histories)
            dtypes = {name: column.dtype for name, column in columns.items()}
            self._batch = StaticBatch(*room, self.max_length, offsets.device, dtypes)
            self._num_targets = torch.ones((), dtype=torch.long, device=offsets.device)
        self._batch.load(columns, offsets)
        self._num_targets.fill_(num_targets)
        return enlarge

    def _room_for(self, tokens: int, histories: int) -> tuple[int, int]:
        """Positions and histories for such a batch and for most batches like it of up to `max_tokens` positions."""
        tokens = max(tokens, min(self.max_tokens, -(-tokens * 9 // 8)))
        histories = -(-histories * 5 // 4) + -(-tokens // self.max_length)
        if self._batch is None:
            return tokens, histories
        # Never less than before, or two kinds of batches would alternate.
        return max(tokens, self._batch.tokens), max(histories, self._batch.histories)

    def _arguments(self) -> Batch:
        """The model's arguments: always the same tensors."""
        packing = {"cu_seq_lens_q": self._batch.cu_seq_lens, "max_length_q": self.max_length}
        return {**self._batch.columns, **packing, "num_items_in_batch": self._num_targets}


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
            return self.run(self._arguments())
        self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _capture(self) -> None:
        self._graph = self._gradients = None  # frees their memory first
        arguments, device = self._arguments(), self._batch.cu_seq_lens.device
        random_state = torch.cuda.get_rng_state(device)
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]
        warm_up(lambda: self.run(arguments), device)
        self._set_gradients(gradients)
        captured = capture(lambda: self.run(arguments), device)
        self.works = captured is not None
        if self.works:
            self._graph, self._loss = captured
            self._gradients = [parameter.grad for parameter in self.parameters]
        self._set_gradients(gradients)
        torch.cuda.set_rng_state(random_state, device)

    def _set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(gradient)
