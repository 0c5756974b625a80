"""Cards, and what goes to the Hub with them."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from huggingface_hub import CommitInfo, DatasetCard, EvalResult, HfApi, ModelCard, ModelCardData

from ..data.filters import REPORT_FILE, FilterReport
from ..data.metadata import METADATA_FILE
from ..data.overview import describe, summary
from ..data.storage import load_folder
from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.manifest_blossomrec import MANIFEST_NAME, TOKENIZER_NAMES, check_manifest, code_files
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..model.upload_blossomrec import REPO_PLACEHOLDER, ensure_repo, push_folder
from ..utils.files import atomic_write, read_json, write_json


_COLUMNS = {
    "user_id": "the raw id of the user; a row a user, in the order in which the log first shows them",
    "input_ids": "all events of the user in time order, as vocabulary ids: 0 is `[PAD]`, 1 `[UNK]`, items follow by frequency",
    "timestamps": "when each event was, in the log's unit",
    "train_end": "training reads `input_ids[:train_end]`",
    "validation_end": "validation asks for `input_ids[train_end:validation_end]`",
    "test_end": "the test asks for `input_ids[validation_end:test_end]`",
    "part": "whose the user is: 0 train, 1 validation, 2 test",
}


def dataset_card(folder: str | Path) -> str:
    """
    The card of a data set that `build_sequences` saved: columns, source, licence, filters and counts, all of it taken
    from the files of `folder`.
    """
    folder = Path(folder)
    dataset = load_folder(folder)
    filters = FilterReport.load(folder)
    lines = ["---", "tags:", "- sequential-recommendation", "- blossomrec", "license: other", "---", ""]
    lines += [f"# Item-id sequences from {filters.source if filters else 'a log'}", ""]
    lines += ["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in summary(describe(dataset), filters)]
    lines += ["", "## Columns", "", "| column | type | what it is |", "|---|---|---|"]
    schema = dataset.features.arrow_schema
    lines += [
        f"| `{name}` | `{schema.field(name).type}` | {_COLUMNS.get(name, '')} |" for name in dataset.column_names
    ]
    if filters:
        lines += ["", "## Source and licence", "", f"Read from `{filters.source}`, format `{filters.format}`."]
        lines += [
            f"Licence of the source: {filters.licence or 'not known to the tool that built this; see the source.'}"
        ]
        lines += ["", "## Filters", "", *(f"- {line}" for line in str(filters).splitlines())]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from blossomrec_hf import BlossomRecTokenizer",
        "from blossomrec_hf.data import split",
    ]
    lines += ["from datasets import load_from_disk", "", 'dataset = load_from_disk("<this folder>")']
    lines += [
        'tokenizer = BlossomRecTokenizer.from_pretrained("<this folder>")',
        'test = split(dataset, "test")',
        "```",
        "",
    ]
    return "\n".join(lines)


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """
    Pushes a data set that `build_sequences` saved, with tokenizer, titles, filter report and card.

    Args:
        repo_id (`str`): `owner/name` of a data set repository; made if it is not there.
        private (`bool`): whether a new repository is private. Logs are people's behaviour: it is, unless asked.

    Returns:
        `str`: the address of the repository.

    Raises:
        as `model.push_to_hub`.
    """
    folder = Path(folder)
    dataset = load_folder(folder)
    repo_id = ensure_repo(repo_id, private=private, token=token, repo_type="dataset")
    dataset.push_to_hub(repo_id, private=private, token=token)
    # `push_to_hub` writes a card that says where the rows are; its text becomes ours, its data stays.
    card = DatasetCard.load(repo_id, token=token)
    ours = DatasetCard(dataset_card(folder))
    card.text = ours.text
    card.data.tags, card.data.license = ours.data.tags, ours.data.license
    card.push_to_hub(repo_id, token=token)
    address = HfApi(token=token).upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=[*TOKENIZER_NAMES, MANIFEST_NAME, *code_files(folder), METADATA_FILE, REPORT_FILE],
        commit_message="Tokenizer, titles and filter report",
    )
    return str(address)


SUMMARY_FILE = "training_summary.json"
PICTURES = {
    "selection.png": "Over the training: the mean gate of each head, how far back the selected blocks lie (the share at "
    "1, 2–3, 4–7 … blocks), the entropy of the importance, and the norm of the gradient.",
}

# By the suffix of the figures; what "" stands for depends on the log, see `RunGroup.protocols`.
_PROTOCOLS = {
    "_unseen": "leave-one-out, all items ranked, items already seen masked",
    "_all": "leave-one-out, all items ranked, nothing masked",
    "_repeated": "leave-one-out, all items ranked, nothing masked, targets that repeat an item of the history",
    "_new": "leave-one-out, all items ranked, nothing masked, targets that are new to the history",
    "_uni100": "leave-one-out, 100 items drawn uniformly ranked beside the right one",
}
_HEADS = {
    "_unseen": "seen items masked",
    "_all": "nothing masked",
    "_repeated": "repeated targets",
    "_new": "new targets",
    "_uni100": "100 drawn items",
}
_MODEL_ARGUMENTS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size hidden_dropout_prob".split()
# The order of a command; what comes later in a configuration follows as it is.
_FIRST_ARGUMENTS = "data attention_types num_key_value_heads max_length num_train_epochs".split()
_WITH_A_COLUMN = {"attention_types", "max_length", "num_attention_heads", "num_key_value_heads"}


def non_defaults(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `examples/train.py` that differ from its defaults; without the seed."""
    from ..training.arguments import LogArguments, LoopArguments  # which import this file, to push

    defaults = {field.name: field.default for kind in (LogArguments, LoopArguments) for field in fields(kind)}
    defaults |= {field.name: field.default for field in fields(BlossomRecConfig)}
    defaults |= {"attention_types": ["blossom"], "config_overrides": "{}", "num_key_value_heads": 2, "seed": MISSING}
    ordered = dict.fromkeys([*_FIRST_ARGUMENTS, *configuration])
    values = {name: configuration.get(name) for name in ordered if name != "seed"}
    built_in = configuration.get("data") is None  # for which some of the defaults are others
    return {
        name: value
        for name, value in values.items()
        if value is not None and (built_in or value != defaults.get(name, MISSING))
    }


@dataclass(frozen=True)
class RunGroup:
    """
    Runs that differ in the seed alone.

    Attributes:
        varying: what sets this group apart from the others of a card, of what has no column of its own.
    """

    runs: list[dict[str, Any]]
    varying: dict[str, Any]

    @property
    def attention_types(self) -> list[str]:
        return self.runs[0]["configuration"]["attention_types"]

    @property
    def label(self) -> str:
        types = set(self.attention_types)
        if types == {"blossom"}:
            return "BlossomRec"
        if types == {"full"}:
            return "full attention (SASRec with rotary embeddings)"
        runs = [(kind, len(list(layers))) for kind, layers in groupby(self.attention_types)]
        return ", then ".join(f"{number} × {kind}" for kind, number in runs)

    @property
    def long_label(self) -> str:
        told = [self.label, f"latest {self.get('max_length')} items"]
        if (number := self.get("num_key_value_heads")) is not None:
            told.append(f"{number} key/value heads")
        return ", ".join([*told, *(f"{name} {value}" for name, value in self.varying.items() if value is not None)])

    @property
    def is_baseline(self) -> bool:
        return set(self.attention_types) == {"full"}

    @property
    def part(self) -> str:
        return "test" if "test" in self.runs[0] else "validation"

    @property
    def suffixes(self) -> dict[str, str]:
        """The kinds of figures that a card shows, as keys of `_PROTOCOLS`, and the suffix of each in the results."""
        own, other = ("_unseen", "_all") if self.runs[0]["exclude_seen"] else ("_all", "_unseen")
        return {own: "", **{kind: kind for kind in ("_repeated", "_new", other, "_uni100")}}

    def get(self, name: str) -> Any:
        """A setting of the runs."""
        return self.runs[0]["configuration"].get(name)

    def values(self, name: str) -> list[float]:
        """A figure of each run; nothing where a run does not have it."""
        found = [run.get(self.part, {}).get(name) for run in self.runs]
        return [] if None in found else found

    def shown(self, name: str) -> str:
        """The mean of a figure and, of two runs or more, its standard deviation over seeds."""
        values = self.values(name)
        if len(values) < 2:
            return f"{values[0]:.4f}" if values else "–"
        return f"{fmean(values):.4f} ± {stdev(values):.4f}"

    def told(self, what: str) -> str:
        """What the runs say of `what`, each answer once."""
        return ", ".join(dict.fromkeys(str(run[what]) for run in self.runs if run.get(what) is not None))


def group_runs(results: Sequence[Mapping[str, Any]]) -> list[RunGroup]:
    """The runs of a results file by what was run, baselines last, each group by seed."""
    groups: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for run in results:
        if missing := {"configuration", "seed", "exclude_seen"} - run.keys():
            raise ValueError(
                f"`results` has a run without {', '.join(sorted(missing))}; give a file that `examples/train.py` wrote."
            )
        how = {name: run.get(name) for name in ("implementation", "commit")}
        how["commit"] = how["commit"] and how["commit"][:10]
        settings = {**non_defaults(run["configuration"]), **how}
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(dict(run))
    names = dict.fromkeys(name for settings, _ in groups.values() for name in settings)
    varying = [
        name
        for name in names
        if name not in _WITH_A_COLUMN and len({json.dumps(settings.get(name)) for settings, _ in groups.values()}) > 1
    ]
    grouped = [
        RunGroup(sorted(runs, key=lambda run: run["seed"]), {name: settings.get(name) for name in varying})
        for settings, runs in groups.values()
    ]
    return sorted(
        grouped, key=lambda group: (group.is_baseline, group.get("max_length") or 0, not group.told("commit"))
    )


def model_card(
    results: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    name: str,
    dataset_name: str | None = None,
    repo_id: str = REPO_PLACEHOLDER,
    published: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[str] = (),
    license: str | None = None,
    k: int = 10,
) -> ModelCard:
    """
    The card of a model, made of what its runs wrote and of nothing else.

    Args:
        results: the runs of a file that `examples/train.py --results_json` writes, or the one of a run's
            `training_summary.json`. Those with one configuration and several seeds are shown as their mean; those with
            full attention in all layers, beside others, as baselines.
        name: of the model.
        dataset_name: what people call the data; by default, the name of the file.
        repo_id: where the model will be; `push_folder` fills it in.
        published: others' figures to stand beside, `{"model", "recall@10", "ndcg@10", "protocol", "source"}` each; not ours.
        pictures: names of pictures that lie beside the card.
        license: an identifier of the Hub, of the weights.
        k: the cut-off shown.

    Raises:
        ValueError: for results without a run, for figures that the runs do not have, and for `published` figures without
            the names of their model, protocol and source.
    """
    for row in published:
        if not isinstance(row, Mapping) or not {"model", "protocol", "source"} <= row.keys():
            raise ValueError(f"`published` has {row!r}; each must have `model`, `protocol` and `source`.")
    groups = group_runs([results] if isinstance(results, Mapping) else results)
    if not groups:
        raise ValueError("`results` holds no run; give a file that `examples/train.py --results_json` wrote.")
    suffixes = groups[0].suffixes
    if len({run["exclude_seen"] for group in groups for run in group.runs}) > 1:
        raise ValueError("`results`: some runs exclude seen items and some do not; one card cannot show both.")
    suffixes = {
        kind: suffix
        for kind, suffix in suffixes.items()
        if all(group.values(f"recall@{k}{suffix}") for group in groups)
    }
    measured = any(part in run for group in groups for run in group.runs for part in ("test", "validation"))
    if measured and not suffixes:
        raise ValueError(f"`results` holds no recall@{k} for all of its runs; `k` must be one of their cut-offs.")
    if dataset_name is None:
        data = groups[0].get("data")
        dataset_name = "the built-in generated log" if data is None else Path(data).name
        if "data" not in groups[0].runs[0]["configuration"]:  # not of `examples/train.py`
            dataset_name = "the log of its training"
    models = [group for group in groups if not group.is_baseline] or groups
    metadata = ModelCardData(
        library_name="transformers",
        license=license,
        tags=["sequential-recommendation", "recommender-systems", "blossomrec"],
        model_name=name,
        eval_results=[result for group in models for result in _eval_results(group, dataset_name, suffixes, k)]
        or None,
    )
    text = [f"# {name}", "", _what_it_is(models), ""]
    text += ["## Use", "", "```python", "from transformers import pipeline", ""]
    text += [f'recommender = pipeline("sequential-recommendation", model="{repo_id}", trust_remote_code=True)']
    text += ["recommender([41, 73, 12, 95], top_k=10)  # raw item ids of a history, the latest last", "```", ""]
    text += [
        "After `import blossomrec_hf`, the same without `trust_remote_code`. Remote code runs when it is loaded: pin "
        "`revision=` to a commit that you have read.",
        "",
    ]
    if measured:
        text += ["## Results", "", *_results_table(groups, suffixes, k), ""]
        text += [_how_measured(groups, dataset_name, suffixes), ""]
    else:
        text += ["## Results", "", "None: no user of the log had an item held out, so nothing was measured.", ""]
    if published:
        text += ["Published by others, each with its own training and not measured here:", ""]
        text += [f"| model | Recall@{k} | NDCG@{k} | protocol | source |", "|---|---|---|---|---|"]
        text += [
            f"| {row['model']} | {_figure(row.get(f'recall@{k}'))} | {_figure(row.get(f'ndcg@{k}'))} | {row['protocol']} "
            f"| {row['source']} |"
            for row in published
        ]
        text += [""]
    text += ["## Training", "", *_training(groups), ""]
    for picture in pictures:
        text += [f"![{picture}]({picture})", "", PICTURES.get(picture, ""), ""]
    text += [*_USE_AND_LIMITS]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(text))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _what_it_is(groups: Sequence[RunGroup]) -> str:
    sizes = ", ".join(
        f"{groups[0].get(key)} {words}"
        for key, words in (
            ("num_hidden_layers", "layers"),
            ("hidden_size", "wide"),
            ("num_attention_heads", "heads"),
            ("num_key_value_heads", "key/value heads"),
        )
        if groups[0].get(key) is not None
    )
    return (
        "Predicts the next item of a user's history. BlossomRec ([arXiv 2512.13368](https://arxiv.org/abs/2512.13368)) "
        "joins two sparse attention streams, one to a few selected past blocks (long-term interests) and one to blocks "
        f"at growing distances (short-term interests), by a learned gate. Attention: {groups[0].label}; {sizes}."
    )


def _eval_results(group: RunGroup, dataset_name: str, suffixes: Mapping[str, str], k: int) -> list[EvalResult]:
    results = []
    for kind, suffix in suffixes.items():
        for metric in ("recall", "ndcg"):
            values = group.values(f"{metric}@{k}{suffix}")
            shown = {"recall": "Recall", "ndcg": "NDCG"}[metric]
            results.append(
                EvalResult(
                    task_type="sequential-recommendation",
                    task_name="Sequential recommendation",
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset_name.lower()).strip("-"),
                    dataset_name=dataset_name,
                    # Results of one data set that differ in what is ranked, or in the history read, stand apart.
                    dataset_config=f"{_PROTOCOLS[kind]}; {group.long_label}",
                    dataset_split=group.part,
                    dataset_args={
                        "protocol": _PROTOCOLS[kind],
                        "max_length": group.get("max_length"),
                        "attention": group.label,
                        "seeds": [run["seed"] for run in group.runs],
                        "hardware": group.told("device"),
                    },
                    metric_type=f"{metric}@{k}",
                    metric_name=f"{shown}@{k}, mean of {len(values)} seeds" if len(values) > 1 else f"{shown}@{k}",
                    metric_value=round(fmean(values), 6),
                )
            )
    return results


def _results_table(groups: Sequence[RunGroup], suffixes: Mapping[str, str], k: int) -> list[str]:
    columns = [(f"{metric}@{k}{suffix}", f"{shown}@{k}, {_HEADS[kind]}") for kind, suffix in suffixes.items()
               for metric, shown in (("recall", "Recall"), ("ndcg", "NDCG"))]  # fmt: skip
    varying = groups[0].varying
    header = [
        "attention",
        "latest items",
        "heads / key-value heads",
        *varying,
        "seeds",
        *(head for _, head in columns),
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for group in groups:
        heads_of = f"{group.get('num_attention_heads')} / {group.get('num_key_value_heads')}"
        others = ("–" if value is None else value for value in group.varying.values())
        cells = [group.label, group.get("max_length"), heads_of, *others, len(group.runs)]
        cells += [group.shown(name) for name, _ in columns]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _how_measured(groups: Sequence[RunGroup], dataset_name: str, suffixes: Sequence[str]) -> str:
    part = {"test": "the last item of each history", "validation": "the last but one item of each history"}
    text = (
        f"{dataset_name[0].upper()}{dataset_name[1:]}, {groups[0].part} figures: {part[groups[0].part]} is to be found"
    )
    if "_uni100" not in suffixes:
        text += " among all items"
    text += ". Items of equal score share their ranks. The model does not see the time of the item to be found. "
    if "_unseen" in suffixes:
        text += "Masked means that items of the user's history are not ranked. "
    shares = dict.fromkeys(run["repeat_share"] for group in groups for run in group.runs if "repeat_share" in run)
    if shares:
        text += f"{', '.join(f'{share:.1%}' for share in shares)} of the test items already occur in their user's history. "
    if "_uni100" in suffixes and not any(group.get("eval_negatives") for group in groups):
        text += (
            "The figures beside drawn items are those of `blossomrec evaluate` for the models that the runs saved. "
        )
    if any(len(group.runs) > 1 for group in groups):
        text += "Means over seeds, ± their standard deviation. "
    if any(run.get("refit") for group in groups for run in group.runs):
        return text + (
            "These are figures of a first run, which chose the number of epochs. The weights are those of a new model, "
            "trained for as many epochs on all events, the validation and test items included. It has no test figures."
        )
    return text + "The weights are those of the best validation figure of each run."


def train_command(run: Mapping[str, Any]) -> str:
    """The command of `examples/train.py` that makes a run again."""
    lines = ["blossomrec train"]
    for name, value in [*non_defaults(run["configuration"]).items(), ("seed", run["seed"])]:
        values = value if isinstance(value, list) else [value]
        words = f"--{name} {' '.join(shlex.quote(str(value)) for value in values)}"
        if len(lines[-1]) + len(words) > 105:
            lines.append("   ")
        lines[-1] += f" {words}"
    return " \\\n".join(lines)


def _training(groups: Sequence[RunGroup]) -> list[str]:
    lines, commands = [], set()
    for group in groups:
        first = group.runs[0]
        told = group.long_label
        if len(group.runs) > 1:
            told += f" (seeds {', '.join(str(run['seed']) for run in group.runs)})"
        training = [run.get("training", {}) for run in group.runs]
        if all("seconds" in part and "epochs" in part for part in training):
            epochs = ", ".join(dict.fromkeys(str(part["epochs"]) for part in training))
            told += f": {fmean(part['seconds'] for part in training):.0f} s a run, {epochs} epochs"
        if group.told("device"):
            told += f", on {group.told('device')}"
        command = first.get("command")
        if command is None and "data" in first["configuration"]:
            command = train_command(first)
        if command is None:
            settings = ", ".join(f"`{name}` {value}" for name, value in first["configuration"].items())
            lines += [f"{told}, with `transformers.Trainer`: {settings}.", ""]
        elif command in commands:
            lines += [f"{told}; the command above.", ""]
        else:
            lines += [f"{told}:", "", "```bash", command, "```", ""]
        commands.add(command)
    made_with = dict.fromkeys(
        f"{name} {version}"
        for group in groups
        for run in group.runs
        for name, version in (run.get("versions") or {}).items()
        if version
    )
    commits = dict.fromkeys(group.told("commit") for group in groups if group.told("commit"))
    if made_with:
        lines += [f"Made with {', '.join(made_with)}{'; commit ' if commits else ''}{', '.join(commits)}."]
    return lines


_USE_AND_LIMITS = """\
## Intended use

Ranking the items of one catalogue for people of whom a history in that catalogue is known: a shop, a video or music
site, research on sequential recommendation. Raw item ids are those of the training log.

## Limits

- **Popularity.** Trained on what people did with what they were shown, it recommends popular items more often than
  they deserve. `blossomrec evaluate` measures coverage and popularity lift; look at both before you deploy it.
- **New items and new people.** An item that was not in the training log has no embedding: it is never recommended, and
  dropped from histories (with a warning). `tokenizer.add_items` and fine-tuning take items in. A person without a
  history gets the most frequent items.
- **Privacy.** Histories are personal data. None is stored in the model, but it holds how often each item occurred,
  and what was consumed together shows in its embeddings; with few users, that can tell of one. Do not publish a
  model of a log that you could not publish in aggregate.
- **Offline figures.** Leave-one-out figures rank models on the past of a log; they do not say what people would have
  done with the recommendations.
""".split("\n")


def write_summary(folder: str | Path, run: Mapping[str, Any]) -> Path:
    """
    Writes `training_summary.json`, what a card is made of: how a run was configured, on what, and what came of it. Of
    the log, only the name of its file is kept.

    Args:
        run: `configuration`, `seed`, `test` or `validation` (the figures; neither where nothing was held out),
            `exclude_seen` (whether the figures without a suffix exclude seen items) and, if known, `refit` (whether the
            weights are those of a new model, trained on all events), `repeat_share`, `training`, `versions`, `device`,
            `commit` and `command`, as in a results file of `examples/train.py`.
    """
    configuration = dict(run["configuration"])
    for name in ("data", "titles"):
        if configuration.get(name) is not None:
            configuration[name] = Path(configuration[name]).name
    path = Path(folder) / SUMMARY_FILE
    summary = {**run, "configuration": configuration}
    write_json(path, summary)
    return path


def write_card(folder: str | Path, *, name: str | None = None, **options: Any) -> Path:
    """
    Writes the README.md of a run's folder from its `training_summary.json`; pictures that lie there are shown.

    Args:
        name: of the model; by default, that of the folder.
        options: of `model_card`.

    Raises:
        ValueError: where the folder has no summary.
    """
    folder = Path(folder)
    summary = folder / SUMMARY_FILE
    if not summary.exists():
        raise ValueError(f"`folder` {folder} has no {SUMMARY_FILE}, which `examples/train.py` writes at its end.")
    pictures = [picture for picture in PICTURES if (folder / picture).exists()]
    card = model_card(read_json(summary), name=name or folder.resolve().name, pictures=pictures, **options)
    path = folder / "README.md"
    with atomic_write(path) as partial:
        partial.write_text(str(card), "utf-8")
    return path


def push_run(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """
    Pushes a folder that holds a model and its tokenizer, as `examples/train.py` and `Trainer` leave it: with its card,
    the summary of its training, pictures, titles and item index, in one commit.

    Args:
        folder: holds the model; where it has no README.md, one is made of its `training_summary.json`, if it has that.
        options: `private`, `token`, `revision`, `create_pr`, `exist_ok`, `commit_message`, `commit_description`, as in
            `model.push_to_hub`.

    Raises:
        ValueError: for a folder without a model or tokenizer, a tokenizer of another size than the vocabulary, and
            files that are not those that were saved; and the errors of `model.push_to_hub`.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() or not list(folder.glob("model*.safetensors")):
        raise ValueError(
            f"`folder` {folder} holds no model (config.json, model.safetensors); give one that `examples/train.py` or "
            "`Trainer` wrote."
        )
    if not (folder / "tokenizer.json").exists():
        raise ValueError(
            f"`folder` {folder} holds no tokenizer; `tokenizer.save_pretrained({str(folder)!r})` adds it."
        )
    vocab_size = BlossomRecConfig.from_pretrained(folder).vocab_size
    num_ids = len(BlossomRecTokenizer.from_pretrained(folder))
    if num_ids != vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {num_ids} ids, the model's vocabulary {vocab_size}. Save both of one model; "
            "after `tokenizer.add_items(...)`, call `model.resize_token_embeddings(len(tokenizer))`."
        )
    check_manifest(folder)
    if not (folder / "README.md").exists() and (folder / SUMMARY_FILE).exists():
        write_card(folder, name=repo_id.split("/")[-1])
    return push_folder(folder, repo_id, **options)
