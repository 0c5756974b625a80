"""The state and the result of a run of the training loop, and SIGTERM."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LoopState:
    """The state of a run, part of every checkpoint."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best_metric: float = -math.inf
    best_step: int = 0
    best_epoch: int = 0
    best_figures: dict[str, float] = field(default_factory=dict)
    evaluations_since_best: int = 0
    seconds: float = 0.0

    def add_validation(self, metrics: dict[str, float], name: str) -> bool:
        """Adds the figures of a validation; returns whether it is the best so far by the figure `name`."""
        self.evaluations_since_best += 1
        if not metrics[name] > self.best_metric:
            return False
        self.best_metric, self.best_figures = metrics[name], metrics
        self.best_step, self.best_epoch = self.step, self.epoch
        self.evaluations_since_best = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class TrainingResult:
    """
    The result of a run.

    Attributes:
        steps, epochs: number of steps and epochs.
        seconds: seconds of training, validation included.
        best_metric: best value of `metric_for_best_model`; `None` without a validation.
        best_step, best_epoch: when it was reached; 0 without a validation.
        best_figures: all validation figures of that time.
    """

    steps: int
    epochs: int
    seconds: float
    best_metric: float | None
    best_step: int
    best_epoch: int
    best_figures: dict[str, float]

    @classmethod
    def of(cls, state: LoopState) -> "TrainingResult":
        """The result of a run from its last state."""
        best_metric = state.best_metric if state.best_step else None
        best = (best_metric, state.best_step, state.best_epoch, state.best_figures)
        return cls(state.step, state.epoch, state.seconds, *best)

    def summary(self) -> dict[str, Any]:
        """All attributes except the figures, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "best_figures"}


@contextmanager
def on_sigterm(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` at SIGTERM instead of ending the process; in the main thread only."""
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: callback())
    except ValueError:  # not in the main thread, which handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
