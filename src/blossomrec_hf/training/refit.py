"""The final fit: a fresh model trained on all events, once a first run has found out for how long."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..batches.histories import HistoryStore
from .arguments import LoopArguments
from .callbacks import LoopCallback
from .checkpoints import refuse_unfinished
from .loop import TrainingLoop
from .state import TrainingResult


def refit_folder(args: LoopArguments) -> Path:
    """Where the refit of a run goes: `refit` in its output folder."""
    return Path(args.output_dir) / "refit"


def check_refit_folder(args: LoopArguments) -> None:
    """
    To be called before the first run, so that its work is not lost.

    Raises:
        ValueError: if the folder has an unfinished refit that is not to be resumed.
    """
    if not args.resume:
        refuse_unfinished(refit_folder(args))


def refit(
    model: PreTrainedModel,
    train_view: Dataset | Sequence[Mapping] | HistoryStore,
    first: TrainingResult,
    *,
    args: LoopArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[LoopCallback] = (),
) -> TrainingResult:
    """
    Trains a fresh model on all events, with the schedule of a first run, stopped at the epoch that was the first run's
    best. Nothing is held out, so the model cannot be evaluated; its figures are those of the first run.

    The learning rate follows the same schedule over `args.num_train_epochs` epochs (which have more steps here, because
    there are more events). The run writes into [`refit_folder`] what [`~blossomrec_hf.training.train`] writes, and goes on
    with `args.resume` after it was killed.

    Args:
        model: as the first run's was at its start (the same seed), with the `item_counts` of all events.
        train_view: the training view of [`~blossomrec_hf.data.hold_out_nothing`].
        first: how the first run ended. If it had no validation, the refit takes as many epochs.
        args: those of the first run.
        tokenizer, callbacks: as in `train`.

    Raises:
        as `train`.
    """
    loop = TrainingLoop(
        model,
        train_view,
        args=replace(args, output_dir=str(refit_folder(args)), push_to_hub=False),
        tokenizer=tokenizer,
        callbacks=callbacks,
        stop_epoch=first.best_epoch or first.epochs,
    )
    return loop.run()
