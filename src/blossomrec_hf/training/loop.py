"""The training loop on Accelerate."""

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import CommitInfo
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..batches.histories import HistoryStore
from ..batches.windows import HistoryWindows
from ..evaluation.held_out import HeldOutItems
from ..evaluation.model_scores import hold_out, nows_of
from ..evaluation.ranking import (
    ALL_SUFFIX,
    NOW_SUFFIX,
    UNSEEN_SUFFIX,
    check_metric,
    count_batches,
    evaluate,
)
from ..model.manifest_blossomrec import require_loadable
from ..sharing.upload import ensure_repo, push
from ..utils.environment import worth_compiling
from ..utils.progress import can_draw_bars, progress_bar
from .arguments import LoopArguments
from .callbacks import LoopCallback
from .checkpoints import RunFolder, describe_run
from .initialize import keep_latest_time
from .journal import MetricsFile, StepSums
from .plan import StepPlan
from .state import LoopState, TrainingResult, on_sigterm
from .step import TrainingStep


logger = logging.getLogger(__name__)


def train(
    model: PreTrainedModel,
    train_view: Dataset | Sequence[Mapping] | HistoryStore,
    validation_view: Dataset | Sequence[Mapping] | HeldOutItems | None = None,
    *,
    args: LoopArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[LoopCallback] = (),
    accelerator: Accelerator | None = None,
) -> TrainingResult:
    """
    Trains a model to predict every next item, and leaves it with the weights of its best validation.

    Runs alone or under `accelerate launch`. Each step packs whole histories up to `args.tokens_per_step` items. Its
    loss is the sum of weight · loss over all valid targets of the step divided by their number, over all processes and
    accumulation steps.

    The run writes into `args.output_dir`: `metrics.jsonl`, `best-N` (model and tokenizer after the best step N),
    `checkpoint-N` (the state of the run) and, at the end, the best model and the tokenizer. A run that was interrupted,
    also by `kill -9`, resumes with `args.resume` and reaches the same weights (to the last bit on a CPU), except that
    dropout differs on another number of processes. SIGTERM writes a checkpoint first and exits with status 143.
    Several processes write it at the next multiple of `args.logging_steps`; launchers wait 30 s for them. No other run
    may use the folder meanwhile.

    Args:
        model: a `BlossomRecForSequentialRecommendation`.
        train_view: the training view of [`~blossomrec_hf.data.split`], rows with `input_ids`, or [`HistoryStore`].
            Events of weight 0 are no targets, and the items of a basket are predicted together, from the events before it.
            Whole histories are needed for other `args.windows` than `"latest"`;
            [`~blossomrec_hf.batches.HistoryWindows`] are used as they are. A model of times or event types needs them:
            `split(dataset, "train", columns=model.config.event_columns)`.
        validation_view: the validation view of [`~blossomrec_hf.data.split`], such rows, or [`HeldOutItems`]. Without
            one, the last weights are kept.
        args: see [`LoopArguments`].
        tokenizer: saved with the model.
        callbacks: see [`~blossomrec_hf.training.LoopCallback`].
        accelerator: Defaults to one made from `args`.

    Raises:
        ValueError: if no history has an item to predict, the metric is unknown, the run to be resumed is another one, or
            the folder has an unfinished run that is not to be resumed, or one of another process that is running.
        OSError: if the disk is full; earlier checkpoints are kept.
        FloatingPointError: if a gradient or the loss is not finite; names the step and the parameters. Earlier
            checkpoints are kept.
    """
    loop = TrainingLoop(
        model,
        train_view,
        validation_view,
        args=args,
        tokenizer=tokenizer,
        callbacks=callbacks,
        accelerator=accelerator,
    )
    result = loop.run()
    if args.push_to_hub:
        loop.push_to_hub()
    return result


def make_accelerator(args: LoopArguments) -> Accelerator:
    """An accelerator for the loop."""
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )


class TrainingLoop:
    """
    The parts of [`train`], for users who want to replace one. `run()` does everything.

    Args:
        stop_epoch: the epoch after which the run ends, while its schedule is that of `args.num_train_epochs`; optional.

        The other arguments are those of [`train`]. On a GPU, forward and backward passes are captured once: with
        `args.cuda_graphs=False`, hooks and settings may change in between.

    Attributes:
        plan: the histories of each step, a `StepPlan`.
        update: one update of the weights, a `TrainingStep`.
        state: where the run is, a `LoopState`.
        bare_model: the model as it was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train_view: Dataset | Sequence[Mapping] | HistoryStore,
        validation_view: Dataset | Sequence[Mapping] | HeldOutItems | None = None,
        *,
        args: LoopArguments,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[LoopCallback] = (),
        accelerator: Accelerator | None = None,
        stop_epoch: int | None = None,
    ):
        check_metric(args.metric_for_best_model)
        require_loadable(type(model))
        if args.push_to_hub and tokenizer is None:
            raise ValueError("`push_to_hub` needs a `tokenizer`; without one, nobody could use the model.")
        self.args, self.bare_model, self.callbacks = args, model, list(callbacks)
        self.num_epochs = min(args.num_train_epochs, stop_epoch or args.num_train_epochs)
        self.accelerator = accelerator or make_accelerator(args)
        self.output_dir = Path(args.output_dir)
        self._repository = self._ensure_repository()
        histories = self._make_histories(train_view, model.config.event_columns)
        keep_latest_time(model, histories)
        processes = self.accelerator.num_processes
        self.plan = StepPlan(
            histories,
            args,
            vocab_size=model.config.vocab_size,
            num_processes=processes,
            process_index=self.accelerator.process_index,
        )
        self.held_out = validation_view
        self._validates_with_now = args.metric_for_best_model.endswith(NOW_SUFFIX)
        if validation_view is not None:
            nows_of(model.config, self._validates_with_now)  # fails now, not after an epoch
            limits = {"max_length": args.max_length, "num_users": args.eval_users or None}
            self.held_out = hold_out(validation_view, model.config, **limits)
        if self.held_out is not None and model.config.repeat_share is None:
            model.config.repeat_share = self.held_out.repeat_share  # saved with the model
        description = describe_run(args, model, histories, num_processes=processes, stop_epoch=stop_epoch)
        self._folder = RunFolder(self.output_dir, self.accelerator, description, tokenizer)
        # Each process draws its own dropout; the order of the data does not depend on the global generators.
        set_seed(args.seed, device_specific=True)
        histories.to(self.accelerator.device)
        self.state = LoopState()
        self.update = TrainingStep(model, self.plan, args, self.accelerator)
        self._folder.execution = self.update.execution
        self.accelerator.register_for_checkpointing(self.state, self.update.scheduler)
        if self.update.average is not None:
            self.accelerator.register_for_checkpointing(self.update.average)
        # All validations together decide, as each of them runs the same compiled code.
        validations = 0 if self.held_out is None else self.num_epochs // args.eval_epochs
        batches = validations * count_batches(self.held_out, args.eval_tokens) if validations else 0
        self._compiled_validation = worth_compiling(self.accelerator.device, batches)
        self.sums = StepSums(self.accelerator, step=0)
        self._stop_requested = False

    def _make_histories(
        self, train_view: Dataset | Sequence[Mapping] | HistoryStore, columns: Sequence[str]
    ) -> HistoryStore:
        """The histories or windows to train on, as in the first epoch."""
        args, histories = self.args, train_view
        if not isinstance(histories, HistoryStore):
            histories = HistoryStore.from_rows(
                train_view, columns=columns, max_length=args.max_length if args.windows == "latest" else None
            )
        histories = histories.with_columns(columns)
        if args.windows != "latest" and not isinstance(histories, HistoryWindows):
            histories = HistoryWindows(histories, args.max_length, window=args.windows, seed=args.seed)
        histories.set_epoch(0)
        return histories

    def _ensure_repository(self) -> str:
        """The repository of `push_to_hub`. It is created now, so that a missing token is reported before the training."""
        name = self.args.hub_model_id or self.output_dir.resolve().name
        if self.args.push_to_hub and self.accelerator.is_main_process:
            return ensure_repo(name, private=self.args.hub_private_repo)
        return name

    # -- training ----------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the end, and save the model with the best validation figure in `args.output_dir`."""
        args, state = self.args, self.state
        resumed = self._folder.start(resume=args.resume)
        if resumed:
            self._folder.best_in_checkpoint = state.best_step
        main = self.accelerator.is_main_process
        self.metrics_file = MetricsFile(
            self.output_dir / "metrics.jsonl", enabled=main, step=state.step if resumed else None
        )
        if args.report_to != "none":
            settings = {name: value for name, value in args.resume_critical_args().items() if value is not None}
            self.accelerator.init_trackers(self.output_dir.name, config=settings)
        self.sums.reset(state.step)
        self._last_save = time.perf_counter()
        self._started = time.perf_counter() - state.seconds
        total = min(self.plan.total_steps(), self.num_epochs * len(self.plan.epoch_steps(0)))
        bar = progress_bar(total=total, initial=state.step, description="Training", enabled=main)
        with on_sigterm(self._request_stop), bar as self.bar:
            while not self._finished():
                self._run_epoch()
        self._finish()
        return TrainingResult.of(state)

    def _run_epoch(self) -> None:
        """The rest of an epoch, its validation and its checkpoint."""
        args, state = self.args, self.state
        self.plan.histories.set_epoch(state.epoch)
        for rows in self.plan.epoch_steps(state.epoch)[state.step_in_epoch :]:
            self.training_step(rows)
            state.seconds = time.perf_counter() - self._started
            self._after_step()
            if state.step == args.max_steps:
                break
        state.epoch += 1
        state.step_in_epoch = 0
        if self.held_out is not None and (state.epoch % args.eval_epochs == 0 or self._finished()):
            self.validate()
        state.seconds = time.perf_counter() - self._started
        if self._finished() or self._any_process(time.perf_counter() - self._last_save >= args.save_seconds):
            self.save_checkpoint()

    def training_step(self, rows: np.ndarray) -> None:
        """Updates the weights from the histories `rows`, int64 [S], of all processes. Does not wait for the device."""
        loss = self.update(rows, self.state.step + 1)
        self.sums.add(loss, int(self.plan.histories.lengths[rows].sum()))
        self.state.step += 1
        self.state.step_in_epoch += 1

    def _finished(self) -> bool:
        args, state = self.args, self.state
        return (
            state.epoch >= self.num_epochs
            or state.step == args.max_steps
            or (args.patience > 0 and state.evaluations_since_best >= args.patience)
        )

    def _after_step(self) -> None:
        args, state = self.args, self.state
        self.bar.update()
        for callback in self.callbacks:
            callback.on_step(self)
        stopping = self._stop_requested and self.accelerator.num_processes == 1
        if state.step % args.logging_steps == 0:
            self.log()
            # A signal reaches the processes of one run at different steps; they have to agree on when to stop.
            stopping = self._any_process(self._stop_requested)
        if stopping or (args.save_steps > 0 and state.step % args.save_steps == 0):
            self.save_checkpoint()
        if stopping:
            logger.warning("Stopped by SIGTERM at step %d; `--resume` continues from here.", state.step)
            raise SystemExit(128 + signal.SIGTERM)

    def log(self) -> None:
        """Writes the means since the last log. Inside an epoch, only this waits for the device."""
        self._raise_if_not_finite()
        loss = self.sums.mean_loss(self.state.step)
        self._write(
            loss=loss,
            grad_norm=self.update.watch.norm.item(),
            learning_rate=self.update.scheduler.get_last_lr()[0],
            items_per_second=self.sums.items_per_second(),
            seconds=round(self.state.seconds, 3),
        )
        self.bar.set_postfix({"loss": f"{loss:.3f}", **self._best_in_bar()}, refresh=False)
        self.sums.reset(self.state.step)

    def _write(self, **values: float) -> None:
        self.metrics_file.write(step=self.state.step, epoch=self.state.epoch, **values)
        self.accelerator.log(values, step=self.state.step)

    def _best_in_bar(self) -> dict[str, str]:
        known = self.state.best_step > 0
        return {f"best {self.args.metric_for_best_model}": f"{self.state.best_metric:.4f}"} if known else {}

    # -- validation --------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """
        Ranks the validation items, and saves the model if it is the best so far: the moving average of the weights, if
        there is one.
        """
        with nullcontext() if self.update.average is None else self.update.average.in_place():
            return self._validate()

    def _validate(self) -> dict[str, float]:
        args, state = self.args, self.state
        self._raise_if_not_finite()
        started = time.perf_counter()
        metrics = evaluate(
            self.bare_model,
            self.held_out,
            max_tokens=args.eval_tokens,
            all_and_unseen=args.metric_for_best_model.removesuffix(NOW_SUFFIX).endswith((ALL_SUFFIX, UNSEEN_SUFFIX)),
            now=self._validates_with_now,
            accelerator=self.accelerator,
            compile=self._compiled_validation,
        )
        values = {f"validation_{name}": value for name, value in metrics.items()}
        for callback in self.callbacks:
            values |= callback.on_validate(self, metrics)
        seconds = {"seconds": state.seconds, "validation_seconds": time.perf_counter() - started}
        self._write(**{name: round(value, 3) for name, value in seconds.items()}, **values)
        if state.add_validation(metrics, args.metric_for_best_model):
            self._folder.save_best(state.best_step, self.bare_model)
        self.bar.set_postfix(self._best_in_bar(), refresh=False)
        loss = self.sums.mean_loss(state.step)
        if self.accelerator.is_main_process and not can_draw_bars():
            name, value = args.metric_for_best_model, metrics[args.metric_for_best_model]
            best = f"{state.best_metric:.4f} in epoch {state.best_epoch}"
            logger.info(
                "Epoch %d, step %d, %.0f s: loss %.4f, validation %s %.4f (best %s), learning rate %.3g",
                *(state.epoch, state.step, state.seconds, loss, name, value, best),
                self.update.scheduler.get_last_lr()[0],
            )
        return metrics

    # -- the folder of the run ---------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Writes a checkpoint in place of the previous one."""
        self._raise_if_not_finite()
        self._folder.save_checkpoint(self.state.step, self.state.best_step, finished=self._finished())
        self._last_save = time.perf_counter()

    def _finish(self) -> None:
        """Loads the best weights, and writes the model and the tokenizer into the folder of the run."""
        if not self._folder.load_best(self.state.best_step, self.bare_model) and self.update.average is not None:
            self.update.average.copy_to_parameters()
        self._folder.save_final(self.bare_model)
        for callback in self.callbacks:
            callback.on_end(self)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def push_to_hub(self, folder: Path | None = None) -> CommitInfo | None:
        """
        Uploads the folder of a finished run, on the main process: best model, tokenizer, card and summary. See
        [`~blossomrec_hf.sharing.push`].

        Args:
            folder: another folder, such as that of the refit. Defaults to that of the run.
        """
        if not self.accelerator.is_main_process:
            return None
        return push(
            folder or self.output_dir,
            self._repository,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            commit_message="End of training",
        )

    # -- processes ---------------------------------------------------------------------------------

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _raise_if_not_finite(self) -> None:
        self.update.watch.raise_if_not_finite(self.output_dir)

    def _any_process(self, flag: bool) -> bool:
        """Whether `flag` is true on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return self.accelerator.reduce(flags, reduction="sum").item() > 0
