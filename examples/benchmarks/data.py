"""
Time building a data set from a Parquet log, and iterating over packed batches.

    python examples/benchmarks/data.py --interactions 32_000_000 --k_core 5

generates a log (items by Zipf's law, log-normal history lengths, rows in time order, so users are interleaved), stores it in
`--folder` for later runs, and builds it in a process of its own. The output is one line of JSON per run: seconds of
`build_sequences`, its CPU time (user and system, all threads), seconds of the whole process including imports, peak resident
memory in MiB, and the size of the result.

    python examples/benchmarks/data.py --interactions 32_000_000 --columns 3

builds the log three times without times, with times, and with times, event types and an item table, in turn, and prints the
ratios of the seconds and of the CPU times of the last to the others.

    python examples/benchmarks/data.py --log ml-1m/interactions.txt --max_length 1000 --max_tokens 65536 --workers 2

builds an existing log, then times epochs of packed batches without training: how full the batches are, how long a training
loop waits per batch, and the CPU time of the training process.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq


CHUNK = 4_000_000
PLAIN = {"timestamp": ""}
COLUMNS = {
    "event_type": "event_type",
    "targets": "cart,purchase",
    "item_categories": "category",
    "item_numbers": "price",
}


def generate(path: Path, interactions: int, seed: int = 0) -> None:
    """
    Write a log of `interactions` rows with user, item, rating, timestamp and event type, about 165 per user, as in
    MovieLens; and, to `items_path(path)`, a table of the items with a title, a category and a price.
    """
    from blossomrec_hf.utils.files import atomic_write  # not at the top, because `bare_sort` is timed without PyTorch

    rng = np.random.default_rng(seed)
    num_users, num_items = max(interactions // 165, 10), max(int(interactions**0.5) * 15, 100)
    user_share = np.cumsum(rng.lognormal(0, 1.2, num_users))
    item_share = np.cumsum(1 / np.arange(1, num_items + 1))
    user_names, item_names = rng.permutation(num_users * 3)[:num_users], rng.permutation(num_items * 3)[:num_items]
    types = pa.array(["view", "cart", "purchase"])
    numbers = np.arange(num_items)
    items = {"item_id": item_names, "title": [f"Item {n}" for n in numbers], "price": rng.lognormal(3, 1, num_items)}
    pq.write_table(pa.table(items | {"category": [f"c{n % 300}|d{n % 7}" for n in numbers]}), items_path(path))
    schema = pa.schema(
        [("user", pa.int64()), ("item", pa.int64()), ("rating", pa.float32()), ("timestamp", pa.int64())]
        + [("event_type", pa.string())]
    )
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for start in range(0, interactions, CHUNK):
            rows = min(CHUNK, interactions - start)
            users = np.searchsorted(user_share, rng.random(rows) * user_share[-1])
            items = np.searchsorted(item_share, rng.random(rows) * item_share[-1])
            times = 1_000_000_000 + (start + np.sort(rng.integers(0, rows, rows))) * 600_000_000 // interactions
            ratings = rng.integers(1, 11, rows).astype(np.float32) / 2
            kinds = types.take(pa.array(rng.choice(3, rows, p=[0.8, 0.15, 0.05])))
            columns = [user_names[users], item_names[items], ratings, times, kinds]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=1_000_000)


def items_path(log: Path) -> Path:
    return log.with_name(f"items-of-{log.name}")


def bare_sort(path: Path, output: Path, options: dict[str, Any], report: multiprocessing.Queue) -> None:
    """Time sorting and grouping the log with Polars alone, for comparison: no filters, ids or output."""
    started = time.perf_counter()
    frame = pl.scan_parquet(path).select("user", "item", "timestamp").sort("user", "timestamp", maintain_order=True)
    users = frame.group_by("user", maintain_order=True).agg("item").collect(engine="streaming").height
    seconds = round(time.perf_counter() - started, 2)
    cpu = round(time.process_time(), 2)
    report.put({"what": "polars sort and group", "seconds": seconds, "cpu_seconds": cpu, "users": users})
    report.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def build(path: Path, output: Path, options: dict[str, Any], report: multiprocessing.Queue) -> None:
    process_started = time.perf_counter()
    from blossomrec_hf.data import build_sequences

    started, cpu = time.perf_counter(), time.process_time()
    dataset, tokenizer = build_sequences(path, output_dir=output, overwrite=True, **options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    report.put(
        {
            "what": ", ".join(["build_sequences", *(f"{name}={value}" for name, value in options.items())]),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "process_seconds": round(time.perf_counter() - process_started, 2),
            "users": len(dataset),
            "items": tokenizer.num_items,
            "output_MiB": round(sum(file.stat().st_size for file in output.iterdir()) / 2**20),
        }
    )
    report.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def batches(log: Path, max_length: int, max_tokens: int, workers: int, step_seconds: float) -> None:
    """Time epochs of packed batches. A sleep of `step_seconds` simulates the training step, during which workers run."""
    from blossomrec_hf.batches import HistoryDataLoader, HistoryWindows
    from blossomrec_hf.data import build_sequences

    windows = HistoryWindows(build_sequences(log)[0], max_length)
    loader = HistoryDataLoader(windows, max_tokens=max_tokens, num_workers=workers)
    padded = len(windows) * int(windows.lengths.max())
    for epoch in range(4):
        loader.set_epoch(epoch)
        sizes, waited, work, iterator = set(), [], 0.0, iter(loader)
        while True:
            started, worked = time.perf_counter(), time.thread_time()
            batch = next(iterator, None)
            waited.append(time.perf_counter() - started)
            work += time.thread_time() - worked
            if batch is None:
                break
            sizes.add(batch["input_ids"].shape[1])
            time.sleep(step_seconds)
        line = {
            "log": log.name,
            "epoch": epoch,
            "steps": len(waited) - 1,
            "sizes": sorted(sizes),
            "filled": round(int(windows.lengths.sum()) / max_tokens / (len(waited) - 1), 4),
            "filled_if_padded": round(int(windows.lengths.sum()) / padded, 4),
            "first_wait_ms": round(waited[0] * 1e3, 1),
            "later_wait_ms_a_step": round(sum(waited[1:-1]) / max(len(waited) - 2, 1) * 1e3, 2),
            "own_cpu_ms_a_step": round(work / (len(waited) - 1) * 1e3, 2),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--interactions", type=int, nargs="+", default=[1_000_000], help="sizes of the log; several give the slope"
    )
    parser.add_argument("--k_core", type=int, default=5)
    parser.add_argument(
        "--columns",
        type=int,
        default=0,
        help="build a generated log this many times without times, with times, and with times, event types and items, in turn",
    )
    parser.add_argument("--log", type=Path, help="an existing log, instead of a generated one")
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark_data"), help="folder of generated logs and output"
    )
    parser.add_argument("--bare_sort", action="store_true", help="also time Polars' sort and group alone")
    parser.add_argument("--max_tokens", type=int, help="with --log: time packed batches of this many items")
    parser.add_argument("--max_length", type=int, default=1000, help="with --max_tokens: maximum items of a history")
    parser.add_argument("--workers", type=int, default=2, help="with --max_tokens: number of DataLoader workers")
    parser.add_argument(
        "--step_seconds", type=float, default=0.03, help="with --max_tokens: duration of a simulated training step"
    )
    arguments = parser.parse_args()
    if arguments.max_tokens is not None:
        if arguments.log is None:
            parser.error("--max_tokens needs --log")
        batches(arguments.log, arguments.max_length, arguments.max_tokens, arguments.workers, arguments.step_seconds)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # so that peak memory is measured per run
    core = {"k_core": arguments.k_core}
    times = []
    for interactions in [0] if arguments.log else arguments.interactions:
        path = arguments.log or arguments.folder / f"log-{interactions}.parquet"
        if not path.exists():
            generate(path, interactions)
        runs = [(bare_sort, {})] * arguments.bare_sort + [(build, core)]
        if arguments.columns:
            variants = [PLAIN, {}, COLUMNS | {"items": items_path(path)}]
            runs = [(build, core | options) for options in variants] * arguments.columns
        lines = []
        for run, options in runs:
            report = spawn.Queue()
            process = spawn.Process(target=run, args=(path, arguments.folder / "built", options, report))
            process.start()
            lines.append({"log": path.name, **report.get(), "peak_MiB": round(report.get())})
            process.join()
            print(json.dumps(lines[-1]), flush=True)
        shutil.rmtree(arguments.folder / "built", ignore_errors=True)
        built = [line for line in lines if line["what"].startswith("build_sequences")]
        measured = np.array([[line["seconds"], line["cpu_seconds"]] for line in built])
        if arguments.columns:
            ratios = {}
            for place, name in enumerate(("without times", "with times alone")):
                ratio = np.median(measured[2::3] / measured[place::3], axis=0).round(3).tolist()
                ratios[f"all columns to {name}"] = dict(zip(("seconds", "cpu_seconds"), ratio))
            print(json.dumps(ratios), flush=True)
        times.append(np.median(measured[2::3] if arguments.columns else measured, axis=0))
    if len(times) > 1:
        slopes = np.polyfit(np.log(arguments.interactions), np.log(times), 1)[0].round(3).tolist()
        print(
            json.dumps(dict(zip(("slope of log seconds over log interactions", "slope of log CPU seconds"), slopes)))
        )


if __name__ == "__main__":
    main()
