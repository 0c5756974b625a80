"""The folder of a run: checkpoints and models, each complete or absent."""

import json
import logging
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..batches.histories import HistoryStore
from ..utils.environment import describe_environment
from ..utils.files import (
    atomic_files,
    atomic_folder,
    lock_file,
    read_json,
    recover_writes,
    remove_folder,
    write_json,
)
from .arguments import LoopArguments


logger = logging.getLogger(__name__)

RUN_FILE, LOCK_FILE = "run.json", ".lock"
# Of a model's configuration, what says nothing about the model.
_PROVENANCE = "_name_or_path transformers_version blossomrec_version architectures auto_map custom_pipelines".split()


@contextmanager
def written_by_all(
    write: Callable[[Path], AbstractContextManager[Path]], folder: Path, accelerator: Accelerator
) -> Iterator[Path]:
    """
    An atomic write that all processes take part in; each yields the same path.

    Args:
        write: `atomic_folder` or `atomic_files` of `blossomrec_hf.utils.files`.

    Raises:
        OSError: if a process could not write (a full disk); nothing is left of the write then. It is raised on every
            process, or on the main process alone if weights are sharded (FSDP): the others may wait in a collective
            operation of the write, until the launcher ends them.
    """
    with ExitStack() as stack:
        error: Exception | None = None
        others_wait = False
        shared: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                shared = [stack.enter_context(write(folder))]
            except (OSError, ValueError) as raised:
                error = raised
        broadcast_object_list(shared)
        if shared[0] is not None:
            try:
                yield shared[0]
            except Exception as raised:  # torch and safetensors have errors of their own for a full disk
                error = raised
                # The main process of a sharded model writes between collective operations.
                others_wait = accelerator.is_main_process and accelerator.distributed_type == DistributedType.FSDP
        failed = torch.tensor(float(error is not None), device=accelerator.device)
        if others_wait or accelerator.reduce(failed, reduction="sum").item() > 0:
            raise OSError(
                f"could not write {folder}: {error or 'another process failed'}. What was there before is whole."
            ) from error
    accelerator.wait_for_everyone()


def describe_run(
    args: LoopArguments,
    model: PreTrainedModel,
    histories: HistoryStore,
    *,
    num_processes: int,
    stop_epoch: int | None,
) -> dict[str, dict[str, Any]]:
    """By part and name, what must be the same for a run to be resumed (of `processes`, the `number` may differ)."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PROVENANCE}
    checksum = zlib.crc32(histories.items.numpy(), zlib.crc32(histories.lengths))
    for name in sorted(histories.columns.keys() - {"input_ids"}):
        checksum = zlib.crc32(histories.columns[name].numpy(), checksum)
    return {
        "arguments": args.resume_critical_args(),
        "model": json.loads(json.dumps(config, default=str)),
        "data": {
            "histories": len(histories),
            "items": int(histories.lengths.sum()),
            "targets": int(histories.num_targets.sum()),
            "checksum": checksum,
        },
        "processes": {"number": num_processes},
        "schedule": {"stop_epoch": stop_epoch},
    }


def _differences(one: dict[str, Any], other: dict[str, Any], *, names: tuple[str, str]) -> str:
    """What two descriptions of a run differ in, besides the number of processes."""
    return "; ".join(
        f"{part} {key}: {one.get(part, {}).get(key)!r} {names[0]}, {value!r} {names[1]}"
        for part, values in other.items()
        for key, value in values.items()
        if part != "processes" and one.get(part, {}).get(key) != value
    )


def numbered_folders(parent: Path, prefix: str) -> list[tuple[int, Path]]:
    """The complete folders `prefix-N` of `parent`, by N."""
    if not parent.is_dir():
        return []
    found = ((re.fullmatch(rf"{prefix}-(\d+)", child.name), child) for child in parent.iterdir() if child.is_dir())
    return sorted((int(match[1]), child) for match, child in found if match)


def keep_only(parent: Path, prefix: str, *kept: int) -> None:
    """Removes the folders `prefix-N` whose N is not in `kept`."""
    for number, folder in numbered_folders(parent, prefix):
        if number not in kept:
            remove_folder(folder)


def refuse_unfinished(path: Path) -> None:
    """
    Raises:
        ValueError: if the last checkpoint in the folder of a run is one of an unfinished run.
    """
    for _, folder in numbered_folders(path, "checkpoint")[-1:]:
        if not _read_run(folder)["finished"]:
            raise ValueError(
                f"`output_dir` {path} has an unfinished run ({folder.name}): pass `resume` to continue it, or another "
                "folder."
            )


def _read_run(folder: Path) -> dict[str, Any]:
    """What the `run.json` of a checkpoint has; a `ValueError` if it is damaged."""
    run = read_json(folder / RUN_FILE)
    parts = {name: value for name, value in run.items() if name != "finished"}
    sound = isinstance(run.get("finished"), bool) and all(isinstance(part, dict) for part in parts.values())
    if not sound or "number" not in parts.get("processes", ()):
        raise ValueError(f"{folder / RUN_FILE} is damaged; remove {folder}, and begin anew.")
    return run


_locks: dict[Path, sqlite3.Connection] = {}  # of this process, by folder


def _lock_run(path: Path) -> None:
    """
    Keeps other processes from the folder of a run, until the run is finished or this process ends, also by `kill -9`.

    Raises:
        ValueError: if a run of another process writes to the folder.
    """
    path = path.resolve()
    if path in _locks:  # an earlier run of this process failed
        return
    try:
        lock = lock_file(path / LOCK_FILE)
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s. Start no other run with this folder.", error)
        return
    if lock is None:
        raise ValueError(
            f"`output_dir` is {path}, which another process uses; end that process (its launcher may have been killed, or it "
            "is an open notebook), wait for it, or give another folder."
        )
    _locks[path] = lock


def _unlock_run(path: Path) -> None:
    lock = _locks.pop(path.resolve(), None)
    if lock is not None:
        (path / LOCK_FILE).unlink(missing_ok=True)
        lock.close()


class RunFolder:
    """
    The folder of a run: `run.json`, the description of the run; `checkpoint-N`, the state of the run after step N;
    `best-N`, the model after its best step N; and, at the end, the best model.

    Args:
        path: the folder; `start` creates it.
        accelerator: a checkpoint has the state of everything that was prepared or registered with it.
        description: see [`describe_run`].
        tokenizer: saved with each model.

    Attributes:
        execution: how steps are executed. It may change between a run and its resumption, which then is not equal to the
            uninterrupted run to the last bit.
        best_in_checkpoint: the best step according to the last checkpoint; its model is kept, because a run may be
            resumed from there.

    Raises:
        ValueError: on a process whose description differs from that of the first one.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        description: dict[str, dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.path, self.accelerator, self.tokenizer = path, accelerator, tokenizer
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.description = {**description, "weights": {"sharded": self.sharded}}  # their checkpoints have other files
        self.execution: dict[str, Any] = {}
        self.best_in_checkpoint = 0
        of_first = [self.description]
        broadcast_object_list(of_first)
        if differences := _differences(of_first[0], self.description, names=("on process 0", "here")):
            raise ValueError(
                f"process {accelerator.process_index} trains on something else ({differences}); give all processes the "
                "same arguments and data."
            )

    def start(self, *, resume: bool) -> bool:
        """
        Loads the last checkpoint if the run is to be resumed and has one; otherwise begins anew.

        Returns:
            Whether a checkpoint was loaded.

        Raises:
            ValueError: if the checkpoint is of another run, is damaged, or is of an unfinished run and `resume` is false,
                or if another process trains in the folder.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            _lock_run(self.path)
            recover_writes(self.path)
        accelerator.wait_for_everyone()
        checkpoints = numbered_folders(self.path, "checkpoint")
        if checkpoints:
            folder = checkpoints[-1][1]
            saved = _read_run(folder)
            if resume:
                self._refuse_another_run(folder, saved)
                self._report_another_execution(folder, saved)
                self._load_state(folder)
                logger.info("Resumed from %s.", folder)
                return True
            refuse_unfinished(self.path)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            keep_only(self.path, "checkpoint")
            keep_only(self.path, "best")
            write_json(self.path / RUN_FILE, {**self.description, "environment": describe_environment()})
        accelerator.wait_for_everyone()
        return False

    def _load_state(self, folder: Path) -> None:
        try:
            # `load_state` ignores a damaged file of random states and would go on with another dropout.
            random_states = folder / f"random_states_{self.accelerator.process_index}.pkl"
            if random_states.exists():  # missing if there are more processes now
                load(random_states)
            self.accelerator.load_state(folder)
        except OSError:
            raise
        # Readers raise errors of many classes for a damaged file, and so do others if a process failed.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"`resume`: {folder} cannot be loaded ({reason}). If it is damaged, remove it, and begin anew without "
                "`resume`."
            ) from error

    def save_checkpoint(self, step: int, best_step: int, *, finished: bool) -> None:
        """Writes a checkpoint, then removes the previous one and models that are no longer the best."""
        with written_by_all(atomic_folder, self.path / f"checkpoint-{step}", self.accelerator) as folder:
            with quiet_libraries():
                self.accelerator.save_state(folder)
            if self.accelerator.is_main_process:
                write_json(folder / RUN_FILE, {**self.description, "execution": self.execution, "finished": finished})
        self.best_in_checkpoint = best_step
        if self.accelerator.is_main_process:
            keep_only(self.path, "checkpoint", step)
        self.keep_best(best_step)

    def save_best(self, step: int, model: PreTrainedModel) -> None:
        """Writes `best-N` for a step, and removes the other best models except that of the last checkpoint."""
        with written_by_all(atomic_folder, self.path / f"best-{step}", self.accelerator) as folder:
            self._write_model(folder, model)
        self.keep_best(step)

    def keep_best(self, step: int) -> None:
        """Removes all best models except those of `step` and of the last checkpoint."""
        if self.accelerator.is_main_process:
            keep_only(self.path, "best", step, self.best_in_checkpoint)

    def load_best(self, step: int, model: PreTrainedModel) -> bool:
        """
        Loads the weights of `best-N` into a model.

        Returns:
            Whether there are such weights; not if `step` is 0.

        Raises:
            OSError: if the folder is missing.
        """
        if step == 0:
            return False
        best = self.path / f"best-{step}"
        if not best.is_dir():
            raise OSError(f"{best}, the model of the best step, is missing; restore it and resume, or train again.")
        with quiet_libraries():
            best_model = type(model).from_pretrained(best)
        # Of a sharded model, each process takes its share of the full weights.
        set_model_state_dict(model, best_model.state_dict(), options=StateDictOptions(full_state_dict=self.sharded))
        return True

    def save_final(self, model: PreTrainedModel) -> None:
        """Writes the model and the tokenizer into the folder itself, the end of the run."""
        with written_by_all(atomic_files, self.path, self.accelerator) as folder:
            self._write_model(folder, model)
        _unlock_run(self.path)

    def _write_model(self, folder: Path, model: PreTrainedModel) -> None:
        state_dict = self.accelerator.get_state_dict(model)
        with quiet_libraries():
            model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.accelerator.is_main_process)
        if self.tokenizer is not None and self.accelerator.is_main_process:
            self.tokenizer.save_pretrained(folder)

    def _report_another_execution(self, folder: Path, saved: dict[str, Any]) -> None:
        before = saved.get("execution", {})
        changes = [
            f"{name}: {before[name]} there, {now} now"
            for name, now in self.execution.items()
            if before.get(name, now) != now
        ]
        if changes:
            logger.warning(
                "%s was written under another setting (%s): the weights will be close to those of the uninterrupted run, "
                "but not equal to the last bit.",
                folder,
                "; ".join(changes),
            )

    def _refuse_another_run(self, folder: Path, saved: dict[str, Any]) -> None:
        if differences := _differences(saved, self.description, names=("there", "now")):
            raise ValueError(
                f"`resume`: {folder} is of another run ({differences}); give the arguments, data "
                "and launch configuration of that run, or another `output_dir`."
            )
        before, now = saved["processes"]["number"], self.accelerator.num_processes
        if before != now:
            # Steps are planned for all processes together, so they stay the same; only the dropout is drawn anew.
            logger.warning(
                "Resuming on %d processes what ran on %d: the same steps, with another dropout.", now, before
            )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """
    Suppresses the progress bars of `transformers` for each file that it reads or writes, and Accelerate's warning that
    tied weights are saved only once (as they should be).
    """
    shown = transformers_logging.is_progress_bar_enabled()
    accelerate_logger = logging.getLogger("accelerate.utils")
    level = accelerate_logger.level
    transformers_logging.disable_progress_bar()
    accelerate_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate_logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
