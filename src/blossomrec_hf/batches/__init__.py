"""Item-id sequences -> packed or padded batches."""

from .collators import PackingCollator, PaddingCollator
from .histories import HistoryStore
from .loader import HistoryDataLoader
from .sampling import BatchSizeSampler, HistorySampler, TokenBudgetSampler, budget_batches
from .windows import HistoryWindows


__all__ = [
    "BatchSizeSampler",
    "HistoryDataLoader",
    "HistorySampler",
    "HistoryStore",
    "HistoryWindows",
    "PackingCollator",
    "PaddingCollator",
    "TokenBudgetSampler",
    "budget_batches",
]
