"""
Runs commands of `blossomrec`, and scripts, in processes that have imported the package: children of a server that does so
once, where an import takes seconds for each new process.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import TCPStore

import blossomrec_cli


TIMEOUT = 900


def run_in_fork(
    program: str | Path,
    arguments: list[str],
    environment: dict[str, str],
    folder: Path,
    *,
    num_processes: int = 0,
    max_file_bytes: int | None = None,
    spawn_by_fork: bool = False,
) -> subprocess.CompletedProcess:
    """
    Run a program as Python does, in a process of its own, or in several that work together.

    Args:
        program: the name of a command, or the path of a script that starts no processes of its own.
        folder: for files with what it prints.
        num_processes: number of processes with the environment that `torchrun` gives them; 0 is one without it. The result
            has the outputs in their order, and the first exit status that is not 0.
        max_file_bytes: size at which writing a file fails, as on a full disk.
        spawn_by_fork: processes that the program spawns are forks of it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"blossomrec_hf.commands.{command}" for command in blossomrec_cli.COMMANDS])
    processes, printed = [], []
    with rank_environments(num_processes) as ranks:
        for number, of_rank in enumerate(ranks):
            printed.append([folder / f"{field}-{number}" for field in ("stdout", "stderr")])
            options = (printed[-1], max_file_bytes, spawn_by_fork)
            processes.append(
                context.Process(target=_run, args=(program, arguments, environment | of_rank, os.getcwd(), *options))
            )
            processes[-1].start()
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            process.join(timeout=max(deadline - time.monotonic(), 0))
    if any(process.exitcode is None for process in processes):
        for process in processes:
            process.kill()
        raise TimeoutError(f"{program} {' '.join(arguments)} takes more than {TIMEOUT} s")
    outputs = ["".join(path.read_text("utf-8") for path in paths) for paths in zip(*printed)]
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([program, *arguments], status, *outputs)


def run_code(code: str, *arguments: object, folder: Path, **options: object) -> subprocess.CompletedProcess:
    """Run source code as `run_in_fork` runs a script, which is written to a new `folder`."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(code)
    return run_in_fork(script, list(map(str, arguments)), dict(os.environ), folder, **options)


@contextlib.contextmanager
def rank_environments(num_processes: int) -> Iterator[list[dict[str, str]]]:
    """Variables of the environment of each process, for a store that this process serves meanwhile, as `torchrun` does."""
    if num_processes == 0:
        yield [{}]
        return
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(num_processes)}
    yield [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(num_processes)]


def _run(
    program: str | Path,
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    printed: list[Path],
    max_file_bytes: int | None,
    spawn_by_fork: bool,
) -> None:
    for number, path in enumerate(printed, 1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ |= environment
    tempfile.tempdir = None  # read from the environment again
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # that of a new process, not the one that started this process
    if max_file_bytes is not None:
        # Python would keep the first bytes of a module that is imported now for every later process.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if spawn_by_fork:
        multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    if isinstance(program, Path):
        sys.argv, sys.path[:0] = [str(program), *arguments], [str(program.parent)]
        runpy.run_path(str(program), run_name="__main__")
    else:
        command = importlib.import_module(f"blossomrec_hf.commands.{program}")
        sys.argv = [command.__file__, *arguments]
        command.main()
