"""Ranking metrics computed from the ranks of the held-out items.

Everything here is numpy on one number per held-out item: its rank among the ranked items. How the rank comes about
(which items are ranked, how ties count) is the business of `evaluation.py`.
"""

from collections.abc import Sequence

import numpy as np


DEFAULT_KS = (1, 5, 10, 20)


def per_user_metrics(
    ranks: np.ndarray | Sequence[float], *, ks: Sequence[int] = DEFAULT_KS, users: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """
    Recall, NDCG, MRR and hit rate of every user.

    Args:
        ranks: float [N], the rank of each held-out item, 1 is the best. Halves are fine (ties), so is infinity (an
            item that could not be ranked counts as missed).
        ks: the cut-offs.
        users: int [N], the user to which each held-out item belongs, counted from 0 without gaps. Left out, each item
            belongs to a user of its own (leave-one-out).

    Returns:
        `{"recall@k", "ndcg@k", "mrr@k", "hit_rate@k"}` for each k, float64 [number of users]. With n held-out items:
        recall@k is the share of them with a rank of at most k; ndcg@k = (sum of 1/log2(1 + rank) over the best k of
        those) / (the same sum for the ranks 1 ... min(n, k)) (Järvelin and Kekäläinen 2002, binary gains); mrr@k is
        1/rank of the best of them if it is in the first k, else 0; hit_rate@k is 1 if any is, and equals recall@k when
        n = 1. No figure exceeds 1 if the items of a user are ranked in one list, ties included: only with ties can
        more than k of them have a rank of at most k.

    Raises:
        ValueError: for an empty `ranks`, a rank below 1 or not a number, a cut-off below 1, or `users` of another
            length or with a user who has no item.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0:
        raise ValueError(f"`ranks` must be one number per held-out item and not empty, got shape {ranks.shape}.")
    if not (ranks >= 1).all():
        raise ValueError(f"`ranks` must be 1 or more, got {ranks[~(ranks >= 1)][0]}.")
    if any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"`ks` must be whole numbers from 1 on, got {list(ks)}.")
    users = np.arange(ranks.size) if users is None else np.asarray(users)
    if users.shape != ranks.shape:
        raise ValueError(f"`users` must have the shape of `ranks`, {ranks.shape}, got {users.shape}.")
    held_out = np.bincount(users)
    if (held_out == 0).any():
        raise ValueError(
            f"`users` must count from 0 without gaps: user {np.flatnonzero(held_out == 0)[0]} has no item."
        )

    best = np.full(held_out.size, np.inf)
    np.minimum.at(best, users, ranks)
    by_rank = np.lexsort((ranks, users))
    place = np.empty(ranks.size, dtype=np.int64)  # among the held-out items of the same user, the best is 0
    place[by_rank] = np.arange(ranks.size) - np.repeat(np.cumsum(held_out) - held_out, held_out)
    gains = 1.0 / np.log2(1.0 + ranks)
    metrics: dict[str, np.ndarray] = {}
    for k in ks:
        hits = ranks <= k
        ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(1.0 + np.arange(1, k + 1)))])
        metrics[f"recall@{k}"] = np.bincount(users, weights=hits) / held_out
        metrics[f"ndcg@{k}"] = (
            np.bincount(users, weights=gains * (hits & (place < k))) / ideal[np.minimum(held_out, k)]
        )
        metrics[f"mrr@{k}"] = np.where(best <= k, 1.0 / best, 0.0)
        metrics[f"hit_rate@{k}"] = (best <= k).astype(np.float64)
    return metrics


def ranking_metrics(
    ranks: np.ndarray | Sequence[float],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    users: np.ndarray | None = None,
    suffix: str = "",
) -> dict[str, float]:
    """
    The means over users of [`per_user_metrics`], as plain floats; `suffix` is appended to every name.
    """
    return {
        f"{name}{suffix}": float(values.mean()) for name, values in per_user_metrics(ranks, ks=ks, users=users).items()
    }
