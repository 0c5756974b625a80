"""The scores of a model for held-out items, and the inputs that it gets for them: event columns, "now", event types."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from ..batches.histories import to_device
from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.events_blossomrec import Moments
from ..model.packing_blossomrec import pack_histories
from .held_out import HeldOutItems


def hold_out(
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    config: BlossomRecConfig,
    *,
    max_length: int | None = None,
    test_after: float | None = None,
    num_users: int | None = None,
) -> HeldOutItems:
    """
    The held-out items of a view with the columns that a model of `config` reads. [`HeldOutItems`] are only checked; they have
    their own `max_length` and `num_users`.

    Raises:
        ValueError: if a column is missing, or `test_after` is given with [`HeldOutItems`].
    """
    columns = config.event_columns
    if not isinstance(view, HeldOutItems):
        limits = {"max_length": max_length, "test_after": test_after, "num_users": num_users}
        return HeldOutItems.from_rows(view, columns=columns, **limits)
    if missing := [name for name in columns if name not in view.inputs.columns]:
        raise ValueError(
            f"`view` has no {' and no '.join(missing)}, which the model reads; make it with "
            f"`HeldOutItems.from_rows(view, columns={list(columns)})`."
        )
    if test_after is not None:
        raise ValueError(
            f"`test_after` is {test_after}, but `view` is HeldOutItems; make it with `HeldOutItems.from_rows(view, "
            f"test_after={test_after})`."
        )
    return view


def nows_of(config: BlossomRecConfig, now: bool | None) -> list[bool]:
    """
    The evaluations of a model of `config`, each with (`True`) or without (`False`) now.

    Args:
        now: which of them; `None` for all that differ.

    Raises:
        ValueError: if `now` is true, but the model does not depend on it.
    """
    if now and not config.uses_now:
        raise ValueError(
            f"`now` is true, but the model's `time_features` are {config.time_features}, none of which depends on the time of "
            'the recommendation; train it with "next_gap", for example.'
        )
    if now is not None:
        return [now]
    return [False, True] if config.uses_now else [False]


class LastStates:
    """
    The last layer's hidden states at the last position of users of `held_out`, computed once for each batch of users. They take
    `hidden_size` numbers per user on the device, where the histories are, too.

    Args:
        model: a `BlossomRecForSequentialRecommendation` without wrapper, whose layers do not depend on now.
        held_out: the held-out items, with the columns that the model reads.
        autocast: returns the context in which the layers run.
    """

    def __init__(
        self, model: nn.Module, held_out: HeldOutItems, autocast: Callable[[], AbstractContextManager] = nullcontext
    ):
        self.model, self.held_out, self.autocast = model, held_out, autocast
        self._computed: dict[bytes, tuple[torch.Tensor, Moments]] = {}

    def __call__(self, users: np.ndarray) -> tuple[torch.Tensor, Moments]:
        """Hidden states `[users, hidden_size]` and their moments; of batches that were asked for before, the same ones."""
        key = users.tobytes()
        if key not in self._computed:
            config = self.model.config
            batch = self.held_out.inputs.with_columns(config.event_columns).pack(users)
            histories = pack_histories(**batch, vocab_size=config.vocab_size)
            with self.autocast():
                self._computed[key] = self.model.base_model.run_layers(histories, last_only=True)
        return self._computed[key]


class ModelScores:
    """
    The scores of a model for users of `held_out`, see [`rank_by_scores`]. Users without a history get the item counts.

    Args:
        model: a `BlossomRecForSequentialRecommendation` without wrapper.
        held_out: the held-out items, with the columns that the model reads.
        autocast: returns the context in which the layers run.
        now: whether the model is given the time of the event to be predicted.
        states: hidden states of the same model and held-out items, to share with the scores with or without now. By default, the
            layers run for every batch.

    Raises:
        ValueError: if `now` is true, but the model does not depend on it or `held_out` has no times.
    """

    def __init__(
        self,
        model: nn.Module,
        held_out: HeldOutItems,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        *,
        now: bool = False,
        states: LastStates | None = None,
    ):
        self.model, self.held_out, self.autocast, self.states = model, held_out, autocast, states
        config = model.config
        self.told: dict[str, np.ndarray] = {}
        if nows_of(config, now) == [True]:
            self.told["prediction_time"] = held_out.prediction_times
        if config.target_event_types is not None:
            self.told["target_event_type"] = held_out.target_types
        if missing := [name for name, values in self.told.items() if values is None]:
            raise ValueError(f"`held_out` has no {missing[0]} of its users; make it of a view with such columns.")

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        inputs = self.held_out.inputs.with_columns(self.model.config.event_columns)
        if inputs.lengths[users[0]] == 0:
            return self.model.item_counts.float().expand(len(users), -1)
        device = inputs.items.device
        told = {name: to_device(torch.from_numpy(values[users]), device) for name, values in self.told.items()}
        if self.states is None:
            return last_item_scores(self.model, {**inputs.pack(users), **told}, self.autocast)
        hidden_states, moments = self.states(users)
        now, target = told.get("prediction_time"), told.get("target_event_type")
        base_model, next_time = self.model.base_model, moments.next_time if now is None else now
        base_model.check_moments(Moments(time=moments.time, next_time=next_time, next_type=target))
        with self.autocast():
            states = base_model.prediction_states(hidden_states, moments.time, now, target)
        return _scores_of_items(self.model, states)


def scores_by_now(
    model: nn.Module,
    held_out: HeldOutItems,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    *,
    now: bool | None = None,
) -> dict[bool, ModelScores]:
    """
    The scores of a model with (`True`) and without (`False`) now, as in [`nows_of`]. The layers run once for both, unless they
    depend on now.
    """
    config = model.config
    nows = nows_of(config, now)
    one_pass = len(nows) > 1 and "next_gap_input" not in config.time_features and not is_sharded(model)
    states = LastStates(model, held_out, autocast) if one_pass else None
    return {now: ModelScores(model, held_out, autocast, now=now, states=states) for now in nows}


def last_item_scores(
    model: nn.Module,
    batch: dict[str, torch.Tensor | int],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """
    Compute the scores of all items at the last position of each packed history, float32 [histories, vocab_size].

    Under mixed precision, the layers run in half precision, but the scores are computed in float32, because many items would
    have equal scores in bfloat16. A sharded model (FSDP) returns its own logits, because its weights are only gathered in its
    forward pass.
    """
    if is_sharded(model):
        return model(**batch, logits_to_keep=1).logits[:, -1].float()
    histories = pack_histories(**batch, vocab_size=model.config.vocab_size)
    with autocast():
        last = model.base_model.encode(histories, last_only=True)
    return _scores_of_items(model, last)


def _scores_of_items(model: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(states.float(), model.item_vectors().float())


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
