"""The tokenizer: raw ids of any kind to the vocabulary and back, also through save and load."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_cases import error_message
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from blossomrec_hf.model.manifest_blossomrec import update_manifest
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


ODD = [
    "B00 5A",
    "[PAD]",
    "[UNK]",
    "x%20y",
    "",
    "é\u00a0q",
    "a\nb",
    '"q"',
    "new5",
    "xnew5y",
    "%",
    "a[b",
    "\u2003",
    "\x85",
    "日本",
]


def test_special_ids_come_first():
    tokenizer = BlossomRecTokenizer.from_items(["a", "b"])
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.encode_items(["a", "b"])) == (0, 1, [2, 3])
    assert len(tokenizer) == 4


def test_odd_ids_survive_every_way_in_and_out():
    tokenizer = BlossomRecTokenizer.from_items(ODD)
    ids = list(range(2, 2 + len(ODD)))
    assert tokenizer.encode_items(ODD) == ids
    assert tokenizer([ODD])["input_ids"] == [ids]
    assert tokenizer.decode_items(ids) == ODD


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"])), unique=True, max_size=8))
def test_any_text_is_an_id(items):
    tokenizer = BlossomRecTokenizer.from_items(items)
    assert tokenizer([items])["input_ids"][0] == tokenizer.encode_items(items) == list(range(2, 2 + len(items)))
    assert tokenizer.decode_items(tokenizer.encode_items(items)) == items


def test_an_item_called_pad_is_no_padding():
    tokenizer = BlossomRecTokenizer.from_items(["[PAD]", "x"])
    batch = tokenizer([["[PAD]", "x"], ["x"]], padding=True)
    assert batch["input_ids"] == [[2, 3], [3, 0]]
    assert batch["attention_mask"] == [[1, 1], [1, 0]]


@pytest.mark.parametrize("items, kind", [([7, -3, 10**15], "int"), (["7", "007", "x y"], "str")])
def test_types_come_back_after_saving(tmp_path, items, kind):
    BlossomRecTokenizer.from_items(items).save_pretrained(tmp_path)
    loaded = BlossomRecTokenizer.from_pretrained(tmp_path)
    assert loaded.item_type == kind
    assert loaded.decode_items(loaded.encode_items(items)) == items
    assert [type(item) for item in loaded.decode_items([2, 3, 4])] == [type(item) for item in items]
    assert loaded.truncation_side == "left" and loaded.padding_side == "right"


def test_text_and_lists_agree():
    tokenizer = BlossomRecTokenizer.from_items([12, 15, 3])
    assert tokenizer("12 15 3")["input_ids"] == tokenizer([12, 15, 3])["input_ids"] == [2, 3, 4]
    assert tokenizer(["12 15 3", "3"])["input_ids"] == tokenizer([[12, 15, 3], [3]])["input_ids"] == [[2, 3, 4], [4]]
    assert tokenizer(np.array([[12, 15]]))["input_ids"] == [[2, 3]]


def test_unknown_items_become_unk():
    tokenizer = BlossomRecTokenizer.from_items([12, 15])
    assert tokenizer.encode_items([12, 99]) == [2, 1]
    assert tokenizer([[99, 15]])["input_ids"] == [[1, 3]]
    assert tokenizer.decode_items([0, 1, 2]) == [None, None, 12]


def test_truncation_keeps_the_latest():
    tokenizer = BlossomRecTokenizer.from_items(range(10))
    assert tokenizer([[0, 1, 2, 3]], truncation=True, max_length=2)["input_ids"] == [[4, 5]]


def test_decode_takes_tensors_of_any_shape():
    tokenizer = BlossomRecTokenizer.from_items(["a", "b"])
    assert tokenizer.decode_items(torch.tensor([[2, 3], [0, 2]])) == [["a", "b"], [None, "a"]]
    assert tokenizer.decode_items(np.int64(3)) == "b"


def test_no_recommendation_is_no_item():
    tokenizer = BlossomRecTokenizer.from_items(["a", "b"])
    assert tokenizer.decode_items(-1) is None
    assert tokenizer.decode_items(torch.tensor([[3, -1], [-1, -1]])) == [["b", None], [None, None]]
    for outside in (-2, 4):
        with pytest.raises(ValueError, match=f"`ids` has {outside}; an id may be 0 to 3, or −1"):
            tokenizer.decode_items([2, outside])
    for wrong in (2.0, None, "a"):
        with pytest.raises(ValueError, match=f"`ids` has {wrong!r}; it must be whole numbers"):
            tokenizer.decode_items([2, wrong])


def test_added_items_touch_nothing_old(tmp_path):
    tokenizer = BlossomRecTokenizer.from_items(["old", "xnew5y"])
    assert tokenizer.add_items(["new5", "old", "a b", "new5"]) == 2
    assert tokenizer.encode_items(["old", "xnew5y", "new5", "a b"]) == [2, 3, 4, 5]
    assert tokenizer([["xnew5y", "new5"]])["input_ids"] == [[3, 4]]
    assert tokenizer.decode_items([4, 5]) == ["new5", "a b"]
    tokenizer.save_pretrained(tmp_path)
    loaded = BlossomRecTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 6 and loaded.encode_items(["new5", "a b"]) == [4, 5]


def test_digits_are_added_to_text_and_text_is_not_added_to_integers():
    text, integers = BlossomRecTokenizer.from_items(["0-19-X", "7"]), BlossomRecTokenizer.from_items([7, 8])
    assert text.add_items([7, 12, np.int64(13)]) == 2
    assert text.decode_items([3, 4, 5]) == ["7", "12", "13"]
    with pytest.raises(ValueError, match=r"text id '0-19-X', but the ids of this vocabulary are integers: give"):
        integers.add_items([9, "10", "0-19-X"])
    assert len(integers) == 4


def test_a_single_string_is_not_read_as_a_list_of_its_characters():
    tokenizer = BlossomRecTokenizer.from_items(["sku-1", "sku-2"])
    for call in (tokenizer.add_items, tokenizer.encode_items, BlossomRecTokenizer.from_items):
        with pytest.raises(ValueError, match=r"`items` is 'sku-3'; it must be a list of raw ids, such as \['sku-3'\]"):
            call("sku-3")
    assert len(tokenizer) == 4


@pytest.mark.parametrize("items", [[1, "2"], ["1", 2], [1, 2.5], [True, False], [None]])
def test_mixed_types_are_refused(items):
    with pytest.raises(ValueError, match="`items` has"):
        BlossomRecTokenizer.from_items(items)


def test_wrong_type_is_refused_instead_of_unknown():
    with pytest.raises(ValueError, match="raw ids of this tokenizer are int"):
        BlossomRecTokenizer.from_items([1, 2]).encode_items(["1"])


def test_other_bad_input():
    with pytest.raises(ValueError, match="'a' more than once"):
        BlossomRecTokenizer.from_items(["a", "b", "a"])
    with pytest.raises(ValueError, match="item_type"):
        BlossomRecTokenizer.from_items([], item_type="float")
    with pytest.raises(ValueError, match="an id may be 0 to 3"):
        BlossomRecTokenizer.from_items(["a", "b"]).decode_items([4])


def test_auto_tokenizer_with_and_without_our_package(tmp_path):
    import blossomrec_hf  # noqa: F401  registers the class for AutoTokenizer

    tokenizer = BlossomRecTokenizer.from_items(ODD)
    tokenizer.add_items(["later"])
    tokenizer.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BlossomRecTokenizer
    # A process that has never heard of blossomrec_hf gets the class from the file that travels with the vocabulary.
    code = (
        "import sys, json; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'blossomrec_hf' not in sys.modules\n"
        "items = tokenizer.decode_items(range(2, len(tokenizer)))\n"
        "print(json.dumps([items, tokenizer.encode_items(items), tokenizer.truncation_side]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[*ODD, "later"], list(range(2, 3 + len(ODD))), "left"]


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved tokenizer of the items 100, 101, …, 109."""
    BlossomRecTokenizer.from_items(list(range(100, 110))).save_pretrained(tmp_path)
    return tmp_path


def change_vocabulary(folder, change, *, save=True):
    """Applies `change` to the content of tokenizer.json, as if it had been saved so."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if save:
        update_manifest(folder, ["tokenizer.json"])


def refused(folder, **options):
    message = error_message(lambda: BlossomRecTokenizer.from_pretrained(folder, **options), ValueError)
    assert len(message.splitlines()) == 1
    return message


def swap_two_ids(content):
    vocab = content["model"]["vocab"]
    vocab["103"], vocab["104"] = vocab["104"], vocab["103"]


def test_a_tokenizer_that_was_changed_after_it_was_saved_is_refused_unless_asked_for(saved):
    change_vocabulary(saved, swap_two_ids, save=False)
    message = refused(saved)
    assert message.startswith("tokenizer.json of") and "check_files=False" in message
    assert message == error_message(lambda: AutoTokenizer.from_pretrained(saved), ValueError)
    for kind in (BlossomRecTokenizer, AutoTokenizer):
        assert kind.from_pretrained(saved, check_files=False).encode_items([103, 104]) == [6, 5]
    BlossomRecTokenizer.from_pretrained(saved, check_files=False).save_pretrained(saved)
    assert BlossomRecTokenizer.from_pretrained(saved).encode_items([103, 104]) == [6, 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["model"]["vocab"].update({"109": 10**9}), "they must be 0 to 11, each once"),
        (lambda content: content["model"]["vocab"].update({"109": 5}), "they must be 0 to 11, each once"),
        (lambda content: content["model"]["vocab"].update({"nine": 12}), "item_type"),
        (lambda content: content["model"]["vocab"].update({"007": 12}), "item_type"),
        (lambda content: content["model"]["vocab"].update({"[PAD]": 1, "[UNK]": 0}), ""),
        (lambda content: content.update(model={"type": "WordLevel"}), "cannot be read"),
        (lambda content: content.clear(), "cannot be read"),
    ],
)
def test_a_vocabulary_that_is_none_of_items_is_refused(saved, change, said):
    change_vocabulary(saved, change)
    assert said in refused(saved)


@pytest.mark.parametrize(
    "part",
    [{"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "x"}}],
)
def test_what_would_change_ids_in_the_file_has_no_effect_or_is_refused(tmp_path, part):
    tokenizer = BlossomRecTokenizer.from_items(["aBc", "abc", "x y"])
    tokenizer.save_pretrained(tmp_path)
    change_vocabulary(tmp_path, lambda content: content.update(part))
    try:
        loaded = BlossomRecTokenizer.from_pretrained(tmp_path)
    except ValueError:
        return
    assert loaded(["abc aBc x%20y"])["input_ids"] == tokenizer(["abc aBc x%20y"])["input_ids"] == [[3, 2, 4]]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"x"', "\x00\x01"])
def test_damaged_files_are_refused_in_a_sentence(saved, name, content):
    (saved / name).write_text(content)
    assert refused(saved).startswith(f"{name} of")
    (saved / "checkpoint_manifest.json").unlink()
    if (name, content) != ("tokenizer_config.json", "null"):
        assert "cannot be read" in refused(saved)


def test_a_file_that_is_missing_is_named(tmp_path):
    """Without tokenizer_config.json, integer ids would become text."""
    BlossomRecTokenizer.from_items([5, 7]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer_config.json, which was saved with its other files"):
        BlossomRecTokenizer.from_pretrained(tmp_path)
