"""What the model knows of events besides their items: when they happened and of what type they are."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .configuration_blossomrec import BlossomRecConfig
from .ids_blossomrec import UNKNOWN_TIME, UNKNOWN_TYPE
from .packing_blossomrec import PackedHistories
from .time_blossomrec import (
    GAP_BOUNDS,
    NUM_GAPS,
    ZONE_ROOM,
    gap_buckets,
    hours,
    local_times,
    unit_problem,
    weekdays,
    zone_changes,
)


class Moments(NamedTuple):
    """
    Times and types of events and of the events before and after them, int64 of one shape each; `None` if the model does not
    read them.

    Attributes:
        time: in seconds.
        previous_time: time of the previous event of the history, `UNKNOWN_TIME` at the first.
        next_time: time of the next event, or "now" at the last; `UNKNOWN_TIME` if unknown.
        event_type: index of the type, −1 if unknown.
        next_type: type of the next event, or the one to be predicted at the last; −1 if unknown.
    """

    time: torch.Tensor | None = None
    previous_time: torch.Tensor | None = None
    next_time: torch.Tensor | None = None
    event_type: torch.Tensor | None = None
    next_type: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Moments":
        return Moments(*(None if x is None else function(x) for x in self))

    @property
    def previous_gap(self) -> torch.Tensor:
        """Seconds since the previous event, `UNKNOWN_TIME` at the first."""
        return torch.where(self.previous_time == UNKNOWN_TIME, UNKNOWN_TIME, self.time - self.previous_time)

    @property
    def next_gap(self) -> torch.Tensor:
        """Seconds to the next event, `UNKNOWN_TIME` if unknown."""
        return torch.where(self.next_time == UNKNOWN_TIME, UNKNOWN_TIME, self.next_time - self.time)


def read_moments(histories: PackedHistories, config: BlossomRecConfig, training: bool = False) -> Moments:
    """
    The moments `[T]` of packed histories.

    Args:
        training: whether to drop the next event's time and type at a share `config.time_dropout_prob` of the positions.

    Raises:
        ValueError: for a column that the model reads and the histories do not have.
    """
    time = previous_time = next_time = event_type = next_type = None
    if not config.time_features and not config.event_types:
        return Moments()
    rows = histories.rows
    is_last = histories.position + 1 == histories.counts[rows]

    def following(x: torch.Tensor, last: torch.Tensor | None, default: int) -> torch.Tensor:
        """`x` at the next position; at the last, the value of the history, or `default`."""
        return torch.where(is_last, default if last is None else last[rows], nn.functional.pad(x[1:], (0, 1)))

    def kept(x: torch.Tensor, unknown: int) -> torch.Tensor:
        if not training or not config.time_dropout_prob:
            return x
        return torch.where(torch.rand(x.shape, device=x.device) < config.time_dropout_prob, unknown, x)

    if config.time_features:
        time = _column(histories, "timestamps", f"the model reads times ({', '.join(config.time_features)})")
        before = UNKNOWN_TIME if histories.previous_time is None else histories.previous_time[rows]
        previous_time = torch.where(histories.position == 0, before, nn.functional.pad(time[:-1], (1, 0)))
        next_time = kept(following(time, histories.prediction_time, UNKNOWN_TIME), UNKNOWN_TIME)
    if config.event_types:
        event_type = _column(histories, "event_type_ids", "the model reads event types")
        target = histories.target_event_type
        next_type = kept(following(event_type, target, config.default_target_type), UNKNOWN_TYPE)
    return Moments(time, previous_time, next_time, event_type, next_type)


def _column(histories: PackedHistories, name: str, reason: str) -> torch.Tensor:
    column = getattr(histories, name)
    if column is None:
        raise ValueError(
            f"`{name}` is None, but {reason}; give one value per event (a collator: `columns=model.config.event_columns`)."
        )
    return histories.pack(column)


@torch.compiler.disable
def check_moments(moments: Moments, config: BlossomRecConfig, latest_trained: torch.Tensor | None) -> None:
    """
    Check times and types, which are read from the device all at once.

    Args:
        moments: what `read_moments` returns outside of training.
        latest_trained: the latest time of the training data, a scalar; 0 if it is not known.

    Raises:
        ValueError: for times that go backwards or are in another unit than seconds or than in training, for a
            `prediction_time` before the last event, and for types outside of `config.event_types`.
    """
    facts, num_types = [], len(config.event_types or ())
    for name, types in (("event_type_ids", moments.event_type), ("target_event_type", moments.next_type)):
        if types is not None and types.numel():
            facts += [(name, *types.aminmax())]
    time, before, after = moments.time, moments.previous_time, moments.next_time
    numbers = [x for _, *pair in facts for x in pair]
    if timed := time is not None and time.numel() > 0:
        backwards = torch.zeros_like(time, dtype=torch.bool) if before is None else time < before
        early = (after != UNKNOWN_TIME) & (after < time)
        numbers += [torch.maximum(time, after).max(), backwards.any(), early.any()]
        offloaded = latest_trained is None or latest_trained.is_meta
        numbers.append(torch.zeros_like(time[0]) if offloaded else latest_trained.to(time.device))
    if not numbers:
        return
    numbers = torch.stack([x.long() for x in numbers]).tolist()
    if timed:
        latest, is_backwards, is_early, trained = numbers[-4:]
        if problem := unit_problem(latest, trained):
            raise ValueError(f"`timestamps` (or `prediction_time`) contains {latest}, {problem}")
        if is_backwards:
            place = int(backwards.nonzero()[0])
            raise ValueError(
                f"`timestamps` goes backwards inside a history, from {int(before[place])} to {int(time[place])}; sort the "
                "events of each history by time."
            )
        if is_early:
            place = int(early.nonzero()[0])
            raise ValueError(
                f"`prediction_time` is {int(after[place])}, before the last event of its history at {int(time[place])}; "
                "give the time of the event to be predicted, or drop the events after it."
            )
    for (name, *_), low, high in zip(facts, numbers[::2], numbers[1::2]):
        if low < UNKNOWN_TYPE or high >= num_types:
            raise ValueError(
                f"`{name}` contains {low if low < UNKNOWN_TYPE else high}; types are 0 to {num_types - 1}, as in "
                f"`config.event_types` ({', '.join(config.event_types)}), or −1 if unknown."
            )


# By the name of a feature: the moment that it reads, and what of it.
INPUT_FEATURES = {
    "previous_gap": ("previous_gap", "gap"),
    "next_gap_input": ("next_gap", "gap"),
    "hour": ("time", "hour"),
    "weekday": ("time", "weekday"),
    "event_types": ("event_type", "type"),
}
PREDICTION_FEATURES = {
    "next_gap": ("next_gap", "gap"),
    "hour": ("next_time", "hour"),
    "weekday": ("next_time", "weekday"),
    "event_types": ("next_type", "type"),
}


class EventVectors(nn.Module):
    """
    The sum of one learned vector for each feature of events. A feature has a vector per value (bucket, hour, day, type) and,
    as the last, one for an unknown value. All start at zero.

    Args:
        features: `INPUT_FEATURES` or `PREDICTION_FEATURES`, of which the configured ones are used.
        size: size of the vectors.
    """

    def __init__(self, config: BlossomRecConfig, features: dict[str, tuple[str, str]], size: int) -> None:
        super().__init__()
        configured = {*(config.time_features or ()), *(["event_types"] if config.event_types else [])}
        self.features = {name: feature for name, feature in features.items() if name in configured}
        kinds = {kind for _, kind in self.features.values()}
        self.time_zone = config.time_zone
        if "gap" in kinds:
            self.register_buffer("gap_bounds", torch.zeros(NUM_GAPS - 1, dtype=torch.long))
        if kinds & {"hour", "weekday"}:
            self.register_buffer("zone_changes", torch.zeros(ZONE_ROOM, dtype=torch.long))
            self.register_buffer("zone_offsets", torch.zeros(ZONE_ROOM, dtype=torch.long))
        self.sizes = {"gap": NUM_GAPS, "hour": 24, "weekday": 7, "type": len(config.event_types or ())}
        for name, (_, kind) in self.features.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(self.sizes[kind] + 1, size)))

    def initialize(self) -> None:
        """Set what is not from a checkpoint: vectors to zero, and the tables of buckets and of the time zone."""
        for vectors in self.parameters():
            init.zeros_(vectors)
        if hasattr(self, "gap_bounds"):
            init.copy_(self.gap_bounds, torch.tensor(GAP_BOUNDS))
        if hasattr(self, "zone_changes") and not getattr(self.zone_changes, "_is_hf_initialized", False):
            changes, offsets = zone_changes(self.time_zone)
            init.copy_(self.zone_changes, torch.tensor(changes))
            init.copy_(self.zone_offsets, torch.tensor(offsets))

    def forward(self, moments: Moments) -> torch.Tensor:
        """The vectors `[..., size]` of moments `[...]`."""
        values = self._values(moments)
        weights = [getattr(self, name) for name in values]
        if not torch.is_grad_enabled():
            return reduce(torch.add, map(nn.functional.embedding, values.values(), weights))
        # One matrix product, because the gradient of a lookup adds many events to few rows, which is slow on a GPU. (No
        # `autograd.Function` of all weights: PyTorch 2.11 compiles a variable number of them to gradients of zero.)
        hot = [x[..., None] == torch.arange(len(w), device=x.device) for x, w in zip(values.values(), weights)]
        return torch.cat(hot, -1).to(weights[0].dtype) @ torch.cat(weights)

    def _values(self, moments: Moments) -> dict[str, torch.Tensor]:
        """The rows of each feature's vectors."""
        values, local = {}, {}
        for name, (moment, kind) in self.features.items():
            x = getattr(moments, moment)
            if kind == "type":
                values[name] = torch.where(x == UNKNOWN_TYPE, self.sizes[kind], x)
                continue
            if kind == "gap":
                value = gap_buckets(x, self.gap_bounds)
            else:
                if moment not in local:
                    local[moment] = local_times(x, self.zone_changes, self.zone_offsets)
                value = hours(local[moment]) if kind == "hour" else weekdays(local[moment])
            values[name] = torch.where(x == UNKNOWN_TIME, self.sizes[kind], value)
        return values
