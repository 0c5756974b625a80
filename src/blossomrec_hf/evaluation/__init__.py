"""Ranking of held-out items, metrics, baselines, reports and paired comparisons."""

from .baselines import (
    GapPopularity,
    LastItemNeighbors,
    PopularityScores,
    RecentlyViewed,
    RecentPopularity,
    UserFrequentItems,
)
from .held_out import HeldOutItems, sample_users
from .metrics import per_user_metrics, ranking_metrics
from .model_scores import ModelScores
from .ranking import Ranks, evaluate, rank_by_now, rank_by_scores, rank_held_out_items
from .reports import PROTOCOL, bootstrap_means, describe_evaluation, markdown_table, paired_difference
from .results import append_result, read_results


__all__ = [
    "PROTOCOL",
    "GapPopularity",
    "HeldOutItems",
    "LastItemNeighbors",
    "ModelScores",
    "PopularityScores",
    "Ranks",
    "RecentPopularity",
    "RecentlyViewed",
    "UserFrequentItems",
    "append_result",
    "bootstrap_means",
    "describe_evaluation",
    "evaluate",
    "markdown_table",
    "paired_difference",
    "per_user_metrics",
    "rank_by_now",
    "rank_by_scores",
    "rank_held_out_items",
    "ranking_metrics",
    "read_results",
    "sample_users",
]
