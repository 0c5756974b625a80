"""The log of a run: lines of metrics, and the sums that they are made of."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..utils.files import atomic_write


class StepSums:
    """
    Sums over the steps since the last line of training metrics; the loss stays on the device until it is read.

    Args:
        accelerator: of the run.
        step: number of steps done before.
    """

    def __init__(self, accelerator: Accelerator, step: int):
        self.accelerator = accelerator
        self.last_loss = float("nan")
        self.reset(step)

    def reset(self, step: int) -> None:
        """Begins anew after `step`."""
        self.loss = torch.zeros((), device=self.accelerator.device)
        self.items = 0
        self.step, self.time = step, time.perf_counter()

    def add(self, loss: torch.Tensor, items: int) -> None:
        """Adds a step: the share of this process in its loss, and its number of items over all processes."""
        self.loss += loss
        self.items += items

    def mean_loss(self, step: int) -> float:
        """Mean loss of the steps since the last reset up to `step`; if there is none, the mean read last."""
        if step > self.step:
            self.last_loss = self.accelerator.reduce(self.loss, reduction="sum").item() / (step - self.step)
        return self.last_loss

    def items_per_second(self) -> int:
        """Items per second since the last reset."""
        return round(self.items / (time.perf_counter() - self.time))


class MetricsFile:
    """
    A log of JSON lines, each with a `step`. A resumed run first drops the lines after the step that it resumes from, so
    the file reads as if the run had never been interrupted.

    Args:
        path: the file.
        enabled: whether this process writes.
        step: the step that a resumed run resumes from; `None` begins a new file.

    Raises:
        ValueError: if a line of a resumed run cannot be read.
    """

    def __init__(self, path: Path, *, enabled: bool, step: int | None = None):
        self.path = path
        self.enabled = enabled
        self._kept: set[tuple] = set()  # step and names of each line of `step`
        if enabled:
            kept = [] if step is None or not path.exists() else self._lines_until(step)
            with atomic_write(path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")

    def _lines_until(self, step: int) -> list[str]:
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):  # a kill can cut the last line
                break
            try:
                values = json.loads(line)
                if values["step"] > step:
                    break
                if values["step"] == step:
                    self._kept.add((step, *values))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path} is damaged in line {len(lines) + 1}; remove that line.") from error
            lines.append(line)
        return lines

    def write(self, **values: Any) -> None:
        # A run that was interrupted between its validation and the next checkpoint validates again when it is resumed.
        if self.enabled and (values["step"], *values) not in self._kept:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
