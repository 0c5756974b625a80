"""
Run a study: a grid of configurations × seeds × data sets, with tables, paired tests and figures.

    blossomrec study lengths.yaml ablations.yaml --data_dir data --per_device 6
    blossomrec study lengths.yaml --tables_only          # the tables of the finished runs, without running anything

A study is a YAML file; its name is that of the study:

    description: Does a longer history rank better?
    data: {ml-1m: ml-1m.safetensors}         # paths in --data_dir: of `blossomrec export --data`, a prepared folder, or a log
    seeds: [1, 2, 3]
    settings: {num_hidden_layers: 3, num_train_epochs: 40, mixed_precision: bf16}   # of all runs: arguments of
                                             # `blossomrec train`, and settings of BlossomRecConfig; item_features: all, or
                                             # columns of the item table, separated by commas
    configurations:                          # by name, settings that replace those of the study
      blossom: {num_key_value_heads: 8}
      full: {attention_types: full, num_key_value_heads: 8}
    grid: {max_length: [50, 200, 1000]}      # optional: every configuration with every value
    evaluations: {test: {}, latest 50: {max_length: 50}}        # optional: each trained model is tested in these ways
    users: {all users: {}, long: {min_events: 500}}             # optional: min_events, max_events, after (a time), data
    comparisons: [{first: "blossom*", second: "full*"}]         # optional: paired tests; * is the same text in both
    slopes: [{configurations: "blossom*", evaluations: test, over: max_length}]     # optional
    costs: true                              # optional: inference is timed after the runs, one after the other

A data set may have settings of its own: `{path: ml-1m.safetensors, settings: {tokens_per_step: 4096}}`.

Each finished run is one record in NAME/records/ of the output directory, written atomically: a study that was interrupted, also by
`kill -9`, is continued by the same command, which does the missing runs. A run is done again if its settings, the events, or the
code that figures depend on have changed.

Output files: `NAME.json` (records and tables, with the hash of the code), `NAME.md` (tables) and, with the extra `report`,
`NAME.png`.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.study_plots import draw
from ..evaluation.study_tables import RunResult, markdown
from ..training import LogArguments
from ..training.studies import Study, code_entry, data_checksum
from ..training.study_runs import Job, execute, measure_cost, run_side_by_side
from ..utils.command_line import HelpFormatter, exit_on_error
from ..utils.files import atomic_write, read_json, require_folder, write_json
from ..utils.progress import set_up_logging


logger = logging.getLogger("blossomrec_hf.study")


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="YAML files of studies; their runs share the devices.")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("."), help="Folder that the paths of data sets start from."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/studies"), help="Folder for the records, one folder per study."
    )
    parser.add_argument(
        "--results_dir", type=Path, help="Folder for the results; by default, next to the records of the study."
    )
    parser.add_argument(
        "--per_device", type=int, default=1, help="Number of runs side by side on each GPU, or on the CPU."
    )
    parser.add_argument(
        "--tables_only",
        action="store_true",
        help="Write the tables of the finished runs, also of runs with other code; run nothing.",
    )
    args = parser.parse_args()
    set_up_logging()
    if args.per_device < 1:
        parser.error(f"--per_device is {args.per_device}; it must be at least 1")
    studies = {args.output_dir / path.stem: Study.load(path) for path in args.studies}
    if len(studies) < len(args.studies):
        parser.error("two of the studies have the same name; rename a file")
    for folder in (*studies, *([] if args.results_dir is None else [args.results_dir])):
        require_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    failed = [] if args.tables_only else run_missing(studies, args.data_dir, per_device=args.per_device)
    for folder, study in studies.items():
        results = collect(study, folder, any_code=args.tables_only)
        results_dir = args.results_dir or folder
        write_results(study, results, results_dir)
        print((results_dir / f"{study.name}.md").read_text("utf-8"))
    if failed:
        raise ValueError(
            f"{len(failed)} runs failed; their logs are {failed[0].log_file} and so on. Run the study again."
        )


def run_missing(studies: dict[Path, Study], data_dir: Path, *, per_device: int) -> list[Job]:
    """Do the runs that have no record yet, then the timings; returns those that failed."""
    code, checksums, runs, timings = code_entry(), {}, [], []
    for folder, study in studies.items():
        records = folder / "records"
        for part in ("records", "code"):
            (folder / part).mkdir(exist_ok=True)
        write_json(folder / "code" / f"{code['hash']}.json", code)
        sources = {name: (str(data_dir / path), study.item_features(name)) for name, path in study.data.items()}
        for source in sources.values():
            if source not in checksums:
                checksums[source] = source_checksum(*source)
        for run in study.runs({name: checksums[source] for name, source in sources.items()}, code["hash"]):
            path, _ = sources[run.data]
            runs.append(Job(execute, run, path, records / f"{run.name}.json"))
            if study.costs and run.seed == study.seeds[0]:
                timings.append(Job(measure_cost, run, path, records / f"cost-{run.name}.json"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    missing, untimed = ([job for job in jobs if not job.record.exists()] for jobs in (runs, timings))
    logger.info("%d of %d runs are done; devices: %s.", len(runs) - len(missing), len(runs), visible or "the CPU")
    failed = run_side_by_side(missing, devices=visible.split(","), per_device=per_device)
    return failed + run_side_by_side(untimed, devices=visible.split(","), per_device=1)


def source_checksum(path: str, item_features: Sequence[str]) -> str:
    """
    The checksum of a data set.

    Args:
        path: what `blossomrec train --data` takes.
        item_features: the columns of the item table that runs read.

    Raises:
        ValueError: if the item table has no such column.
    """
    log = LogArguments(data=path)
    table, tokenizer = log.read_table()
    return data_checksum(table, [log.item_features(columns, table, tokenizer) for columns in item_features])


def collect(study: Study, folder: Path, *, any_code: bool) -> dict[str, Any]:
    """
    The results of a study: its records, tables and the code that they were measured with.

    Args:
        folder: of the study; it has the folders `records` and `code`.
        any_code: whether records of other code count, too; of several records of a run, the latest counts.
    """
    records, code = folder / "records", code_entry()
    wanted = {(run.data, run.configuration, run.seed): run for run in study.runs(dict.fromkeys(study.data, ""), "")}
    found: dict[tuple, tuple[Path, dict[str, Any]]] = {}
    costs: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(records.glob("*.json"), key=lambda path: path.stat().st_mtime):
        record = read_json(path)
        run = wanted.get((record["data"], record["configuration"], record.get("seed", study.seeds[0])))
        if run is None or record["settings"] != run.settings or not (any_code or record["code"] == code["hash"]):
            continue
        if path.name.startswith("cost-"):
            costs[record["data"], record["configuration"]] = record
        elif {name: entry["settings"] for name, entry in record["evaluations"].items()} == run.evaluations:
            found[record["data"], record["configuration"], record["seed"]] = (path, record)
    if not found:
        raise ValueError(
            f"{records} has no record of a finished run of {study.name}; run it without --tables_only, and if runs fail, see "
            "their logs there."
        )
    found = {key: found[key] for key in wanted if key in found}
    hashes = list(dict.fromkeys(record["code"] for _, record in found.values()))
    if len(hashes) > 1:
        logger.warning("The records are of %d versions of the code: %s.", len(hashes), ", ".join(hashes))
    return {
        "study": study.name,
        "description": study.description,
        "code": [read_json(folder / "code" / f"{code_hash}.json") for code_hash in hashes],
        "runs": {"done": len(found), "of": len(wanted)},
        "tables": study.tables.build(tests_of(found.values())),
        "costs": [
            {key: record[key] for key in ("data", "configuration", "microseconds_per_user", "device")}
            for record in costs.values()
        ],
        "records": {path.stem: shorten(record) for path, record in found.values()},
    }


def shorten(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the metrics at 10 alone."""
    tests = {
        name: {**entry, "metrics": {metric: value for metric, value in entry["metrics"].items() if "@10" in metric}}
        for name, entry in record["evaluations"].items()
    }
    validation = {metric: value for metric, value in record["validation"].items() if "@10" in metric}
    return {**record, "evaluations": tests, "validation": validation}


def tests_of(records: Sequence[tuple[Path, dict[str, Any]]]) -> list[RunResult]:
    """The tests of all records, with the ranks next to them."""
    tests = []
    for path, record in records:
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {name: file[name] for name in file.files}
        for evaluation, entry in record["evaluations"].items():
            tests.append(
                RunResult(
                    data=record["data"],
                    configuration=record["configuration"],
                    evaluation=evaluation,
                    seed=record["seed"],
                    settings={**record["settings"], **entry["settings"]},
                    ranks=arrays[f"ranks.{evaluation}"],
                    users=arrays["users"],
                    lengths=arrays["lengths"],
                    last_times=arrays.get("last_times"),
                )
            )
    return tests


def write_results(study: Study, results: dict[str, Any], folder: Path) -> None:
    """Write `NAME.json`, `NAME.md` and, if matplotlib is installed, `NAME.png`."""
    write_json(folder / f"{study.name}.json", results)
    with atomic_write(folder / f"{study.name}.md") as partial:
        partial.write_text(report(results), encoding="utf-8")
    if find_spec("matplotlib") is None:
        logger.warning('There is no figure, because matplotlib is not installed: pip install "blossomrec-hf[report]".')
    else:
        draw(folder / f"{study.name}.png", results["description"] or study.name, results["tables"])


def report(results: dict[str, Any]) -> str:
    """The Markdown of the results of a study: tables, and how and with which code they were measured."""
    costs = {(entry["data"], entry["configuration"]): entry["microseconds_per_user"] for entry in results["costs"]}
    records = list(results["records"].values())
    devices = ", ".join(sorted({record["device"] for record in records}))
    hours = sum(record["training"]["seconds"] for record in records) / 3600
    lines = [
        f"`blossomrec study {results['study']}.yaml`: {results['runs']['done']} of {results['runs']['of']} runs, {hours:.2f} hours "
        f"of training in all, several side by side on {devices}. Code {', '.join(code['hash'] for code in results['code'])}."
    ]
    text = markdown(results["study"], results["description"], results["tables"], costs)
    return text + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
