"""Training and evaluation."""

from .arguments import LoopArguments
from .evaluation import HeldOutItems, Ranks, evaluate, rank_held_out_items
from .histories import HistoryStore
from .loop import TrainingLoop, TrainingResult, describe_environment, train
from .metrics import per_user_metrics, ranking_metrics
from .results import append_result, read_results
from .trainer import RankingCollator, SequentialRecommendationTrainer, ranking_compute_metrics


__all__ = [
    "HeldOutItems",
    "HistoryStore",
    "LoopArguments",
    "RankingCollator",
    "Ranks",
    "SequentialRecommendationTrainer",
    "TrainingLoop",
    "TrainingResult",
    "append_result",
    "describe_environment",
    "evaluate",
    "per_user_metrics",
    "rank_held_out_items",
    "ranking_compute_metrics",
    "ranking_metrics",
    "read_results",
    "train",
]
