"""Raw logs -> item-id sequences -> batches."""

from .build import build_sequences
from .collators import PackingCollator, PaddingCollator
from .sampling import TokenBudgetSampler
from .splits import item_counts, split
from .synthetic import generate_log


__all__ = [
    "PackingCollator",
    "PaddingCollator",
    "TokenBudgetSampler",
    "build_sequences",
    "generate_log",
    "item_counts",
    "split",
]
