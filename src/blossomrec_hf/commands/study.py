"""
Run a study: a grid of configurations × seeds × data sets, with tables, paired tests and figures.

    blossomrec study lengths.yaml ablations.yaml --data_dir data --per_device 6
    blossomrec study lengths.yaml --tables_only          # the tables of the finished runs, without running anything

A study is a YAML file; its name is that of the study:

    description: Does a longer history rank better?
    imports: [my_stream.py]                  # optional: Python files, next to the study, that register streams or objectives
    data: {ml-1m: ml-1m.safetensors}         # paths in --data_dir: of `blossomrec export --data`, a prepared folder, or a log
    seeds: [1, 2, 3]
    settings: {num_hidden_layers: 3, num_train_epochs: 40, mixed_precision: bf16}   # of all runs: arguments of
                                             # `blossomrec train`, as with --recipe none, and settings of BlossomRecConfig;
                                             # item_features: all, or columns of the item table, separated by commas
    configurations:                          # by name, settings that replace those of the study
      blossom: {num_key_value_heads: 8}
      full: {attention_types: full, num_key_value_heads: 8}
    grid: {max_length: [50, 200, 1000]}      # optional: every configuration with every value
    evaluations: {test: {}, latest 50: {max_length: 50}}        # optional: each trained model is tested in these ways
    users: {all users: {}, long: {min_events: 500}}             # optional: min_events, max_events, after (a time), data
    comparisons: [{first: "blossom*", second: "full*"}]         # optional: paired tests; * is the same text in both; best_of
                                             # instead of second: the one with the best validation among those that match
    slopes: [{configurations: "blossom*", evaluations: test, over: max_length}]     # optional
    costs: true                              # optional: inference is timed after the runs, alone on a device; on a GPU, compiled
    baselines: true                          # optional: rules without training are tested, too, as in `blossomrec evaluate`

A data set may have settings of its own: `{path: ml-1m.safetensors, settings: {tokens_per_step: 4096}}`.

Each finished run is one record in NAME/records/ of the output directory, written atomically: a study that was interrupted, also by
`kill -9`, is continued by the same command, which does the missing runs. A run is done again if its settings, the events, or the
code that figures depend on have changed.

Output files: `NAME.json` (records and tables, with the hash of the code), `NAME.md` (tables) and, with the extra `report`,
`NAME.png`.
"""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.ranking import NOW_SUFFIX
from ..evaluation.study_plots import draw
from ..evaluation.study_tables import METRIC, RunResult, markdown
from ..training import LogArguments
from ..training.studies import Run, Study, code_entry, data_checksum, models_to_time
from ..training.study_runs import Job, execute, measure_cost, rank_baselines, run_side_by_side
from ..utils.command_line import Parser, exit_on_error
from ..utils.files import atomic_write, lock_file, read_json, require_folder, write_json
from ..utils.progress import set_up_logging


logger = logging.getLogger("blossomrec_hf.study")

BASELINES = "baselines.json"  # in the folder of a study: figures by data set and baseline


@exit_on_error()
def main() -> None:
    parser = Parser(description=__doc__)
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
        "--only", choices=("runs", "costs"), help="Do the runs alone, or the timings alone; by default, both."
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
    failed = []
    if not args.tables_only:
        with ExitStack() as locks:
            for folder in studies:
                locks.enter_context(lock_study(folder))
            failed = run_missing(studies, args.data_dir, per_device=args.per_device, only=args.only)
    for folder, study in studies.items():
        results = collect(study, folder, any_code=args.tables_only)
        if results is None:
            if failed or args.only == "costs":
                continue
            if not args.tables_only:
                raise ValueError(
                    f"The code has changed since the runs of {study.name} began, so that {folder} has no record of a finished "
                    "run of the current code; run it again, or write the tables of these runs with --tables_only."
                )
            raise ValueError(
                f"{folder} has no record of a finished run of {study.name}; run it without --tables_only."
            )
        results_dir = args.results_dir or folder
        write_results(study, results, results_dir)
        print((results_dir / f"{study.name}.md").read_text("utf-8"))
    if failed:
        raise ValueError(
            f"{len(failed)} of the runs failed; correct the cause and run the study again. The first log is {failed[0]}"
        )


@contextmanager
def lock_study(folder: Path) -> Iterator[None]:
    """
    Keep other processes from the folder of a study, where they would do the same runs.

    Raises:
        ValueError: if another process does its runs.
    """
    lock = lock_file(folder / ".lock")
    if lock is None:
        raise ValueError(
            f"Another process does the runs of the study in {folder}; wait for it, or give another --output_dir."
        )
    with closing(lock):
        yield


def run_missing(studies: dict[Path, Study], data_dir: Path, *, per_device: int, only: str | None) -> list[str]:
    """
    Do the runs that have no record yet, then the timings, or `only` the "runs" or the "costs". Returns a line for each that
    failed.
    """
    checksums: dict[str, str] = {}
    jobs: dict[str, list[Job]] = {"runs": [], "costs": []}
    for folder, study in studies.items():
        records, code = folder / "records", code_entry(study.imports)
        for part in ("records", "code"):
            (folder / part).mkdir(exist_ok=True)
        write_json(folder / "code" / f"{code['hash']}.json", code)
        sources = {name: (str(data_dir / path), study.item_features(name)) for name, path in study.data.items()}
        for source in sources.values():
            if source not in checksums:
                checksums[source] = source_checksum(*source)
        runs = study.runs({name: checksums[source] for name, source in sources.items()}, code["hash"])
        paths = {name: path for name, (path, _) in sources.items()}
        if study.baselines:
            write_json(folder / BASELINES, {name: rank_baselines(path) for name, path in paths.items()})
        work = partial(execute, side_by_side=per_device)
        jobs["runs"] += [Job(work, run, paths[run.data], records / f"{run.name}.json") for run in runs]
        if study.costs:
            for name, (run, lengths) in models_to_time(runs).items():
                work = partial(measure_cost, lengths=lengths)
                jobs["costs"].append(Job(work, run, paths[run.data], records / f"{name}.json"))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    failed = []
    for kind in ("runs", "costs"):
        if only in (None, kind):
            missing = [job for job in jobs[kind] if not job.record.exists()]
            done, number = len(jobs[kind]) - len(missing), len(jobs[kind])
            logger.info("%d of %d %s are done; devices: %s.", done, number, kind, devices or "the CPU")
            side_by_side = per_device if kind == "runs" else 1
            failed += run_side_by_side(missing, devices=devices.split(","), per_device=side_by_side)
    return failed


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


def collect(study: Study, folder: Path, *, any_code: bool) -> dict[str, Any] | None:
    """
    The results of a study: its records, tables and the code that they were measured with; `None` without any record.

    Args:
        folder: of the study; it has the folders `records` and `code`.
        any_code: whether records of other code count, too; of several records of a run, the latest counts.
    """
    code = code_entry(study.imports)["hash"]
    wanted = {(run.data, run.configuration, run.seed): run for run in study.runs(dict.fromkeys(study.data, ""), "")}
    found: dict[tuple, tuple[Path, dict[str, Any]]] = {}
    timings = []
    for path in sorted((folder / "records").glob("*.json"), key=lambda path: path.stat().st_mtime):
        record = read_json(path)
        if not (any_code or record["code"] == code):
            continue
        if "microseconds_per_user" in record:
            timings.append(record)
            continue
        run = wanted.get((record["data"], record["configuration"], record["seed"]))
        tests = {name: entry["settings"] for name, entry in record["evaluations"].items()}
        if run is not None and record["settings"] == run.settings and tests == run.evaluations:
            found[record["data"], record["configuration"], record["seed"]] = (path, record)
    if not found:
        return None
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
        "costs": costs_of(wanted.values(), timings),
        "baselines": read_json(folder / BASELINES) if study.baselines else {},
        "records": {path.stem: shorten(record) for path, record in found.values()},
    }


def costs_of(runs: Iterable[Run], timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The microseconds per user of each data set and configuration by evaluation, from the latest timing of its model."""
    found = {}
    for run, timing in itertools.product(runs, timings):
        if timing["data"] == run.data and timing.get("model") == run.model_settings:
            measured = timing["microseconds_per_user"]
            costs = {name: measured[str(n)] for name, n in run.tested_lengths.items() if str(n) in measured}
            entry = {"data": run.data, "configuration": run.configuration, "microseconds_per_user": costs}
            found[run.data, run.configuration] = entry | {key: timing[key] for key in ("code", "compiled", "device")}
    return list(found.values())


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
                    validation=validation_of(record),
                    ranks=arrays[f"ranks.{evaluation}"],
                    users=arrays["users"],
                    lengths=arrays["lengths"],
                    last_times=arrays.get("last_times"),
                )
            )
    return tests


def validation_of(record: Mapping[str, Any]) -> float:
    """The NDCG@10 of the validation that chose the weights, which is with now if the metric that chose them is."""
    with_now = record["settings"].get("metric_for_best_model", METRIC).endswith(NOW_SUFFIX)
    return record["validation"][METRIC + NOW_SUFFIX * with_now]


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
    minutes = sum(record["device_seconds"] for record in records) / 60
    text = markdown(results["study"], results["description"], results["tables"], costs) + "\n"
    if baselines := results.get("baselines"):
        text += "| without training | data | Recall@10 | NDCG@10 |\n|---|---|---|---|\n"
        for data, rules in baselines.items():
            for name, figures in rules.items():
                text += f"| {name} | {data} | {figures['recall@10']:.4f} | {figures['ndcg@10']:.4f} |\n"
        text += "\n"
    if costs:
        compiled = "compiled" if all(entry["compiled"] for entry in results["costs"]) else "not compiled"
        text += (
            "µs per user: inference, from events on the device to the scores of all items, for the 1,000 users with the longest "
            f"histories; {compiled}, alone on {', '.join(sorted({entry['device'] for entry in results['costs']}))}.\n\n"
        )
    return text + (
        f"`blossomrec study {results['study']}.yaml`: {results['runs']['done']} of {results['runs']['of']} runs, {minutes:.0f} "
        f"minutes of {devices}; runs side by side share the time of the device. Code "
        f"{', '.join(code['hash'] for code in results['code'])}.\n"
    )


if __name__ == "__main__":
    main()
