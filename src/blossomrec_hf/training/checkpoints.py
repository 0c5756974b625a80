"""What a run leaves on disk: folders that are whole or absent, and a log of JSON lines."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from transformers.utils import logging as transformers_logging

from ..utils.environment import describe_environment
from ..utils.files import atomic_folder, atomic_write, read_json, recover_writes, remove_folder, write_json


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


@contextmanager
def written_by_all(
    write: Callable[[Path], AbstractContextManager[Path]], folder: Path, accelerator: Accelerator
) -> Iterator[Path]:
    """
    An atomic write that all processes take part in; each yields the same path.

    Args:
        write: `atomic_folder` or `atomic_files` of `blossomrec_hf.utils.files`.

    Raises:
        OSError: on every process, if one of them could not write (a full disk). Nothing is left of the write then.
    """
    with ExitStack() as stack:
        error: Exception | None = None
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
        failed = torch.tensor(float(error is not None), device=accelerator.device)
        if accelerator.reduce(failed, reduction="sum").item() > 0:
            raise OSError(
                f"could not write {folder}: {error or 'another process failed'}. What was there before is whole."
            ) from error
    accelerator.wait_for_everyone()


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
                f"`output_dir` {path} holds an unfinished run ({folder.name}): pass `resume` to go on with it, or another "
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


class RunFolder:
    """
    The folder of a run: `run.json`, what the run is; `checkpoint-N`, all that it needs to go on after step N; `best-N`, the
    model after its best step N.

    Args:
        path: the folder; made by `start`.
        accelerator: what it was prepared with is what a checkpoint holds.
        description: by part and name, what has to be the same for a run to be continued; of `processes`, the `number`
            may differ.

    Attributes:
        execution: how steps are executed. It may change between a run and its resumption, which then is not equal to the
            uninterrupted run to the last bit.
        best_in_checkpoint: the best step that the last checkpoint knows of; its model must stay as long as a run may
            go on from there.
    """

    def __init__(self, path: Path, accelerator: Accelerator, description: dict[str, dict[str, Any]]):
        self.path, self.accelerator, self.description = path, accelerator, description
        self.execution: dict[str, Any] = {}
        self.best_in_checkpoint = 0

    def start(self, *, resume: bool) -> bool:
        """
        Loads the last checkpoint if the run is to be resumed and has one, and tells whether it did; otherwise begins
        anew.

        Raises:
            ValueError: the checkpoint is of another run, or of an unfinished one that is not to be resumed.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process:
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
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN_FILE, {**self.description, "environment": describe_environment()})
        accelerator.wait_for_everyone()
        return False

    def _load_state(self, folder: Path) -> None:
        """A `ValueError` for a damaged file. `load_state` would go on with another dropout if it is that of the random states."""
        try:
            random_states = folder / f"random_states_{self.accelerator.process_index}.pkl"
            if random_states.exists():  # not where the processes have become more
                load(random_states)
            self.accelerator.load_state(folder)
        except OSError:
            raise
        except Exception as error:  # whatever a damaged file makes of the readers
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"`resume`: {folder} is damaged ({reason}); remove it, and begin anew without `resume`."
            ) from error

    def save_checkpoint(self, step: int, best_step: int, *, finished: bool) -> None:
        """Writes a checkpoint, then removes the one before and the models that were best before."""
        with written_by_all(atomic_folder, self.path / f"checkpoint-{step}", self.accelerator) as folder:
            with quiet_libraries():
                self.accelerator.save_state(folder)
            if self.accelerator.is_main_process:
                write_json(folder / RUN_FILE, {**self.description, "execution": self.execution, "finished": finished})
        self.best_in_checkpoint = best_step
        if self.accelerator.is_main_process:
            keep_only(self.path, "checkpoint", step)
        self.keep_best(best_step)

    def keep_best(self, step: int) -> None:
        """Removes all best models but that of `step` and the one that the last checkpoint knows of."""
        if self.accelerator.is_main_process:
            keep_only(self.path, "best", step, self.best_in_checkpoint)

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
        differences = [
            f"{part} {key}: {saved.get(part, {}).get(key)!r} there, {value!r} now"
            for part, values in self.description.items()
            for key, value in values.items()
            if part != "processes" and saved.get(part, {}).get(key) != value
        ]
        if differences:
            raise ValueError(f"`resume`: {folder} is of another run. {'; '.join(differences)}.")
        before, now = saved["processes"]["number"], self.accelerator.num_processes
        if before != now:
            # The steps are planned for the whole, so they go on where they were; only the dropout is drawn anew.
            logger.warning(
                "Resuming on %d processes what ran on %d: the same steps, with another dropout.", now, before
            )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """
    Without the bars that `transformers` shows for every file that it reads or writes (the loop has its own), and
    without Accelerate's warning that tied weights are saved once (as they should be).
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


class MetricsFile:
    """
    A log of JSON lines, each with a `step`. A continued run first drops the lines that lie after the step it goes on
    from, so the file reads as if the run had never been interrupted.
    """

    def __init__(self, path: Path, *, enabled: bool, step: int | None = None):
        self.path = path
        self.enabled = enabled
        if enabled:
            kept = [] if step is None or not path.exists() else self._lines_until(step)
            with atomic_write(path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")

    def _lines_until(self, step: int) -> list[str]:
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if not line.endswith("\n"):  # a kill can cut the last line
                break
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path} is damaged in line {len(lines) + 1}; remove that line.") from error
            lines.append(line)
        return lines

    def write(self, **values: Any) -> None:
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
