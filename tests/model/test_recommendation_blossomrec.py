"""`recommend` beside a twin that scores everything and sorts it with Python."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ranking_cases import draw_ids, padded, sorted_with_python
from small_cases import make_model

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.id_lists_blossomrec import as_ids


VOCAB_SIZE = 60


def recommender(**kwargs) -> BlossomRecForSequentialRecommendation:
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    return BlossomRecForSequentialRecommendation(BlossomRecConfig(**(settings | kwargs))).double().eval()


def histories(*lengths: int) -> list[list[int]]:
    return [torch.randint(2, VOCAB_SIZE, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("form", ["left", "right", "lists"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_recommend_agrees_with_the_twin(form, exclude_seen):
    model = recommender(attention_types=["blossom", "full"])
    model.item_counts.random_(5)
    rows = [*histories(20, 1, 300, random.randint(2, 50)), []]
    inputs = rows if form == "lists" else padded(rows, form)
    exclude = draw_ids(5, 20, VOCAB_SIZE)
    candidates = draw_ids(5, 80, VOCAB_SIZE)
    forms = [None, random.choice(exclude), exclude, padded(exclude, padding=-1)]
    scores = [model(torch.tensor([row])).logits[0, -1].tolist() if row else model.item_counts.tolist() for row in rows]
    for exclude_ids in forms:
        for candidate_ids in (None, random.choice(candidates), candidates, padded(candidates, padding=-1)):
            min_score = random.choice([None, 0.0])
            top_k = random.choice([1, 7, 58])
            out = model.recommend(
                inputs,
                top_k=top_k,
                exclude_seen=exclude_seen,
                exclude_ids=exclude_ids,
                candidate_ids=candidate_ids,
                min_score=min_score,
            )
            assert out.scores.dtype == torch.float64 and out.num_unknown.tolist() == [0] * 5

            def of_row(ids, i):
                ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
                return ids[i] if ids and isinstance(ids[0], list) else ids

            for i, row in enumerate(rows):
                excluded = (row if exclude_seen else []) + (of_row(exclude_ids, i) or [])
                expected, best = sorted_with_python(
                    scores[i], top_k, excluded, of_row(candidate_ids, i), min_score if row else None
                )
                assert out.item_ids[i].tolist() == expected
                assert out.scores[i].tolist() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
    "rows",
    [
        [[3, 4], [], [5]],
        [np.array([3, 4], np.uint16), [], torch.tensor([5], dtype=torch.int32)],
        [(3, 4), torch.empty(0), np.array([5])],
        [[], []],
        [],
    ],
)
def test_histories_of_any_kind_are_filled_up(rows):
    ids = as_ids("input_ids", rows, 0, torch.device("cpu"), VOCAB_SIZE)
    longest = max((len(row) for row in rows), default=0)
    wanted = [[*map(int, row), *[0] * (longest - len(row))] for row in rows]
    assert ids.dtype == torch.long and ids.tolist() == wanted
    one_list = as_ids("candidate_ids", list(np.array([7, 8])), -1, torch.device("cpu"), VOCAB_SIZE)
    assert one_list.tolist() == [7, 8]


def test_a_longer_history_than_the_model_reads_counts_as_seen():
    model = recommender()
    rows = histories(30, 4, 12)
    out = model.recommend(rows, top_k=9, max_length=5)
    expected = model.recommend([row[-5:] for row in rows], top_k=9, exclude_ids=rows)
    assert torch.equal(out.item_ids, expected.item_ids)


def test_states_from_elsewhere_are_ranked_alike():
    model = recommender()
    rows = histories(9, 3)
    states = torch.stack([model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
    out, expected = model.recommend_from_states(states, rows, top_k=5), model.recommend(rows, top_k=5)
    assert torch.equal(out.item_ids, expected.item_ids)
    torch.testing.assert_close(out.scores, expected.scores)
    assert model.recommend_from_states(states, top_k=5, min_score=1e9).item_ids.unique().tolist() == [-1]


def test_a_cache_gives_what_whole_histories_give():
    model = recommender()
    rows, cuts = [*histories(40, 3, 25), []], (17, 3, 0, 0)
    cache = BlossomRecCache(model.config)
    for inputs in ([row[:cut] for row, cut in zip(rows, cuts)], [[*row[cut:], 1] for row, cut in zip(rows, cuts)]):
        out = model.recommend(inputs, top_k=30, exclude_ids=[5, 6], cache=cache)
    expected = model.recommend(rows, top_k=30, exclude_ids=[5, 6])
    assert torch.equal(out.item_ids, expected.item_ids) and out.num_unknown.tolist() == [1] * 4
    torch.testing.assert_close(out.scores, expected.scores)
    again = model.recommend([[]] * 4, top_k=30, exclude_ids=[5, 6], cache=cache)
    assert torch.equal(again.item_ids, expected.item_ids)
    for wrong in ({"max_length": 3}, {"candidate_ids": [VOCAB_SIZE]}, {"exclude_ids": [[3]]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.recommend(rows, cache=cache, **wrong)
        assert cache.lengths.tolist() == [40, 3, 25, 0]


def test_scores_are_float32_under_autocast_and_in_bfloat16():
    model = recommender().float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.recommend(histories(20, 3), top_k=30).scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    scores = model.bfloat16().recommend(histories(20, 3), top_k=30).scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_selects_the_same_blocks_alone_in_a_batch_and_appended(dtype):
    """
    On a CPU. Sums in half precision would depend on the batch, and one in a hundred selections with them; in float32 it
    is fewer than one in a thousand, those where rounding decides.
    """
    model = make_model(initializer_range=0.3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    model = model.eval().to(dtype)
    rows = histories(20, 90, 300, 270, 150, 330)
    ids = padded(rows, "right")
    whole = model(ids, output_selection=True).selections
    cache = model(ids[:, :100], use_cache=True).cache
    appended = model(ids[:, 100:], cache=cache, output_selection=True).selections
    different = []
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]), output_selection=True).selections
        for layer in range(2):
            expected = whole[layer].block_indices[i, : len(row)]
            different.append((alone[layer].block_indices[0] != expected).any(-1))
            expected = expected[100:]
            different.append((appended[layer].block_indices[i, : len(expected)] != expected).any(-1))
    assert torch.cat(different).float().mean() < 0.003
    together = model.recommend(rows, top_k=10).item_ids
    one_by_one = torch.cat([model.recommend([row], top_k=10).item_ids for row in rows])
    assert (one_by_one == together).all(1).sum() >= 5


def test_unknown_items_are_dropped_and_counted():
    model = recommender()
    row = histories(12)[0]
    out = model.recommend([[*row[:5], 1, *row[5:], 1], [1]])
    assert out.num_unknown.tolist() == [2, 1]
    assert torch.equal(out.item_ids, model.recommend([row, []]).item_ids)


def test_an_empty_history_gets_the_popular_items():
    model = recommender()
    model.item_counts[torch.tensor([40, 7, 30, 5])] = torch.tensor([9, 5, 5, 1])
    assert model.recommend([*histories(4), []], top_k=5).item_ids[1].tolist() == [40, 7, 30, 5, 2]
    assert model.recommend([[]], top_k=2, min_score=100.0).item_ids.tolist() == [[40, 7]]
    assert model.recommend(torch.zeros(2, 0, dtype=torch.long), top_k=1).item_ids.tolist() == [[40], [40]]
    assert model.recommend(torch.zeros(0, 3, dtype=torch.long), top_k=4).item_ids.shape == (0, 4)


def test_threads_share_a_model_in_training_mode(monkeypatch):
    model = recommender(hidden_dropout_prob=0.9)
    inputs = [histories(20, 3) for _ in range(8)]
    expected = [model.recommend(rows) for rows in inputs]
    model.train()

    def recommend(i: int):
        cache = BlossomRecCache(model.config) if i % 2 else None
        return model.recommend(inputs[i % 8], cache=cache)

    def toggled(self, mode=True):
        raise AssertionError("the mode of a module that other threads use is changed")

    monkeypatch.setattr(torch.nn.Module, "train", toggled)
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(recommend, range(48))):
            assert torch.equal(found.item_ids, expected[i % 8].item_ids)
            torch.testing.assert_close(found.scores, expected[i % 8].scores)
    assert all(module.training for module in model.modules())
    with torch.no_grad():  # and what is not inference has its dropout
        x = torch.tensor(inputs[0][:1])
        assert not torch.equal(model(x).logits, model(x).logits)


def test_a_foreign_module_in_training_mode_is_refused_by_name():
    model = recommender()
    x = histories(20)
    expected = model.recommend(x).item_ids
    model.model.embedding_norm = torch.nn.Sequential(model.model.embedding_norm, torch.nn.Dropout(0.5))
    for mode in (True, False):  # or put into a model in evaluation mode
        model.train(mode).model.embedding_norm[1].train()
        for cache in (None, BlossomRecCache(model.config)):
            with pytest.raises(ValueError, match=r"`model\.embedding_norm\.1` \(.*Dropout\).*model\.eval\(\)"):
                model.recommend(x, cache=cache)
    with pytest.raises(ValueError, match="embedding_norm.1"):
        model(torch.tensor(x), use_cache=True)
    model.train().model.embedding_norm[1].eval()
    assert torch.equal(model.recommend(x).item_ids, expected)


def test_an_adapter_in_training_mode_is_refused_by_name():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(recommender(), config)
    x = histories(20)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj` \(peft\..*evaluation mode"):
        model.train().recommend(x)
    assert torch.equal(model.eval().recommend(x).item_ids, model.recommend(x).item_ids)


def test_nothing_left_is_said_in_the_ids():
    model = recommender()
    out = model.recommend(histories(5, 8), top_k=4, candidate_ids=[[7, 9], []], exclude_ids=[7, 9])
    assert out.item_ids.tolist() == [[-1] * 4] * 2 and (out.scores == -torch.inf).all()
    out = model.recommend(histories(5), top_k=4, exclude_ids=range(2, VOCAB_SIZE))
    assert out.item_ids.tolist() == [[-1] * 4]


@pytest.mark.parametrize("broken", ["weights", "embedding"])
def test_scores_that_are_not_numbers_are_an_error(broken):
    model = recommender()
    weight = model.model.layers[0].up_proj.weight if broken == "weights" else model.lm_head.weight
    weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend([[7, 8, 9]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 59}, "top_k.*1 … 58"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"max_length": 0}, "max_length"),
        ({"candidate_ids": [60]}, "candidate_ids.*60.*59"),
        ({"candidate_ids": [-2]}, "candidate_ids.*-2"),
        ({"candidate_ids": [[3], [4]]}, "candidate_ids.*one list a history"),
        ({"exclude_ids": torch.tensor([[[3]]])}, "exclude_ids"),
        ({"exclude_ids": [2.5]}, "exclude_ids.*whole numbers"),
        ({"exclude_ids": [[3], ["a"]]}, "exclude_ids"),
        ({"input_ids": [5, 6]}, "input_ids.*one row"),
        ({"input_ids": [[5.5]]}, "input_ids.*whole"),
        ({"input_ids": [["a"]]}, "input_ids.*whole"),
        ({"input_ids": [[5, 60]]}, "input_ids.*60.*59"),
        ({"input_ids": [[-1, 5]]}, "input_ids.*-1"),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommender().recommend(**({"input_ids": [[5, 6]]} | arguments))


def test_seen_items_are_excluded_by_default_unless_users_repeat_items(tmp_path):
    """What the model knows of its log decides, and travels with it."""
    rows = torch.tensor(histories(20, 20))
    for share, excluded in ((None, True), (0.0, True), (0.01, True), (0.011, False), (0.67, False)):
        recommender(repeat_share=share).save_pretrained(tmp_path)
        model = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
        assert model.config.repeat_share == share and model.config.exclude_seen is excluded
        everything = model.recommend(rows, top_k=58).item_ids
        for row, best in zip(rows.tolist(), everything.tolist()):
            assert set(best) & set(row) == (set() if excluded else set(row))
        assert torch.equal(everything, model.recommend(rows, top_k=58, exclude_seen=excluded).item_ids)
        cached = model.recommend(rows, top_k=58, cache=BlossomRecCache(model.config)).item_ids
        assert torch.equal(everything.sort().values, cached.sort().values)
    with pytest.raises(ValueError, match="`repeat_share` is 1.5"):
        recommender(repeat_share=1.5)
