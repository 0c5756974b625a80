"""The runs of a study: each in a process of its own, several side by side on a device."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batches import budget_batches
from ..data.event_table import EventTable
from ..data.splits import item_counts, split
from ..evaluation.baselines import make_baselines
from ..evaluation.held_out import HeldOutItems
from ..evaluation.model_scores import hold_out, last_item_scores
from ..evaluation.ranking import Ranks, rank_by_scores, rank_held_out_items
from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation
from ..utils.environment import describe_environment, keep_compiled_code
from ..utils.files import atomic_write, write_json
from ..utils.progress import set_up_logging
from .initialize import initialize_model
from .log_arguments import LogArguments
from .loop import TrainingLoop
from .studies import Run, import_files


logger = logging.getLogger(__name__)

COST_USERS = 1_000  # with the longest histories
COST_PASSES = 5
COST_TOKENS = 65_536


def execute(run: Run, data: str, record_file: Path, *, side_by_side: int = 1) -> None:
    """
    Train and test one model. Writes ranks and what tables group users by, as `.npz`, and then the record.

    Args:
        run: the run.
        data: what `blossomrec train --data` takes.
        record_file: the JSON file of the record.
        side_by_side: number of runs that share the device, for its time in the record.
    """
    started = time.perf_counter()
    model, table = _new_model(run, data)
    scratch = record_file.with_suffix(".training")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    args = run.loop_arguments(scratch)
    columns = model.config.event_columns
    latest = args.max_length if args.windows == "latest" else None
    train_view = split(table, "train", max_length=latest, columns=columns)
    validation_view = split(table, "validation", max_length=args.max_length, columns=columns)
    loop = TrainingLoop(model, train_view, validation_view, args=args)
    result = loop.run()
    shutil.rmtree(scratch)

    arrays, evaluations = {}, {}
    for name, settings in run.evaluations.items():
        ranks, held_out, seconds = _test(model, table, settings, loop)
        arrays[f"ranks.{name}"] = ranks.by_suffix()[""].astype(np.float32)
        metrics = ranks.metrics(ks=[10, 20])
        evaluations[name] = {"settings": settings, "metrics": metrics, "seconds": round(seconds, 2)}
    arrays |= {"users": ranks.users.astype(np.int32), "repeated": ranks.repeated}
    arrays |= {"lengths": held_out.history_lengths.astype(np.int32)}
    if "timestamps" in table.events:
        arrays["last_times"] = _last_times(table, held_out)
    with atomic_write(record_file.with_suffix(".npz")) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    record = {name: getattr(run, name) for name in ("data", "checksum", "configuration", "seed", "settings", "code")}
    record |= {"evaluations": evaluations, "validation": result.best_figures, "training": result.summary()}
    record |= {
        "repeat_share": model.config.repeat_share,
        "parameters": model.num_parameters(),
        **describe_environment(),
    }
    record["device_seconds"] = round((time.perf_counter() - started) / side_by_side, 1)
    write_json(record_file, record)


def _new_model(run: Run, data: str) -> tuple[BlossomRecForSequentialRecommendation, EventTable]:
    """A model before its training, and the data."""
    import_files(run.imports)
    log = LogArguments(data=data)
    table, tokenizer = log.read_table()
    features = None if run.item_features is None else log.item_features(run.item_features, table, tokenizer)
    config = run.model_config(len(tokenizer), log.repeat_share(table), features)
    counts = item_counts(table, len(tokenizer))
    return initialize_model(config, seed=run.seed, counts=counts, features=features), table


def _test(
    model: BlossomRecForSequentialRecommendation, table: EventTable, settings: Mapping[str, Any], loop: TrainingLoop
) -> tuple[Ranks, HeldOutItems, float]:
    """Ranks of the test items, the test items, and the seconds that it took."""
    settings = dict(settings)
    max_length = settings.pop("max_length", loop.args.max_length)
    if not model.config.uses_now:  # "with now" is then the same as without
        settings.pop("now", None)
    started = time.perf_counter()
    view = split(table, "test", max_length=max_length, columns=model.config.event_columns)
    held_out = hold_out(view, model.config)
    ranks = rank_held_out_items(
        model,
        held_out,
        max_tokens=loop.args.eval_tokens,
        accelerator=loop.accelerator,
        compile=False,
        progress=False,
        **settings,
    )
    return ranks, held_out, time.perf_counter() - started


def _last_times(table: EventTable, held_out: HeldOutItems) -> np.ndarray:
    """int64 [users], the time of the latest event that precedes each user's test items."""
    rows = {user: row for row, user in enumerate(table.users["user_id"].tolist())}
    chosen = np.array([rows[user] for user in held_out.user_ids])
    ends = table.users["validation_end"].astype(np.int64)[chosen]
    return table.events["timestamps"][table.offsets[chosen] + np.maximum(ends - 1, 0)].astype(np.int64)


def rank_baselines(data: str) -> dict[str, dict[str, float]]:
    """Recall@10 and NDCG@10 of the test items by baseline. `data` is what `blossomrec train --data` takes."""
    log = LogArguments(data=data)
    table, tokenizer = log.read_table()
    columns = ["timestamps"] if "timestamps" in table.events else []
    held_out = HeldOutItems.from_rows(split(table, "test", columns=columns), columns=columns)
    counts = item_counts(table, len(tokenizer))
    exclude_seen = BlossomRecConfig(vocab_size=len(counts), repeat_share=log.repeat_share(table)).exclude_seen
    ranking = {"vocab_size": len(counts), "exclude_seen": exclude_seen, "progress": False}
    figures = {}
    for name, scores in make_baselines(table, "test", held_out, counts, "cpu").items():
        metrics = rank_by_scores(scores, held_out, **ranking).metrics(ks=[10])
        figures[name] = {x: value for x, value in metrics.items() if x.startswith(("recall", "ndcg"))}
    return figures


def measure_cost(run: Run, data: str, record_file: Path, *, lengths: Collection[int]) -> None:
    """
    Time the inference of a new model with the settings of a run, for the users with the longest histories. On a GPU, the model
    is compiled and captured, as `compile_for_inference` does. Nothing else may use the device.

    Args:
        lengths: numbers of latest items that the model reads of each history.
        The other arguments are those of [`execute`].
    """
    model, table = _new_model(run, data)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    keep_compiled_code()
    half = run.settings.get("mixed_precision") == "bf16"
    record = {name: getattr(run, name) for name in ("data", "checksum", "code")} | {"model": run.model_settings}
    costs = {str(length): _microseconds_per_user(model, table, length, half=half) for length in sorted(lengths)}
    record |= {"microseconds_per_user": costs, "compiled": model.device.type == "cuda", **describe_environment()}
    write_json(record_file, record)


@torch.no_grad()
def _microseconds_per_user(model: torch.nn.Module, table: EventTable, max_length: int, *, half: bool) -> float:
    """
    Median over passes of the time from the events on the device to the scores of all items. The compiled model needs batches
    of at least half of the largest one, so that a smaller last batch, if there are others, is not timed.
    """
    view = split(table, "test", max_length=max_length, columns=model.config.event_columns)
    histories = hold_out(view, model.config).inputs
    device = model.device
    histories.to(device)
    longest = np.argsort(-histories.lengths, kind="stable")[:COST_USERS]
    batches = [longest[part] for part in budget_batches(histories.lengths[longest], COST_TOKENS)]
    tokens = [int(histories.lengths[batch].sum()) for batch in batches]
    batches = [batch for batch, number in zip(batches, tokens) if 2 * number >= max(tokens)]

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()

    if device.type == "cuda":
        model.base_model._static_encoders.clear()  # of the former length
        torch.compiler.reset()
        with autocast():
            model.compile_for_inference(
                max_tokens=max(tokens), max_histories=max(map(len, batches)), max_length=max_length
            )
    seconds = []
    for _ in range(1 + COST_PASSES):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for batch in batches:
            last_item_scores(model, histories.pack(batch), autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]) / sum(map(len, batches)) * 1e6)


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """
    What one process does: [`execute`] or [`measure_cost`], with its arguments.

    Attributes:
        work: the function, with its keyword arguments.
        run: its run.
        data: what `blossomrec train --data` takes.
        record: the JSON file that it writes.
    """

    work: Callable[..., None]
    run: Run
    data: str
    record: Path

    @property
    def log_file(self) -> Path:
        """What the process prints."""
        return self.record.with_suffix(".log")


def run_side_by_side(jobs: Sequence[Job], *, devices: Sequence[str], per_device: int) -> list[str]:
    """
    Do jobs in processes of their own, `per_device` at a time on each device. The processes end with the caller, also if it
    is killed.

    Args:
        jobs: in the order in which they are started.
        devices: values of `CUDA_VISIBLE_DEVICES`, one per device; `""` is the CPU.
        per_device: number of processes on each device.

    Returns:
        A line for each job that failed: its log, and why.
    """
    context = multiprocessing.get_context("spawn")
    waiting, free, active, failed = deque(jobs), deque(list(devices) * per_device), {}, []
    threads = max(1, (os.cpu_count() or 1) // len(free))
    started, done = time.perf_counter(), 0
    try:
        while waiting or active:
            while waiting and free:
                job, device = waiting.popleft(), free.popleft()
                process = context.Process(target=_in_own_process, args=(job, device, threads), daemon=True)
                process.start()
                active[process.sentinel] = (process, job, device)
            for sentinel in multiprocessing.connection.wait(list(active)):
                process, job, device = active.pop(sentinel)
                process.join()
                free.append(device)
                done += 1
                if process.exitcode != 0:
                    failed.append(f"{job.log_file}: {_reason(job, process.exitcode)}")
                    logger.error("A run failed, %s", failed[-1])
                seconds = time.perf_counter() - started
                logger.info("%d of %d in %.0f s: %s", done, len(jobs), seconds, job.record.stem)
    finally:
        for process, *_ in active.values():
            process.kill()
    return failed


def _reason(job: Job, status: int) -> str:
    """Why a process failed: what it printed last."""
    if status < 0:
        return f"ended by the signal {signal.Signals(-status).name}"
    lines = job.log_file.read_text("utf-8", errors="replace").splitlines() if job.log_file.exists() else []
    return lines[-1] if lines else f"exit status {status}"


def _in_own_process(job: Job, device: str, threads: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": device, "TQDM_DISABLE": "1"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(job.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    set_up_logging()
    torch.set_num_threads(threads)
    try:
        job.work(job.run, job.data, job.record)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr, flush=True)
        sys.exit(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
