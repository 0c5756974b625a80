import numpy as np
import polars as pl
import pytest
import torch
from small_cases import make_model

from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.data import build_sequences, item_counts, split
from blossomrec_hf.evaluation import (
    HeldOutItems,
    LastItemNeighbors,
    PopularityScores,
    RecentPopularity,
    UserFrequentItems,
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


def test_given_negatives_take_the_place_of_sampled_ones(log, held_out, tmp_path):
    """A line per user in any order, as in S3-Rec's `_sample.txt`, with lines of users that are not evaluated."""
    dataset, tokenizer = log
    rng = np.random.default_rng(0)
    given = {}
    for row in split(dataset, "test"):
        others = sorted(set(range(2, 62)) - set(row["target_ids"]))
        given[row["user_id"]] = rng.choice(others, 7, replace=False).tolist()
    users = list(given)
    given["unused"] = given[users[0]]
    path = tmp_path / "sample.txt"
    lines = [f"{user} {' '.join(map(str, tokenizer.decode_items(items)))}\n" for user, items in given.items()]
    path.write_text("".join(lines[::-1]))
    negatives = held_out.read_negatives(path, tokenizer, [*users, "unused"])
    assert negatives.tolist() == [given[held_out.user_ids[row]] for row in held_out.target_users]

    scores = torch.rand(60, 62).round(decimals=1)
    ranks = rank_by_scores(lambda users: scores[users], held_out, vocab_size=62, num_negatives=5, negatives=negatives)
    for user, target in enumerate(held_out.targets):
        drawn = [float(scores[user, item]) for item in given[held_out.user_ids[user]]]
        own = float(scores[user, target])
        assert ranks.sampled[user] == 1 + sum(x > own for x in drawn) + sum(x == own for x in drawn) / 2
    assert "ndcg@10_given7" in ranks.metrics() and not any("_uni" in name for name in ranks.metrics())


@pytest.mark.parametrize(
    "text, said",
    [
        ("a x y\nb y z\nzed x y\n", "line 3 of .* has the user 'zed', whom the data set does not have"),
        ("a x y\nb y new\n", "line 2 of .* has the item 'new', which is not in the catalog of the model"),
        ("a x y\nb y z\na x y\n", "line 3 of .* has the user 'a' of an earlier line"),
        (
            "a x y\nb y\n",
            r"line 2 of .* has 1 items, but every line needs as many, at least 1 \(the first one has 2\)",
        ),
        ("a x z\nb y z\n", "line 1 of .* has the item 'z', which is held out for this user"),
        ("a x y\n", "has no line of the user 'b', who has a held-out item"),
        ("a x y\n\nb\n", "line 3 of .* has 0 items, but every line needs as many"),
    ],
)
def test_negatives_that_do_not_fit_are_named(tmp_path, text, said):
    """The held-out items of a and b are z and x."""
    dataset, tokenizer = build_sequences(pl.DataFrame({"user": list("aaabbb"), "item": list("xyzyzx")}))
    (tmp_path / "sample.txt").write_text(text)
    held_out = HeldOutItems.from_rows(split(dataset, "test"))
    with pytest.raises(ValueError, match=f"^`negatives`: .*{said}"):
        held_out.read_negatives(tmp_path / "sample.txt", tokenizer, list("ab"))


def test_several_held_out_items_of_a_user_are_ranked_in_one_list_with_the_drawn_ones():
    """Each among its own drawn items and the user's other held-out items, so that only one can come first."""
    rows = [{"user_id": u, "input_ids": [2], "target_ids": [10, 11, 12, 13, 1][u:], "seen_ids": [2]} for u in range(4)]
    held_out = HeldOutItems.from_rows(rows)
    scores = torch.rand(4, 62)
    for user, row in enumerate(rows):
        scores[user, row["target_ids"]] += 2.0  # above everything else: alone, each would have rank 1
    ranks = rank_by_scores(lambda users: scores[users], held_out, vocab_size=62, num_negatives=30)
    for user in range(4):
        items = held_out.targets[held_out.target_users == user]
        higher = [sum(bool(scores[user, j] > scores[user, i]) for j in items if j != 1) for i in items]
        expected = [np.inf if i == 1 else 1 + above for i, above in zip(items, higher)]
        assert ranks.sampled[held_out.target_users == user].tolist() == expected
    scores = torch.rand(4, 62).round(decimals=1)
    for equal in (scores, torch.zeros(4, 62)):
        ranks = rank_by_scores(lambda users: equal[users], held_out, vocab_size=62, num_negatives=2)
        for name, values in ranks.per_user_metrics(ks=(1, 2, 3, 4), all_and_unseen=True).items():
            assert (values <= 1 + 1e-12).all(), name


def test_a_user_who_has_met_everything_is_named():
    rows = [{"user_id": "eve", "input_ids": [2], "target_ids": [3], "seen_ids": [2, 4]}]
    with pytest.raises(ValueError, match="user 'eve' has seen every item"):
        HeldOutItems.from_rows(rows).sample_negatives(100, vocab_size=5)


def test_top_items_are_those_that_the_model_recommends(log, held_out):
    model = make_model()
    ranks = rank_held_out_items(model, split(log[0], "test"), top_k=5, exclude_seen=True, progress=False)
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
    scores = LastItemNeighbors(HistoryStore.from_rows(split(log[0], "train")), held_out, counts)(np.arange(60))
    for user, row in enumerate(split(log[0], "test")):
        followers = [b for history in histories for a, b in zip(history, history[1:]) if a == row["input_ids"][-1]]
        expected = np.bincount(followers, minlength=62) + counts / (counts.max() + 1)
        np.testing.assert_allclose(scores[user], expected, rtol=1e-6)


def test_the_most_frequent_items_of_a_user_come_first_and_of_equals_the_popular_ones():
    rows = [
        {"user_id": 0, "input_ids": [9], "target_ids": [3], "seen_ids": [3, 3, 5, 9, 9, 9, 1]},
        {"user_id": 1, "input_ids": [1], "target_ids": [4], "seen_ids": [1]},
    ]
    counts = np.array([0, 50, 7, 4, 4, 6, 0, 0, 0, 4])
    held_out = HeldOutItems.from_rows(rows)
    scores = UserFrequentItems(held_out, counts)(np.array([0, 1]))
    # Of user 0: item 9 three times, 3 twice, 5 once; then 2 before 4 by popularity. The history before the window counts.
    assert scores[0, 2:].argsort(descending=True, stable=True)[:5].add(2).tolist() == [9, 3, 5, 2, 4]
    np.testing.assert_allclose(scores[1], counts / 51)
    ranks = rank_by_scores(UserFrequentItems(held_out, counts), held_out, vocab_size=10)
    assert ranks.everything.tolist() == [2, 4] and not ranks.exclude_seen  # 3, 4 and 9 are equally popular


def test_recent_popularity_counts_training_events_of_the_week_before_the_last_known_event():
    day = 86_400
    rng = np.random.default_rng()
    users, days = rng.integers(0, 6, 300), rng.integers(0, 60, 300)
    log = pl.DataFrame({"user": users, "item": rng.integers(0, 20, 300), "timestamp": 1_600_000_000 + days * day})
    dataset, tokenizer = build_sequences(log)
    counts = item_counts(dataset, len(tokenizer))
    for part, held in (("validation", 2), ("test", 1)):
        held_out = HeldOutItems.from_rows(split(dataset, part))
        scores = RecentPopularity(dataset, part, held_out, counts)(np.arange(len(held_out)))
        for place, row in enumerate(dataset):
            now = row["timestamps"][-held - 1]
            events = [(i, t) for other in dataset for i, t in zip(other["input_ids"][:-2], other["timestamps"][:-2])]
            recent = [i for i, t in events if now - 7 * day < t <= now]
            expected = np.bincount(recent, minlength=len(counts)) + counts / (counts.max() + 1)
            np.testing.assert_allclose(scores[place], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="build it from a log with times"):
        RecentPopularity(dataset.remove_columns("timestamps"), "test", held_out, counts)


def test_users_without_a_figure_do_not_count():
    values = np.array([1.0, np.nan, 0.0, 0.5, np.nan])
    assert np.nanmean(bootstrap_means(values, samples=4000)) == pytest.approx(0.5, abs=0.05)
    assert paired_difference(values, np.zeros(5))[0] == pytest.approx(0.5)


def test_a_report_holds_together(log, held_out):
    counts = item_counts(log[0], 62)
    sizes = {"vocab_size": 62, "num_negatives": 20, "top_k": 10}
    ranks = rank_by_scores(PopularityScores(counts), held_out, exclude_seen=True, **sizes)
    options = {"ks": (5, 10), "all_and_unseen": True}
    report = describe_evaluation(ranks, held_out, item_counts=counts, samples=200, **options)
    assert report["metrics"] == pytest.approx(ranks.metrics(**options))
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
