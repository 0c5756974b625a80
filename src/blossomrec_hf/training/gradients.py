"""Gradients: one flat buffer, their exchange between processes, clipping, and the search for values that are not finite."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from .checkpoints import numbered_folders


# In elements. Kernels over many tensors read 16 bytes at a time from addresses that are multiples of that.
_ALIGNMENT = 32


class FlatGradients:
    """
    The gradients of all parameters in one flat tensor per dtype, of which every `parameter.grad` is a view. Backward
    passes add to them in place, a captured CUDA graph too, and processes exchange them in one operation.

    Args:
        parameters: on their device. Their gradients become zeros.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.flat: list[torch.Tensor] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            of_dtype = [parameter for parameter in parameters if parameter.dtype == dtype]
            sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in of_dtype]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=of_dtype[0].device)
            for parameter, room in zip(of_dtype, flat.split(sizes)):
                parameter.grad = room[: parameter.numel()].view_as(parameter)
            self.flat.append(flat)

    def zero(self) -> None:
        """Sets all gradients to 0, in place."""
        for flat in self.flat:
            flat.zero_()

    def sum_over_processes(self) -> None:
        """Replaces all gradients by their sums over the processes."""
        for flat in self.flat:
            torch.distributed.all_reduce(flat)


class GradientWatch:
    """
    Clips gradients, and remembers on the device the first step whose loss or gradient is not finite.

    Args:
        names, parameters: of the model; the gradients are read from the parameters.
        accelerator: of the run.
        max_grad_norm: the norm that gradients are clipped to; 0 does not clip.
        sharded: whether each process has a part of every gradient (FSDP).

    Attributes:
        norm: a scalar, the norm of the latest gradient before it was clipped.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        sharded: bool,
    ):
        self.names, self.parameters, self.accelerator = list(names), list(parameters), accelerator
        self.max_grad_norm, self.sharded = max_grad_norm, sharded
        self.norm = torch.zeros((), device=accelerator.device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=accelerator.device)
        self._bad_norms = torch.zeros(len(self.parameters), device=accelerator.device)

    def clip_and_check(self, loss: torch.Tensor, step: int) -> None:
        """Clips the gradients of a step and checks its loss and their norms, without waiting for the device."""
        self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self.parameters]
        if self.sharded:
            gradients = [gradient.to_local() for gradient in gradients]
            squares = torch.stack(torch._foreach_norm(gradients)) ** 2
            norms = self.accelerator.reduce(squares, reduction="sum").sqrt()
        else:
            norms = torch.stack(torch._foreach_norm(gradients))
        self.norm = torch.linalg.vector_norm(norms)
        if self.max_grad_norm > 0:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (self.norm + 1e-6)).clamp(max=1.0))
        # Under fp16 an infinite gradient is usual, and the scaler skips the step; an infinite loss is not.
        watched = loss if self.accelerator.scaler is not None else self.norm
        first_bad = ~torch.isfinite(watched) & (self._bad_step < 0)
        self._bad_step = torch.where(first_bad, step, self._bad_step)
        self._bad_norms = torch.where(first_bad, norms, self._bad_norms)

    def raise_if_not_finite(self, run_folder: Path) -> None:
        """
        Waits for the device. All processes must call it.

        Raises:
            FloatingPointError: names the step, the parameters and the last checkpoint in `run_folder`.
        """
        bad_step = int(self.accelerator.gather(self._bad_step).max())
        if bad_step < 0:
            return
        finite = torch.isfinite(self._bad_norms).tolist()
        bad = [name for name, ok in zip(self.names, finite, strict=True) if not ok]
        # The backward pass goes from the last parameter to the first, and so does what is not finite.
        where = (
            f"it began at {bad[-1]} and reached {len(bad)} of {len(finite)} gradients" if bad else "only the loss is"
        )
        checkpoints = numbered_folders(run_folder, "checkpoint")
        kept = f"The last good checkpoint is {checkpoints[-1][1]}." if checkpoints else "There is no checkpoint yet."
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {bad_step}: {where}. {kept} "
            "A lower learning rate, a longer warm-up or bf16 in place of fp16 usually help."
        )
