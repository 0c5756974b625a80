"""Registry of training objectives: `config.objective` is the name of a registered function."""

import inspect
from collections.abc import Callable

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Objective = Callable[..., torch.Tensor]

SAMPLED_OBJECTIVES = ("sampled_softmax", "bce", "gbce", "bpr")
BUILT_IN_OBJECTIVES = ("cross_entropy", *SAMPLED_OBJECTIVES)

_REGISTERED: dict[str, Objective] = {}
_TAKING_WEIGHTS: set[str] = set()


def register_objective(name: str, function: Objective) -> str:
    """
    Register a training loss, so that `config.objective` can name it.

    ```python
    def hinge(hidden_states, item_vectors, targets, num_items_in_batch, *, weights=None, **kwargs):
        scores = hidden_states @ item_vectors.T
        positive = scores.gather(1, targets.clamp(min=0)[:, None])
        losses = (1 + scores - positive).clamp(min=0).mean(1)
        return mean_over_targets(losses, targets, num_items_in_batch, weights)

    register_objective("hinge", hinge)
    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(objective="hinge"))
    ```

    Args:
        name (`str`): a name of your own; registering it again replaces the function, also in existing models, and logs a
            warning. The objectives of the package cannot be replaced.
        function (`Callable`): called with `hidden_states` `[T, hidden_size]`, `item_vectors` `[vocab_size, hidden_size]`,
            `targets` `[T]` int64 (the vocabulary id to predict at each position, −100 for none) and `num_items_in_batch`
            (an `int`, a scalar tensor or `None`; see [`mean_over_targets`]). The keywords are `config`, `item_counts`
            `[vocab_size]` int64 and, if events have weights, `weights` `[T]` float; accept `**kwargs`, because later
            versions may pass more. A function without a parameter `weights` is refused where events have weights. It
            returns a differentiable scalar.

    Returns:
        `name`.

    Raises:
        ValueError: for a name that is no text, for that of an objective of the package, and for a `function` that cannot
            be called.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name` is {name!r}; it must be an identifier: `register_objective('hinge', function)`.")
    if not callable(function):
        raise ValueError(f"`function` is {function!r}; it must be a function that returns the loss.")
    if name in BUILT_IN_OBJECTIVES and name in _REGISTERED:
        raise ValueError(f"`name` is {name!r}, an objective of the package; register the function under another name.")
    if _REGISTERED.setdefault(name, function) is not function:
        logger.warning(
            f"The objective {name!r} is replaced: all models with this objective train with {function!r} from now on, "
            f"instead of {_REGISTERED[name]!r}. Give the functions two names to use both."
        )
    _REGISTERED[name] = function
    (_TAKING_WEIGHTS.add if _takes_weights(function) else _TAKING_WEIGHTS.discard)(name)
    return name


def _takes_weights(function: Objective) -> bool:
    try:
        return "weights" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function of C has none
        return False


def find_objective(name: str) -> Objective:
    """
    The registered function of this name.

    Raises:
        ValueError: if none has this name.
    """
    if name not in _REGISTERED:
        raise ValueError(
            f"`objective` is {name!r}, registered are {', '.join(map(repr, sorted(_REGISTERED)))}; import the code that calls "
            f"`register_objective({name!r}, function)`, pass the function itself (`from_pretrained(path, "
            "objective=function)`), or choose a registered one, which recommendations do not depend on."
        )
    return _REGISTERED[name]


def require_weights(name: str) -> None:
    """
    Raises:
        ValueError: if the registered function of this name has no parameter `weights`.
    """
    if name not in _TAKING_WEIGHTS:
        raise ValueError(
            f"`weights` are given, but the objective {name!r} has no parameter `weights` and would ignore them; add it, and "
            "pass it to `mean_over_targets`."
        )


def mean_over_targets(
    losses: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The weighted sum of the losses at the positions that have a target, divided by the number of targets of the whole step.
    The division makes the gradient independent of how a step is split into batches and processes. The divisor counts
    targets, whatever their weights: twice the weights are twice the loss.

    Args:
        losses: the loss of each position `[T]`, or their weighted sum (a scalar, without the positions that have no target).
        targets: vocabulary ids `[T]`, −100 for none.
        num_items_in_batch: number of targets in all batches and processes of the step. Defaults to the number in `targets`.
        weights: the weight of each position `[T]`, unless `losses` is a sum. Defaults to 1.

    Returns:
        a scalar; 0 if the step has no target.
    """
    if losses.dim() == 0:
        total = losses
    else:
        losses = losses if weights is None else losses * weights
        total = torch.where(targets >= 0, losses, 0.0).sum()
    number = (targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(number, torch.Tensor):
        number = number.to(total.device)
    return total / (number + (number == 0))
