"""The least work of the benchmark: pairs against a loop over all queries, operations against PyTorch's own counter."""

import importlib
import random

import pytest
import torch
from example_cases import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


@pytest.fixture
def work(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples" / "benchmarks")
    return importlib.import_module("work")


def test_pairs_are_those_that_the_mechanism_attends_to(work):
    for _ in range(20):
        config = BlossomRecConfig(
            num_selected_blocks=random.randint(1, 5),
            short_term_block_size=random.randint(1, 9),
            short_term_window=random.randint(1, 4),
            power_law_base=random.randint(2, 3),
        )
        length, b, short = random.randint(1, 300), config.selection_block_size, config.short_term_block_size
        near = {*range(config.short_term_window), *(config.power_law_base**i for i in range(10))}
        scored = sum(t // b for t in range(length))
        # selected blocks and the own one
        long = sum(b * min(t // b, config.num_selected_blocks) + t % b + 1 for t in range(length))
        near_pairs = sum(t // short - u // short in near for t in range(length) for u in range(t + 1))
        found = work.count_pairs(config, length)
        assert found == ({"long-term": long, "short-term": near_pairs}, scored, length // b), config
        full = BlossomRecConfig(attention_types="full")
        assert work.count_pairs(full, length) == ({"full": length * (length + 1) // 2}, 0, 0)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["blossom", "full"])
def test_operations_are_those_of_the_reference_if_it_attends_to_all_pairs(work, kind, training):
    for _ in range(3):
        length = random.randint(20, 90)
        config = BlossomRecConfig(
            vocab_size=50,
            attention_types=kind,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=random.choice([1, 2, 4]),
            intermediate_size=48,
            compress_stride=random.choice([4, 8]),
            compress_block_size=8,
            selection_block_size=8,
            attn_implementation="eager",
        )
        pairs = work.count_pairs(config, length)
        # The reference scores every block for every query head, and attends to all keys with a mask.
        scored = length * (length // 8) * 4 // config.num_key_value_heads if pairs.scored else 0
        dense = pairs._replace(attended=dict.fromkeys(pairs.attended, length * length), scored=scored)
        operations = sum(work.attention_operations(config, dense).values())
        parts = work.step_work(config, length, length, operations, training=training)
        model = BlossomRecForSequentialRecommendation(config).train(training)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = model(input_ids=torch.randint(2, 50, (1, length))).logits
            if training:
                logits.sum().backward()
        assert counter.get_total_flops() == sum(part.operations for part in parts), (config, length)
