"""
The least work of attention and of whole steps: operations of matrix products, and bytes that must move. Counted from a
configuration and the lengths of the histories.

Every matrix product and every attention reads what it takes and writes what it gives once. Its backward pass reads what
it took and the gradient, and writes gradients. What lies between them is free, and so are weights. A product of n
multiplications and additions is 2·n operations, and its backward pass twice as many: nothing is computed again.
"""

from typing import NamedTuple

import numpy as np

from blossomrec_hf import BlossomRecConfig
from blossomrec_hf.model.ops_reference import power_law_distances


class Pairs(NamedTuple):
    """
    What the queries of histories meet.

    Attributes:
        attended: (query, key) pairs that a query head attends to, by stream.
        scored: (query, block) pairs that a key/value head scores.
        windows: windows that a key/value head compresses.
    """

    attended: dict[str, int]
    scored: int
    windows: int


class Work(NamedTuple):
    """
    The work of a part of a step.

    Attributes:
        name: of the part.
        operations: of its matrix products.
        elements: numbers that it reads and writes.
    """

    name: str
    operations: float
    elements: float


def count_pairs(config: BlossomRecConfig, length: int) -> Pairs:
    """The pairs of a history of `length` items, in a layer of the first layer's type, `full` or `blossom`."""
    t = np.arange(length)
    if config.attention_types[0] == "full":
        return Pairs({"full": int((t + 1).sum())}, 0, 0)
    candidates, in_block = np.divmod(t, config.selection_block_size)
    long = config.selection_block_size * np.minimum(candidates, config.num_selected_blocks) + in_block + 1
    block, in_block = np.divmod(t, config.short_term_block_size)
    distances = power_law_distances(int(block[-1]) + 1, config.short_term_window, config.power_law_base).tolist()
    short = sum(np.where(block >= x, config.short_term_block_size if x else in_block + 1, 0) for x in distances)
    per_block = config.selection_block_size // config.compress_stride
    attended = {"long-term": int(long.sum()), "short-term": int(short.sum())}
    return Pairs(attended, int(candidates.sum()), length // config.selection_block_size * per_block)


def attention_operations(config: BlossomRecConfig, pairs: Pairs) -> dict[str, float]:
    """Operations of the forward pass of one layer's attention, by stream and step; the backward pass has twice as many."""
    groups, width = config.num_key_value_heads, config.head_dim
    window = config.compress_block_size * width
    found = {}
    if pairs.windows:
        found["compress"] = 2 * groups * pairs.windows * window * (window + width)
    if pairs.scored:
        found["score"] = 2 * groups * pairs.scored * width
    return found | {name: 4 * config.hidden_size * count for name, count in pairs.attended.items()}


def core_work(config: BlossomRecConfig, tokens: int, operations: float, *, training: bool) -> Work:
    """
    The work of one layer's attention: what lies between q, k, v, gate values and the head outputs.

    Args:
        operations: of its forward pass.
    """
    queries, keys, gates = _widths(config)
    elements = tokens * (2 * queries + 2 * keys + gates)
    if training:
        elements += tokens * (3 * queries + 4 * keys + 2 * gates)
    return Work("attention", operations * (3 if training else 1), elements)


def step_work(config: BlossomRecConfig, tokens: int, scored: int, operations: float, *, training: bool) -> list[Work]:
    """
    The work of a step, by part: all layers, and the scores of the whole catalog.

    Args:
        tokens: number of positions.
        scored: number of positions whose scores are needed. Behind the attention, the last layer computes these alone; in
            inference, of the other positions it needs keys and values.
        operations: of the forward pass of one layer's attention.
    """
    layers, rows = config.num_hidden_layers, (config.num_hidden_layers - 1) * tokens + scored
    queries, keys, gates = _widths(config)
    width, inner = config.hidden_size, config.intermediate_size
    attention = core_work(config, tokens, operations, training=training)
    projections = _product("projections", layers * tokens, width, queries + 2 * keys + gates, training)
    layer, elements = layers, layers * attention.elements
    if not training and scored < tokens:
        layer, elements = layers - 1, (layers - 1) * attention.elements + tokens * 2 * keys
        of_keys = _product("", tokens, width, 2 * keys, training)
        every = _product("", layer * tokens, width, queries + 2 * keys + gates, training)
        projections = Work("projections", every.operations + of_keys.operations, every.elements + of_keys.elements)
    return [
        projections,
        Work("attention", layer * attention.operations, elements),
        _product("output projection", rows, queries, width, training),
        _product("feed-forward, up", rows, width, inner, training),
        _product("feed-forward, down", rows, inner, width, training),
        _product("scores", scored, width, config.vocab_size, training),
    ]


def _widths(config: BlossomRecConfig) -> tuple[int, int, int]:
    """Numbers per position of queries, of keys, and of gates."""
    gates = 0 if config.attention_types[0] == "full" else 2 * config.num_attention_heads
    return config.hidden_size, config.num_key_value_heads * config.head_dim, gates


def _product(name: str, rows: int, taken: int, given: int, training: bool) -> Work:
    elements = rows * (taken + given + (2 * taken + given if training else 0))
    return Work(name, rows * 2 * taken * given * (3 if training else 1), elements)
