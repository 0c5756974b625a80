"""Histories whose events have times and types, and models that read them."""

import random
from typing import NamedTuple

import torch
from cache_cases import recommender
from model_cases import histories

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.model.configuration_blossomrec import TIME_FEATURES
from blossomrec_hf.model.ids_blossomrec import UNKNOWN_TIME
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


TYPES = ["view", "cart", "buy"]


class Log(NamedTuple):
    """Histories: items, times, types, and the time and type of the event to be predicted. One entry per history."""

    items: list[torch.Tensor]
    times: list[torch.Tensor]
    types: list[torch.Tensor]
    now: torch.Tensor
    target: torch.Tensor

    def part(self, begins: list[int], ends: list[int]) -> "Log":
        """The events from place `begins` to before `ends` of each history."""
        cut = ([x[b:e] for x, b, e in zip(column, begins, ends)] for column in self[:3])
        return Log(*cut, self.now, self.target)

    def with_now(self) -> "Log":
        """The same events with another "now", which is unknown for a few."""
        now = [int(t[-1]) + random.choice([0, 7, 86400, 10**8]) if len(t) else 10**9 for t in self.times]
        return self._replace(now=torch.tensor([random.choice([x, x, UNKNOWN_TIME]) for x in now]))

    def padded(self, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
        """The arguments of a model, padded on a side or anywhere."""
        length = max(map(len, self.items)) + extra
        names = ("input_ids", "timestamps", "event_type_ids", "attention_mask")
        batch = {name: torch.zeros(len(self.items), length, dtype=torch.long) for name in names}
        for i, events in enumerate(zip(*self[:3])):
            n = len(events[0])
            place = torch.arange(n) + (length - n if side == "left" else 0)
            place = torch.randperm(length)[:n].sort().values if side == "anywhere" else place
            for name, values in zip(names, (*events, torch.ones(n, dtype=torch.long))):
                batch[name][i, place] = values
        return batch | {"prediction_time": self.now, "target_event_type": self.target}

    def packed(self) -> dict:
        offsets = torch.tensor([0, *map(len, self.items)]).cumsum(0)
        names = ("input_ids", "timestamps", "event_type_ids")
        batch = {name: torch.cat(column)[None] for name, column in zip(names, self)}
        batch |= {"cu_seq_lens_q": offsets.int(), "max_length_q": max(map(len, self.items))}
        return batch | {"prediction_time": self.now, "target_event_type": self.target}

    def lists(self) -> dict:
        names = ("input_ids", "timestamps", "event_type_ids")
        batch = {name: [x.tolist() for x in column] for name, column in zip(names, self)}
        return batch | {"prediction_time": self.now.tolist(), "target_event_type": self.target.tolist()}


def timed(*lengths: int) -> Log:
    """Histories of random items with times from 1990 to 2030, gaps from 0 seconds to years, and random types."""
    times = []
    for n in lengths:
        gaps = (torch.rand(n, dtype=torch.double) * 19 - 1).exp().long()
        times.append(torch.randint(6 * 10**8, 19 * 10**8, (1,)) + gaps.cumsum(0))
    types = [torch.randint(-1, len(TYPES), (n,)) for n in lengths]
    target = torch.randint(-1, len(TYPES), (len(lengths),))
    return Log(histories(*lengths), times, types, torch.zeros(len(lengths), dtype=torch.long), target).with_now()


def draw_features(always: tuple[str, ...] = ()) -> dict:
    """A random configuration of events."""
    types = random.choice([None, TYPES])
    return {
        "time_features": [name for name in TIME_FEATURES if name in always or random.random() < 0.5],
        "time_zone": random.choice(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/St_Johns"]),
        "event_types": types,
        "target_event_types": random.choice([None, ["buy"]]) if types else None,
    }


def event_recommender(**kwargs) -> BlossomRecForSequentialRecommendation:
    """A small model in float64 with random vectors of its features, which start at zero otherwise."""
    kwargs = {"attention_types": random.choices(ATTENTION_TYPES, k=2), "num_hidden_layers": 2} | kwargs
    model = recommender(**kwargs)
    print({name: getattr(model.config, name) for name in draw_features()}, model.config.attention_types)
    for part in (model.model.event_vectors, model.model.prediction_vectors):
        for vectors in () if part is None else part.parameters():
            torch.nn.init.normal_(vectors, std=0.5)
    return model
