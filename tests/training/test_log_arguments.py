import sys
from dataclasses import replace

import pytest

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.data import build_sequences
from blossomrec_hf.training import LogArguments, parse_arguments, save_arguments


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    return parse_arguments(LogArguments)


def test_titles_come_from_wherever_they_are_known(tmp_path):
    _, tokenizer = LogArguments().build()
    assert LogArguments().item_titles(tokenizer).height == len(tokenizer) - 2
    (tmp_path / "log.csv").write_text("user,item\nu,a\nu,b\n")
    (tmp_path / "titles.csv").write_text("item,title\nb,B!\n")
    log = LogArguments(data=str(tmp_path / "log.csv"))
    _, tokenizer = log.build()
    assert log.item_titles(tokenizer) is None
    log = replace(log, titles=str(tmp_path / "titles.csv"))
    assert log.item_titles(tokenizer)["title"].to_list() == ["B!"]


def test_a_built_folder_is_read_as_it_is(tmp_path):
    (tmp_path / "log.csv").write_text("user,item\nu,a\nu,b\nv,a\n")
    (tmp_path / "titles.csv").write_text("item,title\nb,B!\n")
    folder = tmp_path / "built"
    built, _ = build_sequences(tmp_path / "log.csv", items=tmp_path / "titles.csv", output_dir=folder)
    log = LogArguments(data=str(folder))
    dataset, tokenizer = log.build()
    assert dataset.to_dict() == built.to_dict()
    assert log.item_titles(tokenizer)["title"].to_list() == ["B!"]
    for options in ({"k_core": 5}, {"user": "u"}, {"group": "timestamp"}, {"min_rating": 3.0}):
        with pytest.raises(
            ValueError, match=f"`{next(iter(options))}` is .* is already prepared; give the log instead"
        ):
            LogArguments(data=str(folder), **options).build()
    tokenizer.add_items(["new"])
    assert log.build(tokenizer)[0].to_dict() == built.to_dict()  # the vocabulary has grown since
    dataset, _ = log.build(BlossomRecTokenizer.from_items(["b", "c"]))
    assert dataset["input_ids"][:] == [[1, 2], [1]]  # another vocabulary, without "a"


def test_a_raw_log_is_read_with_the_options_of_prepare(monkeypatch, tmp_path):
    rows = ["u;x;1;5;view", "u;y;1;5;buy", "u;y;2;4;buy", "u;z;2;5;cart", "u;x;3;1;buy", "v;x;9;5;view", "v;y;9;5;buy"]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    words = ("--columns", "user,item,timestamp,rating,kind", "--separator", ";", "--event_type", "kind",
        "--type_weights", "view=0.5,buy=2", "--targets", "buy,view", "--group", "timestamp", "--min_rating", "2",
        "--k_core", "1", "2")  # fmt: skip
    (log,) = parse(monkeypatch, "--data", tmp_path / "log.csv", *words)
    dataset, tokenizer = log.build()
    assert [tokenizer.decode_items(row) for row in dataset["input_ids"][:]] == [["x", "y", "y"], ["x", "y"]]
    assert dataset["weights"][:] == [[0.5, 2, 2], [0.5, 2]]
    assert dataset["basket_starts"][:] == [[True, False, True], [True, False]]
    save_arguments(tmp_path / "run.yaml", log)
    assert parse(monkeypatch, "--config", tmp_path / "run.yaml") == (log,)
    for words, told in (
        (("--separator", "xx"), "separator is 'xx'"),
        (("--targets", "buy,buy"), "targets is 'buy,buy'"),
        (("--min_history", "0"), "min_history is 0"),
        (
            ("--split", "time"),
            r"--split is no option of this command; prepare the log with it \(`blossomrec prepare`\)",
        ),
        (("--item_categories=a",), "--item_categories is no option of this command; prepare the log with it"),
        (("--splitt", "time"), "--splitt is no option of this command; see --help"),
    ):
        with pytest.raises(ValueError, match=told):
            parse(monkeypatch, *words)
