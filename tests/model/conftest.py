"""Fixtures of the tests of the cache."""

import pytest
from cache_cases import append, recommender
from model_cases import histories

from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


@pytest.fixture
def held():
    """A model, its cache, and what that holds; every kind of layer."""
    model = recommender(attention_types=list(ATTENTION_TYPES), num_hidden_layers=4)
    rows = histories(50, 0, 7, 21)
    return model, append(model, None, rows)[0].cache, rows
