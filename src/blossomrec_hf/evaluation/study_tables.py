"""Tables of studies: means and intervals, paired comparisons, and slopes over a setting."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .metrics import per_user_metrics
from .reports import paired_difference


K = 10
METRIC = f"ndcg@{K}"
MARGIN = 0.02  # non-inferior: the interval of the difference lies above this share of the other value, below 0
Z = 1.96  # half a 95 % interval in standard errors


@dataclass
class RunResult:
    """
    The test of one trained model.

    Attributes:
        data, configuration, evaluation: names.
        seed: the seed of the run.
        settings: settings of the run, and of the evaluation (which come first).
        ranks: float [test items], the rank of each test item.
        users: int [test items], its user.
        lengths: int [users], number of events in each user's whole history.
        validation: NDCG@10 of the validation that chose the weights.
        last_times: int64 [users], time of each user's latest event before the test items, in seconds; optional.
    """

    data: str
    configuration: str
    evaluation: str
    seed: int
    settings: Mapping[str, Any]
    ranks: np.ndarray
    users: np.ndarray
    lengths: np.ndarray
    validation: float
    last_times: np.ndarray | None = None
    _metrics: dict[str, np.ndarray] | None = None

    def per_user(self, name: str) -> np.ndarray:
        """float64 [users], a metric of each user."""
        if self._metrics is None:
            self._metrics = per_user_metrics(self.ranks, ks=[K], users=self.users)
        return self._metrics[name]

    def chosen_users(self, group: Mapping[str, Any]) -> np.ndarray:
        """
        bool [users], whether a user belongs to a group: `min_events` and `max_events` of the whole history, and `after`, a
        time in seconds that the latest event before the test items lies after.
        """
        chosen = self.lengths >= group.get("min_events", 0)
        chosen &= self.lengths <= group.get("max_events", np.inf)
        if "after" in group:
            if self.last_times is None:
                raise ValueError(
                    f"`users` has `after`, but the data set {self.data} has no times; remove one of them."
                )
            chosen &= self.last_times > group["after"]
        return chosen


@dataclass
class StudyTables:
    """
    What is reported about a study.

    Attributes:
        users: groups of users by name, see [`RunResult.chosen_users`]; a group may list the data sets that it is for (`data`).
        comparisons: `{"first": configuration, "second": configuration}`, optionally with `evaluation`, or `first_evaluation`
            and `second_evaluation`. If `first` has a `*`, it stands for all matching names, and that of `second` for the same
            text. With `best_of`, a pattern, instead of `second`, the second side is the matching configuration with the
            highest validation NDCG@10 on the data set.
        slopes: `{"over": setting, "configurations": pattern, "evaluations": pattern}`: the regression of NDCG@10 over the
            logarithm of a setting of the runs or of the evaluations.
    """

    users: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all users": {}})
    comparisons: list[dict[str, str]] = field(default_factory=list)
    slopes: list[dict[str, str]] = field(default_factory=list)

    def check(self, path: str, configurations: Sequence[str], evaluations: Sequence[str]) -> None:
        """
        Raises:
            ValueError: if a comparison or a slope names no configuration or evaluation, or a group has unknown conditions.
        """
        for name, group in self.users.items():
            if unknown := sorted((group or {}).keys() - {"min_events", "max_events", "after", "data"}):
                raise ValueError(
                    f"{path}: the users {name!r} have {', '.join(unknown)}; give min_events, max_events, after."
                )
        for entry in self.comparisons:
            if "best_of" in entry and "second" in entry:
                raise ValueError(f"{path}: the comparison {entry} has `second` and `best_of`; remove one of them.")
            if not any(_pairs(entry, second, configurations) for second in _candidates(entry, configurations)):
                raise ValueError(f"{path}: the comparison {entry} names no two of {', '.join(configurations)}.")
            for side in ("first", "second"):
                for name in _evaluations_of(entry, side, evaluations):
                    if name not in evaluations:
                        raise ValueError(
                            f"{path}: the comparison {entry} names no evaluation of {', '.join(evaluations)}."
                        )
        for entry in self.slopes:
            if "over" not in entry or not fnmatch.filter(configurations, entry.get("configurations", "*")):
                raise ValueError(f"{path}: the slope {entry} needs `over`, a setting, and existing configurations.")

    def groups_of(self, data: str) -> dict[str, dict[str, Any]]:
        """The groups of users for a data set."""
        return {name: group or {} for name, group in self.users.items() if data in (group or {}).get("data", [data])}

    def build(self, tests: Sequence[RunResult]) -> dict[str, Any]:
        """
        Compute all tables.

        Returns:
            - `means`: per data set, group, evaluation and configuration: number of users and seeds, the mean of `recall@10` and
              `ndcg@10` over users and seeds, half of its 95 % interval over users, the standard deviation over seeds, and the mean
              `validation` NDCG@10 of all users;
            - `comparisons`: see [`compare`], with the names; with several data sets, also one of all of them;
            - `slopes`: see [`slope`], with the names and the points.
        """
        by_name: dict[tuple[str, str, str], list[RunResult]] = {}
        for test in tests:
            by_name.setdefault((test.data, test.configuration, test.evaluation), []).append(test)
        for same in by_name.values():
            same.sort(key=lambda test: test.seed)
        sets = list(dict.fromkeys(test.data for test in tests))
        configurations = list(dict.fromkeys(test.configuration for test in tests))
        evaluations = list(dict.fromkeys(test.evaluation for test in tests))
        means, comparisons, slopes = [], [], []
        for data in sets:
            validation = {
                configuration: float(np.mean([test.validation for test in same]))
                for (of_data, configuration, _), same in by_name.items()
                if of_data == data
            }
            for title, group in self.groups_of(data).items():
                place = {"data": data, "users": title}
                for (of_data, configuration, evaluation), same in by_name.items():
                    if of_data == data:
                        names = {**place, "evaluation": evaluation, "configuration": configuration}
                        means.append({**names, **describe(same, group)})
                for entry in self.comparisons:
                    chosen = max(
                        _candidates(entry, validation), key=lambda name: validation.get(name, 0.0), default=""
                    )
                    for first, second in _pairs(entry, chosen, configurations):
                        for evaluation in _evaluations_of(entry, "first", evaluations):
                            other = entry.get("second_evaluation", evaluation)
                            one, two = by_name.get((data, first, evaluation)), by_name.get((data, second, other))
                            if one and two:
                                names = {**place, "first": [first, evaluation], "second": [second, other]}
                                names |= {"best_of": entry["best_of"]} if "best_of" in entry else {}
                                comparisons.append({**names, **compare(one, two, group)})
                for entry in self.slopes:
                    points = [
                        same
                        for (of_data, configuration, evaluation), same in by_name.items()
                        if of_data == data and fnmatch.fnmatch(configuration, entry.get("configurations", "*"))
                        if fnmatch.fnmatch(evaluation, entry.get("evaluations", "*"))
                        and entry["over"] in same[0].settings
                    ]
                    if len(points) > 1:
                        slopes.append({**place, **entry, **slope(points, group, over=entry["over"])})
        return {"means": means, "comparisons": comparisons + _over_data_sets(comparisons), "slopes": slopes}


def _evaluations_of(entry: Mapping[str, str], side: str, evaluations: Sequence[str]) -> list[str]:
    chosen = entry.get(f"{side}_evaluation", entry.get("evaluation"))
    return list(evaluations) if chosen is None else [chosen]


def _candidates(entry: Mapping[str, str], configurations: Iterable[str]) -> list[str]:
    """The configurations or the pattern that the second side of a comparison is chosen from."""
    return fnmatch.filter(configurations, entry["best_of"]) if "best_of" in entry else [entry.get("second", "")]


def _pairs(entry: Mapping[str, str], second: str, configurations: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of configurations that a comparison with the second side `second` names."""
    first = entry.get("first", "")
    pattern = re.compile("(.*)".join(map(re.escape, first.split("*", 1))))
    matches = [(name, pattern.fullmatch(name)) for name in configurations]
    named = [(name, second.replace("*", match[1] if match.groups() else "")) for name, match in matches if match]
    return [(one, two) for one, two in named if two in configurations and one != two]


def _stack(same: Sequence[RunResult], name: str, group: Mapping[str, Any]) -> np.ndarray:
    """float64 [seeds, users of the group], a metric."""
    if any(not np.array_equal(test.lengths, same[0].lengths) for test in same):
        raise ValueError(
            f"the tests of {same[0].configuration} on {same[0].data} have different users; run them again."
        )
    chosen = same[0].chosen_users(group)
    return np.stack([test.per_user(name)[chosen] for test in same])


def describe(same: Sequence[RunResult], group: Mapping[str, Any]) -> dict[str, Any]:
    """Means of the tests of one configuration with several seeds, for a group of users; see [`StudyTables.build`]."""
    found: dict[str, Any] = {"seeds": [test.seed for test in same]}
    found["validation"] = float(np.mean([test.validation for test in same]))
    for name in (f"recall@{K}", METRIC):
        values = _stack(same, name, group)
        found["num_users"] = values.shape[1]
        if values.shape[1] == 0:
            return found
        mean, error = paired_difference(values, np.zeros_like(values))
        found[name] = mean
        found[f"{name} half interval"] = Z * error
        found[f"{name} over seeds"] = float(values.mean(1).std(ddof=1)) if len(same) > 1 else None
    return found


def compare(first: Sequence[RunResult], second: Sequence[RunResult], group: Mapping[str, Any]) -> dict[str, Any]:
    """
    The paired, seed-averaged difference `first` − `second` in NDCG@10 over the users of a group, of the seeds that both have.

    Returns:
        `difference`, its 95 % interval `low` to `high`, the value of `second`, `num_users`, and the `verdict`: "better" (the
        interval lies above 0), "worse" (below 0), "non-inferior" (above −2 % of the other value) or "open".
    """
    seeds = {test.seed for test in first} & {test.seed for test in second}
    first, second = ([test for test in side if test.seed in seeds] for side in (first, second))
    if not seeds:
        return {"num_users": 0, "verdict": "open"}
    one, two = _stack(first, METRIC, group), _stack(second, METRIC, group)
    if one.shape[1] != two.shape[1] or one.shape[1] == 0:
        return {"num_users": 0, "verdict": "open"}
    difference, error = paired_difference(one, two)
    other, low, high = float(two.mean()), difference - Z * error, difference + Z * error
    found = {"difference": difference, "low": low, "high": high, "other": other, "num_users": one.shape[1]}
    found["seeds"] = sorted(seeds)
    found["recall difference"] = float(
        _stack(first, f"recall@{K}", group).mean() - _stack(second, f"recall@{K}", group).mean()
    )
    return {**found, "verdict": _verdict(low, high, other)}


def _verdict(low: float, high: float, other: float) -> str:
    if low > 0:
        return "better"
    if low > -MARGIN * other:
        return "non-inferior"
    return "worse" if high < 0 else "open"


def _over_data_sets(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    The means of the relative differences over data sets, for comparisons of all users that several of them have. There is none
    of a configuration that is itself the best on some of them.
    """
    same: dict[str, list[Mapping[str, Any]]] = {}
    for entry in comparisons:
        is_candidate = fnmatch.fnmatchcase(entry["first"][0], entry.get("best_of", ""))
        if entry["num_users"] and entry["other"] > 0 and not is_candidate:
            second = [entry.get("best_of", entry["second"][0]), entry["second"][1]]
            same.setdefault(repr((entry["users"], entry["first"], second, "best_of" in entry)), []).append(entry)
    found = []
    for entries in same.values():
        if len(entries) < 2:
            continue
        errors = [(entry["high"] - entry["low"]) / 2 / entry["other"] for entry in entries]
        mean = float(np.mean([entry["difference"] / entry["other"] for entry in entries]))
        half = math.sqrt(sum(error**2 for error in errors)) / len(entries)
        names = {key: entries[0][key] for key in ("users", "first", "second", "best_of") if key in entries[0]}
        if "best_of" in names:  # another one on each data set
            names["second"] = ["", names["second"][1]]
        figures = {"difference": mean, "low": mean - half, "high": mean + half, "other": 1.0}
        figures["num_users"] = sum(entry["num_users"] for entry in entries)
        found.append(
            {"data": "mean, relative", **names, **figures, "verdict": _verdict(mean - half, mean + half, 1.0)}
        )
    return found


def slope(points: Sequence[Sequence[RunResult]], group: Mapping[str, Any], *, over: str) -> dict[str, Any]:
    """
    The regression of NDCG@10 over log2 of a setting: least squares per user, then the mean over users, which is the slope for
    the mean over users and has an interval over users.

    Args:
        points: the tests of one value of the setting each, with all seeds.
        over: name of the setting.

    Returns:
        `slope` (change of NDCG@10 if the setting doubles), its 95 % interval `low` to `high`, `num_users`, and `points`, pairs
        of the setting and the mean NDCG@10.
    """
    points = sorted(points, key=lambda same: same[0].settings[over])
    values = np.array([same[0].settings[over] for same in points], dtype=np.float64)
    metrics = np.stack([_stack(same, METRIC, group).mean(0) for same in points])
    if metrics.shape[1] == 0:
        return {"num_users": 0}
    logs = np.log2(values)
    logs -= logs.mean()
    per_user = logs @ metrics / (logs @ logs)
    mean, error = paired_difference(per_user, np.zeros_like(per_user))
    pairs = [[float(value), float(metric)] for value, metric in zip(values, metrics.mean(1))]
    return {
        "slope": mean,
        "low": mean - Z * error,
        "high": mean + Z * error,
        "num_users": metrics.shape[1],
        "points": pairs,
    }


# -- Markdown --------------------------------------------------------------------------------------


def markdown(
    study: str, description: str, tables: Mapping[str, Any], costs: Mapping[tuple[str, str], Mapping[str, float]]
) -> str:
    """
    The tables of a study in Markdown.

    Args:
        study: name of the study.
        description: a sentence about it.
        tables: the result of [`StudyTables.build`].
        costs: microseconds per user by evaluation, by data set and configuration; may be empty.
    """
    lines = [f"# {study}", "", *([description, ""] if description else [])]
    places = dict.fromkeys((entry["data"], entry["users"], entry["evaluation"]) for entry in tables["means"])
    for data, users, evaluation in places:
        rows = [e for e in tables["means"] if (e["data"], e["users"], e["evaluation"]) == (data, users, evaluation)]
        if not rows[0]["num_users"]:
            continue
        lines += [f"**{data}, {users} ({rows[0]['num_users']:,}), {evaluation}**", ""]
        timed = any(evaluation in costs.get((data, row["configuration"]), {}) for row in rows)
        lines += ["| | seeds | Recall@10 | NDCG@10 | over seeds | validation |" + (" µs per user |" if timed else "")]
        lines += ["|---|---|---|---|---|---|" + ("---|" if timed else "")]
        for row in rows:
            cells = [f"{row[name]:.4f} ± {row[f'{name} half interval']:.4f}" for name in (f"recall@{K}", METRIC)]
            spread = row[f"{METRIC} over seeds"]
            cells += ["" if spread is None else f"{spread:.4f}", f"{row['validation']:.4f}"]
            cost = costs.get((data, row["configuration"]), {}).get(evaluation)
            cells += ["" if cost is None else f"{cost:.1f}"] if timed else []
            lines.append(f"| {row['configuration']} | {len(row['seeds'])} | {' | '.join(cells)} |")
        lines.append("")
    if tables["comparisons"]:
        lines += ["| difference in NDCG@10 | data, users | absolute | relative | |", "|---|---|---|---|---|"]
        lines += [_comparison_row(entry) for entry in tables["comparisons"] if entry["num_users"]]
        lines.append("")
    if tables["slopes"]:
        lines += ["| slope of NDCG@10 per doubling | data, users | 95 % interval | NDCG@10 |", "|---|---|---|---|"]
        for entry in tables["slopes"]:
            if entry["num_users"]:
                points = ", ".join(f"{value:g}: {metric:.4f}" for value, metric in entry["points"])
                title = f"{entry.get('configurations', '*')} over {entry['over']}: {entry['slope']:+.5f}"
                interval = f"{entry['low']:+.5f} to {entry['high']:+.5f}"
                lines.append(
                    f"| {title} | {entry['data']}, {entry['users']} ({entry['num_users']:,}) | {interval} | {points} |"
                )
        lines.append("")
    lines.append(
        "± is half of the 95 % interval over users (bootstrap). Validation is the NDCG@10 that chose the weights, of all users. "
        "Differences are paired by user and averaged over seeds. "
        "Non-inferior: the interval lies above −2 % of the other value; better: above 0."
    )
    return "\n".join(lines) + "\n"


def comparison_title(entry: Mapping[str, Any]) -> str:
    """The names of the two sides of a comparison."""
    (first, evaluation), (second, other) = entry["first"], entry["second"]
    if "best_of" in entry:
        second = f"best of {entry['best_of']} on validation"
    return (
        f"{first} − {second} ({evaluation})" if evaluation == other else f"{first} ({evaluation}) − {second} ({other})"
    )


def _comparison_row(entry: Mapping[str, Any]) -> str:
    title = comparison_title(entry)
    relative = [entry[name] / entry["other"] for name in ("difference", "low", "high")]
    absolute = f"{entry['difference']:+.4f} ({entry['low']:+.4f} to {entry['high']:+.4f})"
    if entry["other"] == 1.0:
        absolute = ""
    chosen = f"; best: {entry['second'][0]}" if "best_of" in entry and entry["second"][0] else ""
    percent = f"{relative[0]:+.1%} ({relative[1]:+.1%} to {relative[2]:+.1%})"
    place = f"{entry['data']}, {entry['users']} ({entry['num_users']:,}){chosen}"
    return f"| {title} | {place} | {absolute} | {percent} | {entry['verdict']} |"
