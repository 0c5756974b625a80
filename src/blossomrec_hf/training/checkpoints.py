"""What a run leaves on disk: folders that are whole or absent, and a log of JSON lines."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


_PARTIAL = ".partial"


@contextmanager
def written_aside(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """
    Gives a folder to write into, and renames it to `folder` when all processes are done: whoever looks, after a kill
    as well, finds the whole folder or none.

    Raises:
        OSError: on every process, if one of them could not write (a full disk). Nothing is left of the folder then.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    error = None
    try:
        yield partial
    except Exception as raised:  # torch and safetensors have errors of their own for a full disk
        error = raised
    failed = torch.tensor(float(error is not None), device=accelerator.device)
    if accelerator.reduce(failed, reduction="sum").item() > 0:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {folder}: {error or 'another process failed'}. What was there before is whole."
        ) from error
    if accelerator.is_main_process:
        # The target exists when a run that was cut off between two such folders does the same step again.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def numbered_folders(parent: Path, prefix: str) -> list[tuple[int, Path]]:
    """The complete folders `prefix-N` of `parent`, by N."""
    if not parent.is_dir():
        return []
    found = ((re.fullmatch(rf"{prefix}-(\d+)", child.name), child) for child in parent.iterdir() if child.is_dir())
    return sorted((int(match[1]), child) for match, child in found if match)


def keep_only(parent: Path, prefix: str, *kept: int) -> None:
    """Removes the folders `prefix-N` whose N is not in `kept`, and what an interrupted write left."""
    for child in parent.glob(f"{prefix}-*"):
        if child.name not in [f"{prefix}-{number}" for number in kept]:
            shutil.rmtree(child, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
            partial = path.with_name(path.name + _PARTIAL)
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

    def _lines_until(self, step: int) -> list[str]:
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A kill can cut the last line.
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            lines.append(line)
        return lines

    def write(self, **values: Any) -> None:
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
