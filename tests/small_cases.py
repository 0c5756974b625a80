"""A small log and a small model, for tests of all kinds."""

import numpy as np

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


def small_log(num_users=60, num_items=60):
    """A log in which an item's successor on a ring mostly follows it: easy to learn. Every item occurs."""
    import polars as pl  # tests of models and of GPUs need no data libraries

    rng = np.random.default_rng(0)
    users, items = [], []
    for user in range(num_users):
        steps = rng.choice([1, 1, 1, 1, 7], size=rng.integers(5, 40))
        users += [user] * len(steps)
        items += ((user + np.cumsum(steps)) % num_items).tolist()
    return pl.DataFrame({"user": users, "item": items})


def make_model(vocab_size=62, **changes):
    """A model of two narrow layers."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "compress_block_size": 4,
        "compress_stride": 2,
        "selection_block_size": 4,
        "num_selected_blocks": 2,
        "short_term_block_size": 2,
    }
    return BlossomRecForSequentialRecommendation(BlossomRecConfig(**{**settings, **changes}))
