"""Where a run of the training loop is, how it ended, and when it is asked to end."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LoopState:
    """Where a run is. All of it is in every checkpoint."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best_metric: float = -math.inf
    best_step: int = 0
    best_epoch: int = 0
    best_figures: dict[str, float] = field(default_factory=dict)
    evaluations_since_best: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class TrainingResult:
    """
    How a run ended: steps and epochs done, seconds of training (validation included), the best value of
    `metric_for_best_model`, when it was reached, and all validation figures of that time. Without a validation, the best
    value is `None`, its step and epoch are 0, and there are no figures.
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
        """The result of a run that ended in `state`."""
        best_metric = state.best_metric if state.best_step else None
        best = (best_metric, state.best_step, state.best_epoch, state.best_figures)
        return cls(state.step, state.epoch, state.seconds, *best)

    def summary(self) -> dict[str, Any]:
        """All of it but the figures, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "best_figures"}


@contextmanager
def on_sigterm(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` at SIGTERM, in place of ending the process; only in the main thread."""
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: callback())
    except ValueError:  # Not in the main thread: whoever runs the loop there handles signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
