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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batches import budget_batches
from ..data.event_table import EventTable
from ..data.splits import item_counts, split
from ..evaluation.held_out import HeldOutItems
from ..evaluation.model_scores import hold_out, last_item_scores
from ..evaluation.ranking import Ranks, rank_held_out_items
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation
from ..utils.environment import describe_environment
from ..utils.files import atomic_write, write_json
from ..utils.progress import set_up_logging
from .arguments import LogArguments
from .initialize import initialize_model
from .loop import TrainingLoop
from .studies import Run


logger = logging.getLogger(__name__)

COST_USERS = 1_000  # with the longest histories
COST_PASSES = 5
COST_TOKENS = 65_536


def execute(run: Run, data: str, record_file: Path) -> None:
    """
    Train and test one model. Writes ranks and what tables group users by, as `.npz`, and then the record.

    Args:
        run: the run.
        data: what `blossomrec train --data` takes.
        record_file: the JSON file of the record.
    """
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
    write_json(record_file, record)


def _new_model(run: Run, data: str) -> tuple[BlossomRecForSequentialRecommendation, EventTable]:
    """A model before its training, and the data."""
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


def measure_cost(run: Run, data: str, record_file: Path) -> None:
    """
    Time the inference of a new model with the settings of a run, for the users with the longest histories, at each length
    that the study tests. Arguments as in [`execute`]. Nothing else may use the device.
    """
    model, table = _new_model(run, data)
    model.eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    half = run.settings.get("mixed_precision") == "bf16"
    costs = {}
    for name, settings in run.evaluations.items():
        max_length = settings.get("max_length", run.settings.get("max_length", 200))
        costs[name] = _microseconds_per_user(model, table, max_length, half=half)
    record = {name: getattr(run, name) for name in ("data", "checksum", "configuration", "settings", "code")}
    record |= {"microseconds_per_user": costs, "users": COST_USERS, "tokens": COST_TOKENS, **describe_environment()}
    write_json(record_file, record)


@torch.no_grad()
def _microseconds_per_user(model: torch.nn.Module, table: EventTable, max_length: int, *, half: bool) -> float:
    """Median over passes of the time from the events on the device to the scores of all items."""
    view = split(table, "test", max_length=max_length, columns=model.config.event_columns)
    histories = hold_out(view, model.config).inputs
    device = model.device
    histories.to(device)
    users = np.argsort(-histories.lengths, kind="stable")[:COST_USERS]
    batches = [users[part] for part in budget_batches(histories.lengths[users], COST_TOKENS)]

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()

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
    return float(np.median(seconds[1:]) / len(users) * 1e6)


# -- processes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """
    What one process does: [`execute`] or [`measure_cost`] with its arguments.

    Attributes:
        work: the function.
        run: its run.
        data: what `blossomrec train --data` takes.
        record: the JSON file that it writes.
    """

    work: Callable[[Run, str, Path], None]
    run: Run
    data: str
    record: Path

    @property
    def log_file(self) -> Path:
        """What the process prints."""
        return self.record.with_suffix(".log")


def run_side_by_side(jobs: Sequence[Job], *, devices: Sequence[str], per_device: int) -> list[Job]:
    """
    Do jobs in processes of their own, `per_device` at a time on each device. The processes end with the caller, also if it
    is killed.

    Args:
        jobs: in the order in which they are started.
        devices: values of `CUDA_VISIBLE_DEVICES`, one per device; `""` is the CPU.
        per_device: number of processes on each device.

    Returns:
        The jobs that failed; the log says why.
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
                    failed.append(job)
                    end = job.log_file.read_text("utf-8", errors="replace")[-2000:] if job.log_file.exists() else ""
                    logger.error("%s failed (status %s):\n%s", job.record.stem, process.exitcode, end)
                seconds = time.perf_counter() - started
                logger.info("%d of %d in %.0f s: %s", done, len(jobs), seconds, job.record.stem)
    finally:
        for process, *_ in active.values():
            process.kill()
    return failed


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
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
