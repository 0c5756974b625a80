"""Item-id sequences -> packed or padded batches."""

from .collators import PackingCollator, PaddingCollator
from .histories import HistoryStore
from .packed_loader import PackedDataLoader, PackedTrainerMixin
from .sampling import TokenBudgetSampler
from .windows import HistoryWindows


__all__ = [
    "HistoryStore",
    "HistoryWindows",
    "PackedDataLoader",
    "PackedTrainerMixin",
    "PackingCollator",
    "PaddingCollator",
    "TokenBudgetSampler",
]
