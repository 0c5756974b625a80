"""Models of random sizes, and appends to their caches, for the tests of the cache."""

import random

import torch
from model_cases import histories, padded

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 1000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


def recommender(dtype: torch.dtype = torch.float64, **kwargs) -> BlossomRecForSequentialRecommendation:
    """A small model whose importance is far from uniform; block sizes, heads and rotary embedding drawn anew."""
    stride = random.choice([1, 2, 4])
    heads, groups = random.choice([(4, 2), (4, 1), (2, 2)])
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 24,
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2, 3]) + random.choice([0, 1]),
        "selection_block_size": stride * random.choice([1, 2, 4]),
        "num_selected_blocks": random.choice([1, 2, 4]),
        "short_term_block_size": random.choice([1, 3, 4]),
        "short_term_window": random.choice([1, 2]),
        "power_law_base": random.choice([2, 3]),
        "rope_parameters": random.choice(ROPES),
        "initializer_range": 0.3,
    }
    config = BlossomRecConfig(**(settings | kwargs))
    print({name: getattr(config, name) for name in settings})
    return BlossomRecForSequentialRecommendation(config).to(dtype).eval()


def padded_anywhere(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, on the right or anywhere, and their mask."""
    return padded(rows, random.choice(["left", "right", "anywhere"]), extra=random.choice([0, 0, 2]))


@torch.no_grad()
def append(model, cache, rows: list[torch.Tensor], **kwargs):
    """The output for the new events `rows`, and the logits of each row's events."""
    ids, mask = padded_anywhere(rows)
    mask_given = random.random() < 0.7
    out = model(ids, attention_mask=mask if mask_given else None, cache=cache, use_cache=True, **kwargs)
    return out, mask, [out.logits[i][mask[i] == 1] for i in range(len(rows))]


def whole(model, row: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(row[None]).logits[0]


def assert_continues(model, cache, rows: list[torch.Tensor], events: int = 9) -> None:
    """The cache holds `rows`: new events after them get the logits of whole histories."""
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert [cache.item_ids[i, : len(row)].tolist() for i, row in enumerate(rows)] == [row.tolist() for row in rows]
    new = histories(*(random.randint(0, events) for _ in rows))
    _, _, logits = append(model, cache, new)
    for row, events, found in zip(rows, new, logits):
        expected = whole(model, torch.cat([row, events]))[len(row) :]
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype])
