"""The summary of a training run, from which its card is written, and groups of runs that differ in the seed alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..utils.files import read_json, write_json


SUMMARY_FILE = "training_summary.json"
# These settings have a column of their own in a table of results.
_COLUMNS = {"attention_types", "max_length", "num_attention_heads", "num_key_value_heads"}


def write_summary(folder: str | Path, run: Mapping[str, Any]) -> Path:
    """
    Write `training_summary.json`: the configuration of a run, its data and its figures.

    Of the log, only the file name is stored, never its path.

    Args:
        folder: the folder of the run.
        run: the entry of the run in a results file of `blossomrec train`:

            - `configuration`: all arguments of the run, or the settings of a `Trainer`;
            - `changed_arguments`: the arguments of `blossomrec train` that differ from their defaults, without the seed;
              absent for a `Trainer`;
            - `seed`;
            - `test` or `validation`: the figures by name; neither if the log has no held-out items;
            - `exclude_seen`: whether figures without a suffix exclude seen items from the ranking;
            - optionally `refit` (whether a new model was trained on all events), `repeat_share`, `training`, `versions`,
              `device`, `commit` and `command`.
    """
    summary = dict(run)
    for name in ("configuration", "changed_arguments"):
        if name in run:
            summary[name] = _without_paths(run[name])
    path = Path(folder) / SUMMARY_FILE
    write_json(path, summary)
    return path


def _without_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with file names in place of the paths of the log and of the titles."""
    paths = {name for name in ("data", "titles") if arguments.get(name) is not None}
    return {name: Path(value).name if name in paths else value for name, value in arguments.items()}


def read_summary(folder: str | Path) -> dict[str, Any]:
    """
    Read the summary of a run.

    Raises:
        ValueError: if the folder has no summary, or a damaged one.
    """
    path = Path(folder) / SUMMARY_FILE
    if not path.exists():
        raise ValueError(f"`folder` {folder} has no {SUMMARY_FILE}; give the folder of a finished `blossomrec train`.")
    return read_json(path)


@dataclass(frozen=True)
class RunGroup:
    """
    Runs that differ in the seed alone.

    Attributes:
        runs: entries of a results file, by seed.
        varying: the settings that distinguish this group from the others of a card and have no column of their own.
    """

    runs: list[dict[str, Any]]
    varying: dict[str, Any]

    @property
    def attention_types(self) -> list[str]:
        return self.runs[0]["configuration"]["attention_types"]

    @property
    def label(self) -> str:
        """The kind of attention, for a table."""
        types = set(self.attention_types)
        if types == {"blossom"}:
            return "BlossomRec"
        if types == {"full"}:
            return "full attention (SASRec with rotary embeddings)"
        layers = [(kind, len(list(run))) for kind, run in groupby(self.attention_types)]
        return ", then ".join(f"{number} × {kind}" for kind, number in layers)

    @property
    def long_label(self) -> str:
        """The label with the settings that distinguish this group from others."""
        parts = [self.label, f"latest {self.get('max_length')} items"]
        if (number := self.get("num_key_value_heads")) is not None:
            parts.append(f"{number} key/value heads")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.varying.items() if value is not None)])

    @property
    def is_baseline(self) -> bool:
        return set(self.attention_types) == {"full"}

    @property
    def part(self) -> str:
        """The part of the data with which the runs were evaluated."""
        return "test" if "test" in self.runs[0] else "validation"

    @property
    def suffixes(self) -> dict[str, str]:
        """Protocol → suffix of its figures in the results, in the order of a table's columns."""
        own, other = ("_unseen", "_all") if self.runs[0]["exclude_seen"] else ("_all", "_unseen")
        suffixes = {own: "", **{kind: kind for kind in ("_repeated", "_new", other, "_uni100")}}
        return suffixes | {f"{kind}_now": f"{suffix}_now" for kind, suffix in suffixes.items()}

    @property
    def time_features(self) -> list[str]:
        """What the model reads of times, see `BlossomRecConfig.time_features`."""
        features = self._model_setting("time_features") or []
        return features.split(",") if isinstance(features, str) else list(features)

    @property
    def item_features(self) -> list[str]:
        """The columns of item features that are part of the item vectors."""
        names = self.get("item_features")
        return names.split(",") if names else []

    @property
    def reads_event_types(self) -> bool:
        return bool(self._model_setting("event_types"))

    def _model_setting(self, name: str) -> Any:
        return json.loads(self.get("config_overrides") or "{}").get(name, self.get(name))

    def get(self, name: str) -> Any:
        """A setting of the runs, or `None`."""
        return self.runs[0]["configuration"].get(name)

    def values(self, name: str) -> list[float]:
        """A figure of each run; empty if a run lacks it."""
        found = [run.get(self.part, {}).get(name) for run in self.runs]
        return [] if None in found else found

    def format_mean(self, name: str) -> str:
        """The mean of a figure and, for two runs or more, its standard deviation over seeds."""
        values = self.values(name)
        if len(values) < 2:
            return f"{values[0]:.4f}" if values else "–"
        return f"{fmean(values):.4f} ± {stdev(values):.4f}"

    def join(self, name: str) -> str:
        """The distinct values of an entry of the runs, separated by commas."""
        return ", ".join(dict.fromkeys(str(run[name]) for run in self.runs if run.get(name) is not None))


def group_runs(results: Sequence[Mapping[str, Any]]) -> list[RunGroup]:
    """
    Group the runs of a results file by configuration. Groups are sorted by history length, baselines last.

    Raises:
        ValueError: if a run lacks its configuration, its seed or `exclude_seen`.
    """
    groups: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for run in results:
        if missing := {"configuration", "seed", "exclude_seen"} - run.keys():
            raise ValueError(
                f"`results` has a run without {', '.join(sorted(missing))}; give a file that `blossomrec train` wrote."
            )
        settings = {**run.get("changed_arguments", run["configuration"]), "implementation": run.get("implementation")}
        settings["commit"] = run["commit"][:10] if run.get("commit") else None
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(dict(run))
    names = dict.fromkeys(name for settings, _ in groups.values() for name in settings)
    varying = [
        name
        for name in names
        if name not in _COLUMNS and len({json.dumps(settings.get(name)) for settings, _ in groups.values()}) > 1
    ]
    grouped = [
        RunGroup(sorted(runs, key=lambda run: run["seed"]), {name: settings.get(name) for name in varying})
        for settings, runs in groups.values()
    ]
    return sorted(
        grouped, key=lambda group: (group.is_baseline, group.get("max_length") or 0, not group.join("commit"))
    )
