"""Item features: vectors of categories and of dense tables, next to a computation in plain Python."""

import copy
import importlib.util
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from model_cases import config, histories, packed, padded
from transformers import AutoModel, AutoModelForCausalLM

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.model.features_blossomrec import Categories, ItemFeatures
from blossomrec_hf.model.modules_blossomrec import weights_fingerprint
from blossomrec_hf.model.packing_blossomrec import pack_histories


GENRES, TAGS = ["Drama", "Comedy", "Action"], [f"tag {i}" for i in range(30)]


def draw_columns(num_items: int = 58) -> dict:
    """A category or several per item, dense vectors, and some missing ones."""
    genres = [None if np.random.rand() < 0.1 else np.random.choice(GENRES) for _ in range(num_items)]
    tags = [np.random.choice(TAGS, np.random.randint(0, 9)).tolist() for _ in range(num_items)]
    vectors = [None if np.random.rand() < 0.1 else np.random.randn(7) for _ in range(num_items)]
    return {"genre": genres, "tags": tags, "plot": vectors}


def make_model(columns: dict | None = None, **settings) -> BlossomRecForSequentialRecommendation:
    """A model in float64 whose vectors of unknown categories are trained."""
    features = ItemFeatures.from_columns(draw_columns() if columns is None else columns)
    model = BlossomRecForSequentialRecommendation(config(item_features=features.config(), **settings))
    model.set_item_features(features)
    for column in model.model.item_features.columns:
        weight = column.weight if hasattr(column, "weight") else column.projection.weight
        torch.nn.init.normal_(weight, std=0.1)
    return model.double().eval()


def plain_vectors(model, columns: dict) -> torch.Tensor:
    """The item vectors, item after item."""
    rows = [weight.clone() for weight in model.model.item_embedding.weight]
    for name, column in zip(sorted(columns), model.model.item_features.columns):
        for row, value in enumerate(columns[name], start=2):
            if hasattr(column, "projection"):
                if value is not None:
                    unit = torch.tensor(np.asarray(value) / np.linalg.norm(np.float32(value)))
                    rows[row] = rows[row] + column.projection(unit.float().half().to(rows[0].dtype))
                continue
            values = {value} if isinstance(value, str) else set(value or [])
            codes = {column.names.index(v) + 1 if v in column.names else 0 for v in values} or {0}
            for code in codes:
                rows[row] = rows[row] + column.weight[code]
    return torch.stack(rows)


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_vectors_scores_and_gradients_are_those_of_a_plain_computation(scoring):
    columns = draw_columns()
    model = make_model(columns, scoring=scoring, hidden_dropout_prob=0.0, id_dropout_prob=0.0)
    x = torch.randint(2, 60, (3, 21))
    torch.testing.assert_close(model.model.item_vectors(), plain_vectors(model, columns), rtol=0, atol=1e-3)
    plain = plain_vectors(model, columns)

    def losses(vectors):
        states = model.model.encode(pack_histories(x, vocab_size=60), item_vectors=vectors)
        scored = vectors if scoring == "dot" else torch.nn.functional.normalize(vectors, dim=-1)
        logits = (states @ scored[2:].T).unflatten(0, x.shape)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten() - 2)

    loss = losses(plain)
    torch.testing.assert_close(model(x, labels=x).loss, loss, rtol=1e-4, atol=1e-4)  # tables in float16
    # The gradients by the same vectors, without the rounding of the table.
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    exact = losses(model.model.item_vectors())
    expected = torch.autograd.grad(exact, weights)
    actual = torch.autograd.grad(model(x, labels=x).loss, weights)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for one, other in zip(torch.autograd.grad(loss, weights), expected):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_alone_padded_packed_and_cached_are_equal(scoring):
    model, rows = make_model(scoring=scoring), histories(1, 40, 17, 3)
    alone = [model(row[None]).logits[0] for row in rows]
    torch.testing.assert_close(model(**packed(rows)).logits[0], torch.cat(alone), rtol=0, atol=1e-10)
    for side in ("left", "right", "anywhere"):
        ids, mask = padded(rows, side, extra=2)
        logits = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], torch.cat(alone), rtol=0, atol=1e-10)
    cut = [row[: max(1, len(row) // 2)] for row in rows]
    ids, mask = padded(cut, "right")
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    rest, mask = padded([row[len(start) :] for row, start in zip(rows, cut)], "right")
    appended = model.recommend(rest, attention_mask=mask, cache=cache, top_k=58, exclude_seen=False)
    expected = model.recommend([row.tolist() for row in rows], top_k=58, exclude_seen=False)
    torch.testing.assert_close(appended.scores, expected.scores, rtol=0, atol=1e-10)
    assert torch.equal(appended.item_ids, expected.item_ids)


def test_item_vectors_is_the_only_reader():
    """Whoever replaces it replaces inputs and scores."""
    model, x = make_model(), torch.randint(2, 60, (2, 30))
    assert model.get_output_embeddings() is None and model.lm_head is None
    with torch.no_grad():
        vectors = model.item_vectors()
        assert vectors is model.model.item_vectors() and not vectors[0].any()
        assert torch.equal(model.item_vectors([5, 2]), vectors[[5, 2]])
        inputs_embeds = model.model.item_embedding(x, vectors)
        torch.testing.assert_close(model(inputs_embeds=inputs_embeds).logits, model(x).logits)
        vectors.add_(torch.randn_like(vectors))
        states = model.model(x).last_hidden_state
        torch.testing.assert_close(model(x).logits, states @ vectors.T)
        torch.testing.assert_close(
            model.recommend(x, top_k=1, exclude_seen=False).scores[:, 0], model(x).logits[:, -1, 2:].max(1).values
        )


def test_the_matrix_is_never_stale():
    columns = draw_columns()
    model, x = make_model(columns), torch.randint(2, 60, (2, 9))

    def check(columns=columns):
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model.item_vectors(), plain_vectors(model, columns), rtol=0, atol=1e-3)
            assert model.item_vectors() is model.item_vectors()
        with torch.inference_mode():
            assert model.item_vectors() is model.item_vectors() and not model.item_vectors().is_inference()

    check()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for how in ({}, {"fused": True}):
        model(x, labels=x).loss.backward()
        torch.optim.AdamW(trained, lr=0.1, **how).step()
        check()
    with torch.no_grad():
        for weight in trained:
            before = model.item_vectors().clone()
            weight.add_(torch.randn_like(weight))
            if weight.shape[0] == 60 or weight.shape[1:] == (16,):
                check()
        del before
    columns = draw_columns()
    features = ItemFeatures.from_columns(columns, known=model.config.item_features)
    model.set_item_features(features)
    check(columns)
    model.load_state_dict(
        {name: value * 2 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    )
    model.set_item_features(features)  # whose vectors have length 1
    check(columns)
    model.train()
    assert model.model._all_vectors._kept is None
    model(x, labels=x).loss.backward()
    with torch.no_grad():
        assert model.item_vectors() is not model.item_vectors() and model.model._all_vectors._kept is None


def test_copies_pickles_and_threads():
    model, x = make_model(scoring="cosine"), torch.randint(2, 60, (8, 30))
    expected = model.recommend(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.recommend(x).item_ids, expected.item_ids)
    model.train()  # no id embedding is omitted in inference
    for mode in (True, False):
        model.train(mode)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda row: model.recommend(row[None]).item_ids[0], [*x] * 4))
        assert torch.equal(torch.stack(found), expected.item_ids.repeat(4, 1))


def test_id_embeddings_are_omitted_in_training_for_input_and_scores_alike():
    torch.manual_seed(0)
    model = make_model(id_dropout_prob=0.5, hidden_dropout_prob=0.0, vocab_size=60).train()
    bare = model.model.item_features() + 0 * model.model.item_embedding.weight
    whole = model.model.item_vectors()
    drawn = model.model.item_vectors(training=True)
    omitted = (drawn == bare).all(1)[2:]
    torch.testing.assert_close(drawn[2:][~omitted], whole[2:][~omitted])
    assert 15 < omitted.sum() < 43
    seen, x = [], torch.randint(2, 60, (2, 9))
    model.model.item_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    original = model.item_vectors
    model.item_vectors = lambda input_vectors: seen.append(input_vectors) or original(input_vectors=input_vectors)
    model(x, labels=x)
    assert seen[0] is seen[1]


def test_old_items_without_id_embedding_are_as_if_new():
    """An item's vector without its id embedding is that of a new item with the same features."""
    columns = draw_columns()
    model = make_model(columns)
    x, rows = torch.randint(2, 60, (2, 30)), [3, 11, 57]
    before, known = model(x).logits, weights_fingerprint(model.model)
    cache = model(x, use_cache=True).cache
    model.resize_token_embeddings(63)
    torch.testing.assert_close(model(x).logits[..., :60], before)
    assert (
        model.config.item_features["tags"]["num_values"]
        == model.state_dict()["model.item_features.columns.2.codes"].shape[0]
    )
    new = ItemFeatures.from_columns(
        {name: [column[row - 2] for row in rows] for name, column in columns.items()}, known=model.config.item_features
    )
    model.set_item_features(new, first_id=60)
    vectors, features = model.item_vectors(), model.model.item_features()
    assert torch.equal(vectors[60:], features[rows])
    # A grown catalog leaves caches valid; other features do not.
    assert weights_fingerprint(model.model, 60) == known
    event = torch.tensor([[60], [5]])
    appended = model(event, cache=cache).logits[:, 0]
    longer = model(torch.cat([x, event], 1)).logits[:, -1]
    torch.testing.assert_close(appended, longer, rtol=0, atol=1e-10)
    changed = {name: [*column[:-1], column[0]] for name, column in draw_columns(61).items()}
    model.set_item_features(ItemFeatures.from_columns(changed, known=model.config.item_features))
    assert weights_fingerprint(model.model, 60) != known
    with pytest.raises(ValueError, match="cache"):
        model(event, cache=cache)
    model.resize_token_embeddings(40)
    assert model.item_vectors().shape == (40, 16)
    assert model.recommend(torch.randint(2, 40, (2, 30))).item_ids.max() < 40


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_save_and_load(tmp_path, scoring):
    model, x = make_model(scoring=scoring).float(), torch.randint(2, 60, (2, 30))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(loaded.recommend(x).item_ids, model.recommend(x).item_ids)
    assert weights_fingerprint(loaded.model) == weights_fingerprint(model.model)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)
    loaded.resize_token_embeddings(70)
    loaded.save_pretrained(tmp_path / "grown")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert torch.equal(grown(x).logits, loaded(x).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.recommend(x).item_ids.shape == (2, 10)


def test_dense_tables_are_frozen_in_half_precision():
    features = ItemFeatures.from_columns(draw_columns())
    model = BlossomRecForSequentialRecommendation(config(item_features=features.config()))
    model.set_item_features(features)
    table = model.model.item_features.columns[1].table
    assert table.dtype == torch.float16 and not table.requires_grad
    model.requires_grad_(True)
    x = torch.randint(2, 60, (2, 9))
    model(x, labels=x).loss.backward()
    assert table.grad is None
    assert model.dtype == torch.float32


def test_compiled_and_checkpointed_training():
    model = make_model(
        attention_types="full", scoring="cosine", hidden_dropout_prob=0.0, id_dropout_prob=0.0, item_dropout_prob=0.0
    ).train()
    x = torch.randint(2, 60, (2, 40))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected = torch.autograd.grad(model(x, labels=x).loss, weights)
    model.gradient_checkpointing_enable()
    for one, other in zip(torch.autograd.grad(model(x, labels=x).loss, weights), expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x, labels=x).loss, weights), expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_encoder_for_large_batches_follows_the_weights():
    model = make_model(scoring="cosine").float()
    x = torch.randint(2, 60, (4, 20))
    model.compile_for_inference(max_tokens=80, max_histories=4, max_length=20)
    for _ in range(2):
        for _ in range(2):
            found = model.recommend(x, exclude_seen=False, top_k=5)
            expected = model(x).logits[:, -1].gather(1, found.item_ids)
            torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for column in model.model.item_features.columns:
                weight = column.weight if hasattr(column, "weight") else column.projection.weight
                weight.add_(torch.randn_like(weight))


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_adapters_of_embedding_and_projection_count_once(scoring):
    peft = pytest.importorskip("peft")
    model, x = make_model(scoring=scoring), torch.randint(2, 60, (3, 20))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "item_embedding", "projection"]))
    for name, weight in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.train()(input_ids=x, labels=x).loss.backward()
    assert all(weight.grad.any() for name, weight in adapted.named_parameters() if "lora" in name)
    adapted.eval()
    logits, best = adapted(input_ids=x).logits, adapted.recommend(x).item_ids
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, logits)
    assert torch.equal(merged.recommend(x).item_ids, best)


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
def test_weights_on_disk(tmp_path, scoring):
    model, x = make_model(scoring=scoring).float(), torch.randint(2, 60, (3, 20))
    model.save_pretrained(tmp_path / "model")
    for device_map, buffers in (({"model": "disk"}, False), ({"model": "disk"}, True), ({"": "cpu"}, False)):
        twin = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "weights", offload_buffers=buffers
        )
        assert weights_fingerprint(twin.model) == weights_fingerprint(model.model)
        assert torch.equal(twin.recommend(x).item_ids, model.recommend(x).item_ids)
        assert torch.equal(twin.similar_items([5, 9]).item_ids, model.similar_items([5, 9]).item_ids)
        torch.testing.assert_close(twin(x).logits, model(x).logits)


def test_similar_items_share_features():
    """Items without id embeddings are compared by their features, also new ones."""
    columns = {"genre": [GENRES[item % 3] for item in range(58)]}
    model = make_model(columns)
    torch.nn.init.normal_(model.model.item_embedding.weight, std=1e-3)
    found = model.similar_items([2, 3], top_k=10)
    assert ((found.item_ids - 2) % 3 == torch.tensor([[0], [1]])).all() and found.scores.min() > 0.9
    expected = torch.nn.functional.cosine_similarity(model.item_vectors([2]), model.item_vectors(found.item_ids[0]))
    torch.testing.assert_close(found.scores[0], expected)


def test_an_index_is_checked_against_the_features():
    pytest.importorskip("faiss")
    from blossomrec_hf.serving.index import ItemIndex

    model, x = make_model(scoring="cosine").float(), torch.randint(2, 60, (3, 20))
    index = ItemIndex.build(model)
    assert torch.equal(model.recommend(x, index=index).item_ids, model.recommend(x).item_ids)
    with torch.no_grad():
        model.model.item_features.columns[0].weight.add_(torch.randn_like(model.model.item_features.columns[0].weight))
    with pytest.raises(ValueError, match="stale"):
        model.recommend(x, index=index)


def bad_codes(features: ItemFeatures) -> None:
    codes = features.columns["genre"].codes.clone()
    codes[0] = 9
    features.columns["genre"] = features.columns["genre"]._replace(codes=codes)


def bad_width(features: ItemFeatures) -> None:
    features.columns["plot"] = features.columns["plot"][:, 1:]


def bad_number(features: ItemFeatures) -> None:
    features.columns["plot"][3, 1] = torch.nan


def bad_length(features: ItemFeatures) -> None:
    features.columns["plot"] = features.columns["plot"][1:]


def bad_name(features: ItemFeatures) -> None:
    features.columns["genre"].names.append("Western")


def bad_kind(features: ItemFeatures) -> None:
    features.columns["plot"] = features.columns["genre"]


def bad_columns(features: ItemFeatures) -> None:
    del features.columns["plot"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (bad_codes, "code 9 in the column 'genre'; codes are 0"),
        (bad_width, r"shape \[58, 6\] in the column 'plot'; the model's have 7 numbers"),
        (bad_number, "'plot' that are not finite"),
        (bad_length, "57 items in the column 'plot'; 58 are expected"),
        (bad_name, "other categories in the column 'genre'"),
        (bad_kind, "categories in the column 'plot', in which the model has vectors"),
        (bad_columns, "has the columns genre, tags; the model has genre, plot, tags"),
    ],
)
def test_features_that_do_not_fit_change_nothing(damage, message):
    columns = draw_columns()
    columns["genre"][:6] = GENRES * 2  # all are known
    model = make_model(columns)
    before = model.item_vectors()
    features = ItemFeatures.from_columns(draw_columns(), known=model.config.item_features)
    damage(features)
    with pytest.raises(ValueError, match=message):
        model.set_item_features(features)
    assert torch.equal(model.item_vectors(), before)


def test_bad_columns_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        ItemFeatures.from_columns({"genre": ["a", "b"], "plot": np.ones((3, 2))})
    with pytest.raises(ValueError, match="plot has vectors of 3 numbers; 2 are expected, or categories"):
        ItemFeatures.from_columns({"plot": [[1.0, 2.0], [1.0, 2.0, 3.0]]})
    with pytest.raises(ValueError, match="plot has numbers that are not finite for item 1"):
        ItemFeatures.from_columns({"plot": np.array([[1.0, 2.0], [1.0, np.nan]])})
    with pytest.raises(ValueError, match="config.item_features"):
        model = BlossomRecForSequentialRecommendation(config())
        model.set_item_features(ItemFeatures.from_columns({"genre": ["a", "a"]}))
    for columns in (None, {}, [["a"]]):
        with pytest.raises(ValueError, match="`columns` is .*; it must be a dictionary with at least one column"):
            ItemFeatures.from_columns(columns)
    for column in (7, "abc", None, {"item": "a"}):
        with pytest.raises(ValueError, match=r"`columns\['genre'\]` is .*; it must be a list or an array"):
            ItemFeatures.from_columns({"genre": column})
    for value in (np.nan, 1.5, ["a", None], {"a": 1}, [["a"]]):
        with pytest.raises(ValueError, match=r"`columns\['genre'\]` has .* for item 1; categories are strings or int"):
            ItemFeatures.from_columns({"genre": ["a", value]})
    features = ItemFeatures.from_columns(draw_columns())
    model = BlossomRecForSequentialRecommendation(config(item_features=features.config()))
    for first_id in (0, 1, 61):
        with pytest.raises(
            ValueError, match=f"`first_id` is {first_id}; it must be the vocabulary id of an item, from 2"
        ):
            model.set_item_features(features, first_id=first_id)
    for wrong in (None, draw_columns(), [features]):
        with pytest.raises(ValueError, match="`features` is of .*; make it with `ItemFeatures.from_columns"):
            model.set_item_features(wrong)
    for use in (model.train, model.item_vectors, lambda: model(torch.tensor([[3]])), lambda: model.recommend([[3]])):
        with pytest.raises(ValueError, match="no features of its items.*set_item_features"):
            use()
    with pytest.raises(ValueError, match="plot has vectors with values that are no numbers"):
        ItemFeatures.from_columns({"plot": [[1.0, 2.0], [1.0, "x"]]})
    for value in (3, 2.5, True):
        with pytest.raises(
            ValueError, match=f"plot has {value} for item 1; give a vector, or None in place of a missing"
        ):
            ItemFeatures.from_columns({"plot": [[1.0, 2.0], value]})


def test_a_column_of_zeros_is_no_missing_column(tmp_path):
    model = make_model({"genre": ["a", "b"] * 29, "price": np.zeros((58, 1))})
    model.save_pretrained(tmp_path)
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    assert torch.equal(loaded.train().item_vectors([5]), model.item_vectors([5]))


def test_whole_numbers_are_categories():
    years = [1994, 1995, None, 1994, 1995]
    expected = ItemFeatures.from_columns({"year": [None if year is None else str(year) for year in years]})
    assert expected.columns["year"].names == ["1994", "1995"]
    found = ItemFeatures.from_columns({"year": years})
    assert all(map(np.array_equal, found.columns["year"], expected.columns["year"]))
    assert ItemFeatures.from_columns({"year": np.array([7, 7, 8])}).columns["year"].codes.tolist() == [1, 1, 0]
    known = expected.config()
    assert ItemFeatures.from_columns({"year": [1995, 2000]}, known=known).columns["year"].codes.tolist() == [2, 0]


def test_features_of_another_copy_of_the_code_fit():
    """As those of the package do for a model that is loaded with `trust_remote_code=True`."""
    model = make_model()
    name = f"{ItemFeatures.__module__}_copy"
    spec = importlib.util.spec_from_file_location(name, inspect.getsourcefile(ItemFeatures))
    spec.loader.exec_module(copied := importlib.util.module_from_spec(spec))
    assert copied.Categories is not Categories
    features = copied.ItemFeatures.from_columns(draw_columns(), known=model.config.item_features)
    model.set_item_features(features)
    codes, offsets = model.model.item_features.columns[0].codes, features.columns["genre"].offsets
    assert codes.tolist() == features.columns["genre"].codes.tolist() and len(offsets) == 59


def test_codes_are_sorted_unique_and_never_missing():
    columns = Categories.from_codes(["a", "b"], np.array([3, 0, 0, 0]), np.array([2, 2, 1, 2]), 5)
    assert columns.codes.tolist() == [1, 2, 0, 0, 2, 0] and columns.offsets.tolist() == [0, 2, 3, 4, 5, 6]
    features = ItemFeatures.from_columns({"tags": [["x", "y"], "x", ["z", "w"], None]})
    assert features.columns["tags"].names == ["x"]  # a category of a single item teaches nothing
    assert features.columns["tags"].codes.tolist() == [0, 1, 1, 0, 0]
