"""A small log for the tests of training."""

import pytest
from training_cases import small_log

from blossomrec_hf.data import build_sequences


@pytest.fixture(scope="session")
def log():
    """(dataset, tokenizer) of 60 users and 60 items; vocab_size 62."""
    return build_sequences(small_log())
