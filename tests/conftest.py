"""What all tests share: every test draws fresh random numbers, and says which when it fails."""

import atexit
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from local_hub import LocalHub


# Before anything imports `huggingface_hub`: what a test asks of the Hub goes to one on this machine, which refuses
# connections until a test starts it, and nothing is read from or written to a user's cache.
HUB = LocalHub()
HUB_HOME = tempfile.mkdtemp(prefix="blossomrec-tests-")
atexit.register(shutil.rmtree, HUB_HOME, ignore_errors=True)
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": HUB_HOME, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: the kernels run on the CPU
    import quick_interpreter


@pytest.fixture(autouse=True)
def seed() -> int:
    """A seed drawn anew for each test (or set by `BLOSSOMREC_TEST_SEED`); pytest shows it where a test fails."""
    value = int(os.environ.get("BLOSSOMREC_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"BLOSSOMREC_TEST_SEED={value}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def own_compiled_code() -> Iterator[None]:
    """Compiled code ends with its test: in a process, PyTorch compiles a function anew only a few times."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def overflow_is_an_error() -> Iterator[None]:
    """Arithmetic of integers that overflows in Triton's interpreter raises an error."""
    if INTERPRETED:
        quick_interpreter.find_overflow(True)
    yield
    if INTERPRETED:
        quick_interpreter.find_overflow(False)


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    """An empty Hub that serves; with the token `hf_writer` one may do everything under `ada/`."""
    HUB.start()
    HUB.reset()
    yield HUB
    HUB.faults.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
