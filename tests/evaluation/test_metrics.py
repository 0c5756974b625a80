import numpy as np
import pytest

from blossomrec_hf.evaluation.metrics import per_user_metrics, ranking_metrics


def independent_figures(ranked, relevant, ks):
    """Per-user figures of `ir-measures` (pytrec_eval underneath) for lists of ranked item ids and sets of relevant ones."""
    ir_measures = pytest.importorskip("ir_measures")
    run = [
        ir_measures.ScoredDoc(str(user), str(item), float(len(items) - place))
        for user, items in enumerate(ranked)
        for place, item in enumerate(items)
    ]
    qrels = [ir_measures.Qrel(str(user), str(item), 1) for user, items in enumerate(relevant) for item in items]
    names = {"recall": ir_measures.R, "ndcg": ir_measures.nDCG, "mrr": ir_measures.RR, "hit_rate": ir_measures.Success}
    measures = {measure @ k: f"{name}@{k}" for name, measure in names.items() for k in ks}
    figures = {name: np.full(len(ranked), np.nan) for name in measures.values()}
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        figures[measures[metric.measure]][int(metric.query_id)] = metric.value
    return figures


@pytest.mark.parametrize("held_out", [1, 4])
def test_agrees_with_an_independent_library(held_out):
    rng = np.random.default_rng(held_out)
    ks = (1, 3, 5, 10, 20)
    ranked = [rng.permutation(60) for _ in range(50)]
    relevant = [rng.choice(60, size=held_out, replace=False) for _ in range(50)]
    ranks = [int(np.flatnonzero(items == item)[0]) + 1 for items, wanted in zip(ranked, relevant) for item in wanted]
    users = np.repeat(np.arange(50), held_out)

    ours = per_user_metrics(ranks, ks=ks, users=users)
    theirs = independent_figures(ranked, relevant, ks)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(
            ours[name], theirs[name], atol=1e-4, err_msg=name
        )  # pytrec_eval prints four digits of some

    means = ranking_metrics(ranks, ks=ks, users=users, suffix="_unseen")
    assert means["ndcg@10_unseen"] == pytest.approx(ours["ndcg@10"].mean())


def test_figures_by_hand():
    metrics = per_user_metrics([1, 3, 2.5, np.inf], ks=(2, 3))
    np.testing.assert_allclose(metrics["recall@2"], [1, 0, 0, 0])
    np.testing.assert_allclose(metrics["recall@3"], [1, 1, 1, 0])
    np.testing.assert_allclose(metrics["mrr@3"], [1, 1 / 3, 1 / 2.5, 0])
    np.testing.assert_allclose(metrics["ndcg@3"], [1, 0.5, 1 / np.log2(3.5), 0])
    np.testing.assert_allclose(metrics["hit_rate@3"], metrics["recall@3"])


def test_ndcg_is_at_most_1_with_ties():
    """Three items that share ranks 1 to 3 have rank 2 each; of those, only two fit in the first two places."""
    metrics = per_user_metrics([2, 2, 2], ks=(1, 2, 3), users=np.zeros(3, int))
    assert metrics["ndcg@2"] == pytest.approx(2 / np.log2(3) / (1 + 1 / np.log2(3)))
    assert metrics["ndcg@1"] == 0 and metrics["ndcg@3"] == pytest.approx(3 / np.log2(3) / (1.5 + 1 / np.log2(3)))
    scores = np.random.default_rng().integers(0, 3, size=(200, 6))
    for row in scores:  # all six items of a user in one list, with many ties
        ranks = [(row > score).sum() + ((row == score).sum() + 1) / 2 for score in row]
        for name, value in per_user_metrics(ranks, ks=range(1, 7), users=np.zeros(6, int)).items():
            assert value <= 1 + 1e-12, name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ranks": []}, "`ranks`"),
        ({"ranks": [1, 0.5]}, "0.5"),
        ({"ranks": [1, float("nan")]}, "nan"),
        ({"ranks": [1], "ks": (0,)}, "`ks`"),
        ({"ranks": [1, 2], "users": np.array([0])}, "`users`"),
        ({"ranks": [1, 2], "users": np.array([0, 2])}, "user 1"),
    ],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        per_user_metrics(arguments.pop("ranks"), **arguments)
