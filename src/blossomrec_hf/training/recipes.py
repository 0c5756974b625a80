"""Recipes: settings of `blossomrec train` that were found by validation, by the kind of log that they suit."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """
    Settings that replace the defaults of `blossomrec train`.

    Attributes:
        purpose: the logs that it is for.
        found_on: the data sets on which it was found.
        settings: values by name, of arguments and of other settings of `BlossomRecConfig`.
    """

    purpose: str
    found_on: str
    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings that are among the arguments `names`, and the others, which are overrides of the configuration."""
        own = {name: value for name, value in self.settings.items() if name in names}
        return own, {name: value for name, value in self.settings.items() if name not in names}


def merge_overrides(recipe: dict[str, Any], given: str) -> str:
    """The overrides of a recipe as JSON, with those of the user, which have precedence."""
    return json.dumps({**recipe, **json.loads(given)})


SHORT_MEDIAN = 20  # events; see `suitable_recipe`
_SCHEDULE = {"lr_scheduler_type": "linear", "patience": 0}
_SMALL = {
    **{"tokens_per_step": 8192, "scoring": "cosine", "temperature": 0.05, "item_dropout_prob": 0.15},
    **{"ema_decay": 0.99, "num_train_epochs": 60, "eval_epochs": 4},
    **_SCHEDULE,
}
_LONG = {
    **{
        "max_length": 1000,
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "intermediate_size": 512,
    },
    **{
        "hidden_dropout_prob": 0.5,
        "scoring": "cosine",
        "temperature": 0.05,
        "item_dropout_prob": 0.15,
        "num_selected_blocks": 2,
    },
    **{"learning_rate": 2e-3, "warmup_steps": 500, "ema_decay": 0.998, "num_train_epochs": 90, "eval_epochs": 3},
    **_SCHEDULE,
}
RECIPES = {
    "short": Recipe(
        purpose=f"most users have fewer than {SHORT_MEDIAN} events",
        found_on="Amazon Beauty and Video Games",
        settings={**_SMALL, "max_length": 200, "hidden_dropout_prob": 0.5, "learning_rate": 1e-3},
    ),
    "medium": Recipe(
        purpose=f"most users have {SHORT_MEDIAN} events or more",
        found_on="MovieLens-1M, Foursquare, Gowalla and Online Retail",
        settings={**_SMALL, "max_length": 1000, "hidden_dropout_prob": 0.3, "learning_rate": 2e-3},
    ),
    "long": Recipe(
        purpose="many users have hundreds of events; a GPU",
        found_on="MovieLens-1M",
        settings=_LONG,
    ),
    "times": Recipe(
        purpose="as long, for logs with times whose gaps matter, recommendations with the time of the request",
        found_on="MovieLens-1M and MovieLens-100K",
        settings={
            **_LONG,
            **{"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "hidden_dropout_prob": 0.3},
            **{"num_selected_blocks": 4, "num_train_epochs": 26, "eval_epochs": 4, "warmup_steps": 200},
            **{"time_features": "previous_gap,next_gap_input", "metric_for_best_model": "ndcg@10_now"},
        },
    ),
    "tiny": Recipe(
        purpose="a few hundred users; two CPU cores, a minute",
        found_on="MovieLens-100K",
        settings={
            **{"max_length": 50, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1},
            **{"intermediate_size": 128, "hidden_dropout_prob": 0.5, "tokens_per_step": 4096, "learning_rate": 3e-3},
            **{"warmup_steps": 50, "num_train_epochs": 30, "eval_epochs": 5},
            **_SCHEDULE,
        },
    ),
}


def suitable_recipe(events: np.ndarray) -> str:
    """
    The recipe of `blossomrec train` if the user names none.

    Args:
        events: integers [U], number of events of each user of the log.
    """
    return "short" if np.median(events) < SHORT_MEDIAN else "medium"
