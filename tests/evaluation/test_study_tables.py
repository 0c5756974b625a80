"""Tables of studies, against plain NumPy."""

import numpy as np
import pytest

from blossomrec_hf.evaluation.study_plots import draw
from blossomrec_hf.evaluation.study_tables import RunResult, StudyTables, compare, describe, markdown, slope


def ndcg(ranks):
    ranks = ranks.astype(np.float64)
    return np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)


def make_test(ranks, *, seed=1, configuration="blossom", evaluation="test", data="d", **settings):
    num_users = len(ranks)
    lengths = np.arange(num_users) + 1
    return RunResult(
        data=data, configuration=configuration, evaluation=evaluation, seed=seed, settings=settings, ranks=ranks,
        users=np.arange(num_users), lengths=lengths, last_times=1000 + lengths, validation=0.1 * seed,
    )  # fmt: skip


def draw_ranks(num_users=400, best=1):
    return np.random.randint(best, 40, size=num_users).astype(np.float32)


def test_means_are_over_seeds_and_users_of_the_group():
    ranks = [draw_ranks(), draw_ranks()]
    same = [make_test(values, seed=seed) for seed, values in enumerate(ranks)]
    for group, chosen in (
        ({}, slice(None)),
        ({"min_events": 101, "max_events": 300}, slice(100, 300)),
        ({"after": 1050}, slice(50, None)),
    ):
        found = describe(same, group)
        values = np.stack([ndcg(part[chosen]) for part in ranks])
        assert found["ndcg@10"] == pytest.approx(values.mean())
        assert found["recall@10"] == pytest.approx(np.mean([part[chosen] <= 10 for part in ranks]))
        assert found["ndcg@10 over seeds"] == pytest.approx(values.mean(1).std(ddof=1))
        assert found["num_users"] == values.shape[1] and found["seeds"] == [0, 1]
        assert found["validation"] == pytest.approx(0.05)
        # The standard error of the mean over users of the means over seeds; the bootstrap draws.
        error = values.mean(0).std() / np.sqrt(values.shape[1])
        assert found["ndcg@10 half interval"] == pytest.approx(1.96 * error, rel=0.15)


def test_differences_are_paired_by_user():
    ranks = draw_ranks()
    better = np.where(np.arange(400) % 4 == 0, np.maximum(ranks - 5, 1), ranks)
    first, second = [make_test(better)], [make_test(ranks, configuration="full")]
    found = compare(first, second, {})
    difference = ndcg(better) - ndcg(ranks)
    assert found["difference"] == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / np.sqrt(400)  # far below that of unpaired users
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.15)
    assert found["verdict"] == "better" and compare(second, first, {})["verdict"] == "worse"
    assert compare(first, first, {})["verdict"] == "non-inferior"


def test_only_seeds_that_both_have_are_compared():
    one, two, other = draw_ranks(), draw_ranks(), draw_ranks()
    first = [make_test(one, seed=1), make_test(two, seed=2)]
    found = compare(first, [make_test(other, seed=2)], {})
    assert found["seeds"] == [2] and found["difference"] == pytest.approx((ndcg(two) - ndcg(other)).mean())
    assert compare(first, [make_test(other, seed=3)], {})["num_users"] == 0


def test_a_slightly_worse_model_is_not_inferior_by_the_margin():
    ranks = np.full(4000, 2.0)
    worse = ranks.copy()
    worse[:40] = 3.0
    assert compare([make_test(worse)], [make_test(ranks)], {})["verdict"] == "non-inferior"
    worse[:400] = 3.0
    assert compare([make_test(worse)], [make_test(ranks)], {})["verdict"] == "worse"


def test_a_slope_is_the_regression_of_the_means():
    lengths = [50, 200, 1000]
    points = [[make_test(draw_ranks(best=1 + place), max_length=length)] for place, length in enumerate(lengths)]
    found = slope(points[::-1], {"min_events": 11}, over="max_length")
    means = [ndcg(same[0].ranks[10:]).mean() for same in points]
    expected = np.polyfit(np.log2(lengths), means, 1)[0]
    assert found["slope"] == pytest.approx(expected) and found["low"] < expected < found["high"]
    assert found["points"] == [[length, pytest.approx(mean)] for length, mean in zip(lengths, means)]


def test_all_tables_of_two_data_sets():
    tests = [
        make_test(draw_ranks(), data=data, configuration=name, evaluation=evaluation, seed=seed, max_length=length)
        for data in ("a", "b")
        for name, length in (("blossom, 50", 50), ("blossom, 200", 200), ("full, 50", 50), ("full, 200", 200))
        for evaluation in ("test", "with now")
        for seed in (1, 2)
    ]
    tables = StudyTables(
        users={"all users": {}, "long": {"min_events": 300, "data": ["b"]}},
        comparisons=[
            {"first": "blossom*", "second": "full*", "evaluation": "test"},
            {"first": "full, 50", "second": "full, 50", "first_evaluation": "with now", "second_evaluation": "test"},
        ],
        slopes=[{"over": "max_length", "configurations": "full*", "evaluations": "test"}],
    )
    tables.comparisons.pop()  # a configuration is compared with another
    tables.check("study", ["blossom, 50", "blossom, 200", "full, 50", "full, 200"], ["test", "with now"])
    built = tables.build(tests)
    assert len(built["means"]) == 3 * 8
    pairs = {(entry["data"], entry["users"], entry["first"][0], entry["second"][0]) for entry in built["comparisons"]}
    pair = ("blossom, 50", "full, 50")
    assert pairs >= {("a", "all users", *pair), ("b", "long", *pair), ("mean, relative", "all users", *pair)}
    assert ("a", "long", *pair) not in pairs
    both = [entry for entry in built["comparisons"] if tuple(entry["first"] + entry["second"])[::2] == pair]
    single = [
        entry["difference"] / entry["other"]
        for entry in both
        if entry["data"] in "ab" and entry["users"] == "all users"
    ]
    assert next(entry for entry in both if "relative" in entry["data"])["difference"] == pytest.approx(np.mean(single))
    assert [entry["data"] for entry in built["slopes"]] == ["a", "b", "b"]

    text = markdown("lengths", "Longer histories.", built, {("a", "full, 50"): {"test": 12.34}})
    mean = next(entry for entry in built["means"] if entry["configuration"] == "full, 50")
    assert f"| full, 50 | 2 | {mean['recall@10']:.4f} ± " in text and text.count("| 12.3 |") == 1
    assert "**b, long (101), with now**" in text


def test_a_comparison_with_the_configuration_that_validation_prefers():
    validation = {
        "a": {"defaults": 0.9, "tuned 1": 0.2, "tuned 2": 0.3},
        "b": {"defaults": 0.1, "tuned 1": 0.5, "tuned 2": 0.4},
    }
    tests = []
    for data, figures in validation.items():
        for name, figure in figures.items():
            tests += [make_test(draw_ranks(), data=data, configuration=name, seed=seed) for seed in (1, 2)]
            # Of the mean over seeds; the best single seed is that of another configuration.
            tests[-2].validation, tests[-1].validation = figure, figure + (0.15 if name == "tuned 1" else 0.1)
    tables = StudyTables(comparisons=[{"first": "*", "best_of": "tuned*"}])
    tables.check("study", list(validation["a"]), ["test"])
    built = tables.build(tests)["comparisons"]
    best = {"a": "tuned 2", "b": "tuned 1"}
    for data, second in best.items():
        found = {entry["first"][0]: entry for entry in built if entry["data"] == data}
        assert found.keys() == validation[data].keys() - {second}
        for name, entry in found.items():
            sides = (
                [test for test in tests if (test.data, test.configuration) == (data, side)] for side in (name, second)
            )
            assert entry["second"] == [second, "test"] and entry["difference"] == compare(*sides, {})["difference"]
    relative = [entry["difference"] / entry["other"] for entry in built if entry["first"][0] == "defaults"]
    assert len(relative) == 3 and relative[2] == pytest.approx(np.mean(relative[:2]))
    assert sum(entry["data"] == "mean, relative" for entry in built) == 1  # the others are the best of one set

    text = markdown("recipes", "", tables.build(tests), {})
    assert "| defaults − best of tuned* on validation (test) | a, all users (400); best: tuned 2 |" in text
    assert "| defaults − best of tuned* on validation (test) | mean, relative, all users (800) |" in text

    for entry, words in (
        ({"first": "defaults", "best_of": "trained*"}, "names no two of"),
        ({"first": "tuned 1", "best_of": "tuned 1"}, "names no two of"),
        ({"first": "defaults", "second": "tuned 1", "best_of": "tuned*"}, "`second` and `best_of`; remove one"),
    ):
        with pytest.raises(ValueError, match=words):
            StudyTables(comparisons=[entry]).check("study", list(validation["a"]), ["test"])


def test_models_of_other_users_are_not_averaged():
    tests = [make_test(draw_ranks(20)), make_test(draw_ranks(21), seed=2)]
    with pytest.raises(ValueError, match="have different users"):
        describe(tests, {})


def test_a_group_by_time_needs_times():
    test = make_test(draw_ranks(5))
    test.last_times = None
    with pytest.raises(ValueError, match="has no times"):
        describe([test], {"after": 3})


@pytest.mark.parametrize("kind", ["slopes", "comparisons", "means"])
def test_a_figure_is_drawn_of_each_kind_of_table(tmp_path, kind):
    pytest.importorskip("matplotlib")
    tests = [
        make_test(draw_ranks(), data=data, configuration=f"{name}, {length}", max_length=length)
        for data in ("a", "b", "c")
        for name in ("blossom", "full")
        for length in (50, 200)
    ]
    slopes = [{"over": "max_length", "configurations": "full*"}] if kind == "slopes" else []
    comparisons = [] if kind == "means" else [{"first": "blossom*", "second": "full*"}]
    draw(tmp_path / "figure.png", "Title", StudyTables(comparisons=comparisons, slopes=slopes).build(tests))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
