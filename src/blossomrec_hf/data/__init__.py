"""Raw logs -> item-id sequences -> batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from .collators import PackingCollator, PaddingCollator
    from .packed_loader import PackedDataLoader, PackedTrainerMixin
    from .sampling import TokenBudgetSampler
    from .streaming import PackedStream
    from .windows import HistoryWindows

# What makes batches needs torch; what makes sequences does not, and should not wait the seconds that its import takes.
_NEEDS_TORCH = {
    "HistoryWindows": "windows",
    "PackedDataLoader": "packed_loader",
    "PackedStream": "streaming",
    "PackedTrainerMixin": "packed_loader",
    "PackingCollator": "collators",
    "PaddingCollator": "collators",
    "TokenBudgetSampler": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NEEDS_TORCH[name]}", __name__), name)


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
