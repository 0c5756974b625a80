"""Fixtures of the tests of training, batches and evaluation; imported by their `conftest.py`."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from small_cases import small_log


@pytest.fixture(scope="session")
def log():
    """(dataset, tokenizer) of 60 users and 60 items; vocab_size 62."""
    from blossomrec_hf.data import build_sequences

    return build_sequences(small_log())


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """What one test asked of Accelerate (bf16, a tracker) must not reach the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
