"""How training steps are executed: operation by operation, compiled, and replayed as a CUDA graph."""

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..model.loss_blossomrec import MAX_LOGITS, supports_fused
from ..utils.environment import keep_compiled_code, worth_compiling
from .arguments import LoopArguments


def why_not_captured(
    args: LoopArguments, accelerator: Accelerator, model: PreTrainedModel, *, max_tokens: int, sharded: bool
) -> str | None:
    """
    Why forward and backward passes cannot be replayed as CUDA graphs; `None` if they can. A graph has no room for
    communication inside a pass (FSDP) nor for decisions of the CPU (the scaler of fp16). Logits that do not fit in
    memory at once are computed in chunks, which take longer than their launches.

    Args:
        max_tokens: number of items of the largest forward pass.
        sharded: whether the weights are sharded (FSDP).
    """
    if not args.cuda_graphs:
        return "`cuda_graphs` is off"
    if accelerator.device.type != "cuda":
        return "the device is no GPU"
    if sharded:
        return "the weights are sharded"
    if accelerator.scaler is not None:
        return "`mixed_precision` is fp16"
    config = model.config
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)
    fused = config.cross_entropy_implementation in ("auto", "triton") and supports_fused(dtype, config.hidden_size)
    if config.objective == "cross_entropy" and not fused and max_tokens * config.vocab_size > MAX_LOGITS["cuda"]:
        return f"the logits of {max_tokens:,} positions and {config.vocab_size:,} items do not fit in memory at once"
    return None


def is_compiled(args: LoopArguments, device: torch.device, total_steps: int) -> bool:
    """Whether steps are compiled: as `args.torch_compile` says, by default if they are `worth_compiling`."""
    if args.torch_compile is not None:
        return args.torch_compile
    return worth_compiling(device, total_steps)


def compile_model(model: PreTrainedModel, *, sharded: bool) -> nn.Module:
    """
    The compiled forward pass of a model, for batches of one shape. Of a sharded model, each layer is compiled on its
    own, because weights are gathered between the layers.
    """
    keep_compiled_code()
    if not sharded:
        return torch.compile(model, dynamic=False)
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)
    return model
