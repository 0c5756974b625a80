import dataclasses

import pytest
import torch
from example_cases import load_example

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


sizing = load_example("benchmarks/sizing.py")


@pytest.mark.parametrize(("items", "hidden_size", "layers", "kv_heads"), [(1000, 32, 1, 2), (500, 64, 3, 8)])
def test_memory_between_steps_is_that_of_the_tensors(items, hidden_size, layers, kv_heads):
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
    training = sizing.Training(items=items, **sizes)
    config = BlossomRecConfig(vocab_size=items + 2, intermediate_size=2 * hidden_size, **sizes)
    model = BlossomRecForSequentialRecommendation(config)
    assert training.weights == model.num_parameters()

    model.train()
    ids = torch.randint(2, items + 2, (2, 40))
    model(ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [state for of_one in optimizer.state.values() for state in of_one.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    tensors = [*model.parameters(), *gradients, *states, model.item_counts]
    assert training.persistent_bytes() == pytest.approx(sum(x.nbytes for x in tensors), rel=1e-2)


def test_sharding_divides_what_stays_and_not_the_gathered_table():
    alone = sizing.Training(items=20_000_000, sharded=True, num_negatives=1024)
    eight = dataclasses.replace(alone, gpus=8)
    counts = 8 * alone.items
    assert 8 * (eight.persistent_bytes() - counts) == pytest.approx(alone.persistent_bytes() - counts, rel=1e-6)
    assert eight.peak_bytes() - eight.persistent_bytes() == alone.peak_bytes() - alone.persistent_bytes()
    largest = sizing.largest_catalog(eight, 78 * 2**30)
    assert dataclasses.replace(eight, items=largest).peak_bytes() <= 78 * 2**30
    assert dataclasses.replace(eight, items=largest + 1).peak_bytes() > 78 * 2**30
