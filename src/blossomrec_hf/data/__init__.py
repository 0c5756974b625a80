"""Item-id sequences from raw logs: a `datasets.Dataset` with one row per user."""

import importlib
from typing import TYPE_CHECKING, Any

from .event_table import EventTable
from .holdout import (
    choose_fold,
    hold_out_nothing,
    split_by_leave_one_out,
    split_by_time,
    split_by_user,
    split_into_folds,
)
from .splits import has_users, item_counts, repeat_share, split


if TYPE_CHECKING:
    from .build import build_sequences
    from .cluster import build_sequences_on_spark
    from .shards import partition_log
    from .synthetic import generate_log, generate_titles


# Imported at first use: these modules import polars, pyarrow and datasets, which training from one file does without.
_MODULES = {
    "build_sequences": "build",
    "build_sequences_on_spark": "cluster",
    "generate_log": "synthetic",
    "generate_titles": "synthetic",
    "partition_log": "shards",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "EventTable",
    "build_sequences",
    "build_sequences_on_spark",
    "choose_fold",
    "generate_log",
    "generate_titles",
    "has_users",
    "hold_out_nothing",
    "item_counts",
    "partition_log",
    "repeat_share",
    "split",
    "split_by_leave_one_out",
    "split_by_time",
    "split_by_user",
    "split_into_folds",
]
