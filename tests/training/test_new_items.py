import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from small_cases import make_model

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.batches.histories import concatenate
from blossomrec_hf.training import add_items, freeze_all_but_items, initialize_from_events, read_item_vectors


def vectors_file(path, vectors):
    if path.suffix == ".parquet":
        pl.DataFrame({"item": [int(item) for item in vectors], "vector": list(vectors.values())}).write_parquet(path)
    else:
        save_file(vectors, path)
    return path


@pytest.mark.parametrize("name", ["vectors.parquet", "vectors.safetensors"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_items_begin_where_they_are_told(tmp_path, name, tied):
    tokenizer = BlossomRecTokenizer.from_items([10, 20, 30])
    model = make_model(5, tie_word_embeddings=tied)
    old = model.lm_head.weight.detach().clone()
    given = {"20": np.ones(16, np.float32), "50": np.random.default_rng().normal(size=16).astype(np.float32)}
    vectors = read_item_vectors(vectors_file(tmp_path / name, given))
    assert add_items(model, tokenizer, [20, 40, 50], vectors=vectors) == 2
    assert tokenizer.encode_items([10, 20, 30, 40, 50]) == [2, 3, 4, 5, 6]
    for table in (model.lm_head.weight, model.model.item_embedding.weight):
        np.testing.assert_allclose(table[6].detach().numpy(), given["50"], rtol=1e-6)
    torch.testing.assert_close(model.lm_head.weight[:5], old)  # a vector for an old item changes nothing
    torch.testing.assert_close(model.lm_head.weight[5], old[2:].mean(0))
    assert add_items(model, tokenizer, [40, 50], vectors=vectors) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_new_items_begin_where_their_events_place_them(tied):
    """
    Two groups of 40 items whose vectors lie around opposite points; a history keeps to one group. Each of the new items 82
    to 85 is met in one of the groups, 86 in no history, and 87 alone in one.
    """
    rng = np.random.default_rng(0)
    model = make_model(88, tie_word_embeddings=tied).eval()
    center = torch.randn(16)
    groups = [np.arange(2, 42), np.arange(42, 82)]
    with torch.no_grad():
        for table in {model.lm_head.weight, model.model.item_embedding.weight}:
            table[2:42], table[42:82] = center + 0.1 * torch.randn(40, 16), -center + 0.1 * torch.randn(40, 16)
    histories = [rng.choice(groups[number % 2], 20) for number in range(100)] + [np.array([87])]
    for number, history in enumerate(histories[:40]):
        history[rng.integers(1, 19)] = 82 + number % 4  # 82 and 84 in the first group, 83 and 85 in the second
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    initialize_from_events(model, range(82, 88), HistoryStore(*concatenate(histories)), max_tokens=300)
    for table in (model.lm_head.weight, model.model.item_embedding.weight):
        similarity = torch.cosine_similarity(table[82:86], center[None])
        assert (similarity * torch.tensor([1, -1, 1, -1])).min() > 0.9
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"lm_head.weight", "model.item_embedding.weight"}
    for name in changed:
        rows = (model.state_dict()[name] != before[name]).any(1)
        assert rows.nonzero().flatten().tolist() == [82, 83, 84, 85]


@pytest.mark.parametrize(
    ("vector", "named"), [(np.ones(8), r"\(8,\) for the item '7', but the model's `hidden_size` is 16"), (np.full(16, np.nan), "finite")]
)  # fmt: skip
def test_bad_vectors_change_nothing(vector, named):
    tokenizer, model = BlossomRecTokenizer.from_items([10, 20, 30]), make_model(5)
    with pytest.raises(ValueError, match=named):
        add_items(model, tokenizer, [7], vectors={"7": vector})
    assert len(tokenizer) == model.config.vocab_size == 5


def test_vectors_may_be_lists():
    tokenizer, model = BlossomRecTokenizer.from_items([10, 20, 30]), make_model(5)
    assert add_items(model, tokenizer, [7], vectors={7: [0.5] * 16}) == 1
    assert model.item_vectors([5]).tolist() == [[0.5] * 16]


def test_the_tokenizer_of_another_model_does_not_cut_the_vocabulary():
    tokenizer, model = BlossomRecTokenizer.from_items([10, 20, 30]), make_model(60)
    with pytest.raises(ValueError, match="`tokenizer` has 5 ids, the model's vocabulary 60; give the tokenizer"):
        add_items(model, tokenizer, [40])
    assert len(tokenizer) == 5 and model.config.vocab_size == 60


def test_files_that_hold_no_vectors_are_named(tmp_path):
    with pytest.raises(ValueError, match="parquet or .safetensors"):
        read_item_vectors(tmp_path / "vectors.csv")
    pl.DataFrame({"id": [1]}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="lacks the columns item, vector; it has id"):
        read_item_vectors(tmp_path / "v.parquet")


@pytest.mark.parametrize("first", [2, 9])
def test_only_the_items_asked_for_are_trained(first):
    model = make_model(12)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    freeze_all_but_items(model, first)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    input_ids = torch.arange(2, 12)[None]
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"lm_head.weight", "model.item_embedding.weight"}
    moved = (model.lm_head.weight != before["lm_head.weight"]).any(1)
    assert moved[first:].all() and not moved[:first].any()
