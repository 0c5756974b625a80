"""Training and evaluation."""

from .arguments import LoopArguments
from .evaluation import HeldOutItems, Ranks, evaluate, rank_held_out_items
from .histories import HistoryStore
from .loop import TrainingLoop, TrainingResult, train
from .metrics import per_user_metrics, ranking_metrics


__all__ = [
    "HeldOutItems",
    "HistoryStore",
    "LoopArguments",
    "Ranks",
    "TrainingLoop",
    "TrainingResult",
    "evaluate",
    "per_user_metrics",
    "rank_held_out_items",
    "ranking_metrics",
    "train",
]
