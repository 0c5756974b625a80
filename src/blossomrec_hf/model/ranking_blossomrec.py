"""The best items by score: the top of a catalog of any size, some items at a time."""

import torch
from torch import nn

from .ids_blossomrec import NUM_SPECIAL_IDS


MAX_SCORES = {"cpu": 2**22, "cuda": 2**28}  # scores alive at a time, 16 MiB and 1 GiB in float32
MAX_CHUNK = {"cpu": 2**18, "cuda": 2**22}  # items scored at a time, at most
SMALL_SORT = 2**10  # scores that are sorted rather than searched for the highest
# Gathering the vector of one candidate of one history costs about as much as so many items of a shared product.
GATHER_COST = 16


def top_of_rows(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k` highest of each row of `scores` `[S, C]` and their places, both `[S, min(k, C)]`: the highest first, of equals
    the earlier one. Only rows with a tie at the k-th place are sorted completely.
    """
    k = min(k, scores.shape[1])
    # A small sort takes less time than the operations below.
    if scores.shape[1] <= 2 * k or scores.numel() <= SMALL_SORT:
        values, places = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], places[:, :k]
    values, places = scores.topk(k + 1, dim=1)
    tied = ((values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)).nonzero()[:, 0]
    values, places = values[:, :k], places[:, :k]
    if tied.numel():
        of_tied = scores[tied].sort(dim=1, descending=True, stable=True)
        values, places = values.index_copy(0, tied, of_tied[0][:, :k]), places.index_copy(0, tied, of_tied[1][:, :k])
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def rank_items(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    top_k: int,
    *,
    all_scores: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    popular: torch.Tensor | None = None,
    item_counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `top_k` items of the highest score for each state, of equal scores the lower id first. Scores are computed in
    float32 or better, some items at a time: never all users × all items of a large catalog.

    Args:
        states: `[S, hidden_size]`, the last hidden state of each history.
        weight: item vectors `[vocab_size, hidden_size]`; [PAD] and [UNK] are never chosen.
        all_scores: `[S, vocab_size]`, in place of the products of `states` and `weight`; changed in place.
        scales: factors `[vocab_size]` that the scores of the items are multiplied by. Defaults to 1.
        excluded: ids `[S, E]` to exclude for each row; ids below the first item (padding) are ignored.
        candidates: ids to choose from, `[C]` or, for each row, `[S, C]`; ids below the first item are ignored.
        popular: `[S]` bool, the rows that are ranked by `item_counts` `[vocab_size]` instead.

    Returns:
        ids `[S, top_k]` int64 and scores `[S, top_k]`, −1 and −inf if too few items remain.

    Raises:
        ValueError: if a score is not a number.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    states = states.to(dtype)
    counts = item_counts.to(dtype) if popular is not None and bool(popular.any()) else None
    own = None
    if candidates is not None and candidates.dim() == 2:
        own, candidates = candidates, None
    # Scores in float32 even under autocast: bfloat16 has too few bits to separate the items of a catalog.
    with torch.autocast(states.device.type, enabled=False):
        if own is not None and all_scores is None and own.shape[1] * GATHER_COST < weight.shape[0]:
            scores, ids = _rank_own(states, weight, scales, top_k, excluded, own, popular, counts)
        else:
            if candidates is not None:
                candidates = candidates[candidates >= NUM_SPECIAL_IDS].unique()
            scores, ids = _rank_shared(
                states, weight, all_scores, scales, top_k, excluded, candidates, own, popular, counts
            )
    if bool(scores[:, :1].isnan().any()):  # NaN is sorted first
        raise ValueError(
            "Scores that are not numbers (NaN): the model's weights or hidden states are not finite. Look at "
            "`[n for n, p in model.named_parameters() if not p.isfinite().all()]`, and load a sound checkpoint."
        )
    if missing := top_k - scores.shape[1]:
        scores, ids = nn.functional.pad(scores, (0, missing), value=-torch.inf), nn.functional.pad(ids, (0, missing))
    return ids.masked_fill(scores == -torch.inf, -1), scores


def _rank_shared(states, weight, all_scores, scales, top_k, excluded, candidates, allowed, popular, counts):
    """The best of the same items for all rows, a chunk of items at a time."""
    device, num_rows = states.device, states.shape[0]
    vocab_size = weight.shape[0] if all_scores is None else all_scores.shape[1]
    num_items = vocab_size - NUM_SPECIAL_IDS if candidates is None else candidates.shape[0]
    size = min(MAX_SCORES.get(device.type, 2**26) // max(num_rows, 1), MAX_CHUNK.get(device.type, 2**16))
    size = max(size, 2**10, top_k)
    scores, ids = states.new_empty(num_rows, 0), torch.empty(num_rows, 0, dtype=torch.long, device=device)
    if num_items == 0:
        return scores, ids
    drop, keep = (None if sets is None else _places(sets, candidates) for sets in (excluded, allowed))
    for start in range(0, num_items, size):
        stop = min(start + size, num_items)
        if candidates is None:
            chosen = slice(start + NUM_SPECIAL_IDS, stop + NUM_SPECIAL_IDS)
        else:
            chosen = candidates[start:stop]
        if all_scores is None:
            found = _products(states, weight[chosen].to(states.dtype))
        else:
            found = all_scores[:, chosen]
        if scales is not None:
            found = found * scales[chosen]
        if counts is not None:
            found = torch.where(popular[:, None], counts[chosen], found)
        if keep is not None:
            found.masked_fill_(~_among(keep, start, stop), -torch.inf)
        if drop is not None:
            found.masked_fill_(_among(drop, start, stop), -torch.inf)
        found, place = top_of_rows(found, top_k)
        place = place + (start + NUM_SPECIAL_IDS) if candidates is None else chosen[place]
        if start == 0:
            scores, ids = found, place
        else:  # a stable sort: of equals, the lower ids stand first
            scores, order = torch.cat([scores, found], 1).sort(dim=1, descending=True, stable=True)
            scores, ids = scores[:, :top_k], torch.cat([ids, place], 1).gather(1, order[:, :top_k])
    return scores, ids


def _products(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Dot products `[S, C]`."""
    if states.device.type != "cpu" or states.shape[0] > 64:
        return states @ weight.T
    # On a CPU a tall matrix times a few columns takes a third of the time of any other order, and of one
    # column alone (or of one that is expanded).
    columns = states.repeat(2, 1) if states.shape[0] == 1 else states
    return (weight @ columns.T).T[: states.shape[0]].contiguous()


def _places(ids: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    """The place of each of `ids` among all items, or among `candidates` (ascending ids); negative if it has none."""
    if candidates is None:
        return ids - NUM_SPECIAL_IDS
    place = torch.searchsorted(candidates, ids).clamp(max=candidates.shape[0] - 1)
    return torch.where(candidates[place] == ids, place, -1)


def _among(places: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Which of the places `start` … `stop` − 1 each row of `places` `[S, E]` contains, `[S, stop − start]` bool."""
    size = stop - start
    column = places - start
    column = column.masked_fill((column < 0) | (column >= size), size)  # one column more for all other places
    members = torch.zeros(places.shape[0], size + 1, dtype=torch.bool, device=places.device)
    return members.scatter_(1, column, True)[:, :size]


def _rank_own(states, weight, scales, top_k, excluded, candidates, popular, counts):
    """The best of each row's own candidates, some rows at a time, from gathered item vectors."""
    candidates = candidates.sort(dim=1).values
    valid = candidates >= NUM_SPECIAL_IDS
    valid[:, 1:] &= candidates[:, 1:] != candidates[:, :-1]
    if excluded is not None and excluded.shape[1]:
        members = excluded.sort(dim=1).values
        place = torch.searchsorted(members, candidates).clamp(max=members.shape[1] - 1)
        valid &= members.gather(1, place) != candidates
    candidates = candidates.clamp(min=0)
    scores = []
    rows = max(1, MAX_SCORES.get(states.device.type, 2**26) // max(1, candidates.shape[1] * states.shape[1]))
    for state, chosen in zip(states.split(rows), candidates.split(rows)):
        scores.append((weight[chosen].to(states.dtype) @ state[:, :, None])[..., 0])
    scores = torch.cat(scores) if scores else states.new_empty(candidates.shape)
    if scales is not None:
        scores = scores * scales[candidates]
    if counts is not None:
        scores = torch.where(popular[:, None], counts[candidates], scores)
    scores, places = top_of_rows(scores.masked_fill(~valid, -torch.inf), top_k)
    return scores, candidates.gather(1, places)
