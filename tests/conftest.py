"""What all tests share: every test draws fresh random numbers, and says which when it fails."""

import os
import random

import numpy as np
import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: the kernels run on the CPU


@pytest.fixture(autouse=True)
def seed() -> int:
    """A seed drawn anew for each test (or set by `BLOSSOMREC_TEST_SEED`); pytest shows it where a test fails."""
    value = int(os.environ.get("BLOSSOMREC_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"BLOSSOMREC_TEST_SEED={value}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
