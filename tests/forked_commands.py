"""
Runs commands of `blossomrec`, and scripts, in processes that have imported the package: children of a server that does so
once, where an import takes seconds for each new process.
"""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import blossomrec_cli


def run_in_fork(
    program: str | Path, arguments: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess:
    """
    Run a program as Python does, in a process of its own.

    Args:
        program: the name of a command, or the path of a script that starts no processes of its own.
        folder: for files with what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"blossomrec_hf.commands.{command}" for command in blossomrec_cli.COMMANDS])
    printed = {field: folder / field for field in ("stdout", "stderr")}
    process = context.Process(target=_run, args=(program, arguments, environment, os.getcwd(), printed))
    process.start()
    process.join(timeout=900)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{program} {' '.join(arguments)} takes more than 900 s")
    return subprocess.CompletedProcess(
        [program, *arguments], process.exitcode, *(path.read_text("utf-8") for path in printed.values())
    )


def _run(
    program: str | Path, arguments: list[str], environment: dict[str, str], cwd: str, printed: dict[str, Path]
) -> None:
    for number, field in enumerate(("stdout", "stderr"), 1):
        with open(printed[field], "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    if isinstance(program, Path):
        sys.argv, sys.path[:0] = [str(program), *arguments], [str(program.parent)]
        runpy.run_path(str(program), run_name="__main__")
    else:
        command = importlib.import_module(f"blossomrec_hf.commands.{program}")
        sys.argv = [command.__file__, *arguments]
        command.main()
