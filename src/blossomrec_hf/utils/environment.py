"""The environment of a run."""

import os
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from .progress import count_noun


# Passes of a model from which compilation pays on a GPU. Of training steps it takes 8 s more than capturing alone (1 s if
# compiled code was kept) and saves 5 ms per step of 65,536 items (two layers, width 128; six layers, width 256, 16,384
# items: 7 s, 3 ms; one H100, 2026-11-27). Batches of inference take and save less, and have the same number.
COMPILE_PASSES = 2_000


def worth_compiling(device: torch.device, num_passes: int) -> bool:
    """Whether a run is compiled by default: on a GPU, for at least `COMPILE_PASSES` training steps or batches."""
    return device.type == "cuda" and num_passes >= COMPILE_PASSES


def check_processes(num_processes: int) -> None:
    """
    Raise `ValueError` if a launcher started more processes than `num_processes`, those that work together: each would do
    all of the work and write the same files. Without `ACCELERATE_USE_CPU=true`, `torchrun` joins processes on GPUs only, and
    `accelerate launch --cpu` starts one process, whatever its `--num_processes`.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started > num_processes:
        raise ValueError(
            f"WORLD_SIZE is {started}, but {num_processes} process works alone; on CPUs, join them by the environment variable "
            "ACCELERATE_USE_CPU=true."
        )


def describe_environment() -> dict[str, Any]:
    """The versions of packages, the device and the commit, for results and cards."""
    packages = ("blossomrec-hf", "torch", "transformers", "accelerate", "datasets")
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except ModuleNotFoundError:
            installed[package] = None
    cpu = f"CPU, {count_noun(torch.get_num_threads(), 'thread')}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"versions": installed, "device": device, "commit": git_revision()}


def git_revision() -> str | None:
    """The commit of the package's source, with `-dirty` if tracked files have changes; `None` outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def keep_compiled_code() -> None:
    """
    Keep the results of `torch.compile` between runs in `blossomrec/compiled` below `HF_HOME` (PyTorch uses a temporary
    folder), unless the environment variable `TORCHINDUCTOR_CACHE_DIR` is set or the folder cannot be created.
    """
    folder = Path(HF_HOME) / "blossomrec" / "compiled"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
