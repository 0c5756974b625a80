"""The top of a catalog beside a twin that scores everything and sorts it with Python."""

import random

import pytest
import torch
from ranking_cases import draw_ids, padded, sorted_with_python

from blossomrec_hf.model import ranking_blossomrec
from blossomrec_hf.model.ranking_blossomrec import rank_items, top_of_rows


@pytest.mark.parametrize("size", [1, 2, 3, 10, 50])
def test_the_top_of_rows_is_that_of_a_stable_sort(size):
    for k in (1, 2, 5, size, size + 3):
        scores = torch.randint(-3, 3, (40, size)).float()
        scores[torch.rand(40, size) < 0.3] = -torch.inf
        scores[:3] = 1.0
        expected = scores.sort(dim=1, descending=True, stable=True)
        values, places = top_of_rows(scores, k)
        assert torch.equal(values, expected.values[:, :k])
        left = values > -torch.inf
        assert torch.equal(places[left], expected.indices[:, :k][left])


@pytest.mark.parametrize("choice", ["all", "shared", "own few", "own many"])
@pytest.mark.parametrize("popular", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_ranking_agrees_with_the_twin_where_scores_tie(monkeypatch, choice, popular, scaled):
    monkeypatch.setitem(ranking_blossomrec.MAX_SCORES, "cpu", 2**11)  # several chunks of items, and of rows
    rows, vocab_size, top_k = 7, 4000, random.choice([1, 10, 30])
    # Small whole numbers: sums are exact and most scores occur many times.
    states, weight = torch.randint(-1, 2, (rows, 3)), torch.randint(-1, 2, (vocab_size, 3))
    counts = torch.randint(0, 9, (vocab_size,))
    empty = torch.rand(rows) < 0.5
    scores = (states @ weight.T).tolist()
    scales = None
    if scaled:
        scales = 2.0 ** torch.randint(-2, 3, (vocab_size,))
        scores = (states @ weight.T * scales).tolist()
    if popular:
        scores = [counts.tolist() if empty[i] else scores[i] for i in range(rows)]
    excluded = draw_ids(rows, 3000, vocab_size)
    candidates = {
        "all": None,
        "shared": draw_ids(1, 3000, vocab_size)[0],
        "own few": [*draw_ids(rows - 1, 100, vocab_size), []],
        "own many": draw_ids(rows, 3000, vocab_size),
    }[choice]
    tensor = None
    if candidates is not None:
        tensor = torch.tensor(candidates) if choice == "shared" else padded(candidates, padding=-1)
    ids, found = rank_items(
        states.float(),
        weight.float(),
        top_k,
        scales=scales,
        excluded=padded(excluded, padding=-1),
        candidates=tensor,
        popular=empty if popular else None,
        item_counts=counts,
    )
    for i in range(rows):
        own = candidates[i] if choice.startswith("own") else candidates
        assert (ids[i].tolist(), found[i].tolist()) == sorted_with_python(scores[i], top_k, excluded[i], own)
