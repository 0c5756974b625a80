"""Outputs of the models."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from .append_blossomrec import Append
from .cache_blossomrec import BlossomRecCache
from .configuration_blossomrec import BlossomRecConfig
from .packing_blossomrec import PackedHistories


class LayerSelection(NamedTuple):
    """
    The selected blocks and the gates of one layer, in the shape of the input; `None` if the layer has none.

    Attributes:
        block_indices (`torch.LongTensor` `[B, L, G, k]`): numbers of the selected blocks by falling importance; −1 for none.
        importance (`torch.Tensor` `[B, L, G, k]`): their probabilities π.
        gates (`torch.Tensor` `[B, L, H, number of streams]`): gate values, of the long-term stream first.
    """

    block_indices: torch.Tensor | None
    importance: torch.Tensor | None
    gates: torch.Tensor | None

    @classmethod
    def of_layer(
        cls, histories: PackedHistories, selection: Any, gates: torch.Tensor | None, append: Append | None
    ) -> "LayerSelection":
        """From the selection and the gates of packed positions; of an append, those of the new events."""
        block_indices, importance = (None, None) if selection is None else selection
        gates = None if gates is None else gates[0]
        if append is not None:
            block_indices, importance, gates = (
                None if x is None else append.of_new(x) for x in (block_indices, importance, gates)
            )
        if block_indices is not None:  # shifted, so that padding reads −1
            block_indices, importance = histories.unpack(block_indices + 1) - 1, histories.unpack(importance)
        return cls(block_indices, importance, None if gates is None else histories.unpack(gates))


class LayerOutputs(NamedTuple):
    """The outputs of every layer that `BlossomRecModel.encode` collects: each list that is not `None`."""

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None
    selections: list[LayerSelection] | None = None

    @classmethod
    def requested(
        cls,
        config: BlossomRecConfig,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        output_selection: bool | None,
        cache: BlossomRecCache | None,
    ) -> "LayerOutputs | None":
        """
        The lists for the outputs of every layer that a call of `forward` requests; `None` without any.

        Raises:
            ValueError: if attentions are requested with a cache, or from an implementation that never has them.
        """
        hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = config.output_attentions if output_attentions is None else output_attentions
        if attentions and config._attn_implementation != "eager":
            raise ValueError(
                f'`output_attentions=True` works with `attn_implementation="eager"` only; '
                f"{config._attn_implementation!r} never has all probabilities at once. Use `output_selection=True`."
            )
        if attentions and cache is not None:
            raise ValueError("`output_attentions=True` cannot be combined with a cache; use `output_selection=True`.")
        requested = (hidden_states, attentions, output_selection)
        return cls(*([] if wanted else None for wanted in requested)) if any(requested) else None

    def keep_hidden_states(
        self, histories: PackedHistories, hidden_states: torch.Tensor, append: Append | None
    ) -> torch.Tensor:
        """
        Collect `hidden_states` `[1, T, hidden_size]` in the shape of the input; of an append, those of the new events. What
        follows must read the returned ones, so that the collected ones have a gradient (`retain_grad()`).
        """
        if self.hidden_states is None:
            return hidden_states
        if append is not None:  # there are no gradients
            self.hidden_states.append(histories.unpack(append.of_new(hidden_states[0])))
            return hidden_states
        self.hidden_states.append(histories.unpack(hidden_states[0]))
        return histories.pack(self.hidden_states[-1])[None]

    def fields(self) -> dict[str, tuple | None]:
        """The lists as fields of a model output."""
        return {name: None if values is None else tuple(values) for name, values in self._asdict().items()}


@dataclass
class BlossomRecModelOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state (`torch.Tensor` `[B, L, hidden_size]`): zero at padding.
        hidden_states (`tuple`, *optional*): the embedding and every layer's output, each `[B, L, hidden_size]`.
        attentions (`tuple`, *optional*): every layer's gated attention probabilities, each `[B, H, L, L]`.
        selections (`tuple[LayerSelection]`, *optional*): selected blocks and gates of every layer.
        cache (`BlossomRecCache`, *optional*): the cache, which includes these histories or events.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    selections: tuple[LayerSelection, ...] | None = None
    cache: BlossomRecCache | None = None


@dataclass
class BlossomRecOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.Tensor`, *optional*): the objective, a scalar; requires `labels`.
        logits (`torch.Tensor`): `[B, L, vocab_size]`, or `[S, n, vocab_size]` with `logits_to_keep=n`: plain dot
            products, those of [PAD] and [UNK] included; zero at padding. `None` in training mode with `labels` (and no
            `logits_to_keep`): the loss does not need them.
        hidden_states, attentions, selections, cache: as in `BlossomRecModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    selections: tuple[LayerSelection, ...] | None = None
    cache: BlossomRecCache | None = None
