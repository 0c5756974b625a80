"""`blossomrec similar` prints what `similar_items` returns, with raw ids."""

import json
import sys

import pytest
from checkpoint_cases import small_model, small_tokenizer

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.commands import similar


@pytest.fixture
def print_similar(monkeypatch, capsys):
    """Run the command in this process, and parse the lines that it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["blossomrec similar", *map(str, arguments)])
        similar.main()
        return [json.loads(line) for line in capsys.readouterr().out.rstrip().split("\n")]

    return run


def as_answers(tokenizer, items, out):
    """The lines that are expected for the raw ids `items`."""
    answers = []
    for item, ids, scores in zip(items, out.item_ids.tolist(), out.scores.tolist()):
        found = [index for index in ids if index >= 0]
        similar_items = zip(tokenizer.decode_items(found), scores)
        answers.append({"item": item, "similar": [{"item": other, "score": score} for other, score in similar_items]})
    return answers


def test_ids_are_arguments_or_lines_of_a_file(print_similar, tmp_path, monkeypatch, caplog):
    model, tokenizer = small_model(), small_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    items = [105, 100, 139, 105]
    ids = tokenizer.encode_items(items)

    expected = as_answers(tokenizer, items, model.similar_items(ids, top_k=3))
    assert print_similar(*items, "--model", tmp_path / "model", "--top_k", 3) == approximately(expected)

    monkeypatch.setattr(similar, "BATCH_SIZE", 3)
    (tmp_path / "items.txt").write_text("\n".join(map(str, items)), "utf-8-sig")
    (tmp_path / "candidates.txt").write_text("105\n139\n7\n\n120\n")
    out = model.similar_items(ids, candidate_ids=tokenizer.encode_items([105, 139, 120]))
    files = ("--items", tmp_path / "items.txt", "--candidates", tmp_path / "candidates.txt")
    answers = print_similar(*files, "--model", tmp_path / "model")
    assert answers == approximately(as_answers(tokenizer, items, out))
    assert [len(answer["similar"]) for answer in answers] == [2, 3, 2, 2]
    assert "1 of 4 items that are not in the model's vocabulary ('7')" in caplog.text


def test_ids_may_be_any_text(print_similar, tmp_path):
    names = ["07", "a b", "é", "[PAD]", "%41", "a\u2028b"]
    tokenizer = BlossomRecTokenizer.from_items(names)
    model = small_model(len(names))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = as_answers(tokenizer, names, model.similar_items(tokenizer.encode_items(names), top_k=6))
    assert print_similar(*names, "--model", tmp_path, "--top_k", 6) == approximately(expected)
    (tmp_path / "names.txt").write_text("\r\n".join(names), "utf-8")
    found = print_similar("--items", tmp_path / "names.txt", "--model", tmp_path, "--top_k", 6)
    assert found == approximately(expected)


def approximately(answers):
    """Equal but for the rounding of scores."""
    return [
        {
            **answer,
            "similar": [{**entry, "score": pytest.approx(entry["score"], abs=1e-5)} for entry in answer["similar"]],
        }
        for answer in answers
    ]
