import numpy as np
import pytest
import torch
from small_cases import make_model

from blossomrec_hf.data import item_counts, split
from blossomrec_hf.training import (
    HeldOutItems,
    HistoryStore,
    LastItemNeighbours,
    PopularityScores,
    bootstrap_means,
    describe_evaluation,
    markdown_table,
    paired_difference,
    rank_by_scores,
    rank_held_out_items,
)


@pytest.fixture(scope="module")
def held_out(log):
    return HeldOutItems.from_rows(split(log[0], "test"), max_length=10)


def test_negatives_are_drawn_evenly_from_what_a_user_has_not_met(log, held_out):
    negatives = held_out.sample_negatives(500, vocab_size=62, seed=1)
    assert negatives.shape == (60, 500)
    for user, row in enumerate(split(log[0], "test")):
        allowed = set(range(2, 62)) - set(row["seen_ids"]) - set(row["target_ids"])
        times = np.bincount(negatives[user], minlength=62)
        assert set(np.flatnonzero(times)) <= allowed
        expected = 500 / len(allowed)
        assert (abs(times[sorted(allowed)] - expected) < 6 * np.sqrt(expected) + 1).all()
    np.testing.assert_array_equal(negatives, held_out.sample_negatives(500, vocab_size=62, seed=1))
    assert (negatives != held_out.sample_negatives(500, vocab_size=62, seed=2)).any()


def test_sampled_ranks_count_the_negatives_that_score_higher(held_out):
    scores = torch.rand(60, 62).round(decimals=1)
    ranks = rank_by_scores(lambda users: scores[users], held_out, vocab_size=62, num_negatives=30, seed=4)
    negatives = held_out.sample_negatives(30, vocab_size=62, seed=4)
    for user, target in enumerate(held_out.targets):
        drawn = scores[user, negatives[user].astype(int)]
        higher, equal = (drawn > scores[user, target]).sum(), (drawn == scores[user, target]).sum()
        assert ranks.sampled[user] == 1 + higher + equal / 2
    assert "ndcg@10_uni30" in ranks.metrics()


def test_a_user_who_has_met_everything_is_named():
    rows = [{"user_id": "eve", "input_ids": [2], "target_ids": [3], "seen_ids": [2, 4]}]
    with pytest.raises(ValueError, match="user 'eve' has met every item"):
        HeldOutItems.from_rows(rows).sample_negatives(100, vocab_size=5)


def test_top_items_are_those_that_the_model_recommends(log, held_out):
    model = make_model()
    ranks = rank_held_out_items(model, split(log[0], "test"), top_k=5, progress=False)
    for user, row in enumerate(split(log[0], "test")):
        history = torch.tensor([row["input_ids"]])
        keep = torch.tensor([i for i in range(2, 62) if i not in set(row["seen_ids"]) - set(row["target_ids"])])
        best = model.recommend(history, top_k=5, exclude_seen=False, candidate_ids=keep)
        scores = best.scores[0]
        if scores.diff().abs().min() > 1e-5:  # else their order may hang on a rounding
            assert ranks.top_items[user].tolist() == best.item_ids[0].tolist()


def test_baselines_score_as_counted_by_hand(log, held_out):
    counts = item_counts(log[0], 62)
    histories = [row["input_ids"] for row in split(log[0], "train")]
    popularity = PopularityScores(counts)(np.array([0, 3]))
    assert popularity.tolist() == [counts.tolist()] * 2
    scores = LastItemNeighbours(HistoryStore.from_rows(split(log[0], "train")), held_out, counts)(np.arange(60))
    for user, row in enumerate(split(log[0], "test")):
        followers = [b for history in histories for a, b in zip(history, history[1:]) if a == row["input_ids"][-1]]
        expected = np.bincount(followers, minlength=62) + counts / (counts.max() + 1)
        np.testing.assert_allclose(scores[user], expected, rtol=1e-6)


def test_a_report_holds_together(log, held_out):
    counts = item_counts(log[0], 62)
    ranks = rank_by_scores(PopularityScores(counts), held_out, vocab_size=62, num_negatives=20, top_k=10)
    report = describe_evaluation(ranks, held_out, item_counts=counts, ks=(5, 10), samples=200)
    assert report["metrics"] == pytest.approx(ranks.metrics(ks=(5, 10)))
    buckets = report["by_history_length"]
    assert list(buckets) == ["0-10", "11-20", "21-50"]
    lengths = np.array([len(row["seen_ids"]) for row in split(log[0], "test")])
    assert [bucket["users"] for bucket in buckets.values()] == [
        (lengths <= 10).sum(), ((lengths > 10) & (lengths <= 20)).sum(), (lengths > 20).sum()
    ]  # fmt: skip
    mean = sum(bucket["users"] * bucket["ndcg@10_unseen"] for bucket in buckets.values()) / 60
    assert mean == pytest.approx(report["metrics"]["ndcg@10_unseen"])
    for name, (low, high) in report["confidence"].items():
        assert low <= report["metrics"][name] <= high
    assert report["coverage@10"] == len(np.unique(ranks.top_items)) / 60
    assert report["popularity_lift@5"] > report["popularity_lift@10"] > 0
    table = markdown_table({"popular": report}, ["ndcg@10", "coverage@10"])
    assert table.splitlines()[2].startswith(f"| popular | {report['metrics']['ndcg@10']:.4f} ± ")


def test_bootstrap_has_the_error_of_a_mean():
    values = np.random.default_rng().normal(3.0, 2.0, size=400)
    spread = bootstrap_means(values, samples=2000).std()
    assert spread == pytest.approx(values.std() / np.sqrt(400), rel=0.15)
    better, error = paired_difference(np.stack([values + 0.5, values + 0.7]), values)
    assert better == pytest.approx(0.6) and error < 1e-9  # the same users: nothing is left to chance
