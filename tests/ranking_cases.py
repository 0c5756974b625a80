"""Random ids, and the twin of rankings that sorts with Python."""

import random

import torch


def padded(rows: list[list[int]], side: str = "left", padding: int = 0) -> torch.Tensor:
    length = max(map(len, rows))
    fill = [[padding] * (length - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for f, r in zip(fill, rows)], dtype=torch.long)


def sorted_with_python(scores: list[float], top_k: int, excluded=(), candidates=None, min_score=None):
    """(ids, scores) of the best items of one row of scores."""
    items = range(2, len(scores)) if candidates is None else {item for item in candidates if item >= 2}
    order = sorted((-scores[item], item) for item in items if item not in set(excluded))
    order = [(item, -score) for score, item in order if min_score is None or -score >= min_score][:top_k]
    order += [(-1, -torch.inf)] * (top_k - len(order))
    return [item for item, _ in order], [score for _, score in order]


def draw_ids(rows: int, most: int, vocab_size: int) -> list[list[int]]:
    """Ids with repeats and with special ones among them."""
    return [torch.randint(0, vocab_size, (random.randint(0, most),)).tolist() for _ in range(rows)]
