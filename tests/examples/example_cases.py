"""What the tests of the examples share."""

from pathlib import Path

import numpy as np
import polars as pl


REPOSITORY = Path(__file__).parents[2]
SMALL_MODEL = (
    "--hidden_size 16 --num_attention_heads 2 --num_key_value_heads 1 --intermediate_size 32 --max_length 20 "
    "--tokens_per_step 300 --learning_rate 1e-2 --warmup_steps 5"
).split()


def write_log(path, *, num_users, num_items):
    rng = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        steps = rng.choice([1, 1, 1, 1, 7], size=rng.integers(5, 40))
        rows += [(user, int(item), time) for time, item in enumerate((user + np.cumsum(steps)) % num_items)]
    pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").write_csv(path)
    return path
