"""Progress of long work: a bar on a terminal or in a notebook, plain log lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0  # between two lines
_VERBOSE = ("accelerate", "httpx", "matplotlib", "datasets", "sentence_transformers", "onnx_ir", "onnxscript")


def can_draw_bars() -> bool:
    """Whether the output is a terminal or a notebook, and `TQDM_DISABLE` is not set."""
    switched_off = os.environ.get("TQDM_DISABLE", "").lower() in ("1", "true", "yes", "on")
    return (sys.stderr.isatty() or _in_notebook()) and not switched_off


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel. `tqdm` draws bars there, although standard error is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def set_up_logging(level: int = logging.INFO) -> None:
    """
    Set up the log of a command on standard error: messages of this package from `level`, and warnings of other libraries.
    Their progress bars are disabled if the output can show none. Of several processes that a launcher started, all but the
    first log warnings only.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    is_first = "LOCAL_RANK" not in os.environ or int(os.environ.get("RANK", 0)) == 0
    logging.getLogger("blossomrec_hf").setLevel(level if is_first else max(level, logging.WARNING))
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(logging.WARNING)
    if not can_draw_bars():
        if find_spec("datasets") is not None:  # training from one file does without
            from datasets import disable_progress_bars

            disable_progress_bars()
        transformers_logging.disable_progress_bar()


class LogLines:
    """
    A substitute for a `tqdm` bar that writes to the log. `update` writes a line if the last one is at least a minute old.
    """

    def __init__(self, *, total: int, description: str, enabled: bool = True, initial: int = 0):
        self.total, self.description, self.enabled = total, description, enabled
        self.done = self.initial = initial
        self.postfix: dict[str, Any] = {}
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, values: Mapping[str, Any], refresh: bool = True) -> None:
        """Set the values at the end of the following lines."""
        self.postfix = dict(values)

    def update(self, number: int = 1) -> None:
        """Add `number` finished steps."""
        self.done += number
        now = time.monotonic()
        if not self.enabled or now - self.last_line < LOG_SECONDS:
            return
        self.last_line = now
        left = (now - self.started) / max(self.done - self.initial, 1) * (self.total - self.done)
        parts = [
            f"{self.done} of {self.total} ({self.done / max(self.total, 1):.0%})",
            f"about {left / 60:.0f} min left",
        ]
        logger.info("%s: %s", self.description, ", ".join([*parts, *(f"{k} {v}" for k, v in self.postfix.items())]))


def progress_bar(
    *, total: int, description: str, enabled: bool = True, initial: int = 0, leave: bool = True
) -> tqdm | LogLines:
    """
    A context manager for the progress of `total` steps: a `tqdm` bar on a terminal or in a notebook, one log line per
    minute elsewhere, no output if not `enabled`.
    """
    if not can_draw_bars():
        return LogLines(total=total, description=description, enabled=enabled, initial=initial)
    return tqdm(total=total, initial=initial, desc=description, leave=leave, dynamic_ncols=True, disable=not enabled)


def count_noun(number: int, noun: str) -> str:
    """A number with its noun: `1 epoch`, `2 epochs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
