"""Model cards, written from the results of training runs."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.streams_blossomrec import ATTENTION_TYPES, stream_names
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_write
from .summary import RunGroup, group_runs, read_summary


REPO_PLACEHOLDER = "OWNER/NAME"  # in a card that is written before its repository is known; `push` replaces it
PICTURES = {
    "selection.png": "During training: the mean gate of each head, the distance of the selected blocks (shares at 1, 2–3, "
    "4–7 … blocks), the entropy of the importance, and the norm of the gradient.",
}
# Protocol → description, in metadata and in the header of a table; see `RunGroup.suffixes`.
_PROTOCOLS = {
    "_unseen": "leave-one-out, all items ranked, items already seen masked",
    "_all": "leave-one-out, all items ranked, nothing masked",
    "_repeated": "leave-one-out, all items ranked, nothing masked, targets that repeat an item of the history",
    "_new": "leave-one-out, all items ranked, nothing masked, targets that are new to the history",
    "_uni100": "leave-one-out, the target ranked among 100 items drawn uniformly",
}
_HEADERS = {
    "_unseen": "seen items masked",
    "_all": "nothing masked",
    "_repeated": "repeated targets",
    "_new": "new targets",
    "_uni100": "100 drawn items",
}
NOW_SUFFIX = "_now"
_PROTOCOLS |= {
    f"{kind}{NOW_SUFFIX}": f"{text}, the time of the event to be predicted is known"
    for kind, text in _PROTOCOLS.items()
}
_HEADERS |= {f"{kind}{NOW_SUFFIX}": f"{text}, with now" for kind, text in _HEADERS.items()}
_METRICS = {"recall": "Recall", "ndcg": "NDCG"}


def model_card(
    results: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    name: str,
    dataset_name: str | None = None,
    repo_id: str = REPO_PLACEHOLDER,
    published: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[str] = (),
    license: str | None = None,
    items: Sequence[int | str] = (41, 73, 12, 95),
    k: int = 10,
) -> ModelCard:
    """
    Build the card of a model from the results of its runs. Every figure of the card comes from them.

    Args:
        results: the runs in a file of `blossomrec train --results_json`, or a single run from a
            `training_summary.json`. Runs with the same configuration and several seeds are averaged. Runs with full
            attention in all layers are listed as baselines if there are others.
        name: the name of the model.
        dataset_name: the name of the data set. Defaults to the file name of the log.
        repo_id: the repository of the model. Defaults to a placeholder, which `push` replaces.
        published: figures of other publications, one `{"model", "recall@10", "ndcg@10", "protocol", "source"}` each.
        pictures: the names of pictures in the folder of the card.
        license: the license of the weights, as an identifier of the Hub.
        items: raw item ids for the example of the card.
        k: the cut-off of the figures in the card.

    Raises:
        ValueError: if `results` is empty, if a run lacks the figures at `k`, if only some runs exclude seen items, or if
            an entry of `published` lacks its model, protocol or source.
    """
    groups = group_runs([results] if isinstance(results, Mapping) else results)
    _check(groups, published)
    suffixes = _common_suffixes(groups, k)
    dataset_name = dataset_name or _name_of_data(groups[0])
    models = [group for group in groups if not group.is_baseline] or groups
    metadata = ModelCardData(
        library_name="transformers",
        license=license,
        tags=["sequential-recommendation", "recommender-systems", "blossomrec"],
        model_name=name,
        eval_results=[result for group in models for result in _eval_results(group, dataset_name, suffixes, k)]
        or None,
    )
    text = [f"# {name}", "", _introduction(models[0]), "", *_usage(repo_id, models[0], items)]
    text += ["## Results", "", *_results(groups, dataset_name, suffixes, k), ""]
    text += _published_table(published, k)
    text += ["## Training", "", *_training(groups), ""]
    for picture in pictures:
        text += [f"![{picture}]({picture})", "", PICTURES.get(picture, ""), ""]
    new_items = _NEW_ITEMS_WITH_FEATURES if models[0].item_features else _NEW_ITEMS
    text += _USE_AND_LIMITS.format(new_items=new_items).split("\n")
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(text))


def write_card(folder: str | Path, *, name: str | None = None, **options: Any) -> Path:
    """
    Write the README.md of a run from its `training_summary.json`, with the pictures in its folder. The example has the most
    frequent items of the tokenizer there, if there is one.

    Args:
        folder: the folder of the run.
        name: the name of the model. Defaults to the name of the folder.
        options: further arguments of [`model_card`].

    Raises:
        ValueError: if the folder has no summary.
    """
    folder = Path(folder)
    pictures = [picture for picture in PICTURES if (folder / picture).exists()]
    if (folder / "tokenizer.json").exists():
        tokenizer = BlossomRecTokenizer.from_pretrained(folder)
        ids = range(NUM_SPECIAL_IDS, min(NUM_SPECIAL_IDS + 4, len(tokenizer)))
        options.setdefault("items", tokenizer.decode_items(ids))
    card = model_card(read_summary(folder), name=name or folder.resolve().name, pictures=pictures, **options)
    path = folder / "README.md"
    with atomic_write(path) as partial:
        partial.write_text(str(card), "utf-8")
    return path


def short_card(repo_id: str) -> str:
    """The card of a model without a training summary."""
    lines = ["---", "library_name: transformers", "tags:", "- sequential-recommendation", "- blossomrec", "---", ""]
    lines += [f"# {repo_id.split('/')[-1]}", "", "A BlossomRec model (arXiv 2512.13368).", "", "```python"]
    lines += ["from transformers import pipeline", ""]
    lines += [f'recommender = pipeline("sequential-recommendation", model="{repo_id}", trust_remote_code=True)', "```"]
    return "\n".join(lines) + "\n"


def train_command(run: Mapping[str, Any]) -> str:
    """
    The `blossomrec train` command that repeats a run, from its `changed_arguments` and `seed`. These include what a recipe
    has set, so that the command has `--recipe none`.
    """
    lines = ["blossomrec train --recipe none"]
    for name, value in [*run["changed_arguments"].items(), ("seed", run["seed"])]:
        values = value if isinstance(value, list) else [value]
        words = f"--{name} {' '.join(shlex.quote(str(value)) for value in values)}"
        if len(lines[-1]) + len(words) > 105:
            lines.append("   ")
        lines[-1] += f" {words}"
    return " \\\n".join(lines)


def _check(groups: Sequence[RunGroup], published: Sequence[Mapping[str, Any]]) -> None:
    for row in published:
        if not isinstance(row, Mapping) or not {"model", "protocol", "source"} <= row.keys():
            raise ValueError(f"`published` has {row!r}; each entry needs `model`, `protocol` and `source`.")
    if not groups:
        raise ValueError("`results` has no run; give a file that `blossomrec train --results_json` wrote.")
    if len({run["exclude_seen"] for group in groups for run in group.runs}) > 1:
        raise ValueError(
            "`results`: some runs exclude seen items and some do not; one card cannot show both. Make a card of each."
        )


def _common_suffixes(groups: Sequence[RunGroup], k: int) -> dict[str, str]:
    """
    Protocol → suffix of the figures that all runs have, and of those with now that any has; empty if no user had a held-out
    item.
    """
    suffixes = {
        protocol: suffix
        for protocol, suffix in groups[0].suffixes.items()
        # Some models are evaluated with now as well.
        if (any if suffix.endswith(NOW_SUFFIX) else all)(group.values(f"recall@{k}{suffix}") for group in groups)
    }
    measured = any(part in run for group in groups for run in group.runs for part in ("test", "validation"))
    if measured and not suffixes:
        raise ValueError(f"`k` is {k}, but not all runs in `results` have recall@{k}; give one of their cut-offs.")
    return suffixes


def _name_of_data(group: RunGroup) -> str:
    if "data" not in group.runs[0]["configuration"]:  # the settings of a `Trainer`
        return "the log of its training"
    data = group.get("data")
    return "the built-in generated log" if data is None else Path(data).name


def _introduction(group: RunGroup) -> str:
    names = {"num_hidden_layers": "layers", "hidden_size": "features", "num_attention_heads": "heads"}
    names |= {"num_key_value_heads": "key/value heads"}
    sizes = ", ".join(f"{group.get(key)} {words}" for key, words in names.items() if group.get(key) is not None)
    return (
        "Predicts the next item of a user's history. BlossomRec ([arXiv 2512.13368](https://arxiv.org/abs/2512.13368)) "
        "combines two sparse attention streams with a learned gate: one attends to a few selected past blocks (long-term "
        f"interests), the other to blocks at growing distances (short-term interests). Attention: {group.label}; {sizes}."
        f"{_signals(group)}"
    )


def _signals(group: RunGroup) -> str:
    """A sentence on the times and types of events and the features of items that the model reads, if any."""
    read = []
    if group.time_features:
        read.append(f"the times of events ({', '.join(group.time_features)})")
    if group.reads_event_types:
        read.append("the types of events")
    if group.item_features:
        read.append(f"the features of items ({', '.join(group.item_features)})")
    *first, last = read or [""]
    return f" Besides item ids, it reads {', '.join(first)}{' and ' * bool(first)}{last}." if read else ""


def _call(group: RunGroup, items: Sequence[int | str]) -> str:
    """A line that asks the pipeline for recommendations, with the columns that the model reads."""
    shown = list(items[:2] if group.time_features or group.reads_event_types else items)
    columns = {"items": json.dumps(shown, ensure_ascii=False)}
    if group.time_features:
        times = [1795680000, 1795766400][: len(shown)]
        columns |= {"timestamps": times, "now": 1795770000}
    if group.reads_event_types:
        columns["event_types"] = f"recommender.model.config.event_types[:1] * {len(shown)}"
    if len(columns) == 1:
        return f"recommender({columns['items']}, top_k=10)  # raw item ids of a history, the latest last"
    columns = ", ".join(f'"{name}": {value}' for name, value in columns.items())
    return f"recommender({{{columns}}}, top_k=10)  # the latest last, times in seconds"


def _usage(repo_id: str, group: RunGroup, items: Sequence[int | str]) -> list[str]:
    own = {name for kind in group.attention_types for name in stream_names(kind)}.difference(ATTENTION_TYPES)
    needs = "`trust_remote_code` is not needed"
    if own:
        names = ", ".join(f"`{name}`" for name in sorted(own))
        needs += f" where the code that registers {names} is imported, too"
    return [
        *("## Use", "", "```python", "from transformers import pipeline", ""),
        f'recommender = pipeline("sequential-recommendation", model="{repo_id}", trust_remote_code=True)',
        _call(group, items),
        *("```", ""),
        f"After `import blossomrec_hf`, {needs}. Remote code runs when the model is loaded: pin `revision=` to a commit "
        "that you have read.",
        "",
    ]


def _eval_results(group: RunGroup, dataset_name: str, suffixes: Mapping[str, str], k: int) -> list[EvalResult]:
    """The metadata of the figures. Results that differ in protocol or history length get different `dataset_config`s."""
    results = []
    for protocol, suffix in suffixes.items():
        for metric, label in _METRICS.items():
            values = group.values(f"{metric}@{k}{suffix}")
            if not values:
                continue
            results.append(
                EvalResult(
                    task_type="sequential-recommendation",
                    task_name="Sequential recommendation",
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", dataset_name.lower()).strip("-"),
                    dataset_name=dataset_name,
                    dataset_config=f"{_PROTOCOLS[protocol]}; {group.long_label}",
                    dataset_split=group.part,
                    dataset_args={
                        "protocol": _PROTOCOLS[protocol],
                        "max_length": group.get("max_length"),
                        "attention": group.label,
                        "seeds": [run["seed"] for run in group.runs],
                        "hardware": group.join("device"),
                    },
                    metric_type=f"{metric}@{k}",
                    metric_name=f"{label}@{k}, mean of {len(values)} seeds" if len(values) > 1 else f"{label}@{k}",
                    metric_value=round(fmean(values), 6),
                )
            )
    return results


def _results(groups: Sequence[RunGroup], dataset_name: str, suffixes: Mapping[str, str], k: int) -> list[str]:
    if not suffixes:
        return ["None: no user of the log has a held-out item, so nothing was measured."]
    return [*_results_table(groups, suffixes, k), "", _protocol(groups, dataset_name, suffixes)]


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _results_table(groups: Sequence[RunGroup], suffixes: Mapping[str, str], k: int) -> list[str]:
    columns = {
        f"{metric}@{k}{suffix}": f"{label}@{k}, {_HEADERS[protocol]}"
        for protocol, suffix in suffixes.items()
        for metric, label in _METRICS.items()
    }
    header = ["attention", "latest items", "heads / key-value heads", *groups[0].varying, "seeds", *columns.values()]
    rows = []
    for group in groups:
        heads = f"{group.get('num_attention_heads')} / {group.get('num_key_value_heads')}"
        varying = ["–" if value is None else value for value in group.varying.values()]
        figures = [group.format_mean(name) for name in columns]
        rows.append([group.label, group.get("max_length"), heads, *varying, len(group.runs), *figures])
    return _table(header, rows)


def _protocol(groups: Sequence[RunGroup], dataset_name: str, suffixes: Mapping[str, str]) -> str:
    part = {"test": "the last item of each history", "validation": "the second-to-last item of each history"}
    text = f"{groups[0].part.capitalize()} figures on {dataset_name}: the target is {part[groups[0].part]}"
    if "_uni100" not in suffixes:
        text += ", ranked among all items"
    text += ". Items with equal scores share ranks. "
    if any(protocol.endswith(NOW_SUFFIX) for protocol in suffixes):
        text += "In figures with now, the model sees the time of the target; in all others, it does not. "
    else:
        text += "The model does not see the time of the target. "
    if "_unseen" in suffixes:
        text += "Masked: items of the user's history are not ranked. "
    shares = dict.fromkeys(run["repeat_share"] for group in groups for run in group.runs if "repeat_share" in run)
    if shares:
        text += f"{', '.join(f'{share:.1%}' for share in shares)} of the test items already occur in their user's history. "
    if "_uni100" in suffixes and not any(group.get("eval_negatives") for group in groups):
        text += "The figures with drawn items were measured by `blossomrec evaluate` with the saved models. "
    if any(len(group.runs) > 1 for group in groups):
        text += "Figures are means over seeds ± standard deviation. "
    if any(run.get("refit") for group in groups for run in group.runs):
        return text + (
            "These are the figures of a first run, which selected the number of epochs. The weights belong to a new model, "
            "trained for the same number of epochs on all events, including validation and test. It has no test figures."
        )
    return text + "The weights are those with the best validation figure of each run."


def _published_table(published: Sequence[Mapping[str, Any]], k: int) -> list[str]:
    if not published:
        return []
    rows = [
        [row["model"], *(_figure(row.get(f"{metric}@{k}")) for metric in _METRICS), row["protocol"], row["source"]]
        for row in published
    ]
    header = ["model", *(f"{label}@{k}" for label in _METRICS.values()), "protocol", "source"]
    return [
        "Published figures, each with its own training setup, not measured here:",
        *("", *_table(header, rows), ""),
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _training(groups: Sequence[RunGroup]) -> list[str]:
    """The command or the settings of each group, and the versions with which the runs were made."""
    lines, commands = [], set()
    for group in groups:
        command = _command(group)
        if command is None:
            settings = ", ".join(f"`{name}` {value}" for name, value in group.runs[0]["configuration"].items())
            lines += [f"{_duration(group)}, with `transformers.Trainer`: {settings}.", ""]
        elif command in commands:
            lines += [f"{_duration(group)}; the command above.", ""]
        else:
            lines += [f"{_duration(group)}:", "", "```bash", command, "```", ""]
        commands.add(command)
    return lines + _versions(groups)


def _command(group: RunGroup) -> str | None:
    """The command of a group's first run; `None` for a `Trainer`."""
    run = group.runs[0]
    if "command" in run or "changed_arguments" not in run:
        return run.get("command")
    return train_command(run)


def _duration(group: RunGroup) -> str:
    text = group.long_label
    if len(group.runs) > 1:
        text += f" (seeds {', '.join(str(run['seed']) for run in group.runs)})"
    training = [run.get("training", {}) for run in group.runs]
    if all("seconds" in part and "epochs" in part for part in training):
        epochs = ", ".join(dict.fromkeys(str(part["epochs"]) for part in training))
        text += f": {fmean(part['seconds'] for part in training):.0f} s per run, {epochs} epoch{'' if epochs == '1' else 's'}"
    device = group.join("device")
    return f"{text}, on {device}" if device else text


def _versions(groups: Sequence[RunGroup]) -> list[str]:
    made_with = dict.fromkeys(
        f"{name} {version}"
        for group in groups
        for run in group.runs
        for name, version in (run.get("versions") or {}).items()
        if version
    )
    commits = dict.fromkeys(group.join("commit") for group in groups if group.join("commit"))
    if not made_with:
        return []
    return [f"Made with {', '.join(made_with)}{'; commit ' if commits else ''}{', '.join(commits)}."]


_NEW_ITEMS = """\
- **New items and new users.** An item that is not in the training log has no embedding: it is never recommended, and
  removed from histories with a warning. `tokenizer.add_items` and fine-tuning add items. For a user without a history,
  the most frequent items are recommended."""
_NEW_ITEMS_WITH_FEATURES = """\
- **New items and new users.** An item that is not in the training log is never recommended, and removed from histories
  with a warning, until `blossomrec_hf.training.add_items(model, tokenizer, items, features=...)` adds it. It is then
  recommended by its features, and by itself after fine-tuning. For a user without a history, the most frequent items are
  recommended."""
_USE_AND_LIMITS = """\
## Intended use

Ranking the items of a catalog for users with a history in it: a shop, a video or music site, research on sequential
recommendation. Raw item ids are those of the training log.

## Limits

- **Popularity.** The model learns from what users did with the items that they were shown, so it recommends popular
  items too often. `blossomrec evaluate` measures coverage and popularity lift; check both before deployment.
{new_items}
- **Privacy.** Histories are personal data. The model stores none, but it stores how often each item occurred, and its
  embeddings show which items occurred together. With few users, these can reveal one of them. Do not publish a model of
  a log that you could not publish in aggregate.
- **Offline figures.** Leave-one-out figures compare models on past events. They do not show how users would have
  reacted to the recommendations.
"""
