"""Reports of evaluations: metrics, confidence intervals, and breakdowns by users and items."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from .held_out import HeldOutItems
from .metrics import DEFAULT_KS
from .ranking import Ranks


PROTOCOL = (
    'Rank: 1 + items with a higher score + half of the other items with the same score. Only rows "with now" see the time of the '
    "event to be predicted, and only models with target event types its type. Baselines: among items with equal counts, the one "
    "that is more popular in training comes first."
)
NOW_LABEL = ", with now"  # ends the name of a model that is given the time of the event to be predicted
LENGTH_EDGES = (10, 20, 50, 100, 200, 500, 1000)


def bootstrap_means(values: np.ndarray, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """
    Bootstrap means over users.

    Args:
        values: float [users, ...]. NaN is ignored.
        samples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        float64 [samples, ...]; NaN if a sample has only users with NaN.
    """
    rng = np.random.default_rng(seed)
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    flat = np.where(known, flat, 0.0)
    means = np.empty((samples, flat.shape[1]))
    for sample in range(samples):
        times = np.bincount(rng.integers(0, len(values), size=len(values)), minlength=len(values))
        with np.errstate(invalid="ignore"):
            means[sample] = (times @ flat) / (times @ known)
    return means.reshape(samples, *values.shape[1:])


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """
    The mean difference `first` − `second` over users, and its standard error from a paired bootstrap.

    Args:
        first, second: a metric of each user, float [users], or [seeds, users], which is averaged over seeds first. NaN is
            ignored.
        samples: number of bootstrap samples.
        seed: seed of the bootstrap.
    """
    difference = np.atleast_2d(first).mean(0) - np.atleast_2d(second).mean(0)
    difference = difference[~np.isnan(difference)]
    return float(difference.mean()), float(bootstrap_means(difference, samples=samples, seed=seed).std(ddof=1))


def describe_evaluation(
    ranks: Ranks,
    held_out: HeldOutItems,
    *,
    item_counts: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
    all_and_unseen: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Summarize the ranks of an evaluation in a report that can be written as JSON.

    Args:
        ranks: the result of [`rank_held_out_items`] with `top_k=max(ks)`.
        held_out: the ranked items.
        item_counts: int [vocab_size], how often each item occurs in training.
        ks: the cut-offs.
        all_and_unseen: also report the metrics with nothing excluded and with seen items excluded.
        samples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Returns:
        - `users`, `repeat_share` (the share of held-out items that occur in their user's history), `exclude_seen`;
        - `metrics`: the metrics of [`~blossomrec_hf.evaluation.evaluate`];
        - `confidence`: the interval of each metric, from the 2.5th to the 97.5th percentile of the bootstrap;
        - `by_history_length`: number of users and metrics by the length of the whole history; metrics that no user has are
          omitted;
        - `coverage@k`: the share of the catalog that is among the top k items of at least one user;
        - `popularity_lift@k`: the mean training frequency of the top k items divided by that of the items in the users'
          histories, minus 1 (Abdollahpouri et al. 2020). Above 0, recommended items are more popular than chosen ones.
    """
    per_user = ranks.per_user_metrics(ks=ks, all_and_unseen=all_and_unseen)
    names = list(per_user)
    values = np.stack([per_user[name] for name in names], axis=1)
    low, high = np.nanpercentile(bootstrap_means(values, samples=samples, seed=seed), [2.5, 97.5], axis=0)
    report: dict[str, Any] = {
        "users": len(held_out),
        "repeat_share": held_out.repeat_share,
        "exclude_seen": ranks.exclude_seen,
        "metrics": dict(zip(names, np.nanmean(values, 0).tolist())),
        "confidence": {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)},
        "by_history_length": {},
    }
    bucket = np.searchsorted(LENGTH_EDGES, held_out.history_lengths)
    for place in np.unique(bucket):
        inside = bucket == place
        first = LENGTH_EDGES[place - 1] + 1 if place > 0 else 0
        name = f"{first}-{LENGTH_EDGES[place]}" if place < len(LENGTH_EDGES) else f"{first} and more"
        known = ~np.isnan(values[inside]).all(0)
        means = dict(zip(np.array(names)[known].tolist(), np.nanmean(values[inside][:, known], 0).tolist()))
        report["by_history_length"][name] = {"users": int(inside.sum()), **means}
    if ranks.top_items is not None:
        counts = np.asarray(item_counts, dtype=np.float64)
        owners = np.repeat(np.arange(len(held_out)), np.diff(held_out.seen_offsets))
        sums = np.bincount(owners, weights=counts[held_out.seen_items], minlength=len(held_out))
        profile = sums / np.maximum(np.diff(held_out.seen_offsets), 1)
        for k in ks:
            shown = ranks.top_items[:, :k]
            shown = shown[shown >= 0]
            report[f"coverage@{k}"] = len(np.unique(shown)) / (len(counts) - NUM_SPECIAL_IDS)
            report[f"popularity_lift@{k}"] = float(counts[shown].mean() / max(profile.mean(), 1e-12) - 1)
    return report


def markdown_table(reports: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """
    A Markdown table with one row per report and one column per name. Metrics are followed by half of their confidence interval.
    """
    rows = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, report in reports.items():
        cells = []
        for name in names:
            if name in report["metrics"]:
                low, high = report["confidence"][name]
                cells.append(f"{report['metrics'][name]:.4f} ± {(high - low) / 2:.4f}")
            else:
                cells.append(f"{report[name]:.3f}")
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
