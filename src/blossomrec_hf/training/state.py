"""Where a run of the training loop is, and how it ended."""

import math
from dataclasses import asdict, dataclass
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
    `metric_for_best_model` and when it was reached.
    """

    steps: int
    epochs: int
    seconds: float
    best_metric: float
    best_step: int
    best_epoch: int
