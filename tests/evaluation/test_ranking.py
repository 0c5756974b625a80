import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_cases import make_model

from blossomrec_hf.data import item_counts, split
from blossomrec_hf.evaluation import (
    HeldOutItems,
    evaluate,
    model_scores,
    rank_by_now,
    rank_by_scores,
    rank_held_out_items,
)
from blossomrec_hf.evaluation import ranking as evaluation_module


def ranks_one_by_one(model, rows, max_length=None, decimals=12):
    """The protocol, one user and one comparison at a time; scores that round to the same number are the same."""
    everything, unseen = [], []
    model.eval()
    for row in rows:
        history = row["input_ids"][-max_length:] if max_length else row["input_ids"]
        if history:
            with torch.no_grad():
                scores = model(torch.tensor([history]), logits_to_keep=1).logits[0, 0]
        else:
            scores = model.item_counts.double()
        scores = scores.round(decimals=decimals)
        for target in sorted(set(row["target_ids"])):
            for ranks, seen in ((everything, set()), (unseen, set(row["seen_ids"]) - set(row["target_ids"]))):
                others = [j for j in range(2, len(scores)) if j != target and j not in seen]
                higher = sum(bool(scores[j] > scores[target]) for j in others)
                equal = sum(bool(scores[j] == scores[target]) for j in others)
                ranks.append(1 + higher + equal / 2 if target >= 2 else np.inf)
    return everything, unseen


def random_rows(vocab_size, num_users=40):
    rng = np.random.default_rng()
    rows = []
    for user in range(num_users):
        seen = rng.integers(1, vocab_size, size=rng.integers(0, 30)).tolist()
        targets = rng.integers(1, vocab_size, size=rng.integers(0, 4)).tolist()
        if user % 3 == 0 and seen:
            targets.append(seen[-1])  # a repeat
        rows.append({"user_id": user, "input_ids": seen[-12:], "target_ids": targets, "seen_ids": seen})
    return rows


@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_the_last_layer_computes_one_position_per_user(monkeypatch, sharded):
    monkeypatch.setattr(model_scores, "is_sharded", lambda model: sharded)
    model, positions = make_model(40, num_hidden_layers=2), []
    for layer in model.model.layers:
        layer.up_proj.register_forward_pre_hook(lambda module, inputs: positions.append(inputs[0].shape[1]))
    rows = [{"user_id": user, "input_ids": list(range(2, 9 + user)), "target_ids": [30]} for user in range(5)]
    evaluate(model, rows, progress=False)
    assert positions == [sum(len(row["input_ids"]) for row in rows), len(rows)]


@pytest.mark.parametrize(
    ("max_tokens", "max_scores"), [(10_000, 2**26), (15, 2**26), (10_000, 100)], ids=["whole", "tokens", "scores"]
)
@pytest.mark.parametrize("coarse", [False, True], ids=["", "ties"])
def test_ranks_are_those_of_the_protocol(monkeypatch, max_tokens, max_scores, coarse):
    monkeypatch.setattr(evaluation_module, "MAX_SCORES", max_scores)
    decimals = 1 if coarse else 12
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact_scores = model_scores.last_item_scores
    monkeypatch.setattr(
        model_scores, "last_item_scores", lambda *inputs: exact_scores(*inputs).round(decimals=decimals)
    )
    model = make_model(40, attention_types=["full", "short_term"], initializer_range=0.1).double()
    model.item_counts.copy_(torch.randint(0, 5, (40,)))
    model.train()
    rows = random_rows(40)
    ranks = rank_held_out_items(model, rows, max_length=9, max_tokens=max_tokens)
    assert model.training
    everything, unseen = ranks_one_by_one(model, rows, max_length=9, decimals=decimals)
    np.testing.assert_array_equal(ranks.everything, everything)
    np.testing.assert_array_equal(ranks.unseen, unseen)
    assert (ranks.unseen < ranks.everything).any()
    assert not coarse or (ranks.everything[np.isfinite(ranks.everything)] % 1 > 0).any()


def test_a_view_gives_the_figures_of_its_rows(log):
    dataset, tokenizer = log
    model = make_model(len(tokenizer))
    model.item_counts.copy_(torch.from_numpy(item_counts(dataset, len(tokenizer))))
    view = split(dataset, "test", max_length=8)
    rows = [view[i] for i in range(len(view))]
    everything, unseen = ranks_one_by_one(model, rows)
    figures = evaluate(model, view, ks=(5,), exclude_seen=True, all_and_unseen=True, progress=False)
    assert figures["recall@5_all"] == np.mean(np.array(everything) <= 5)
    assert figures["mrr@5_unseen"] == pytest.approx(np.mean([1 / r if r <= 5 else 0 for r in unseen]))
    names = ("recall", "ndcg", "mrr", "hit_rate")
    assert figures.keys() == {f"{name}@5{suffix}" for name in names for suffix in ("", "_all", "_unseen")}
    assert all(figures[f"{name}@5"] == figures[f"{name}@5_unseen"] for name in names)
    # What lies before the window is seen as well: the uncut view and `max_length` give the same.
    uncut = split(dataset, "test")
    arguments = {"exclude_seen": True, "all_and_unseen": True, "progress": False}
    assert evaluate(model, uncut, ks=(5,), max_length=8, **arguments) == figures


def test_where_users_repeat_items_nothing_is_excluded_and_both_kinds_of_targets_are_reported():
    """Of four users, one repeats an item: more than 1 %. A model that knows its log decides, else the held-out items."""
    model = make_model(40)
    rows = [{"user_id": u, "input_ids": [3, 4 + u], "target_ids": [30 + u], "seen_ids": [3, 4 + u]} for u in range(3)]
    rows.append({"user_id": 3, "input_ids": [8, 9], "target_ids": [8], "seen_ids": [8, 9]})
    held_out = HeldOutItems.from_rows(rows)
    assert held_out.repeated.tolist() == [False, False, False, True] and held_out.repeat_share == 0.25
    ranks = rank_held_out_items(model, held_out)
    figures = ranks.metrics(ks=(10,))
    np.testing.assert_array_equal(ranks.by_suffix()[""], ranks.everything)
    assert figures["mrr@10"] == pytest.approx((3 * figures["mrr@10_new"] + figures["mrr@10_repeated"]) / 4)
    assert figures["recall@10_repeated"] == float(ranks.everything[3] <= 10)
    assert not any(name.endswith(("_all", "_unseen")) for name in figures)  # only where asked for
    assert np.isnan(ranks.per_user_metrics(ks=(10,))["ndcg@10_new"]).tolist() == [False, False, False, True]

    model.config.repeat_share = 0.01
    figures = evaluate(model, held_out, ks=(10,))
    assert figures["mrr@10"] == np.mean([1 / rank if rank <= 10 else 0 for rank in ranks.unseen])
    assert figures.keys() == {f"{name}@10" for name in ("recall", "ndcg", "mrr", "hit_rate")}
    model.config.repeat_share = 0.02
    assert "ndcg@10_new" in evaluate(model, rows[:3], ks=(10,))  # in spite of these users, who repeat nothing


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("feature", "passes"), [("next_gap", 1), ("next_gap_input", 2)])
def test_ranks_without_and_with_now_are_those_of_rankings_of_their_own(monkeypatch, feature, passes, compile):
    """The layers run once for both, unless they depend on now."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    features = {"time_features": ["previous_gap", "hour", feature], "event_types": ["view", "buy"]}
    model = make_model(40, target_event_types=["buy", "view"], scoring="cosine", **features).double()
    for name, parameter in model.named_parameters():
        if "vectors" in name:
            torch.nn.init.normal_(parameter)  # they start at zero
    rng = np.random.default_rng()
    rows = random_rows(40)
    for row in rows:
        times = np.sort(rng.integers(10**9, 2 * 10**9, size=len(row["input_ids"]) + len(row["target_ids"])))
        types = rng.integers(-1, 2, size=len(times))
        for name, values in (("timestamps", times), ("event_type_ids", types)):
            row |= {name: values[: len(row["input_ids"])], f"target_{name}": values[len(row["input_ids"]) :]}
    held_out = HeldOutItems.from_rows(rows, columns=model.config.event_columns)
    calls, compute = [], model.model.run_layers

    def run_layers(*inputs, compiled=True, **options):
        calls.extend([1] if compiled else [])  # what is compiled calls it, too
        return compute(*inputs, compiled=compiled, **options)

    monkeypatch.setattr(model.model, "run_layers", run_layers)
    options = {"max_tokens": 60, "compile": compile, "top_k": 5, "progress": False}
    both = rank_by_now(model, held_out, **options)
    of_both = len(calls)
    for now, ranks in both.items():
        calls.clear()
        alone = rank_held_out_items(model, held_out, now=now, **options)
        np.testing.assert_array_equal(ranks.everything, alone.everything)
        np.testing.assert_array_equal(ranks.unseen, alone.unseen)
        np.testing.assert_array_equal(ranks.top_items, alone.top_items)
        assert of_both == passes * len(calls)
    assert (both[True].everything != both[False].everything).any()
    held_out.prediction_times = held_out.prediction_times - 2 * 10**9
    with pytest.raises(ValueError, match="`prediction_time` is -?[0-9]+, before the last event"):
        rank_by_now(model, held_out, **options)


def test_ties_go_to_the_lower_id_in_the_top_items():
    rows = [{"user_id": 0, "input_ids": [7], "target_ids": [4], "seen_ids": [7]}]
    scores = torch.zeros(1, 2000)
    scores[0, 1234] = 1.0
    for exclude_seen, expected in ((True, [1234, 2, 3, 4, 5, 6, 8]), (False, [1234, 2, 3, 4, 5, 6, 7])):
        arguments = {"vocab_size": 2000, "top_k": 7, "exclude_seen": exclude_seen, "progress": False}
        ranks = rank_by_scores(lambda users: scores[users], HeldOutItems.from_rows(rows), **arguments)
        assert ranks.top_items[0].tolist() == expected


def test_scores_that_are_no_numbers_rank_last():
    model = make_model(40, attention_types="full")
    rows = [{"user_id": 0, "input_ids": [2, 3], "target_ids": [4], "seen_ids": [2, 3]}]
    model.lm_head.weight.data[4] = float("nan")
    assert rank_held_out_items(model, rows).everything[0] >= 38
    model.lm_head.weight.data[4:] = 0.0
    model.lm_head.weight.data[5] = float("nan")
    assert rank_held_out_items(model, rows).everything[0] >= 2


def test_bfloat16_does_not_score_in_bfloat16(log):
    view = HeldOutItems.from_rows(split(log[0], "test"))
    model = make_model(len(log[1]), hidden_size=64)
    model.lm_head.weight.data += 1.0  # a common part that leaves bfloat16 no room for the differences
    ranks = rank_held_out_items(model, view, accelerator=Accelerator(mixed_precision="bf16", cpu=True))
    assert (ranks.everything % 1 == 0).all()


def test_bad_input_is_named():
    model = make_model(40)
    row = {"user_id": 0, "input_ids": [2], "target_ids": [4], "seen_ids": [2]}
    with pytest.raises(ValueError, match="none of them has an item to predict"):
        evaluate(model, [{**row, "target_ids": []}])
    with pytest.raises(ValueError, match="item 40, but the model's vocabulary ends at 39"):
        evaluate(model, [{**row, "target_ids": [40]}])


def test_a_compiled_evaluation_has_the_same_figures(log, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function) or function)
    model, view = make_model().double(), split(log[0], "validation")
    expected = evaluate(model, view, max_tokens=300, max_length=20, progress=False)
    assert not compiled
    assert evaluate(model, view, max_tokens=300, max_length=20, compile=True, progress=False) == expected
    assert len(compiled) == 1
