"""
The `blossomrec` command: lists the commands, and runs one of them. It lies outside the package, because importing the
package imports PyTorch, which takes seconds; `blossomrec --help` does not.
"""

import difflib
import importlib
import sys
from importlib.metadata import version
from typing import NoReturn


COMMANDS = {
    "prepare": "build item-id sequences from an interaction log",
    "train": "train a model, evaluate it and save it",
    "finetune": "fine-tune a model on new events, with new items",
    "evaluate": "rank the held-out items of a log by checkpoints and baselines",
    "compare": "run a paired significance test between two groups of checkpoints",
    "study": "run a grid of configurations, seeds and data sets, and compare them",
    "recommend": "write the recommendations of all users to Parquet files",
    "similar": "print the items that are most similar to given items",
    "serve": "serve recommendations over HTTP",
    "push": "upload a trained model to the Hub",
    "export": "write a checkpoint as ONNX or torch.export program, or prepared data as one file",
    "convert": "convert a checkpoint from or to the authors' code",
    "card": "write the model card of a run",
}
EXTRAS = {"serve": "serve"}  # commands that cannot be imported without the packages of an extra
USAGE = "usage: blossomrec [--import MODULE] COMMAND [options]\n\n" + "\n".join(
    f"  {name:<10} {text}" for name, text in COMMANDS.items()
)
USAGE += (
    "\n\n`blossomrec COMMAND --help` lists the options of a command, `blossomrec --version` prints the version.\n"
    "`--import MODULE` imports a module of yours first, from the current folder or the environment: one that registers\n"
    "streams, objectives or formats."
)


def main() -> None:
    """Run `blossomrec COMMAND …`. Exits with code 2 if the command does not exist or its extra is not installed."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        print(version("blossomrec-hf"))
        return
    while arguments[0] == "--import":
        if len(arguments) < 3:
            _exit("`--import` requires a module and a command: `blossomrec --import my_streams train ...`.")
        _import(arguments[1])
        arguments = arguments[2:]
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}."
        _exit(f"blossomrec has no command {name!r}; {hint}")
    sys.argv = [f"blossomrec {name}", *rest]
    try:
        command = importlib.import_module(f"blossomrec_hf.commands.{name}")
    except ModuleNotFoundError as error:
        if name not in EXTRAS:
            raise
        _exit(f'blossomrec {name} requires {error.name}: `pip install "blossomrec-hf[{EXTRAS[name]}]"`.')
    command.main()


def _import(module: str) -> None:
    """Import a module as `python -m` does, from the current folder first."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        _exit(f"`--import` is {module!r}, which cannot be imported: {error}.")


def _exit(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)
