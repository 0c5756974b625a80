"""Raw logs -> item-id sequences -> batches."""

from .build import build_sequences
from .cluster import build_sequences_on_spark, partition_log
from .collators import PackingCollator, PaddingCollator
from .packed_loader import PackedDataLoader, PackedTrainerMixin
from .sampling import TokenBudgetSampler
from .splits import item_counts, split, split_by_leave_one_out, split_by_time, split_by_user
from .streaming import PackedStream
from .synthetic import generate_log
from .windows import HistoryWindows


__all__ = [
    "HistoryWindows",
    "PackedDataLoader",
    "PackedStream",
    "PackedTrainerMixin",
    "PackingCollator",
    "PaddingCollator",
    "TokenBudgetSampler",
    "build_sequences",
    "build_sequences_on_spark",
    "generate_log",
    "item_counts",
    "partition_log",
    "split",
    "split_by_leave_one_out",
    "split_by_time",
    "split_by_user",
]
