"""`recommend`, the best next items of histories, and `similar_items`, with exclusions and candidates."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from .cache_blossomrec import BlossomRecCache
from .events_blossomrec import Moments
from .id_lists_blossomrec import as_ids, tensor_of_lists
from .ids_blossomrec import NUM_SPECIAL_IDS
from .items_blossomrec import MIN_NORM
from .modules_blossomrec import (
    check_inference,
    dense_weight,
    execution_device,
    is_plain,
    offloaded_tensor,
    stored_item_vectors,
)
from .packing_blossomrec import check_tensors, int64_column, pack_histories
from .ranking_blossomrec import MAX_SCORES, rank_items, top_of_rows
from .static_blossomrec import StaticEncoder


logger = logging.get_logger(__name__)

# Candidates that an index is asked for per recommended item, and at least: its own scores are rough.
INDEX_FETCH, MIN_FETCH = 4, 100


@dataclass
class RecommendationOutput(ModelOutput):
    """
    Attributes:
        item_ids (`torch.LongTensor` `[B, k]`): vocabulary ids, the best first; −1 if no candidate remains.
        scores (`torch.FloatTensor` `[B, k]`): their logits (for an empty history, their counts; for `similar_items`,
            their cosine similarities); −inf for an id of −1.
        num_unknown (`torch.LongTensor` `[B]`): number of [UNK] that were dropped from each history, by `recommend`.
    """

    item_ids: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    num_unknown: torch.LongTensor | None = None


_UNITS = dict.fromkeys(("timestamps", "prediction_time"), "seconds since 1970") | dict.fromkeys(
    ("event_type_ids", "target_event_type"), "indices of `config.event_types`"
)


def _as_column(name: str, values: Any, input_ids: Any, device: torch.device) -> torch.Tensor | None:
    """A column of the events, given as `input_ids` are: a tensor, or lists of different lengths, padded with 0."""
    if values is None or isinstance(values, torch.Tensor):
        return values
    column = tensor_of_lists(name, values, 0, device, f"whole numbers, {_UNITS[name]}")
    if not isinstance(input_ids, torch.Tensor) and column.dim() == 2:
        for i, (row, items) in enumerate(zip(values, input_ids)):
            if len(row) != len(items):
                raise ValueError(
                    f"`{name}[{i}]` has {len(row)} values, `input_ids[{i}]` {len(items)} items; give one value per item."
                )
    return column


def _as_row_values(name: str, values: Any) -> torch.Tensor | int | None:
    """One value of each history: a tensor or a list `[B]`, or one number for all of them."""
    if values is None or isinstance(values, int | torch.Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` is {values!r:.80}; it must be one integer, or one per history, {_UNITS[name]}."
        ) from error


class RecommendationMixin:
    """`recommend` and `similar_items` for a model with a base model, `item_vectors` and `item_counts`."""

    def compile_for_inference(
        self, *, max_tokens: int = 65536, max_histories: int = 4096, max_length: int = 1000
    ) -> None:
        """
        Compile the layers for large batches of histories, on a GPU as a CUDA graph: for recommending to many users and for
        evaluation. Takes seconds, and the warm-up is logged. Batches of one shape are compiled, to which smaller ones are
        filled up. Other batches run as before: those of less than half of `max_tokens` items, larger ones, and those with a
        cache. `recommend` never compiles by itself.

        Args:
            max_tokens (`int`, defaults to 65536): number of items of the largest batch.
            max_histories (`int`, defaults to 4096): number of histories of the largest batch.
            max_length (`int`, defaults to 1000): number of items of the longest history.

        Raises:
            ValueError: for numbers below 1.
        """
        encoders = self.base_model._static_encoders
        if not any(encoder.takes(self.base_model, max_tokens, max_histories, max_length) for encoder in encoders):
            encoder = StaticEncoder(
                self.base_model, max_tokens=max_tokens, max_histories=max_histories, max_length=max_length
            )
            encoder.warm_up()
            encoders.append(encoder)

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
        timestamps: torch.LongTensor | Sequence[Sequence[int]] | None = None,
        event_type_ids: torch.LongTensor | Sequence[Sequence[int]] | None = None,
        prediction_time: torch.LongTensor | Sequence[int] | int | None = None,
        target_event_type: torch.LongTensor | Sequence[int] | int | None = None,
    ) -> RecommendationOutput:
        """
        Recommend the `top_k` best next items of each history; of equal scores, the lower id comes first. Scores are
        computed in float32 or better, or by the `forward` of an output embedding that is quantized, offloaded or adapted.
        [PAD] and [UNK] are never recommended. Dropout is not applied and no module's mode changes, so that threads may
        share a model, even one in training mode.

        In bfloat16 and float16, rounding may differ between a history alone, in a batch and in a cache, because matrix
        products of other shapes sum in another order. A query whose blocks score nearly the same may then select
        another block, and items of nearly equal scores may change places. On a CPU, attention sums in float32 and
        such differences are rare; load the model in float32 to avoid them.

        Args:
            input_ids (`torch.LongTensor` or lists): vocabulary ids, `[B, L]` padded on any side or lists of different
                lengths; [UNK] is dropped and counted. For raw ids, use `pipeline("sequential-recommendation")`.
            attention_mask (`torch.Tensor`, *optional*): `[B, L]`, 0 at padding. By default, [PAD] ids are padding.
            top_k (`int`): number of items per history.
            exclude_seen (`bool`, *optional*): whether to exclude the items of the history itself. Defaults to
                `config.exclude_seen`: no if users of the training log repeat items (`config.repeat_share` above 0.01), yes
                otherwise and if `repeat_share` is unknown.
            exclude_ids (`torch.LongTensor` or lists, *optional*): further items to exclude, `[E]` for all histories, or
                `[B, E]` padded with −1 or lists of different lengths for each.
            candidate_ids (`torch.LongTensor` or lists, *optional*): items to choose from, `[C]` for all histories, or
                `[B, C]` padded with −1 or lists of different lengths for each. Defaults to all items.
            min_score (`float`, *optional*): exclude items of a lower score. It does not apply to the counts of an empty
                history.
            max_length (`int`, *optional*): number of latest items of a history that the model reads; all of them count as
                seen. Defaults to all items.
            cache (`BlossomRecCache`, *optional*): Cached histories; if given, `input_ids` contains only new events (a row
                may have none), which are appended. All items of the histories count as seen.
            index (`blossomrec_hf.serving.index.ItemIndex`, *optional*): index of this model that finds the candidates if no
                `candidate_ids` are given. The candidates are scored exactly, but some of the best may be missing.
            timestamps (`torch.LongTensor` or lists, *optional*): times of the events in seconds, in the shape of `input_ids`.
                Required with `config.time_features`, and ignored by models without.
            event_type_ids (`torch.LongTensor` or lists, *optional*): types of the events, in the shape of `input_ids`, −1 for
                an unknown one. Required with `config.event_types`, and ignored by models without.
            prediction_time (`torch.LongTensor`, `list[int]` or `int`, *optional*): time for which to recommend ("now") in
                seconds, one for all histories or `[B]`, with `UNKNOWN_TIME` where it is unknown. Defaults to unknown. A cache
                without new events may be asked again with another time.
            target_event_type (`torch.LongTensor`, `list[int]` or `int`, *optional*): type of the event to recommend, one for
                all histories or `[B]`. Defaults to the first of `config.target_event_types`, or to unknown (−1).

        Returns:
            `RecommendationOutput` with `item_ids` and `scores` `[B, top_k]`. An empty history gets the most frequent
            items of the training data (`item_counts`).

        Raises:
            ValueError: for `top_k` outside the catalog, ids outside the vocabulary, shapes that do not fit, scores
                that are not numbers, and for a module in training mode that is not BlossomRec's own (that of an adapter).
        """
        check_inference(self)
        vocab_size = self.config.vocab_size
        _check_top_k(top_k, vocab_size)
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; it must be at least 1, or None for whole histories.")
        if max_length is not None and cache is not None:
            raise ValueError("`max_length` cannot be combined with `cache`; `crop` a cache instead.")
        cache = self.base_model.cache_for(cache)
        device, given = self._input_device(), input_ids
        input_ids = as_ids("input_ids", input_ids, 0, device, vocab_size)
        columns = {
            "timestamps": _as_column("timestamps", timestamps, given, device),
            "event_type_ids": _as_column("event_type_ids", event_type_ids, given, device),
            "prediction_time": _as_row_values("prediction_time", prediction_time),
            "target_event_type": _as_row_values("target_event_type", target_event_type),
        }
        real = _real_positions(input_ids, attention_mask)
        if not input_ids.shape[1]:  # without events, there is nothing to give
            columns |= {name: input_ids for name in ("timestamps", "event_type_ids") if columns[name] is None}
        unknown = real & (input_ids == self.config.unk_token_id)
        real = real & ~unknown
        num_unknown, empty = unknown.sum(1), ~real.any(1)
        some_unknown, some_empty = torch.stack([unknown.any(), empty.any()]).tolist()
        if some_unknown:
            logger.warning(
                f"Dropped {int(num_unknown.sum())} unknown items from {int((num_unknown > 0).sum())} histories."
            )
        # Checked before the histories are read: later, that would wait for a GPU.
        exclude_ids = self._checked("exclude_ids", exclude_ids, len(input_ids))
        candidate_ids = self._checked("candidate_ids", candidate_ids, len(input_ids))
        if max_length is not None:
            real = real & (real.flip(1).cumsum(1).flip(1) <= max_length)
        histories = pack_histories(input_ids, real, vocab_size=vocab_size, drop_padding=cache is not None, **columns)
        with nullcontext() if cache is None else cache.all_or_nothing():
            states, seen = self.base_model.encode(histories, last_only=True, cache=cache), input_ids
            if cache is not None:
                seen = cache.item_ids.to(device).long()
                empty = (cache.lengths == 0).to(device)
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
        timestamps: torch.Tensor | None = None,
        prediction_time: torch.Tensor | None = None,
        target_event_type: torch.Tensor | None = None,
    ) -> RecommendationOutput:
        """
        Recommend from hidden states, such as those of a cache, as `recommend` does from histories.

        Args:
            states: `[B, hidden_size]`, the last hidden state of each history's last position.
            seen_ids: items to exclude, `[B, N]` padded with −1 or lists of different lengths. Defaults to none.
            empty: `[B]` bool, the rows without a history, whose states have no meaning.
            timestamps, prediction_time, target_event_type: int64 `[B]`, lists or one integer, as in
                `BlossomRecModel.prediction_states`. With the time feature `"next_gap_input"`, the states themselves depend on
                the `prediction_time` for which they were computed; ask `recommend` with the cache.

            The other arguments, the output and the errors are those of `recommend`; there is no `num_unknown`.
        """
        values = {"timestamps": timestamps, "prediction_time": prediction_time, "target_event_type": target_event_type}
        time, now, target = (
            int64_column(name, _as_row_values(name, x), states.shape[:1], states.device) for name, x in values.items()
        )
        config, timed = self.config, time is not None and now is not None
        moments = Moments(time=time, next_time=now) if config.time_features and timed else Moments()
        self.base_model.check_moments(moments._replace(next_type=target if config.event_types else None))
        states = self.base_model.prediction_states(states, time, now, target)
        options = {"exclude_ids": exclude_ids, "candidate_ids": candidate_ids, "min_score": min_score, "index": index}
        return self.recommend_from_predictions(states, seen_ids, empty=empty, top_k=top_k, **options)

    @torch.no_grad()
    def recommend_from_predictions(
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
        Recommend from prediction states `[B, hidden_size]`, as `encode` returns them; the other arguments, the output and the
        errors are those of `recommend_from_states`.
        """
        batch = states.shape[0]
        excluded = [self._checked("seen_ids", seen_ids, batch), self._checked("exclude_ids", exclude_ids, batch)]
        candidates = self._checked("candidate_ids", candidate_ids, batch)
        return self._best(states, excluded, candidates, empty, top_k, min_score, index)

    @torch.no_grad()
    def similar_items(
        self,
        item_ids: torch.LongTensor | Sequence[int],
        top_k: int = 10,
        *,
        exclude_ids: torch.LongTensor | Sequence | None = None,
        candidate_ids: torch.LongTensor | Sequence | None = None,
        min_score: float | None = None,
        index: Any | None = None,
    ) -> RecommendationOutput:
        """
        Find the `top_k` items whose vectors have the highest cosine similarity to that of each item; of equal
        similarities, the lower id comes first. The item itself, [PAD] and [UNK] are never returned. The vectors are
        those of `item_vectors`, and similarities are computed in float32 or better. The similarity
        of a vector of zeros is 0.

        Args:
            item_ids (`torch.LongTensor` or `list[int]` `[B]`): vocabulary ids of items.
            top_k (`int`, defaults to 10): number of similar items per item.
            exclude_ids (`torch.LongTensor` or lists, *optional*): further items to exclude, `[E]` for all items, or
                `[B, E]` padded with −1 or lists of different lengths for each.
            candidate_ids (`torch.LongTensor` or lists, *optional*): items to choose from, `[C]` for all items, or
                `[B, C]` padded with −1 or lists of different lengths for each. Defaults to the catalog.
            min_score (`float`, *optional*): exclude items of a lower similarity.
            index (`blossomrec_hf.serving.index.ItemIndex`, *optional*): index of this model with `scoring="cosine"`
                that finds the candidates if no `candidate_ids` are given. The candidates are scored exactly, but some
                of the most similar items may be missing.

        Returns:
            `RecommendationOutput` with `item_ids` and `scores` `[B, top_k]`, padded with −1 and −inf if fewer
            items remain.

        Raises:
            ValueError: for `top_k` outside the catalog, ids outside the vocabulary, [PAD] or [UNK] in `item_ids`, an
                `index` of other vectors or of `scoring="dot"`, vectors that are not finite, and for a module in
                training mode that is not BlossomRec's own.
        """
        check_inference(self)
        _check_top_k(top_k, self.config.vocab_size)
        item_ids = as_ids("item_ids", item_ids, 0, self._input_device(), self.config.vocab_size)
        if item_ids.dim() != 1:
            raise ValueError(f"`item_ids` has shape {tuple(item_ids.shape)}; it must be one list of vocabulary ids.")
        if special := item_ids[item_ids < NUM_SPECIAL_IDS].tolist():
            raise ValueError(f"`item_ids` contains {special[0]}, which is [PAD] or [UNK]; give ids of items only.")
        excluded = [item_ids[:, None], self._checked("exclude_ids", exclude_ids, len(item_ids), row="an item")]
        candidates = self._checked("candidate_ids", candidate_ids, len(item_ids), row="an item")
        vectors = self.item_vectors()
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        scales = torch.linalg.vector_norm(vectors, dim=1, dtype=dtype).clamp(min=MIN_NORM).reciprocal()
        states = vectors[item_ids].to(dtype) * scales[item_ids, None]
        return self._best(states, excluded, candidates, None, top_k, min_score, index, scales=scales)

    def _input_device(self) -> torch.device:
        head = self.get_output_embeddings()
        plain = head is not None and is_plain(head)
        return dense_weight(head).device if plain else execution_device(self)

    def _checked(self, name: str, ids: Any, batch: int, row: str = "a history") -> torch.Tensor | None:
        """Ids for all rows `[C]` or for each `[B, C]`, as int64 on the device of the item vectors."""
        if ids is None:
            return None
        ids = as_ids(name, ids, -1, self._input_device(), self.config.vocab_size)
        if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != batch):
            raise ValueError(
                f"`{name}` has shape {tuple(ids.shape)}; it must be one list of ids, or one list {row} "
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
        scales: torch.Tensor | None = None,
    ) -> RecommendationOutput:
        """
        The output of `recommend_from_states`, from ids that are `_checked`. With `scales` `[vocab_size]`, which make
        the item vectors unit vectors, that of `similar_items`.
        """
        head = self.get_output_embeddings()
        states = states.to(self._input_device())
        excluded = [ids.expand(states.shape[0], -1) for ids in excluded if ids is not None]
        excluded = torch.cat(excluded, 1) if excluded else None
        item_counts = self.item_counts
        if item_counts.is_meta:
            item_counts = offloaded_tensor(self.base_model, "log_statistics.item_counts")
        item_counts = item_counts.to(states.device)
        if index is not None and candidates is None:
            index.check(stored_item_vectors(self), scoring="dot" if scales is None else "cosine")
            count = max(INDEX_FETCH * top_k, MIN_FETCH) + (0 if excluded is None else excluded.shape[1])
            count = min(count, self.config.vocab_size - NUM_SPECIAL_IDS)
            candidates = index.search(states, count)
            if empty is not None and bool(empty.any()):
                popular = top_of_rows(item_counts[None, NUM_SPECIAL_IDS:].float(), count)[1] + NUM_SPECIAL_IDS
                candidates = torch.where(empty[:, None], popular, candidates)
        by_row = {"excluded": excluded, "candidates": candidates, "popular": empty}
        rank = partial(rank_items, top_k=top_k, item_counts=item_counts, scales=scales)
        if head is None or is_plain(head) or self.config.scoring == "cosine":
            item_ids, scores = rank(states, self.item_vectors().to(states.device), **by_row)
        else:
            item_ids, scores = _rank_by_module(head, states, rank, self.config.vocab_size, **by_row)
        if min_score is not None:
            low = scores < min_score if empty is None else (scores < min_score) & ~empty[:, None]
            item_ids, scores = item_ids.masked_fill(low, -1), scores.masked_fill(low, -torch.inf)
        return RecommendationOutput(item_ids=item_ids, scores=scores)


def _check_top_k(top_k: Any, vocab_size: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= vocab_size - NUM_SPECIAL_IDS:
        raise ValueError(f"`top_k` is {top_k}; it must lie in 1 … {vocab_size - NUM_SPECIAL_IDS}, the catalog.")


def _real_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which positions of `input_ids` `[B, L]` are no padding, `[B, L]` bool."""
    if input_ids.dim() != 2:
        raise ValueError(
            f"`input_ids` has shape {tuple(input_ids.shape)}; it must be `[B, L]`, one row (or list) a history."
        )
    if attention_mask is None:
        return input_ids != 0
    check_tensors(attention_mask=attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, `input_ids` {tuple(input_ids.shape)}; "
            "they must be the same."
        )
    return attention_mask.to(input_ids.device) != 0


def _rank_by_module(
    head: nn.Module,
    states: torch.Tensor,
    rank: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    vocab_size: int,
    *,
    excluded: torch.Tensor | None,
    candidates: torch.Tensor | None,
    popular: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rank_items` with the scores of a module whose weight cannot be read, some histories at a time."""
    size = max(1, MAX_SCORES.get(states.device.type, 2**26) // vocab_size)
    ranked = []
    for start in range(0, max(states.shape[0], 1), size):
        rows = slice(start, start + size)
        all_scores = head(states[rows]).to(device=states.device, dtype=torch.float32)
        own = candidates[rows] if candidates is not None and candidates.dim() == 2 else candidates
        by_row = {name: None if x is None else x[rows] for name, x in (("excluded", excluded), ("popular", popular))}
        ranked.append(rank(states[rows], None, all_scores=all_scores, candidates=own, **by_row))
    item_ids, scores = (torch.cat(parts) for parts in zip(*ranked))
    return item_ids, scores
