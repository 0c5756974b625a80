"""`recommend`: the best next items of histories, with exclusions and candidates."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from .cache_blossomrec import BlossomRecCache
from .ids_blossomrec import NUM_SPECIAL_IDS
from .modules_blossomrec import check_inference, execution_device, is_plain, offloaded_tensor, stored_item_vectors
from .packing_blossomrec import pack_histories
from .ranking_blossomrec import MAX_SCORES, rank_items, top_of_rows


logger = logging.get_logger(__name__)

# So many candidates an item wanted are taken from an index, and so many at least; its own scores are rough.
INDEX_FETCH, MIN_FETCH = 4, 100


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


def as_ids(name: str, ids: Any, padding: int, device: torch.device, vocab_size: int) -> torch.Tensor:
    """
    Ids given as a tensor, a list, or lists of different lengths, as int64 `[C]` or `[B, C]` filled up with `padding`.

    Raises:
        ValueError: for what is no whole number, or lies outside the vocabulary (`padding` itself may).
    """
    if not isinstance(ids, torch.Tensor):
        if not hasattr(ids, "__iter__"):
            raise ValueError(f"`{name}` is {ids!r}; it must be a list or tensor of vocabulary ids.")
        ids = list(ids)
        if any(isinstance(row, (Sequence, torch.Tensor)) or hasattr(row, "__array__") for row in ids):
            try:
                rows = [torch.as_tensor(row) for row in ids]
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"`{name}` must hold vocabulary ids, lists of whole numbers: {error}.") from error
            rows = [row.long() if row.numel() == 0 else row for row in rows]
            if all(row.dim() == 0 for row in rows):  # numbers of numpy
                return as_ids(name, [row.item() for row in rows], padding, device, vocab_size)
            if any(row.dim() != 1 for row in rows):
                raise ValueError(f"`{name}` must be one list of ids, or one list a history.")
            kinds, devices = {row.dtype for row in rows}, {row.device for row in rows}
            if any(kind.is_floating_point or kind.is_complex for kind in kinds):
                raise ValueError(
                    f"`{name}` must hold vocabulary ids, whole numbers; it holds numbers with a fraction."
                )
            if torch.bool in kinds:
                raise ValueError(f"`{name}` has dtype torch.bool; it must hold vocabulary ids, whole numbers.")
            if len(kinds) > 1 or len(devices) > 1:
                rows = [row.to(device=device, dtype=torch.long) for row in rows]
            ids = _filled_up(rows, padding, device)
        else:
            try:
                ids = torch.as_tensor(ids) if ids else torch.empty(0, dtype=torch.long)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"`{name}` must hold vocabulary ids, whole numbers: {error}.") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` has dtype {ids.dtype}; it must hold vocabulary ids, whole numbers.")
    ids = ids.to(device=device, dtype=torch.long)
    if ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < min(padding, 0) or high >= vocab_size:
            wrong = high if high >= vocab_size else low
            raise ValueError(
                f"`{name}` holds {wrong}; ids lie in 0 … {vocab_size - 1}"
                + (f" (or are {padding}, padding)." if padding < 0 else ".")
            )
    return ids


def _filled_up(rows: Sequence[torch.Tensor], padding: int, device: torch.device) -> torch.Tensor:
    """Rows `[n]` as one tensor `[rows, longest]` on `device`, made there: the ids travel end to end, without padding."""
    lengths = [row.shape[0] for row in rows]
    flat = torch.cat(rows).to(device=device, dtype=torch.long)
    real = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    return flat.new_full(real.shape, padding).masked_scatter_(real, flat)


class RecommendationMixin:
    """`recommend` for a model with a base model, an output embedding and `item_counts`."""

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.LongTensor | Sequence[Sequence[int]],
        attention_mask: torch.Tensor | None = None,
        *,
        top_k: int = 10,
        exclude_seen: bool | None = None,
        exclude_ids: torch.LongTensor | Sequence | None = None,
        candidate_ids: torch.LongTensor | Sequence | None = None,
        min_score: float | None = None,
        max_length: int | None = None,
        cache: BlossomRecCache | None = None,
        index: Any | None = None,
    ) -> RecommendationOutput:
        """
        The `top_k` best next items of each history, ties to the lower id. They are scored in float32 or better, but by
        a head that is quantized, offloaded or adapted as its `forward` does. [PAD] and [UNK] are never recommended.
        Dropout is never applied, and no module's mode is changed: threads may share a model, even one in training mode.

        In bfloat16 and float16, rounding may differ between a history alone, in a batch and in a cache, because matrix
        products of other shapes sum in another order. A query whose blocks score nearly the same may then select
        another block, and items of nearly equal scores may change places. On a CPU, attention sums in float32 and
        such differences are rare; load the model in float32 to be free of them.

        Args:
            input_ids: vocabulary ids, `[B, L]` padded on any side or lists of different lengths; [UNK] is dropped and
                counted. Raw ids go through `pipeline("sequential-recommendation")`.
            attention_mask: `[B, L]`, 0 at padding. Where it is missing, [PAD] ids are padding.
            exclude_seen: whether to exclude the items of the history itself. `None` means what suits the log that the
                model was trained on: not where users repeat items (`config.repeat_share` above 0.01), else yes. So it is
                yes for a model whose `repeat_share` is not known.
            exclude_ids: more items to leave out, `[E]` for all histories, or `[B, E]` padded with −1 or lists of
                different lengths for each.
            candidate_ids: items to choose from, `[C]` for all histories, or `[B, C]` padded with −1 or lists of
                different lengths for each; all where it is `None`.
            min_score: leave out items of a lower score. An empty history's counts are no such scores.
            max_length: the model reads the latest so many items of a history; all of them count as seen.
            cache: cached histories; if given, `input_ids` contains only their new events (a row may
                have none), which are appended to it, and the items of the whole histories count as seen.
            index: a `blossomrec_hf.serving.index.ItemIndex` of this model, which finds the candidates where no `candidate_ids`
                are given: more than enough for what is left out, scored exactly. It may miss some of the best.

        Returns:
            `RecommendationOutput` with `item_ids` and `scores` `[B, top_k]`. An empty history gets the most frequent
            items of the training data (`item_counts`).

        Raises:
            ValueError: for `top_k` outside the catalogue, ids outside the vocabulary, shapes that do not fit, scores
                that are not numbers, and a module in training mode that is not BlossomRec's own (that of an adapter).
        """
        check_inference(self)
        vocab_size = self.config.vocab_size
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= vocab_size - NUM_SPECIAL_IDS:
            raise ValueError(f"`top_k` is {top_k}; it must lie in 1 … {vocab_size - NUM_SPECIAL_IDS}, the catalogue.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; it must be at least 1, or None for whole histories.")
        device = self._input_device()
        input_ids = as_ids("input_ids", input_ids, 0, device, vocab_size)
        if input_ids.dim() != 2:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; it must be `[B, L]`, one row (or list) a history."
            )
        if attention_mask is None:
            real = input_ids != self.config.pad_token_id
        elif attention_mask.shape == input_ids.shape:
            real = attention_mask.to(device) != 0
        else:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, `input_ids` {tuple(input_ids.shape)}; "
                "they must be the same."
            )
        unknown = real & (input_ids == self.config.unk_token_id)
        real = real & ~unknown
        num_unknown, empty = unknown.sum(1), ~real.any(1)
        some_unknown, some_empty = torch.stack([unknown.any(), empty.any()]).tolist()
        if some_unknown:
            logger.warning(
                f"Dropped {int(num_unknown.sum())} unknown items from {int((num_unknown > 0).sum())} histories."
            )
        exclude_ids = self._checked("exclude_ids", exclude_ids, len(input_ids))
        candidate_ids = self._checked("candidate_ids", candidate_ids, len(input_ids))
        if max_length is not None and cache is not None:
            raise ValueError("`max_length` cannot be combined with `cache`; `crop` a cache instead.")
        cache = self.base_model.cache_for(cache)
        # A cache keeps the events only if nothing fails to the end.
        with nullcontext() if cache is None else cache.all_or_nothing():
            if cache is None:
                states, seen = self._last_states(input_ids, real, max_length), input_ids
            else:
                events = pack_histories(input_ids, real, vocab_size=vocab_size, drop_padding=True)
                self.base_model.encode(events, cache=cache)
                states, seen = cache.last_hidden_state, cache.item_ids.to(device).long()
                empty = (cache.lengths == 0).to(device)  # none where every row has new events
            # All ids were checked above: reading them now would wait for a GPU that is busy with the histories.
            exclude_seen = self.config.exclude_seen if exclude_seen is None else exclude_seen
            excluded = [seen if exclude_seen else None, exclude_ids]
            out = self._best(states, excluded, candidate_ids, empty if some_empty else None, top_k, min_score, index)
        out.num_unknown = num_unknown
        return out

    @torch.no_grad()
    def recommend_from_states(
        self,
        states: torch.Tensor,
        seen_ids: torch.LongTensor | Sequence | None = None,
        *,
        empty: torch.Tensor | None = None,
        top_k: int = 10,
        exclude_ids: torch.LongTensor | Sequence | None = None,
        candidate_ids: torch.LongTensor | Sequence | None = None,
        min_score: float | None = None,
        index: Any | None = None,
    ) -> RecommendationOutput:
        """
        What `recommend` does once histories have been read, for states that come from elsewhere, such as a cache.

        Args:
            states: `[B, hidden_size]`, the last hidden state of each history's last position.
            seen_ids: items to leave out, `[B, N]` padded with −1 or lists of different lengths; none where `None`.
            empty: `[B]` bool, the rows without a history, whose states mean nothing.

            The other arguments, what is returned and what is raised are those of `recommend`; there is no
            `num_unknown`.
        """
        batch = states.shape[0]
        excluded = [self._checked("seen_ids", seen_ids, batch), self._checked("exclude_ids", exclude_ids, batch)]
        candidates = self._checked("candidate_ids", candidate_ids, batch)
        return self._best(states, excluded, candidates, empty, top_k, min_score, index)

    def _input_device(self) -> torch.device:
        return self.item_vectors().device if is_plain(self.get_output_embeddings()) else execution_device(self)

    def _checked(self, name: str, ids: Any, batch: int) -> torch.Tensor | None:
        """Ids for all histories `[C]` or for each `[B, C]`, as int64 beside the embedding."""
        if ids is None:
            return None
        ids = as_ids(name, ids, -1, self._input_device(), self.config.vocab_size)
        if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != batch):
            raise ValueError(
                f"`{name}` has shape {tuple(ids.shape)}; it must be one list of ids, or one list a history "
                f"({batch} of them)."
            )
        return ids

    def _best(
        self,
        states: torch.Tensor,
        excluded: list[torch.Tensor | None],
        candidates: torch.Tensor | None,
        empty: torch.Tensor | None,
        top_k: int,
        min_score: float | None,
        index: Any | None,
    ) -> RecommendationOutput:
        """What `recommend_from_states` returns, of ids that are `_checked`."""
        head = self.get_output_embeddings()
        weight = self.item_vectors() if is_plain(head) else None
        states, vocab_size = states.to(self._input_device()), self.config.vocab_size
        excluded = [ids.expand(states.shape[0], -1) for ids in excluded if ids is not None]
        excluded = torch.cat(excluded, 1) if excluded else None
        item_counts = self.item_counts
        if item_counts.is_meta:
            item_counts = offloaded_tensor(self.base_model, "item_counts").to(states.device)
        if index is not None and candidates is None:
            index.check(stored_item_vectors(self))
            count = max(INDEX_FETCH * top_k, MIN_FETCH)
            if excluded is not None:
                count += excluded.shape[1]
            count = min(count, vocab_size - NUM_SPECIAL_IDS)
            candidates = index.search(states, count)
            if empty is not None and bool(empty.any()):
                popular = top_of_rows(item_counts[None, NUM_SPECIAL_IDS:].float(), count)[1] + NUM_SPECIAL_IDS
                candidates = torch.where(empty[:, None], popular, candidates)
        rank = partial(rank_items, top_k=top_k, item_counts=item_counts)
        if weight is not None:
            item_ids, scores = rank(states, weight, excluded=excluded, candidates=candidates, popular=empty)
        else:  # all scores of some histories at a time, computed by the module
            size = max(1, MAX_SCORES.get(states.device.type, 2**26) // vocab_size)
            ranked = []
            for start in range(0, max(states.shape[0], 1), size):
                rows = slice(start, start + size)
                all_scores = head(states[rows]).to(device=states.device, dtype=torch.float32)
                own = candidates[rows] if candidates is not None and candidates.dim() == 2 else candidates
                of_rows = {"excluded": excluded, "popular": empty}
                of_rows = {name: None if x is None else x[rows] for name, x in of_rows.items()}
                ranked.append(rank(states[rows], None, all_scores=all_scores, candidates=own, **of_rows))
            item_ids, scores = (torch.cat(parts) for parts in zip(*ranked))
        if min_score is not None:
            low = scores < min_score if empty is None else (scores < min_score) & ~empty[:, None]
            item_ids, scores = item_ids.masked_fill(low, -1), scores.masked_fill(low, -torch.inf)
        return RecommendationOutput(item_ids=item_ids, scores=scores)

    def _last_states(self, input_ids: torch.Tensor, real: torch.Tensor, max_length: int | None) -> torch.Tensor:
        """The last hidden state of each row's last real position `[B, hidden_size]`; anything where there is none."""
        if max_length is not None:
            real = real & (real.flip(1).cumsum(1).flip(1) <= max_length)
        histories = pack_histories(input_ids, real, vocab_size=self.config.vocab_size)
        return self.base_model.encode(histories, last_only=True)
