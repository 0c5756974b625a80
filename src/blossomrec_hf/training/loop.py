"""The training loop on Accelerate."""

import json
import logging
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from huggingface_hub import CommitInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ..batches import TokenBudgetSampler
from ..batches.histories import IGNORE_INDEX, HistoryStore
from ..evaluation.held_out import HeldOutItems
from ..evaluation.ranking import ALL_SUFFIX, UNSEEN_SUFFIX, check_metric, evaluate
from ..model.loss_blossomrec import MAX_LOGITS, supports_fused
from ..model.manifest_blossomrec import require_loadable
from ..model.upload_blossomrec import ensure_repo
from ..sharing.hub import push_run
from ..utils.files import atomic_files, atomic_folder
from ..utils.progress import can_draw_bars, progress_bar
from .arguments import COMPILE_STEPS, LoopArguments
from .averaging import WeightAverage
from .callbacks import LoopCallback
from .checkpoints import MetricsFile, RunFolder, numbered_folders, quiet_libraries, written_by_all
from .graphs import GraphedPass
from .optimizer import make_optimizer
from .state import LoopState, TrainingResult, on_sigterm


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

    Runs alone or under `accelerate launch`. Each step packs whole histories up to `args.tokens_per_step` items; its
    loss is the sum over all valid targets of the step divided by their number, over all processes and accumulation
    steps.

    The run writes into `args.output_dir`: `metrics.jsonl`, `best-N` (model and tokenizer at the best step N),
    `checkpoint-N` (all that is needed to go on) and, at the end, the best model and the tokenizer. A run that was
    ended by anything, `kill -9` included, goes on with `args.resume` and reaches the weights that it would have
    reached (to the last bit on a CPU); on another number of processes as well, but for the dropout. SIGTERM writes a
    checkpoint first and exits with status 143.

    Args:
        model: a `BlossomRecForSequentialRecommendation`.
        train_view: the training view of [`~blossomrec_hf.data.split`], rows with `input_ids`, or [`HistoryStore`].
        validation_view: the validation view, rows like its, or [`HeldOutItems`]. Without one, the last weights are
            kept.
        args: see [`LoopArguments`].
        tokenizer: saved beside the model.
        callbacks: see [`~blossomrec_hf.training.LoopCallback`].
        accelerator: made from `args` when left out.

    Raises:
        ValueError: if no history holds an item to predict, the metric's name is unknown, the run to be resumed was
            another one, or the folder holds an unfinished run that is not to be resumed.
        FloatingPointError: if a gradient or the loss is not finite; names the step and the parameters. The checkpoints
            written before stay.
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
    """An accelerator for the loop. The buffers (item frequencies) never change: no broadcast at every step."""
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


class TrainingLoop:
    """
    The parts of [`train`], for those who want to replace one; same arguments, and `stop_epoch`: the epoch after which the
    run ends, whereas its schedule is that of `args.num_train_epochs`. `run()` does everything. On a GPU, what a forward and
    backward pass does is recorded once: with `cuda_graphs=False`, hooks and settings may change in between.
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
        self.args, self.stop_epoch = args, stop_epoch
        self.tokenizer = tokenizer
        self.callbacks = list(callbacks)
        self.accelerator = accelerator or make_accelerator(args)
        self.output_dir = Path(args.output_dir)
        self._repository = args.hub_model_id or self.output_dir.resolve().name
        if args.push_to_hub:
            if tokenizer is None:
                raise ValueError("`push_to_hub` needs a `tokenizer`; without one, nobody could use the model.")
            if self.accelerator.is_main_process:  # a missing token is told now, not after the training
                self._repository = ensure_repo(self._repository, private=args.hub_private_repo)

        self.histories = (
            train_view
            if isinstance(train_view, HistoryStore)
            else HistoryStore.from_rows(train_view, max_length=args.max_length)
        )
        self.trainable = np.flatnonzero(self.histories.num_targets > 0)
        if len(self.trainable) == 0:
            raise ValueError(
                f"`train_view` holds {len(self.histories)} histories, the longest of "
                f"{self.histories.lengths.max(initial=0)} items, and none with an item to predict; give histories of two "
                "items or more."
            )
        largest, vocab_size = int(self.histories.items.max()), model.config.vocab_size
        if largest >= vocab_size:
            raise ValueError(
                f"`train_view` holds the id {largest}; those of the model lie in 0 … {vocab_size - 1}. For new items, "
                "grow the vocabulary: `tokenizer.add_items(...)`, then `model.resize_token_embeddings(...)`."
            )
        if len(self.trainable) < len(self.histories):
            logger.info("%d histories have no item to predict.", len(self.histories) - len(self.trainable))
        self.sampler = TokenBudgetSampler(self.histories.lengths[self.trainable], args.tokens_per_step, seed=args.seed)
        self.held_out = (
            validation_view
            if validation_view is None or isinstance(validation_view, HeldOutItems)
            else HeldOutItems.from_rows(validation_view, max_length=args.max_length, num_users=args.eval_users or None)
        )
        if self.held_out is not None and model.config.repeat_share is None:
            model.config.repeat_share = self.held_out.repeat_share  # travels with the model
        self.state = LoopState()
        self.bare_model = model
        self._folder = RunFolder(self.output_dir, self.accelerator, self._describe_run())
        # Each process draws its own dropout; the order of the data does not depend on the global generators.
        set_seed(args.seed, device_specific=True)
        model.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, args))
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=self.total_steps(),
        )
        self.accelerator.register_for_checkpointing(self.state, self.scheduler)
        self.histories.to(self.accelerator.device)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._parameter_names = [name.removeprefix("module.") for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        if self._sharded:
            # Who calls it on every process gets the gathered weights, as in a forward pass.
            register_fsdp_forward_method(model, "recommend")
        self.average = None
        if args.ema_decay > 0:
            if self._sharded:
                raise ValueError(
                    f"`ema_decay` is {args.ema_decay}; a sharded model (FSDP) has no average, it must be 0."
                )
            self.average = WeightAverage(self._parameters, args.ema_decay)
            self.accelerator.register_for_checkpointing(self.average)
        graphed = self._can_be_graphed()
        compiled = args.torch_compile
        if compiled is None:
            compiled = graphed and self.total_steps() >= COMPILE_STEPS
        # Batches of a captured step have one shape, others any.
        self._step_model = torch.compile(self.model, dynamic=not graphed) if compiled else self.model
        self._folder.execution = {"compiled": compiled, "CUDA graphs": graphed}
        self._graphed = None
        if graphed:
            longest = int(self.histories.lengths.max())
            self._graphed = GraphedPass(
                self._forward_backward, self._parameters, max_tokens=args.tokens_per_step, max_length=longest
            )
        self._stop_requested = False
        self._last_loss = float("nan")

    def _can_be_graphed(self) -> bool:
        """
        Whether a step is one pass on one GPU with nothing that talks to other processes or to the CPU: the gradients'
        exchange of DDP and FSDP does, as do the scaler of fp16 and the chunks of logits that do not fit at once (which
        take longer than their launches anyway).
        """
        args, accelerator = self.args, self.accelerator
        alone = accelerator.num_processes == 1 and args.gradient_accumulation_steps == 1 and not self._sharded
        on_gpu = accelerator.device.type == "cuda" and accelerator.scaler is None
        config = self.bare_model.config
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, self.bare_model.dtype)
        at_once = (
            config.objective != "cross_entropy"
            or args.tokens_per_step * config.vocab_size <= MAX_LOGITS["cuda"]
            or (
                config.cross_entropy_implementation in ("auto", "triton") and supports_fused(dtype, config.hidden_size)
            )
        )
        return args.cuda_graphs and alone and on_gpu and at_once

    # -- the plan ----------------------------------------------------------------------------------

    def total_steps(self) -> int:
        """The steps of the whole run, by which schedules decay (shuffling changes an epoch's steps by a few)."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.args.num_train_epochs * len(self.plan_epoch(0))

    def plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """The histories of each step of an epoch: the same on every process, every history once."""
        self.sampler.set_epoch(epoch)
        return [self.trainable[rows] for rows in self.sampler]

    def own_parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """
        Cuts the histories of a step into one part a forward pass, about equal in items, and returns this process's
        parts.
        """
        accumulation = self.args.gradient_accumulation_steps
        num_parts = accumulation * self.accelerator.num_processes
        lengths = self.histories.lengths[rows]
        middles = np.cumsum(lengths) - lengths / 2
        part_of_row = (middles * num_parts / lengths.sum()).astype(np.int64)
        first = self.accelerator.process_index * accumulation
        return [rows[part_of_row == part] for part in range(first, first + accumulation)]

    # -- training ----------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        args, state = self.args, self.state
        resumed = self._folder.start(resume=args.resume)
        if resumed:
            self._folder.best_in_checkpoint = state.best_step
        self.metrics_file = MetricsFile(
            self.output_dir / "metrics.jsonl",
            enabled=self.accelerator.is_main_process,
            step=state.step if resumed else None,
        )
        if self.args.report_to != "none":
            settings = {name: value for name, value in args.resume_critical_args().items() if value is not None}
            self.accelerator.init_trackers(self.output_dir.name, config=settings)
        self._reset_sums()
        self._last_save = time.perf_counter()
        started = time.perf_counter() - state.seconds

        with (
            on_sigterm(self._request_stop),
            progress_bar(
                total=min(self.total_steps(), (self.stop_epoch or args.num_train_epochs) * len(self.plan_epoch(0))),
                initial=state.step,
                description="Training",
                enabled=self.accelerator.is_main_process,
            ) as self.bar,
        ):
            while not self._finished():
                for rows in self.plan_epoch(state.epoch)[state.step_in_epoch :]:
                    self.training_step(rows)
                    state.seconds = time.perf_counter() - started
                    self._after_step()
                    if state.step == args.max_steps:
                        break
                state.epoch += 1
                state.step_in_epoch = 0
                if self.held_out is not None and (state.epoch % args.eval_epochs == 0 or self._finished()):
                    self.validate()
                state.seconds = time.perf_counter() - started
                if self._finished() or self._agreed(time.perf_counter() - self._last_save >= args.save_seconds):
                    self.save_checkpoint()
        self._finish()
        return TrainingResult.of(state)

    def training_step(self, rows: np.ndarray) -> None:
        """One update of the weights from the histories `rows`. Never waits for the device."""
        self.model.train()
        # No process has to ask the others: the plan is the same everywhere.
        num_targets = int(self.histories.num_targets[rows].sum())
        parts = self.own_parts(rows)
        step_loss = torch.zeros((), device=self.accelerator.device)
        for place, part in enumerate(parts):
            with nullcontext() if place == len(parts) - 1 else self.accelerator.no_sync(self.model):
                batch = self.histories.pack(part, labels=True) if len(part) else self._batch_without_targets()
                if self._graphed is not None:
                    step_loss += self._graphed(batch, num_targets)
                else:
                    step_loss += self._forward_backward(batch | {"num_items_in_batch": num_targets})
        self._clip_and_watch(step_loss)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        self._loss_sum += step_loss
        self._items_since_log += int(self.histories.lengths[rows].sum())
        self.state.step += 1
        self.state.step_in_epoch += 1

    def _forward_backward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        loss = self._step_model(**batch).loss
        # Each loss is already a share of the whole, so the division by processes (and by what accumulation steps the
        # accelerator knows of) is undone.
        self.accelerator.backward(
            loss * (self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps)
        )
        return loss.detach()

    def _batch_without_targets(self) -> dict[str, torch.Tensor | int]:
        # A process without a history in this step still has to take part in the exchange of gradients.
        batch = self.histories.pack(self.trainable[:1], labels=True)
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch

    def _clip_and_watch(self, loss: torch.Tensor) -> None:
        """
        Clips the gradient and notes, on the device, the first step that is not finite and the norms of its gradients.
        """
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self._parameters]
        if self._sharded:
            # Each process holds a part of every gradient; the squares add up.
            gradients = [gradient.to_local() for gradient in gradients]
            squares = torch.stack(torch._foreach_norm(gradients)) ** 2
            norms = self.accelerator.reduce(squares, reduction="sum").sqrt()
        else:
            norms = torch.stack(torch._foreach_norm(gradients))
        self._grad_norm = torch.linalg.vector_norm(norms)
        if self.args.max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self.args.max_grad_norm / (self._grad_norm + 1e-6)).clamp(max=1.0))
        # Under fp16 an infinite gradient is the scaler's daily business; the loss is not.
        watched = loss if self.accelerator.scaler is not None else self._grad_norm
        first_bad = ~torch.isfinite(watched) & (self._bad_step < 0)
        self._bad_step = torch.where(first_bad, self.state.step + 1, self._bad_step)
        self._bad_norms = torch.where(first_bad, norms, self._bad_norms)

    def _raise_if_not_finite(self) -> None:
        bad_step = int(self.accelerator.gather(self._bad_step).max())
        if bad_step < 0:
            return
        finite = torch.isfinite(self._bad_norms).tolist()
        bad = [name for name, ok in zip(self._parameter_names, finite, strict=True) if not ok]
        # Backward goes from the last parameter to the first, and so does what is not finite.
        where = (
            f"it came up at {bad[-1]} and reached {len(bad)} of {len(finite)} gradients" if bad else "only the loss is"
        )
        checkpoints = numbered_folders(self.output_dir, "checkpoint")
        kept = f"The last good checkpoint is {checkpoints[-1][1]}." if checkpoints else "There is no checkpoint yet."
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {bad_step}: {where}. {kept} "
            "A lower learning rate, a longer warm-up or bf16 in place of fp16 usually help."
        )

    # -- after a step or an epoch ------------------------------------------------------------------

    def _finished(self) -> bool:
        args, state = self.args, self.state
        return (
            state.epoch >= min(args.num_train_epochs, self.stop_epoch or args.num_train_epochs)
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
            # A signal reaches the processes of one run at different steps; they have to agree on where to stop.
            stopping = self._agreed(self._stop_requested)
        if stopping or (args.save_steps > 0 and state.step % args.save_steps == 0):
            self.save_checkpoint()
        if stopping:
            logger.warning("Stopped by SIGTERM at step %d; `--resume` goes on from here.", state.step)
            raise SystemExit(128 + signal.SIGTERM)

    def log(self) -> None:
        """
        Writes the means since the last log. Inside an epoch, the only place where the CPU waits for the device.
        """
        self._raise_if_not_finite()
        self._last_loss = self._mean_loss()
        self._write(
            loss=self._last_loss,
            grad_norm=self._grad_norm.item(),
            learning_rate=self.scheduler.get_last_lr()[0],
            items_per_second=round(self._items_since_log / (time.perf_counter() - self._last_log_time)),
            seconds=round(self.state.seconds, 3),
        )
        self.bar.set_postfix({"loss": f"{self._last_loss:.3f}", **self._best_in_bar()}, refresh=False)
        self._reset_sums()

    def _mean_loss(self) -> float:
        """The mean loss of the steps since the last log, or of those before it where there is none."""
        if self.state.step == self._last_log_step:
            return self._last_loss
        return self.accelerator.reduce(self._loss_sum, reduction="sum").item() / (
            self.state.step - self._last_log_step
        )

    def _write(self, **values: float) -> None:
        self.metrics_file.write(step=self.state.step, epoch=self.state.epoch, **values)
        self.accelerator.log(values, step=self.state.step)

    def _reset_sums(self) -> None:
        device = self.accelerator.device
        self._loss_sum = torch.zeros((), device=device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_norms = torch.zeros(len(self._parameters), device=device)
        self._items_since_log = 0
        self._last_log_step = self.state.step
        self._last_log_time = time.perf_counter()

    def _best_in_bar(self) -> dict[str, str]:
        known = self.state.best_step > 0
        return {f"best {self.args.metric_for_best_model}": f"{self.state.best_metric:.4f}"} if known else {}

    def validate(self) -> dict[str, float]:
        """
        Ranks the validation items, and keeps the model on disk if it is the best so far. With a moving average of the
        weights, the model is that average.
        """
        with nullcontext() if self.average is None else self.average.in_place():
            return self._validate()

    def _validate(self) -> dict[str, float]:
        args, state = self.args, self.state
        self._raise_if_not_finite()
        started = time.perf_counter()
        metrics = evaluate(
            self.bare_model,
            self.held_out,
            max_tokens=args.eval_tokens,
            all_and_unseen=args.metric_for_best_model.endswith((ALL_SUFFIX, UNSEEN_SUFFIX)),
            accelerator=self.accelerator,
        )
        values = {f"validation_{name}": value for name, value in metrics.items()}
        for callback in self.callbacks:
            values |= callback.on_validate(self, metrics)
        self._write(
            seconds=round(state.seconds, 3), validation_seconds=round(time.perf_counter() - started, 3), **values
        )
        if metrics[args.metric_for_best_model] > state.best_metric:
            state.best_metric = metrics[args.metric_for_best_model]
            state.best_step, state.best_epoch, state.best_figures = state.step, state.epoch, metrics
            state.evaluations_since_best = 0
            best = self.output_dir / f"best-{state.step}"
            with written_by_all(atomic_folder, best, self.accelerator) as folder:
                self._save_model(folder)
            self._folder.keep_best(state.best_step)
        else:
            state.evaluations_since_best += 1
        self.bar.set_postfix(self._best_in_bar(), refresh=False)
        loss = self._mean_loss()
        if self.accelerator.is_main_process and not can_draw_bars():
            name, value = args.metric_for_best_model, metrics[args.metric_for_best_model]
            best = f"{state.best_metric:.4f} in epoch {state.best_epoch}"
            logger.info(
                "Epoch %d, step %d, %.0f s: loss %.4f, validation %s %.4f (best %s), learning rate %.3g",
                *(state.epoch, state.step, state.seconds, loss, name, value, best),
                self.scheduler.get_last_lr()[0],
            )
        return metrics

    # -- the run's folder --------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Writes all that the run needs to go on, in place of the checkpoint before."""
        self._raise_if_not_finite()
        self._folder.save_checkpoint(self.state.step, self.state.best_step, finished=self._finished())
        self._last_save = time.perf_counter()

    def _describe_run(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued."""
        not_the_model = (
            "_name_or_path transformers_version blossomrec_version architectures auto_map custom_pipelines".split()
        )
        config = {key: value for key, value in self.bare_model.config.to_dict().items() if key not in not_the_model}
        return {
            "arguments": self.args.resume_critical_args(),
            "model": json.loads(json.dumps(config, default=str)),
            "data": {
                "histories": len(self.histories),
                "items": int(self.histories.lengths.sum()),
                "checksum": zlib.crc32(self.histories.items.numpy(), zlib.crc32(self.histories.lengths)),
            },
            "processes": {"number": self.accelerator.num_processes},
            "schedule": {"stop_epoch": self.stop_epoch},
        }

    def _save_model(self, folder: Path) -> None:
        state_dict = self.accelerator.get_state_dict(self.model)
        with quiet_libraries():
            self.bare_model.save_pretrained(
                folder, state_dict=state_dict, is_main_process=self.accelerator.is_main_process
            )
        if self.tokenizer is not None and self.accelerator.is_main_process:
            self.tokenizer.save_pretrained(folder)

    def _finish(self) -> None:
        """Loads the best weights, and puts the model and the tokenizer into the run's folder."""
        best = self.output_dir / f"best-{self.state.best_step}"
        if best.is_dir():
            with quiet_libraries():
                best_model = type(self.bare_model).from_pretrained(best)
            # For a sharded model each process takes its part of the whole weights.
            options = StateDictOptions(full_state_dict=self._sharded)
            set_model_state_dict(self.bare_model, best_model.state_dict(), options=options)
        elif self.average is not None:
            torch._foreach_copy_([p.data for p in self._parameters], self.average.averages)
        with written_by_all(atomic_files, self.output_dir, self.accelerator) as folder:
            self._save_model(folder)
        for callback in self.callbacks:
            callback.on_end(self)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def push_to_hub(self, folder: Path | None = None) -> CommitInfo | None:
        """
        Uploads the run's folder (or another, such as that of its refit) once it is finished: best model, tokenizer, card,
        summary; on the main process. See [`~blossomrec_hf.sharing.hub.push_run`].
        """
        if not self.accelerator.is_main_process:
            return None
        return push_run(
            folder or self.output_dir,
            self._repository,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            commit_message="End of training",
        )

    # -- signals and processes ---------------------------------------------------------------------

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _agreed(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return self.accelerator.reduce(flags, reduction="sum").item() > 0
