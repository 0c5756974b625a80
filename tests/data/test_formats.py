"""A file format from outside the package: one file with one registration, then recognized, filtered and refused like any other."""

import importlib
import sys

import pytest

from blossomrec_hf.commands import prepare
from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.formats import FORMATS, register_format
from blossomrec_hf.data.readers import open_log


TOY = '''
"""Logs of a toy shop: "time|user bought item" per line, below the line "toy shop"."""

import polars as pl

from blossomrec_hf.data.formats import Format, register_format
from blossomrec_hf.data.parts import Part
from blossomrec_hf.data.text_files import read_lines


def open_toy(path, options, notes):
    def read(wanted, bad):
        for lines in read_lines(path):
            fields = pl.col("line").str.extract_groups(r"^(?<timestamp>\\d+)\\|(?<user>\\S+) bought (?<item>\\S+)$")
            rows = lines.filter(pl.col("line") != "toy shop").with_columns(fields=fields).unnest("fields")
            yield rows.select("row", *wanted)

    notes.append("the shop is a toy")
    return Part(str(path), dict.fromkeys(("user", "item", "timestamp"), pl.String()), read)


register_format("toy", Format(open_toy, lambda look: look.first == "toy shop"))
'''


@pytest.fixture
def toy_format(tmp_path, monkeypatch):
    (tmp_path / "toy_format.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("toy_format")
    yield
    del sys.modules["toy_format"], FORMATS["toy"]


def test_a_toy_format_is_added_from_outside(toy_format, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("toy shop\n30|ann bought car\n20|bob bought doll\n10|ann bought ball\n")
    log = open_log(path)
    assert log.format == "toy" and log.notes == ["the shop is a toy"]
    dataset, tokenizer = build_sequences(path)
    assert dataset["user_id"][:] == ["ann", "bob"] and dataset["timestamps"][:] == [[10, 30], [20]]
    assert tokenizer.decode_items(dataset["input_ids"][0]) == ["ball", "car"]
    path.write_text("toy shop\n30|ann bought car\nbob stole a doll\n")
    with pytest.raises(ValueError, match="log.txt, line 3: not a usable user or item or timestamp"):
        build_sequences(path)
    prepare.main([str(path), "--format", "toy", "--on_bad_rows", "skip", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "state.json").is_file()


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="name is 'csv', which is a format already; give another name"):
        register_format("csv", FORMATS["csv"])


def test_an_unknown_option_is_named_with_a_near_one():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kcore'; did you mean 'k_core'"):
        build_sequences("log.csv", kcore=5)
