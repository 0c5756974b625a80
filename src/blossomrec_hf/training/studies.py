"""Studies: a YAML file of configurations, seeds and data sets, the runs that it asks for, and their records."""

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..data.event_table import EventTable
from ..data.item_features import save_item_features
from ..evaluation.study_tables import StudyTables
from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.features_blossomrec import ItemFeatures
from ..model.streams_blossomrec import build_streams
from ..utils.code_hash import hash_files, join_hashes
from .arguments import LoopArguments, read_arguments


PACKAGE = Path(__file__).parent.parent
# Figures depend on these files. Kernels, commands, serving and the readers of raw logs are not among them: kernels are tested to
# compute what `ops_reference` computes, and the events that were read have a checksum.
CODE = """
    model/configuration_*.py model/modeling_*.py model/modules_*.py model/streams_*.py model/attention_*.py model/power_law_*.py
    model/packing_*.py model/loss_*.py model/objectives_*.py model/events_*.py model/time_*.py model/features_*.py
    model/items_*.py model/ops_reference.py
    batches/*.py data/splits.py data/event_table.py
    evaluation/held_out.py evaluation/metrics.py evaluation/model_scores.py evaluation/ranking.py evaluation/reports.py
    training/averaging.py training/gradients.py training/graphs.py training/initialize.py training/loop.py
    training/optimizer.py training/plan.py training/step.py training/study_runs.py
""".split()
# Models with none of these settings run nothing of these files.
CODE_OF_SETTINGS = {
    ("time_features", "event_types"): ("model/events_", "model/time_"),
    ("item_features",): ("model/features_",),
}
_PARTS = "description imports data seeds settings configurations grid evaluations users comparisons slopes costs baselines".split()
_LOOP_NAMES = {f.name for f in fields(LoopArguments)} - {"output_dir", "seed", "resume", "push_to_hub"}
# `item_features` names columns of the data, as in `blossomrec train`; the configuration follows from them.
_CONFIG_NAMES = {f.name for f in fields(BlossomRecConfig)} - {"vocab_size", "repeat_share", "item_features"}
_EVALUATION_NAMES = ("max_length", "now", "exclude_seen", "num_negatives", "seed")  # keywords of `rank_held_out_items`


@dataclass(frozen=True)
class Run:
    """
    One run of a study.

    Attributes:
        data: name of the data set.
        configuration: name of the configuration.
        seed: the seed.
        settings: the settings of `blossomrec train` and of `BlossomRecConfig` that differ from their defaults; `item_features`
            names columns of the item table.
        evaluations: how the model is tested: by name, the settings of the test.
        checksum: of the events, see [`data_checksum`].
        code: hash of the code.
        imports: Python files that are imported first.
    """

    data: str
    configuration: str
    seed: int
    settings: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    checksum: str
    code: str
    imports: tuple[Path, ...] = ()

    @property
    def key(self) -> str:
        """12 hexadecimal digits: another number if anything that the figures depend on is another."""
        parts = [self.settings, self.evaluations, self.seed, self.checksum, self.code]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The name of the files of the record, without suffix."""
        return _file_name(f"{self.data} {self.configuration} {self.seed}", self.key)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings that inference depends on."""
        names = _CONFIG_NAMES | {"item_features", "mixed_precision"}
        return {name: value for name, value in self.settings.items() if name in names}

    @property
    def tested_lengths(self) -> dict[str, int]:
        """By evaluation, the number of latest items that the model reads of each history."""
        own = self.settings.get("max_length", LoopArguments.max_length)
        return {name: settings.get("max_length", own) for name, settings in self.evaluations.items()}

    def loop_arguments(self, output_dir: str | Path) -> LoopArguments:
        """The arguments of the training loop."""
        settings = {name: value for name, value in self.settings.items() if name in _LOOP_NAMES}
        return LoopArguments(output_dir=str(output_dir), seed=self.seed, **settings)

    @property
    def item_features(self) -> str | None:
        """The columns of item features that the model reads, as in `blossomrec train`."""
        return self.settings.get("item_features")

    def model_config(
        self, vocab_size: int, repeat_share: float | None, features: ItemFeatures | None = None
    ) -> BlossomRecConfig:
        """The configuration of the model; `features` are those of `item_features`."""
        settings = {name: value for name, value in self.settings.items() if name in _CONFIG_NAMES}
        described = None if features is None else features.config()
        return BlossomRecConfig(vocab_size=vocab_size, repeat_share=repeat_share, item_features=described, **settings)


@dataclass
class Study:
    """
    A grid of configurations × seeds × data sets, and what is to be reported about it.

    Attributes:
        name: name of the study, that of its file.
        description: a sentence for the report.
        data: path of each data set by name: what `blossomrec train --data` takes, usually a file of
            `blossomrec export --data`. Settings of a data set go into `data_settings`.
        data_settings: by data set, settings that replace those of the study.
        seeds: the seeds.
        settings: settings of all runs: arguments of the training loop and of `BlossomRecConfig`.
        configurations: settings by configuration, which replace the others. The grid is already multiplied out.
        evaluations: by name, how each trained model is tested: some keywords of `rank_held_out_items`; `now` is
            for the models that depend on it.
        tables: what to report.
        costs: whether inference is timed.
        baselines: whether the rules of [`~blossomrec_hf.evaluation.baselines.make_baselines`] are tested, too.
        imports: Python files that are imported first, such as one that registers a stream.
    """

    name: str
    description: str
    data: dict[str, str]
    seeds: list[int]
    configurations: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    data_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=lambda: {"test": {}})
    tables: StudyTables = field(default_factory=StudyTables)
    costs: bool = False
    baselines: bool = False
    imports: tuple[Path, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """
        Read a study from a YAML file, as `blossomrec study --help` describes it.

        Raises:
            ValueError: if the file is not valid, or a setting has a wrong name or value.
            OSError: if the file cannot be read.
        """
        content = read_arguments(path)
        if unknown := sorted(content.keys() - set(_PARTS)):
            raise ValueError(f"{path} has {', '.join(unknown)}; a study may have {', '.join(_PARTS)}.")
        for part in ("data", "seeds", "configurations"):
            if not content.get(part):
                raise ValueError(f"{path} has no {part}; a study needs data, seeds and configurations.")
        _check_parts(path, content)
        sets = {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in content["data"].items()}
        tables = {name: content[name] for name in ("users", "comparisons", "slopes") if content.get(name)}
        study = cls(
            name=Path(path).stem,
            description=" ".join(str(content.get("description", "")).split()),
            data={name: str(entry["path"]) for name, entry in sets.items()},
            data_settings={name: entry.get("settings") or {} for name, entry in sets.items()},
            seeds=content["seeds"],
            settings=content.get("settings") or {},
            configurations=expand_grid(content["configurations"], content.get("grid") or {}),
            evaluations={name: entry or {} for name, entry in (content.get("evaluations") or {"test": {}}).items()},
            tables=StudyTables(**tables),
            costs=bool(content.get("costs", False)),
            baselines=bool(content.get("baselines", False)),
            imports=tuple(Path(path).parent / name for name in content.get("imports") or ()),
        )
        import_files(study.imports)
        study.check(str(path))
        return study

    def check(self, path: str) -> None:
        """
        Raises:
            ValueError: if a setting of a run has an unknown name or a wrong value, or a comparison names nothing.
        """
        for run in self.runs(dict.fromkeys(self.data, ""), code=""):
            place = f"{path}, configuration {run.configuration}"
            if unknown := sorted(run.settings.keys() - _LOOP_NAMES - _CONFIG_NAMES - {"item_features"}):
                raise ValueError(f"{place}: {', '.join(unknown)} is no setting of `blossomrec train`; correct it.")
            if not isinstance(run.item_features, str | None):
                raise ValueError(
                    f"{place}: `item_features` is {run.item_features!r}; name columns of the item table in one text, separated by "
                    'commas, or give "all".'
                )
            try:
                run.loop_arguments("runs")
                config = run.model_config(3418, None)
                for layer in range(config.num_hidden_layers):
                    build_streams(config, layer)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from error
        self.tables.check(path, list(self.configurations), list(self.evaluations))

    def item_features(self, data: str) -> tuple[str, ...]:
        """What the runs of a data set have for `item_features`, sorted."""
        runs = self.runs(dict.fromkeys(self.data, ""), code="")
        return tuple(sorted({run.item_features for run in runs if run.data == data and run.item_features}))

    def runs(self, checksums: Mapping[str, str], code: str) -> list[Run]:
        """
        All runs, in the order in which they are executed: all configurations with the first seed, then with the next.

        Args:
            checksums: checksum of the events by data set.
            code: hash of the code.
        """
        return [
            Run(
                data=data,
                configuration=name,
                seed=seed,
                settings={**self.settings, **self.data_settings.get(data, {}), **settings},
                evaluations=self.evaluations,
                checksum=checksums[data],
                code=code,
                imports=self.imports,
            )
            for seed in self.seeds
            for data in self.data
            for name, settings in self.configurations.items()
        ]


def models_to_time(runs: Sequence[Run]) -> dict[str, tuple[Run, set[int]]]:
    """
    Each model to time: one of its runs, and the lengths at which it is tested, by the name of the files of its record, without
    suffix. Of all that a timing depends on, the name has a hash.
    """
    models: dict[str, tuple[Run, set[int]]] = {}
    for run in runs:
        parts = [run.data, run.model_settings, run.checksum, run.code]
        _, lengths = models.setdefault(json.dumps(parts, sort_keys=True), (run, set()))
        lengths.update(run.tested_lengths.values())
    named = {}
    for parts, (run, lengths) in models.items():
        key = hashlib.sha256(f"{parts} {sorted(lengths)}".encode()).hexdigest()[:12]
        named[_file_name(f"cost {run.data}", key)] = (run, lengths)
    return named


def _file_name(words: str, key: str) -> str:
    """A name that every file system takes: words and a key, joined by hyphens."""
    words = re.sub(r"[^\w.]+", "-", words).strip("-")
    return f"{words}-{key}"


def _check_parts(path: str | Path, content: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a part of a study has another form than the help of `blossomrec study` describes."""
    for part in ("data", "settings", "configurations", "grid", "evaluations", "users"):
        if not isinstance(content.get(part) or {}, dict):
            raise ValueError(f"{path} has {content[part]!r} for {part}, which must be a mapping.")
    for part, kind in (("seeds", int), ("imports", str)):
        values = content.get(part) or []
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            kinds = {int: "integers", str: "paths"}[kind]
            raise ValueError(f"{path} has the {part} {values!r}; they must be a list of {kinds}.")
    for name, entry in content["data"].items():
        known = entry if isinstance(entry, dict) else {"path": entry}
        if not (isinstance(known.get("path"), str) and known.keys() <= {"path", "settings"}):
            raise ValueError(
                f"{path} has {entry!r} for the data set {name!r}; give its path, or a mapping with path and settings."
            )
        if not isinstance(known.get("settings") or {}, dict):
            raise ValueError(
                f"{path} has {known['settings']!r} for the settings of {name!r}, which must be a mapping."
            )
    for name, settings in content["configurations"].items():
        if not isinstance(settings or {}, dict):
            raise ValueError(f"{path} has {settings!r} for the configuration {name!r}, which must be a mapping.")
    for name, values in (content.get("grid") or {}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path} has {values!r} for {name} in the grid; it must be a list of values.")
    for name, settings in (content.get("evaluations") or {}).items():
        if not isinstance(settings or {}, dict) or (settings or {}).keys() - set(_EVALUATION_NAMES):
            raise ValueError(
                f"{path} has {settings!r} for the evaluation {name!r}; it may set {', '.join(_EVALUATION_NAMES)}."
            )
        length = (settings or {}).get("max_length", 1)
        if type(length) is not int or length < 1:
            raise ValueError(
                f"{path} has the max_length {length!r} for the evaluation {name!r}; it must be at least 1."
            )


def expand_grid(
    configurations: Mapping[str, Mapping[str, Any] | None], grid: Mapping[str, Sequence[Any]]
) -> dict[str, dict[str, Any]]:
    """
    Multiply configurations by a grid of settings. `{"blossom": {}}` and `{"max_length": [50, 200]}` give the configurations
    `"blossom, max_length 50"` and `"blossom, max_length 200"`.

    Args:
        configurations: settings by name.
        grid: values by setting. If a configuration has the setting itself, the grid does not vary it.
    """
    expanded = {}
    for name, settings in configurations.items():
        settings = dict(settings or {})
        varied = {key: values for key, values in grid.items() if key not in settings}
        for values in itertools.product(*varied.values()):
            chosen = dict(zip(varied, values))
            expanded[", ".join([name, *(f"{key} {value}" for key, value in chosen.items())])] = {**settings, **chosen}
    return expanded


def data_checksum(table: EventTable, features: Sequence[ItemFeatures] = ()) -> str:
    """12 hexadecimal digits: a hash of the events, the splits, and the item features that models read."""
    digest = hashlib.sha256(np.ascontiguousarray(table.offsets).tobytes())
    columns = {**table.events, **{name: table.users[name] for name in ("train_end", "validation_end", "test_end")}}
    for name, values in sorted(columns.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    for read in features:
        digest.update(save_item_features(read))
    return digest.hexdigest()[:12]


def import_files(paths: Sequence[Path]) -> None:
    """
    Import Python files, each once, as modules with the names of the files.

    Raises:
        ValueError: if a file cannot be imported, or another module has its name.
    """
    for path in map(Path.resolve, paths):
        if path.stem in sys.modules:
            if getattr(sys.modules[path.stem], "__file__", None) != str(path):
                raise ValueError(f"`imports` has {path}, but another module has its name; rename the file.")
            continue
        spec = importlib.util.spec_from_file_location(path.stem, path)
        try:
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except (AttributeError, ImportError, OSError, SyntaxError) as error:
            sys.modules.pop(path.stem, None)
            raise ValueError(f"`imports` has {path}, which cannot be imported ({error}); correct it.") from error


def code_of_studies(imports: Sequence[Path] = ()) -> dict[str, str]:
    """Hashes of the files of the package that figures depend on, and of the files that a study imports, by path."""
    files = hash_files(PACKAGE, CODE)
    for path in imports:
        files |= hash_files(path.parent, [path.name])
    return files


def changed_code(results: Mapping[str, Any], imports: Sequence[Path] = ()) -> list[str]:
    """
    The files that differ from those with which some of the `results` of a study were measured, without those that none of its
    runs uses, see `CODE_OF_SETTINGS`.

    Args:
        results: the content of the JSON file of a study.
        imports: the files that the study imports.
    """
    now, changed = code_of_studies(imports), set()
    for code in results["code"]:
        changed |= {name for name in code["files"].keys() | now.keys() if code["files"].get(name) != now.get(name)}
    settings = {name for record in results.get("records", {}).values() for name in record["settings"]}
    unused = [file for names, files in CODE_OF_SETTINGS.items() if settings.isdisjoint(names) for file in files]
    return sorted(name for name in changed if not name.startswith(tuple(unused)))


def code_entry(imports: Sequence[Path] = ()) -> dict[str, Any]:
    """The hash of the code of a study, and those of its files."""
    files = code_of_studies(imports)
    return {"hash": join_hashes(files), "files": files}
