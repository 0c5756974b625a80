"""Training and evaluation."""

from .arguments import LogArguments, LoopArguments, check_tracker, parse_arguments, read_arguments, save_arguments
from .baselines import LastItemNeighbours, PopularityScores, RecentPopularity, UserFrequentItems
from .callbacks import LogLinesCallback, LoopCallback, SelectionWatch, draw_selection, selection_statistics
from .environment import describe_environment
from .evaluation import ModelScores, Ranks, evaluate, rank_by_scores, rank_held_out_items
from .held_out import HeldOutItems, sample_users
from .histories import HistoryStore
from .loop import TrainingLoop, train
from .metrics import per_user_metrics, ranking_metrics
from .new_items import add_items, freeze_all_but_items, initialize_from_events, read_item_vectors
from .progress import set_up_logging
from .refit import check_refit_folder, refit, refit_folder
from .report import PROTOCOL, bootstrap_means, describe_evaluation, markdown_table, paired_difference
from .results import append_result, read_results
from .state import TrainingResult
from .trainer import RankingCollator, SequentialRecommendationTrainer, ranking_compute_metrics


__all__ = [
    "PROTOCOL",
    "HeldOutItems",
    "HistoryStore",
    "LastItemNeighbours",
    "LogArguments",
    "LogLinesCallback",
    "LoopArguments",
    "LoopCallback",
    "ModelScores",
    "PopularityScores",
    "RankingCollator",
    "Ranks",
    "RecentPopularity",
    "SelectionWatch",
    "SequentialRecommendationTrainer",
    "TrainingLoop",
    "TrainingResult",
    "UserFrequentItems",
    "add_items",
    "append_result",
    "bootstrap_means",
    "check_refit_folder",
    "check_tracker",
    "describe_environment",
    "describe_evaluation",
    "draw_selection",
    "evaluate",
    "freeze_all_but_items",
    "initialize_from_events",
    "markdown_table",
    "paired_difference",
    "parse_arguments",
    "per_user_metrics",
    "rank_by_scores",
    "rank_held_out_items",
    "ranking_compute_metrics",
    "ranking_metrics",
    "read_arguments",
    "read_item_vectors",
    "read_results",
    "refit",
    "refit_folder",
    "sample_users",
    "save_arguments",
    "selection_statistics",
    "set_up_logging",
    "train",
]
