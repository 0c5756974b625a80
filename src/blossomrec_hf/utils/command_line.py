"""Shared parts of the commands: help texts, errors without a traceback, and loading of checkpoints."""

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
# Libraries raise their own errors for a full disk, usually with the text of the system.
_DISK_ERROR = re.compile(
    "No space left on device|Disk quota exceeded|File too large|PytorchStreamWriter failed|enforce fail at inline_container"
)
# What `HfArgumentParser` raises for arguments that a command does not have.
_UNUSED = re.compile(r"arguments are not used by the HfArgumentParser: \['([^']*)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions, and add the default of each argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.const is False:  # the --no_name that `HfArgumentParser` adds, with the help and default of --name
            return f"Disable --{action.dest}."
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with `HelpFormatter` that accepts `--some-name` for `--some_name`, as `HfArgumentParser` does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        return super().add_argument(*names, *[n.replace("_", "-") for n in names if "_" in n], **options)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """
    Exit with code 2 and one sentence on stderr if bad input, a full disk or a missing package raises an error. The
    traceback is logged at level DEBUG. Other errors pass. Use as a context manager or as the decorator `@exit_on_error()`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _ERRORS) and not _DISK_ERROR.search(str(error)):
            raise
        logger.debug("The command ends because of this error:", exc_info=True)
        print(_sentence(error), file=sys.stderr)
        raise SystemExit(2) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror.rstrip('.')}{f': {names}' if names else ''}."
    if unused := _UNUSED.search(str(error)):
        return (
            f"{unused[1]} is no argument of this command; see --help for its arguments. Lists are separated by commas."
        )
    return " ".join(str(error).split()) or type(error).__name__


def check_at_least(least: int, **settings: int) -> None:
    """
    Raises:
        ValueError: if one of the settings is less than `least`.
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"`{name}` is {value}; it must be at least {least}.")


def report_replacement(output_dir: str) -> None:
    """Log that a run will replace the model in its output folder, if there is one."""
    if (Path(output_dir) / "config.json").exists():
        logger.info("`output_dir` is %s, which has a model already; this run replaces it.", output_dir)


def load_checkpoint(kind: type, path: str, argument: str = "model") -> Any:
    """
    Call `kind.from_pretrained(path)` after checking that `path` is a checkpoint.

    Args:
        kind: the class of the model or of the tokenizer.
        path: a folder, or the name of a repository on the Hub.
        argument: the name of the command-line argument, for the error message.

    Raises:
        ValueError: if there is no checkpoint at `path`, or a damaged one.
        OSError: if the Hub cannot be reached and the cache is incomplete.
    """
    problem = _find_problem(path, ["tokenizer.json"] if issubclass(kind, PreTrainedTokenizerBase) else [])
    if problem is not None:
        raise ValueError(
            f"--{argument} is {path}, but {problem}; give the folder of a model that `blossomrec train` wrote, or its name "
            "on the Hub (owner/name)."
        )
    return kind.from_pretrained(path)


def _find_problem(path: str, files: list[str]) -> str | None:
    """The reason why `path` is no checkpoint, found without loading it; `files` are required besides config.json."""
    if Path(path).is_dir():
        missing = [name for name in ["config.json", *files] if not (Path(path) / name).is_file()]
        return f"that folder has no {missing[0]}" if missing else None
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return "there is no such folder"
    try:
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            HfApi().model_info(path, timeout=20)  # one request, where `from_pretrained` tries again for a minute
    except (RepositoryNotFoundError, HFValidationError):
        return "there is no such folder, and no such repository on the Hub that you may read (`hf auth login`)"
    except Exception as error:  # the client raises many kinds of errors without a network
        return f"there is no such folder, and the Hub could not be reached ({str(error).splitlines()[0]})"
    return None
