"""Training: the loop, its arguments and callbacks, and a subclass of `Trainer`."""

from .arguments import (
    LoopArguments,
    changed_arguments,
    check_tracker,
    parse_arguments,
    read_arguments,
    save_arguments,
)
from .callbacks import LogLinesCallback, LoopCallback, SelectionWatch, draw_selection, selection_statistics
from .initialize import initialize_model
from .log_arguments import LogArguments
from .loop import TrainingLoop, train
from .new_items import add_items, freeze_all_but_items, initialize_from_events, read_item_vectors
from .refit import check_refit_folder, refit, refit_folder
from .state import TrainingResult
from .trainer import SequentialRecommendationTrainer, ranking_compute_metrics


__all__ = [
    "LogArguments",
    "LogLinesCallback",
    "LoopArguments",
    "LoopCallback",
    "SelectionWatch",
    "SequentialRecommendationTrainer",
    "TrainingLoop",
    "TrainingResult",
    "add_items",
    "changed_arguments",
    "check_refit_folder",
    "check_tracker",
    "draw_selection",
    "freeze_all_but_items",
    "initialize_from_events",
    "initialize_model",
    "parse_arguments",
    "ranking_compute_metrics",
    "read_arguments",
    "read_item_vectors",
    "refit",
    "refit_folder",
    "save_arguments",
    "selection_statistics",
    "train",
]
