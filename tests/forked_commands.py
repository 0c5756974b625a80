"""
Runs commands of `blossomrec` in processes that have imported them: children of a server that does so once, where an import
takes seconds for each new process.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import blossomrec_cli


def run_in_fork(
    name: str, arguments: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess:
    """
    Run a command as `python -m blossomrec_hf.commands.NAME` does, in a process of its own.

    Args:
        folder: for files with what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"blossomrec_hf.commands.{command}" for command in blossomrec_cli.COMMANDS])
    printed = {field: folder / field for field in ("stdout", "stderr")}
    process = context.Process(target=_run, args=(name, arguments, environment, os.getcwd(), printed))
    process.start()
    process.join(timeout=900)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{name} {' '.join(arguments)} takes more than 900 s")
    return subprocess.CompletedProcess(
        [name, *arguments], process.exitcode, *(path.read_text("utf-8") for path in printed.values())
    )


def _run(name: str, arguments: list[str], environment: dict[str, str], cwd: str, printed: dict[str, Path]) -> None:
    for number, field in enumerate(("stdout", "stderr"), 1):
        with open(printed[field], "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    command = importlib.import_module(f"blossomrec_hf.commands.{name}")
    sys.argv = [command.__file__, *arguments]
    command.main()
