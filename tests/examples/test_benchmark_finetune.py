import importlib.util

import numpy as np
import polars as pl
import pytest
from example_cases import REPOSITORY


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("grown", REPOSITORY / "examples" / "benchmark_finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_old_and_new_log_share_no_event_and_no_new_item(example):
    rng = np.random.default_rng()
    log = pl.DataFrame({"user": rng.integers(0, 50, 3000), "item": (80 * rng.random(3000) ** 2).astype(int)})
    events = example.read_events(log)
    assert events.select("user", "item").sort("user", "item").equals(log.sort("user", "item"))
    old, new = example.divide(events, 30, seed=1)
    assert pl.concat([old, new]).sort("user", "timestamp").equals(events.sort("user", "timestamp"))
    old_users, new_items = set(old["user"]), set(new["item"]) - set(old["item"])
    assert 0 < len(old_users) < 50 and len(new_items) == 30
    counts = dict(events["item"].value_counts().iter_rows())
    assert max(counts[item] for item in new_items) <= min(counts[item] for item in set(old["item"]))
    # An old user's part of the new log holds new items alone.
    assert set(new.filter(pl.col("user").is_in(list(old_users)))["item"]) <= new_items
    with pytest.raises(ValueError, match="`new_items` is 80"):
        example.divide(events, 80, seed=1)
