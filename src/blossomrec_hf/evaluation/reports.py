"""All that can be said of one evaluation: figures, their uncertainty, and for whom and with what items they were reached."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from .held_out import HeldOutItems
from .metrics import DEFAULT_KS
from .ranking import Ranks


PROTOCOL = (
    "Rank: 1 + items of a higher score + half of those of the same score. The models do not see the time of the event to be "
    "predicted. Rules without a model: of equal counts, the item that is more popular in training comes first."
)
LENGTH_EDGES = (10, 20, 50, 100, 200, 500, 1000)


def bootstrap_means(values: np.ndarray, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """
    Means of users drawn anew with replacement: float64 [samples, ...] for `values` [users, ...]. A user whose value is NaN
    does not count; a sample without any other user is NaN.
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
    By how much the first is better, and the standard error of that by a paired bootstrap over users.

    Args:
        first, second: a figure of each user, float [users] or [seeds, users] (the mean over seeds is taken first). Users
            without the figure (NaN) do not count.
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
    A report that can be written as JSON.

    Args:
        ranks: from [`rank_held_out_items`] with `top_k=max(ks)`.
        held_out: what was ranked.
        item_counts: int [vocabulary], how often each item occurs in training.
        all_and_unseen: also report the figures with nothing excluded and with seen items excluded.
        samples: bootstrap samples, drawn with `seed`.

    Returns:
        - `users`, `repeat_share` (of the held-out items, those that their user's history has), `exclude_seen`;
        - `metrics`: the figures of [`~blossomrec_hf.evaluation.evaluate`];
        - `confidence`: the interval of each figure, from the 2.5th to the 97.5th percentile of the bootstrap;
        - `by_history_length`: `users` and figures of the users whose whole history is so long, without those of which
          there are none (no new target, for example);
        - `coverage@k`: the share of the catalog in the first k recommended items of any user;
        - `popularity_lift@k`: the mean training frequency of these items over that of the users' own histories, less 1
          (Abdollahpouri et al. 2020): above 0, users are shown more popular items than they choose.
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
    One row a report, one column a name: a figure with half its confidence interval where it has one.
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
