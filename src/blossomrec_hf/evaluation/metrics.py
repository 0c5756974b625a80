"""
Ranking metrics from the ranks of the held-out items, in NumPy. `ranking.py` defines which items are ranked and how ties
count.
"""

from collections.abc import Sequence

import numpy as np


DEFAULT_KS = (1, 5, 10, 20)


def per_user_metrics(
    ranks: np.ndarray | Sequence[float], *, ks: Sequence[int] = DEFAULT_KS, users: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """
    Recall, NDCG, MRR and hit rate of each user.

    Args:
        ranks: float [N], the rank of each held-out item, starting at 1. Half ranks (ties) are allowed, and infinity counts as
            a miss.
        ks: the cut-offs.
        users: int [N], the user of each held-out item, numbered from 0 without gaps. By default, each item belongs to a user of
            its own (leave-one-out).

    Returns:
        `recall@k`, `ndcg@k`, `mrr@k` and `hit_rate@k` for each k, float64 [number of users]. For a user with n held-out items:

        - recall@k is the share of them with a rank of at most k;
        - ndcg@k is the sum of 1/log2(1 + rank) over the best k of those, divided by the same sum over the ranks 1 to
          min(n, k) (Järvelin and Kekäläinen 2002, binary gains);
        - mrr@k is 1/rank of the best one if its rank is at most k, else 0;
        - hit_rate@k is 1 if a rank is at most k, else 0.

        No metric exceeds 1 if the items of a user are ranked in one list. With ties, more than k items may have a rank of at
        most k; `ndcg@k` then counts the best k.

    Raises:
        ValueError: if `ranks` is empty or has a value below 1 or NaN, if a cut-off is below 1, or if `users` has another length
            or a gap.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0:
        raise ValueError(
            f"`ranks` has the shape {ranks.shape}; it must have one number per held-out item, at least one."
        )
    if not (ranks >= 1).all():
        raise ValueError(f"`ranks` must be 1 or more, got {ranks[~(ranks >= 1)][0]}.")
    if any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"`ks` must be integers of at least 1, got {list(ks)}.")
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
    place = np.empty(ranks.size, dtype=np.int64)  # among the held-out items of the same user, starting at 0
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
    The means of [`per_user_metrics`] over users, as floats. `suffix` is appended to every name.
    """
    return {
        f"{name}{suffix}": float(values.mean()) for name, values in per_user_metrics(ranks, ks=ks, users=users).items()
    }
