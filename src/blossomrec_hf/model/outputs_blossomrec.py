"""What the models return."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from .cache_blossomrec import BlossomRecCache


class LayerSelection(NamedTuple):
    """
    What one layer attended to, `[B, L, …]` in the shape of the input (`None` where the layer has no such part).

    Attributes:
        block_indices (`torch.LongTensor` `[B, L, G, k]`): selected blocks, the most important first; −1 for none.
        importance (`torch.Tensor` `[B, L, G, k]`): their probabilities π.
        gates (`torch.Tensor` `[B, L, H, 2]`): gate values of the long-term and the short-term stream.
    """

    block_indices: torch.Tensor | None
    importance: torch.Tensor | None
    gates: torch.Tensor | None


@dataclass
class BlossomRecModelOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state (`torch.Tensor` `[B, L, hidden_size]`): zero at padding.
        hidden_states (`tuple`, *optional*): the embedding and every layer's output, each `[B, L, hidden_size]`.
        attentions (`tuple`, *optional*): every layer's gated attention probabilities, each `[B, H, L, L]`.
        selections (`tuple[LayerSelection]`, *optional*): what every layer selected, and its gates.
        cache (`BlossomRecCache`, *optional*): the cache, with these histories or events in it. `past_key_values`, the
            name that older versions of `transformers` give it, is the same.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    selections: tuple[LayerSelection, ...] | None = None
    cache: BlossomRecCache | None = None

    past_key_values = property(lambda self: self.cache)


@dataclass
class BlossomRecOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.Tensor`, *optional*): the objective, where `labels` were given.
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

    past_key_values = property(lambda self: self.cache)
