"""The best next items of histories."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, logging

from .loss_blossomrec import NUM_SPECIAL_IDS


logger = logging.get_logger(__name__)


@dataclass
class RecommendationOutput(ModelOutput):
    """
    Attributes:
        item_ids (`torch.LongTensor` `[B, k]`): vocabulary ids, the best first; −1 where no candidate is left.
        scores (`torch.FloatTensor` `[B, k]`): their logits (for an empty history their counts); −inf beside a −1.
        num_unknown (`torch.LongTensor` `[B]`): how many [UNK] of each history were dropped.
    """

    item_ids: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    num_unknown: torch.LongTensor | None = None


class RecommendationMixin:
    """`recommend` for a model with `model`, `lm_head` and `item_counts`."""

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        top_k: int = 10,
        exclude_seen: bool = True,
        candidate_ids: torch.LongTensor | None = None,
    ) -> RecommendationOutput:
        """
        The `top_k` best next items of each history. Always in evaluation mode; [PAD] and [UNK] are never recommended.

        Args:
            input_ids: item ids `[B, L]`, padded on any side; [UNK] is dropped and counted.
            attention_mask: `[B, L]`, 0 at padding. Where it is missing, [PAD] ids are padding.
            exclude_seen: leave out the items of the history itself.
            candidate_ids: items to choose from, `[C]` for all histories or `[B, C]` for each; all where it is `None`.

        Returns:
            `RecommendationOutput` with `item_ids` and `scores` `[B, top_k]`. An empty history gets the most frequent
            items of the training data (`item_counts`, ties to the lower id).

        Raises:
            ValueError: for `top_k` outside the catalogue, and ids outside the vocabulary.
        """
        vocab_size = self.config.vocab_size
        if not 1 <= top_k <= vocab_size - NUM_SPECIAL_IDS:
            raise ValueError(f"`top_k` is {top_k}; it must lie in 1 … {vocab_size - NUM_SPECIAL_IDS}, the catalogue.")
        if input_ids.dim() != 2:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; it must be `[B, L]`, one row a history."
            )
        real = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask != 0
        unknown = real & (input_ids == self.config.unk_token_id)
        real = real & ~unknown
        num_unknown = unknown.sum(1)
        if num_unknown.any():
            logger.warning(
                f"Dropped {int(num_unknown.sum())} unknown items from {int((num_unknown > 0).sum())} histories."
            )

        training = self.training
        self.eval()
        try:
            hidden_states = self.model(input_ids, attention_mask=real).last_hidden_state
        finally:
            self.train(training)
        if input_ids.shape[1] == 0:
            last = hidden_states.new_zeros(input_ids.shape[0], hidden_states.shape[-1])
        else:
            place = torch.where(real, torch.arange(input_ids.shape[1], device=real.device), 0).amax(1)
            last = hidden_states[torch.arange(input_ids.shape[0], device=real.device), place]
        # Scores in float32 even under autocast: bfloat16 has too few bits to tell the items of a catalogue apart.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = last.to(dtype) @ self.lm_head.weight.to(dtype).T
        scores = torch.where(real.any(1)[:, None], scores, self.item_counts.to(dtype))
        scores[:, :NUM_SPECIAL_IDS] = -torch.inf
        if exclude_seen:
            scores.scatter_(1, torch.where(real, input_ids, 0), -torch.inf)
        if candidate_ids is not None:
            candidate_ids = torch.as_tensor(candidate_ids, device=scores.device).expand(scores.shape[0], -1)
            if candidate_ids.numel() and not 0 <= int(candidate_ids.min()) <= int(candidate_ids.max()) < vocab_size:
                raise ValueError(f"`candidate_ids` holds ids outside 0 … {vocab_size - 1}.")
            allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, candidate_ids, True)
            scores = scores.masked_fill(~allowed, -torch.inf)
        scores, item_ids = scores.sort(dim=1, descending=True, stable=True)
        scores, item_ids = scores[:, :top_k], item_ids[:, :top_k]
        item_ids = item_ids.masked_fill(scores == -torch.inf, -1)
        return RecommendationOutput(item_ids=item_ids, scores=scores, num_unknown=num_unknown)
