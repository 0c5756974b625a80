"""The optimizer of the training loop."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from .arguments import LoopArguments


def make_optimizer(model: nn.Module, args: LoopArguments) -> torch.optim.Optimizer:
    """
    AdamW, fused where the device has it, or an optimizer of `transformers` by its name there.

    Weights of linear layers decay, and so do the learned positions of the compressor and the vectors of times and event
    types, which are matrices of their own. Biases, layer norms, and the embeddings of items and of categories do not.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optim == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters),
        )
    # What `Trainer` reads of its arguments; a real TrainingArguments would reset the state of Accelerate.
    settings = SimpleNamespace(
        optim=OptimizerNames(args.optim),
        optim_args=None,
        optim_target_modules=None,
        learning_rate=args.learning_rate,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
    )
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(settings, model)
    return optimizer_class(groups, **settings)
