"""An exponential moving average of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class WeightAverage:
    """
    The exponential moving average of some parameters (Polyak and Juditsky 1992, as used today): after each step,
    average ← decay · average + (1 − decay) · weight. Over the first steps the decay is lower, (1 + n) / (10 + n), so
    that the random start is forgotten.

    Args:
        parameters: on the device where they are trained.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Sequence[torch.Tensor], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replaces the weights by their averages."""
        torch._foreach_copy_(self.parameters, self.averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the weights by their averages inside a `with` statement."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
