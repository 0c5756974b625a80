"""Items that no user had are recommended by their features at once, without training."""

import numpy as np
import pytest
import torch
from small_cases import make_model
from transformers import TrainingArguments

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.training import LoopArguments, SequentialRecommendationTrainer, add_items, train


GROUPS, ITEMS, NEW = 12, 96, 12  # a group of eight old items and a new one each


def group_features(items: range) -> dict[str, list]:
    """A category that is the group of an item, and a noisy vector of it."""
    noise = np.random.default_rng(7).normal(scale=0.2, size=(ITEMS + NEW, GROUPS))
    return {
        "group": [[f"group {item % GROUPS}"] for item in items],
        "text": [np.eye(GROUPS)[item % GROUPS] + noise[item] for item in items],
    }


@pytest.mark.parametrize("columns, scoring", [(["group", "text"], "dot"), (["group"], "cosine"), (["text"], "dot")])
def test_a_new_item_is_recommended_to_those_who_like_its_kind(tmp_path, columns, scoring):
    """Histories stay in one group. The new item of the group ranks first of twelve; chance is one in twelve."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(0, GROUPS, 250)
    rows = [{"input_ids": 2 + kind + GROUPS * rng.integers(0, ITEMS // GROUPS, 12)} for kind in kinds]
    tokenizer = BlossomRecTokenizer.from_items(range(ITEMS))
    given = {name: column for name, column in group_features(range(ITEMS)).items() if name in columns}
    features = ItemFeatures.from_columns(given)
    torch.manual_seed(3)
    model = make_model(len(tokenizer), item_features=features.config(), scoring=scoring, hidden_dropout_prob=0.1)
    model.set_item_features(features)
    args = LoopArguments(output_dir=str(tmp_path), seed=3, max_length=12, tokens_per_step=600, num_train_epochs=12,
        learning_rate=1e-2, warmup_steps=5,
    )  # fmt: skip
    train(model, rows, args=args)
    model.eval()

    new = range(ITEMS, ITEMS + NEW)
    values = {name: column for name, column in group_features(new).items() if name in columns}
    table = {str(item): {name: values[name][row] for name in columns} for row, item in enumerate(new)}
    assert add_items(model, tokenizer, new, features=table) == NEW
    assert not model.model.item_embedding.weight[-NEW:].any()
    histories = [row["input_ids"].tolist() for row in rows]
    ids = tokenizer.encode_items(list(new))
    best = model.recommend(histories, top_k=1, candidate_ids=ids).item_ids[:, 0]
    right = (best - 2 - ITEMS == torch.from_numpy(kinds)).double().mean()
    assert right > 0.8
    # In the whole catalog, too: one of the nine best is new, as one of the nine items of a group is.
    top = model.recommend(histories, top_k=9, exclude_seen=False).item_ids
    share = ((top >= 2 + ITEMS) & ((top - 2) % GROUPS == torch.from_numpy(kinds)[:, None])).double().sum(1).mean()
    assert share > 0.5
    # A new item in a history is read by its features.
    old = model.recommend([[int(new_id)] for new_id in ids], top_k=5, candidate_ids=range(2, 2 + ITEMS)).item_ids
    assert ((old - 2) % GROUPS == torch.arange(GROUPS)[:, None]).double().mean() > 0.8


def small_model(tokenizer: BlossomRecTokenizer):
    features = ItemFeatures.from_columns(group_features(range(24)))
    model = make_model(len(tokenizer), item_features=features.config()).eval()
    model.set_item_features(features)
    return model


def test_the_summary_of_a_trainer_names_the_features(tmp_path):
    model = small_model(BlossomRecTokenizer.from_items(range(24)))
    for trained, names in ((model, "group,text"), (make_model(26), None)):
        trainer = SequentialRecommendationTrainer(trained, TrainingArguments(str(tmp_path), use_cpu=True))
        assert trainer.training_summary()["configuration"]["item_features"] == names


def test_unknown_categories_and_missing_features_of_new_items(caplog):
    tokenizer = BlossomRecTokenizer.from_items(range(24))
    model = small_model(tokenizer)
    features = {"24": {"group": ["group 3", "never seen"]}, "25": {"text": np.ones(GROUPS)}, "7": {"group": "group 0"}}
    before = model.item_vectors([9])
    assert add_items(model, tokenizer, [7, 25, 24, 26], features=features) == 3
    groups, text = model.model.item_features.columns
    codes = [groups.codes[groups.offsets[row] : groups.offsets[row + 1]].tolist() for row in (26, 27, 28)]
    assert tokenizer.decode_items([26, 27, 28]) == [25, 24, 26]
    assert codes == [[0], [0, groups.names.index("group 3") + 1], [0]]
    torch.testing.assert_close(text.table[26].float(), torch.full((GROUPS,), GROUPS**-0.5), rtol=0, atol=1e-3)
    assert not text.table[27:].any() and torch.equal(model.item_vectors([9]), before)
    model.recommend([[26, 27, 28]])
    assert caplog.messages == [
        "1 of 2 categories of the new items in 'group' are unknown to the model, such as 'never seen'; it knows "
        "'group 0', 'group 1', 'group 2', …."
    ]


def test_numbers_of_new_items_are_in_the_interval_of_the_old_ones(caplog):
    tokenizer = BlossomRecTokenizer.from_items(range(4))
    known = {"price": [["2.828 to 4"], ["0"]] * 2, "size": [["3"], ["0"]] * 2}
    model = make_model(len(tokenizer), item_features=(features := ItemFeatures.from_columns(known)).config()).eval()
    model.set_item_features(features)
    prices = [3.5, np.float32(0), "2.828 to 4", ["0"], float("nan"), 50]
    given = {4 + row: {"price": price, "size": 3} for row, price in enumerate(prices)}
    assert add_items(model, tokenizer, list(given), features=given) == 6
    price, size = model.model.item_features.columns
    assert price.codes[-6:].tolist() == [1, 2, 1, 2, 0, 0] and price.names == ["2.828 to 4", "0"]
    assert set(size.codes[-6:].tolist()) == {1 + size.names.index("3")}  # numbers that are categories
    assert caplog.messages == [
        "1 of 3 categories of the new items in 'price' are unknown to the model, such as '45.25 to 64'; it knows "
        "'2.828 to 4', '0'."
    ]


def test_features_and_vectors_have_raw_ids_of_the_type_of_the_items():
    """As integers and as text, they are those of the same item."""
    for key in (24, "24", np.int64(24)):
        tokenizer = BlossomRecTokenizer.from_items(range(24))
        model = small_model(tokenizer)
        vector = np.ones(model.config.hidden_size, np.float32)
        assert add_items(model, tokenizer, [24], vectors={key: vector}, features={key: {"group": "group 3"}}) == 1
        groups = model.model.item_features.columns[0]
        assert groups.codes[groups.offsets[-2] :].tolist() == [groups.names.index("group 3") + 1]
        assert torch.equal(model.model.item_embedding.weight[26], torch.ones(16))


@pytest.mark.parametrize(
    "features, message",
    [
        (
            {"30": {"text": np.ones(12)}, "31": {"text": np.ones(5)}},
            r"`features\['31'\]` cannot be read: text has vectors of 5 numbers; 12 are expected",
        ),
        (
            {"30": {"text": [np.nan] * GROUPS}},
            r"`features\['30'\]` cannot be read: text has numbers that are not finite; correct",
        ),
        ({"30": {"text": 1.5}}, r"`features\['30'\]` cannot be read: text has 1.5; give a vector"),
        ({"30": {"group": 1.5}}, r"`features\['30'\]` cannot be read: .* 1.5; categories are strings or integers"),
        ({"30": {"groups": "group 1"}}, r"`features\['30'\]` has the column 'groups'; the columns of the model are"),
        (
            {"30": "group 1"},
            "`features` is {'30': 'group 1'}; it must be a dictionary by raw id of dictionaries by column",
        ),
        ([{"group": "group 1"}], "it must be a dictionary by raw id of dictionaries by column"),
    ],
)
def test_features_that_do_not_fit_change_nothing(features, message):
    tokenizer = BlossomRecTokenizer.from_items(range(24))
    model = small_model(tokenizer)
    with pytest.raises(ValueError, match=message):
        add_items(model, tokenizer, [30, 31], features=features)
    assert len(tokenizer) == model.config.vocab_size == 26
    with pytest.raises(ValueError, match="`features` are given, but the model has no"):
        add_items(make_model(26), tokenizer, [30], features={"30": {"group": "group 1"}})
