"""The index finds what an exact search finds, and is refused when it is another model's."""

import copy
import random

import pytest
import torch

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.serving.index import ABOUT_FILE, INDEX_FILE, ItemIndex


pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def model() -> BlossomRecForSequentialRecommendation:
    torch.manual_seed(0)
    config = BlossomRecConfig(vocab_size=5002, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    model = BlossomRecForSequentialRecommendation(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    model.item_counts[2:] = torch.randperm(5000)
    return model


def histories() -> list[list[int]]:
    return [*(torch.randint(2, 5002, (n,)).tolist() for n in (1, 60, 9)), []]


def test_reading_all_lists_is_exact_and_saving_keeps_it(model, tmp_path):
    index = ItemIndex.build(model, lists=20, probes=20)
    index.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {INDEX_FILE, ABOUT_FILE}
    loaded = ItemIndex.load(tmp_path, model)
    assert loaded.probes == 20
    rows = histories()
    top = model.recommend(rows, top_k=150).item_ids[0]  # more than an index is asked for where nothing is left out
    for settings in ({}, {"exclude_ids": top}, {"exclude_seen": False}, {"min_score": 0.5}, {"candidate_ids": [5, 9]}):
        expected = model.recommend(rows, **settings)
        for found in (model.recommend(rows, index=index, **settings), model.recommend(rows, index=loaded, **settings)):
            assert torch.equal(found.item_ids, expected.item_ids)
            torch.testing.assert_close(found.scores, expected.scores)
    for row in rows:
        assert torch.equal(model.recommend([row], index=index).item_ids, model.recommend([row]).item_ids)


def test_items_with_values_that_the_sample_lacks_are_found(model):
    """The sample has a fifth of the items; some of the others lie outside of its range."""
    model = copy.deepcopy(model).double()
    index = ItemIndex.build(model, scoring="cosine", lists=20, probes=20)
    for items in torch.arange(2, 5002).split(1000):
        expected = model.similar_items(items, top_k=40)
        assert torch.equal(model.similar_items(items, top_k=40, index=index).item_ids, expected.item_ids)


def test_similar_items_require_an_index_for_cosines(model, tmp_path):
    """Of vectors of different lengths, those of the highest dot products are others."""
    model = copy.deepcopy(model).double()  # in which no two scores are nearly equal
    items = torch.randint(2, 5002, (20,))
    index = ItemIndex.build(model, scoring="cosine", lists=20, probes=20)
    index.save(tmp_path)
    for found in (index, ItemIndex.load(tmp_path, model)):
        for settings in ({}, {"top_k": 40}, {"exclude_ids": [5, 9]}, {"min_score": 0.6}, {"candidate_ids": [5, 9]}):
            out, expected = model.similar_items(items, index=found, **settings), model.similar_items(items, **settings)
            assert torch.equal(out.item_ids, expected.item_ids)
            torch.testing.assert_close(out.scores, expected.scores)
    with pytest.raises(ValueError, match=r'scoring="cosine", but `recommend` requires .*scoring="dot"'):
        model.recommend(histories(), index=index)
    with pytest.raises(ValueError, match=r'scoring="dot", but `similar_items` requires .*scoring="cosine"'):
        model.similar_items(items, index=ItemIndex.build(model, lists=20))
    with pytest.raises(ValueError, match="`scoring` is 'angle'"):
        ItemIndex.build(model, scoring="angle")


def test_few_lists_find_most(model):
    rows = [torch.randint(2, 5002, (9,)).tolist() for _ in range(50)]
    exact = model.recommend(rows).item_ids
    recalls = []
    for probes in (1, 30):
        index = ItemIndex.build(model, lists=60, probes=probes)
        found = model.recommend(rows, index=index).item_ids
        recalls.append((found[:, :, None] == exact[:, None]).any(1).float().mean().item())
    assert recalls[0] < recalls[1] and recalls[1] > 0.9


@pytest.mark.parametrize(("items", "lists"), [(5000, 565), (30, 30)])
def test_there_are_as_many_lists_as_eight_times_the_root_but_no_more_than_items(model, items, lists):
    if items != 5000:
        model = BlossomRecForSequentialRecommendation(BlossomRecConfig(vocab_size=items + 2)).eval()
    index = ItemIndex.build(model)
    assert index.index.nlist == lists
    assert model.recommend([[5, 6]], top_k=9, index=index).item_ids.min() >= 2


def test_a_stale_index_is_refused(model, tmp_path):
    index = ItemIndex.build(model)
    index.save(tmp_path)
    model.recommend(histories(), index=index)
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1e-3
    try:
        for refused in (lambda: ItemIndex.load(tmp_path, model), lambda: model.recommend(histories(), index=index)):
            with pytest.raises(ValueError, match="stale"):
                refused()
    finally:
        model.lm_head.weight.data.copy_(before)
    model.recommend(histories(), index=ItemIndex.load(tmp_path, model))


def test_another_embedding_in_the_same_place_is_stale(model):
    index = ItemIndex.build(model)
    weight = model.lm_head.weight
    index.check(weight)
    before = weight.data
    weight.data = before + 1e-3  # neither another object nor another version
    try:
        with pytest.raises(ValueError, match="stale"):
            index.check(weight)
    finally:
        weight.data = before
    index.check(weight)
    with pytest.raises(ValueError, match="stale"):
        index.check(torch.nn.Parameter(before + 1e-3))


def test_another_index_of_equal_size_is_refused(model, tmp_path):
    index = ItemIndex.build(model)
    index.save(tmp_path / "this")
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight)
    ItemIndex.build(other).save(tmp_path / "other")
    (tmp_path / "other" / INDEX_FILE).replace(tmp_path / "this" / INDEX_FILE)
    with pytest.raises(ValueError, match="not saved together.*ItemIndex.build"):
        ItemIndex.load(tmp_path / "this", model)
    index.save(tmp_path / "this")
    (tmp_path / "this" / INDEX_FILE).replace(tmp_path / "other" / INDEX_FILE)
    (tmp_path / "this" / ABOUT_FILE).replace(tmp_path / "other" / ABOUT_FILE)
    with pytest.raises(ValueError, match="stale"):
        ItemIndex.load(tmp_path / "other", other)


@pytest.mark.parametrize("name", [INDEX_FILE, ABOUT_FILE])
def test_damaged_files_are_refused(model, tmp_path, name):
    ItemIndex.build(model, lists=20).save(tmp_path)
    content = (tmp_path / name).read_bytes()
    place = random.randrange(10, len(content) - 1)
    for damaged in (content[:place], content[:place] + b"\xff\xfe\xfd" + content[place + 3 :], b"", b"[]", b"{}"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            ItemIndex.load(tmp_path, model)


def test_an_embedding_made_in_inference_mode_has_an_index(model):
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        index = ItemIndex.build(twin, lists=20, probes=20)
        assert torch.equal(twin.recommend([[5, 6]], index=index).item_ids, model.recommend([[5, 6]]).item_ids)


def test_bad_input_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="ItemIndex.build"):
        ItemIndex.load(tmp_path, model)
    for arguments, message in (({"lists": 5001}, "lists"), ({"lists": 0}, "lists"), ({"probes": 0}, "probes")):
        with pytest.raises(ValueError, match=message):
            ItemIndex.build(model, **arguments)
