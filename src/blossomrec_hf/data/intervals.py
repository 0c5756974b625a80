"""Intervals of numbers, the categories of `item_numbers`: two per power of 2. Needs no polars."""

import re
from collections.abc import Sequence

import numpy as np


_ZERO_STEP = 5000  # more than the steps between 1 and the smallest number
_NAME = re.compile(r"(\S+) to (\S+)")


def interval_ranks(numbers: np.ndarray) -> np.ndarray:
    """Ranks of the intervals of numbers, float64 of the same shape; NaN or infinite where the number is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.floor(2 * np.log2(np.abs(numbers)))
        return np.where(numbers == 0, 0, np.sign(numbers) * (steps + _ZERO_STEP))


def interval_name(rank: float) -> str:
    """The name of an interval, such as `"5.657 to 8"`."""
    if rank == 0:
        return "0"
    step = abs(rank) - _ZERO_STEP
    bounds = sorted(np.sign(rank) * 2 ** ((step + place) / 2) for place in (0, 1))
    return " to ".join(f"{bound:.4g}" for bound in bounds)


def interval_of(number: float) -> str | None:
    """The name of a number's interval; `None` if the number is not finite."""
    rank = float(interval_ranks(np.float64(number)))
    return interval_name(rank) if np.isfinite(rank) else None


def are_intervals(names: Sequence[str]) -> bool:
    """Whether categories are intervals of numbers, by their names."""
    return any(name != "0" for name in names) and all(name == "0" or _is_interval(name) for name in names)


def _is_interval(name: str) -> bool:
    bounds = _NAME.fullmatch(name)
    try:
        return bounds is not None and interval_of((float(bounds[1]) + float(bounds[2])) / 2) == name
    except ValueError:  # no numbers
        return False
