"""One update of the weights."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, get_scheduler

from ..model.ids_blossomrec import IGNORE_INDEX
from .arguments import LoopArguments
from .averaging import WeightAverage
from .execution import compile_model, is_compiled, why_not_captured
from .gradients import FlatGradients, GradientWatch
from .graphs import GraphedPass, StaticPass
from .optimizer import make_optimizer
from .plan import StepPlan


logger = logging.getLogger(__name__)


class TrainingStep:
    """
    One update of the weights from the histories of a step: forward and backward passes, the exchange of gradients
    between processes, clipping, the optimizer and the moving average. It never waits for the device.

    Several processes each have all weights and exchange one flat buffer of gradients after the last backward pass, or
    (FSDP, version 2) each have a share of the weights.

    Args:
        model: on the CPU or on the device. Every process gets the weights of the first one.
        plan, args, accelerator: of the run.

    Attributes:
        model: the model as `accelerator` prepared it.
        optimizer, scheduler: as in `transformers`.
        average: moving average of the weights, `None` without `args.ema_decay`.
        watch: clips the gradients and remembers a step that is not finite.
        sharded: whether the weights are sharded (FSDP).
        execution: how steps are executed, for the checkpoints.
    """

    def __init__(self, model: PreTrainedModel, plan: StepPlan, args: LoopArguments, accelerator: Accelerator):
        self.plan, self.args, self.accelerator = plan, args, accelerator
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and not accelerator.is_fsdp2:
            raise ValueError("`fsdp_version` is 1; it must be 2 (`accelerate config`).")
        if self.sharded and args.ema_decay > 0:
            raise ValueError(f"`ema_decay` is {args.ema_decay}; a sharded model (FSDP) has no average, it must be 0.")
        model.to(accelerator.device)
        optimizer = make_optimizer(model, args)
        if self.sharded:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            register_fsdp_forward_method(model, "recommend")  # gathers the weights, as a forward pass does
        else:
            # No wrapper of `accelerate` for several processes: gradients are exchanged here.
            self.model = accelerator.prepare_model(model, evaluation_mode=True)
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=plan.total_steps(),
        )
        if args.warmup_steps >= plan.total_steps() > 0 and accelerator.is_main_process:
            logger.warning(
                "`warmup_steps` is %d and the run has %d steps, so that the learning rate never reaches `learning_rate`; "
                "lower `warmup_steps` or `tokens_per_step`, or train for more epochs.",
                args.warmup_steps,
                plan.total_steps(),
            )
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.parameters = list(named.values())
        self.gradients = None
        if not self.sharded and plan.num_parts > 1:
            self.gradients = FlatGradients(self.parameters)
        if not self.sharded and accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                torch.distributed.broadcast(parameter.data, src=0)
        self.average = WeightAverage(self.parameters, args.ema_decay) if args.ema_decay > 0 else None
        self.watch = GradientWatch(
            named, self.parameters, accelerator, max_grad_norm=args.max_grad_norm, sharded=self.sharded
        )
        self._set_up_execution(model)

    def _set_up_execution(self, model: PreTrainedModel) -> None:
        args, accelerator = self.args, self.accelerator
        max_tokens = self.plan.largest_part()
        reason = why_not_captured(args, accelerator, model, max_tokens=max_tokens, sharded=self.sharded)
        compiled = is_compiled(args, accelerator.device, self.plan.total_steps())
        self.execution = {"compiled": compiled, "CUDA graphs": reason is None}
        if accelerator.device.type == "cuda" and accelerator.is_main_process:
            graphs = "replayed as CUDA graphs" if reason is None else f"not replayed as CUDA graphs: {reason}"
            logger.info("Training steps are %s and %s.", "compiled" if compiled else "not compiled", graphs)
        self._compiled_model = compile_model(self.model, sharded=self.sharded) if compiled else self.model
        self.run_pass: Callable[[dict[str, Any], int], torch.Tensor] = self._run_any_shape
        sizes = {"max_tokens": max_tokens, "max_length": int(self.plan.histories.lengths.max())}
        if reason is None:
            self.run_pass = GraphedPass(self._forward_backward, self.parameters, **sizes)
        elif compiled:
            self.run_pass = StaticPass(self._forward_backward, **sizes)

    def __call__(self, rows: np.ndarray, step: int) -> torch.Tensor:
        """
        Updates the weights.

        Args:
            rows: int64 [S], the histories of the step, over all processes.
            step: number of the step, from 1.

        Returns:
            A scalar on the device, the share of this process in the loss of the step.
        """
        self.model.train()
        histories = self.plan.histories
        num_targets = int(histories.num_targets[rows].sum())
        parts = self.plan.own_parts(rows)
        step_loss = torch.zeros((), device=self.accelerator.device)
        for place, part in enumerate(parts):
            with nullcontext() if place == len(parts) - 1 else self.accelerator.no_sync(self.model):
                batch = histories.pack(part, labels=True) if len(part) else self._batch_without_targets()
                step_loss += self.run_pass(batch, num_targets)
        if self.gradients is not None and self.accelerator.num_processes > 1:
            self.gradients.sum_over_processes()
        self.watch.clip_and_check(step_loss, step)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.scheduler.step()
        if self.gradients is None:
            self.optimizer.zero_grad()
        else:
            self.gradients.zero()
        if self.average is not None:
            self.average.update()
        return step_loss

    def _run_any_shape(self, batch: dict[str, Any], num_targets: int) -> torch.Tensor:
        return self._forward_backward(batch | {"num_items_in_batch": num_targets})

    def _forward_backward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        loss = self._compiled_model(**batch).loss
        # Each loss is a share of the loss of the step. What libraries divide gradients by is undone: the accumulation
        # steps that the accelerator was made with and, with FSDP, the number of processes.
        factor = self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss * (factor * self.accelerator.num_processes if self.sharded else factor))
        return loss.detach()

    def _batch_without_targets(self) -> dict[str, torch.Tensor | int]:
        """For a process without a history in a step: FSDP needs all of them to take part."""
        batch = self.plan.histories.pack(self.plan.trainable[:1], labels=True)
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch
