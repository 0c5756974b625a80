"""Item-id sequences from raw logs: a `datasets.Dataset` with one row per user."""

from .build import build_sequences
from .cluster import build_sequences_on_spark, partition_log
from .splits import (
    has_users,
    hold_out_nothing,
    item_counts,
    repeat_share,
    split,
    split_by_leave_one_out,
    split_by_time,
    split_by_user,
)
from .synthetic import generate_log, generate_titles


__all__ = [
    "build_sequences",
    "build_sequences_on_spark",
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
]
