"""
What BlossomRec's streams attend to, and whether it is what full attention attends to.

    python examples/studies/attention.py --data ml-1m-times.safetensors      # trains both models and measures them, one GPU
    python examples/studies/attention.py --from examples/studies/attention.json       # tables and figure again

Trains BlossomRec and full attention with the settings of a study (`times.yaml`, configurations "blossom, none" and "full,
none", which read no times), and follows the gates over the training. Then reads the attention of both in long histories
of the test, in float32, from the streams and the reference implementation of the package. Writes attention.json,
attention.md and attention.png into `--folder`.

Measured at queries with more candidates than they can select, averaged over the queries of a history, then over
histories; ± is half the 95 % interval over histories. "Random", "latest" and "best" select as many blocks as the model;
"best" takes those with the most weight on keys that the short-term stream does not see.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_figure import draw
from attention_measures import average, measure_history, read_layers

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.data.event_table import EventTable
from blossomrec_hf.data.splits import item_counts, split
from blossomrec_hf.training import TrainingLoop
from blossomrec_hf.training.callbacks import SelectionWatch
from blossomrec_hf.training.initialize import initialize_model
from blossomrec_hf.training.log_arguments import LogArguments
from blossomrec_hf.training.studies import Run, Study, code_entry, data_checksum
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error
from blossomrec_hf.utils.environment import describe_environment
from blossomrec_hf.utils.files import atomic_write, read_json, write_json
from blossomrec_hf.utils.progress import set_up_logging


logger = logging.getLogger(__name__)

STUDY = Path(__file__).with_name("times.yaml")
KINDS = {"blossom": "blossom, none", "full": "full, none"}  # configurations of the study
WATCHED_TOKENS = 65_536
MEASURING = [Path(__file__).with_name("attention_measures.py")]  # figures depend on this file, too


def choose_run(kind: str, seed: int, settings: dict[str, Any], checksum: str) -> Run:
    """The run of the study, on ML-1M, with some settings replaced."""
    study, code = Study.load(STUDY), code_entry(MEASURING)["hash"]
    runs = study.runs(dict.fromkeys(study.data, checksum), code)
    run = next(run for run in runs if (run.data, run.configuration) == ("ml-1m", KINDS[kind]))
    return replace(run, seed=seed, settings={**run.settings, **settings})


def train(
    run: Run, table: EventTable, vocab_size: int, repeat_share: float, device: str
) -> tuple[BlossomRecForSequentialRecommendation, dict[str, Any]]:
    """
    Train the model of a run.

    Returns:
        the model in evaluation mode, with the weights of its best validation, and how the training went. "gates" has gates
        and entropy after each validation, of the model that is validated, and before the first step.
    """
    counts = item_counts(table, vocab_size)
    model = initialize_model(run.model_config(vocab_size, repeat_share), seed=run.seed, counts=counts).to(device)
    folder = Path(tempfile.mkdtemp())
    args = run.loop_arguments(folder / "run")
    validation = split(table, "validation", max_length=args.max_length)
    watch = SelectionWatch(validation, max_length=args.max_length, max_tokens=WATCHED_TOKENS)
    before = {"step": 0, **watch.measure(model, None, 0)}
    loop = TrainingLoop(
        model, split(table, "train", max_length=args.max_length), validation, args=args, callbacks=[watch]
    )
    result = loop.run()
    lines = (folder / "run" / "selection.jsonl").read_text("utf-8").splitlines()
    shutil.rmtree(folder)
    gates = [before, *map(json.loads, lines)]
    record = {
        "settings": run.settings,
        "seed": run.seed,
        "training": result.summary(),
        "validation": result.best_figures,
    }
    return model.eval(), record | {"gates": gates}


def choose_histories(
    table: EventTable, *, max_length: int, min_events: int, after: int, number: int, seed: int
) -> HistoryStore:
    """
    Inputs of the test with at least `min_events` events, the latest of them after the time `after`, drawn at random.

    Raises:
        ValueError: if there are none.
    """
    store = HistoryStore.from_rows(split(table, "test", columns=["timestamps"]), columns=["timestamps"])
    last = store.columns["timestamps"].numpy()[store.starts + store.lengths - 1]
    rows = np.flatnonzero((store.lengths >= min_events) & (last > after))
    if not len(rows):
        raise ValueError(
            f"`min_events` is {min_events} and `after` is {after}, but no history has so many events and ends so late; "
            "give a lower number."
        )
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:number])
    return HistoryStore.from_rows(store.select(rows), max_length=max_length)


def measure(
    models: dict[str, BlossomRecForSequentialRecommendation], histories: HistoryStore, seed: int
) -> list[dict[str, Any]]:
    """The measures of each layer, averaged over the histories."""
    device = models["blossom"].device
    generator = torch.Generator(device).manual_seed(seed)
    histories.to(device)
    found = []
    for row in range(len(histories)):
        batch = histories.pack([row])
        readings = {kind: read_layers(model, batch["input_ids"]) for kind, model in models.items()}
        found.append(measure_history(readings["blossom"], readings["full"], batch["timestamps"][0], generator))
        if row % 50 == 49:
            logger.info("%d of %d histories", row + 1, len(histories))
    return average(found)


def run_study(args: argparse.Namespace) -> dict[str, Any]:
    """The results of the study, for JSON."""
    started, log = time.perf_counter(), LogArguments(data=args.data)
    table, tokenizer = log.read_table()
    if "timestamps" not in table.events:
        raise ValueError(f"`data` is {args.data}, which has no times; prepare the log with them.")
    device, checksum = ("cuda" if torch.cuda.is_available() else "cpu"), data_checksum(table)
    runs = {kind: choose_run(kind, args.seed, args.settings, checksum) for kind in KINDS}
    config = runs["blossom"].model_config(len(tokenizer), None)
    least = (config.num_selected_blocks + 1) * config.selection_block_size + 1
    if args.min_events < least:
        raise ValueError(
            f"`min_events` is {args.min_events}, but {config.num_selected_blocks} blocks of {config.selection_block_size} items "
            f"are selected, so that shorter histories than {least} have no choice; give {least} or more."
        )
    chosen = {"min_events": args.min_events, "after": args.after, "number": args.histories, "seed": args.seed}
    histories = choose_histories(table, max_length=runs["blossom"].settings["max_length"], **chosen)
    models, records = {}, {}
    for kind, run in runs.items():
        models[kind], records[kind] = train(run, table, len(tokenizer), log.repeat_share(table), device)
    trained = time.perf_counter() - started
    layers = measure(models, histories, args.seed)
    return {
        "study": "attention",
        "code": [code_entry(MEASURING)],
        "data": {"file": Path(args.data).name, "checksum": checksum},
        "histories": {**chosen, "number": len(histories), "mean length": float(histories.lengths.mean())},
        "sizes": {name: getattr(config, name) for name in ("num_selected_blocks", "selection_block_size")},
        "layers": layers,
        "records": records,
        "seconds": {"training": round(trained), "all": round(time.perf_counter() - started)},
        **describe_environment(),
    }


def report(results: dict[str, Any]) -> str:
    """The tables of the study in Markdown."""
    histories, layers = results["histories"], results["layers"]
    heads = [f"layer {number}" for number in range(1, len(layers) + 1)]
    lines = ["# attention", ""]
    lines += [
        f"{histories['number']} histories of the test with at least {histories['min_events']} events, the latest after "
        f"{histories['after']}; {histories['mean length']:.0f} events on average, read in float32. A query selects "
        f"{results['sizes']['num_selected_blocks']} blocks of {results['sizes']['selection_block_size']} items.",
        "",
    ]
    for kind, record in results["records"].items():
        best = record["training"]
        lines.append(
            f"- {kind}: validation NDCG@10 {record['validation']['ndcg@10']:.4f} in epoch {best['best_epoch']}"
        )
    for part in ("importance", "diversity", "block distances", "agreement", "mass by items", "mass by seconds"):
        lines += ["", f"## {part}", "", _row(["", *heads]), _row(["---"] * (len(heads) + 1))]
        for name in layers[0][part]:
            lines += _rows(name, [layer[part][name] for layer in layers], part)
    lines += [
        "",
        "## gates",
        "",
        _row(["mean ± standard deviation over positions", *heads]),
        _row(["---"] * (len(heads) + 1)),
    ]
    for stream in layers[0]["gates"]:
        for head in range(len(layers[0]["gates"][stream]["mean"][0])):
            pairs = ([part[head] for part in layer["gates"][stream]["mean"]] for layer in layers)
            lines.append(_row([f"{stream}, head {head + 1}", *(f"{mean:.2f} ± {std:.2f}" for mean, std in pairs)]))
    seconds = results["seconds"]
    lines += [
        "",
        f"`python examples/studies/attention.py --data {results['data']['file']}`: {seconds['training']} s of training, "
        f"{seconds['all']} s in all, on {results['device']}. Code {results['code'][0]['hash']}.",
    ]
    return "\n".join(lines) + "\n"


def _rows(name: str, entries: list[Any], part: str) -> list[str]:
    """The rows of a table for one measure of all layers."""
    if "mean" not in entries[0]:
        rows = [_rows(f"{name}: {inner}", [entry[inner] for entry in entries], part) for inner in entries[0]]
        return [row for some in rows for row in some]
    if isinstance(entries[0]["mean"], list):
        return [_row([name, *(" ".join(f"{value:.3f}" for value in entry["mean"]) for entry in entries)])]
    return [_row([name, *(f"{entry['mean']:.3f} ± {entry['half']:.3f}" for entry in entries)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write the tables and, if matplotlib is installed, the figure."""
    with atomic_write(folder / "attention.md") as partial:
        partial.write_text(report(results), encoding="utf-8")
    if find_spec("matplotlib") is None:
        logger.warning('There is no figure, because matplotlib is not installed: pip install "blossomrec-hf[report]".')
    else:
        draw(results, folder / "attention.png")


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--data", default="ml-1m-times.safetensors", help="what `blossomrec train --data` takes, with times"
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={"eval_epochs": 2},
        help="JSON of settings that replace those of the study",
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights, training and the choice of histories")
    parser.add_argument("--histories", type=int, default=200, help="how many are measured")
    parser.add_argument("--min_events", type=int, default=300, help="least number of events of a measured history")
    parser.add_argument(
        "--after",
        type=int,
        default=975_768_738,
        help="measured histories end after this time, from which on all of ML-1M's are true",
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the results are written")
    parser.add_argument("--from", dest="source", type=Path, help="results to draw again, in place of new ones")
    args = parser.parse_args()
    set_up_logging()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.source:
        results = read_json(args.source)
    else:
        results = run_study(args)
        write_json(args.folder / "attention.json", results)
    write_results(results, args.folder)
    print(report(results))


if __name__ == "__main__":
    main()
