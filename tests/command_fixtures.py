"""Fixtures of the tests of commands and examples, which run them as a user does; imported by their `conftest.py`."""

import os
import subprocess
import sys

import pytest
from example_cases import REPOSITORY, SMALL_MODEL, write_log
from forked_commands import run_in_fork

import blossomrec_hf  # noqa: F401  (makes the Auto classes know the models that the commands save)


def command_environment():
    """The environment of a command: without a progress bar and a GPU."""
    path = os.pathsep.join(sys.path)
    return {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def run_python():
    """Runs Python with arguments and returns what it printed; with `status`, the exit status that is expected."""

    def run(*arguments, launcher=(), status=0, field="stdout"):
        command = [sys.executable, *launcher, *map(str, arguments)]
        done = subprocess.run(command, env=command_environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == status, done.stdout + done.stderr
        return getattr(done, field)

    return run


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory):
    """Runs a command or a script as `run_python` does, in processes that need not import the package (`run_in_fork`)."""
    folder = tmp_path_factory.mktemp("printed")

    def run(program, *arguments, status=0, field="stdout", **options):
        done = run_in_fork(program, list(map(str, arguments)), command_environment(), folder, **options)
        assert done.returncode == status, done.stdout + done.stderr
        return getattr(done, field)

    return run


@pytest.fixture(scope="session")
def run_example(run_forked, run_python):
    """Runs a script of `examples/`; one with a `launcher` is not forked."""

    def run(script, *arguments, launcher=(), **options):
        path = REPOSITORY / "examples" / script
        if launcher:
            return run_python(path, *arguments, launcher=launcher, **options)
        return run_forked(path, *arguments, **options)

    return run


@pytest.fixture(scope="session")
def run_command(run_forked, run_python):
    """Runs a command of `blossomrec`; one with a `launcher` is not forked."""

    def run(name, *arguments, launcher=(), **options):
        if launcher:
            return run_python("-m", f"blossomrec_hf.commands.{name}", *arguments, launcher=launcher, **options)
        return run_forked(name, *arguments, **options)

    return run


@pytest.fixture(scope="session")
def log_file(tmp_path_factory):
    """A CSV of 60 users; an item's successor on a ring of 60 mostly follows it."""
    return write_log(tmp_path_factory.mktemp("log") / "log.csv", num_users=60, num_items=60)


@pytest.fixture(scope="session")
def trained(run_command, log_file, tmp_path_factory):
    """(folder of a trained model, what was printed, results file)"""
    folder = tmp_path_factory.mktemp("trained")
    printed = run_command("train", *SMALL_MODEL, "--data", log_file, "--output_dir", folder / "run", "--num_train_epochs", 15,
        "--results_json", folder / "results.json",
    )  # fmt: skip
    return folder / "run", printed, folder / "results.json"
