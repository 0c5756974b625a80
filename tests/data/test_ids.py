"""Ids: what is missing is nobody's, and two spellings of one integer are one id."""

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import spelled

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.ids import MISSING_IDS
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


def histories(dataset, tokenizer) -> dict:
    return {user: tokenizer.decode_items(ids) for user, ids in zip(dataset["user_id"], dataset["input_ids"])}


MISSING_USERS = ["NA", "NULL", "nan", "None", "", "  "]


def frame(users: list) -> pl.DataFrame:
    return pl.DataFrame({"user": users, "item": [f"i{number}" for number in range(len(users))]})


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "frame", "pandas", "parquet"])
@pytest.mark.parametrize("missing", MISSING_USERS)
def test_missing_users_are_no_user(tmp_path, kind, missing):
    log, path = frame(["ann", missing, missing, "bob"]), tmp_path / f"log.{kind}"
    if kind == "csv":
        log.write_csv(path)
    elif kind == "tsv":
        log.write_csv(path, separator="\t", quote_style="never")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in log.to_dicts()))
    elif kind == "parquet":
        log.write_parquet(path)
    source = {"frame": log, "pandas": log.to_pandas()}.get(kind, path)
    with pytest.raises(ValueError, match="(line [23]|row 1): not a usable user .*keep_na_ids"):
        build_sequences(source)
    dataset, tokenizer = build_sequences(source, on_bad_rows="skip", output_dir=tmp_path / "built")
    assert histories(dataset, tokenizer) == {"ann": ["i0"], "bob": ["i3"]}
    assert FilterReport.load(tmp_path / "built").bad_row_reasons == {"no usable user": 2}
    assert "2 with no usable user" in dataset.info.description


def test_an_option_keeps_them():
    dataset, tokenizer = build_sequences(frame(["NA", "NULL", "nan", "None", "NA"]), keep_na_ids=True)
    assert histories(dataset, tokenizer) == {"NA": ["i0", "i4"], "NULL": ["i1"], "nan": ["i2"], "None": ["i3"]}
    with pytest.raises(ValueError, match="row 1: not a usable user"):
        build_sequences(frame(["NA", ""]), keep_na_ids=True)


def test_missing_items_are_no_item():
    log = pl.DataFrame({"user": ["ann"] * 3, "item": ["a", "NULL", "b"]})
    with pytest.raises(ValueError, match="row 1: not a usable item .item 'NULL'."):
        build_sequences(log)
    assert histories(*build_sequences(log, on_bad_rows="skip")) == {"ann": ["a", "b"]}


def test_a_line_of_items_is_no_user(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1 2 3 4 5\n80 81 82 83\n1 3 140 3 141\n")
    for format in (None, "sequences"):
        with pytest.raises(
            ValueError, match=r"lines.txt, line 3: the user '1' begins an earlier line.*item-sequences"
        ):
            build_sequences(path, format=format)
    dataset, tokenizer = build_sequences(path, format="item-sequences")
    assert histories(dataset, tokenizer) == {1: [1, 2, 3, 4, 5], 2: [80, 81, 82, 83], 3: [1, 3, 140, 3, 141]}
    path.write_text("1 2 3 4 5\n80 81 82 83\n")
    assert "each line is read as a user" in build_sequences(path)[0].info.description
    path.rename(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="source is 2 files, but the users of item-sequences"):
        build_sequences(tmp_path, format="item-sequences")


WEEK_1 = "user_id,item_id,timestamp\n1,100,10\n1,101,20\n2,100,5\n"
WEEK_2 = "user_id,item_id,timestamp\n1.0,100.0,30\n1.0,102.0,40\n"


def test_integers_that_were_written_as_floats(tmp_path):
    for name, text in (("week1.csv", WEEK_1), ("week2.csv", WEEK_2)):
        (tmp_path / name).write_text(text)
    dataset, tokenizer = build_sequences(tmp_path, deduplicate="first", output_dir=tmp_path / "built")
    assert histories(dataset, tokenizer) == {1: [100, 101, 102], 2: [100]}
    assert (
        "the item ids are floats with whole values such as '100.0'" in FilterReport.load(tmp_path / "built").notes[1]
    )
    assert histories(*build_sequences(tmp_path / "week2.csv")) == {1: [100, 102]}
    week_1 = build_sequences(tmp_path / "week1.csv")[1]
    assert build_sequences(tmp_path / "week2.csv", tokenizer=week_1)[0]["input_ids"][0] == [2, 1]


def test_floats_of_a_text_catalog(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,1.0\n1,2.0\n1,1\n")
    versions = BlossomRecTokenizer.from_items(["1.0", "2.0", "1"])
    assert build_sequences(path, tokenizer=versions)[0]["input_ids"][0] == [2, 3, 4]
    isbns = BlossomRecTokenizer.from_items(["034545104X", "1", "2"])
    assert build_sequences(path, tokenizer=isbns)[0]["input_ids"][0] == [3, 4, 3]
    path.write_text("user,item\n1,1.0\n1,2.0\n1,x\n")
    assert histories(*build_sequences(path)) == {1: ["1.0", "2.0", "x"]}
    numbers = BlossomRecTokenizer.from_items([2, 1])
    assert build_sequences(path, tokenizer=numbers)[0]["input_ids"][0] == [3, 2, 1]


def test_pandas_columns_with_gaps():
    log = pd.DataFrame({"user": [1, 100, None], "item": [7.0, 8.0, 9.0]})
    assert histories(*build_sequences(log, on_bad_rows="skip")) == {1: [7], 100: [8]}


@pytest.mark.parametrize(
    "name, text",
    [
        ("log.csv", "user,item\n7,1.23457E+12\n8,1.23457E+12\n"),  # 1234567890123 and another, by a spreadsheet
        ("log.jsonl", '{"user": 7, "item": 12345678901234567890123}\n'),
    ],
)
def test_numbers_with_an_exponent_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"ids such as '1.23\d+[eE]\+\d\d' are numbers with an exponent"):
        build_sequences(tmp_path / name)


@pytest.mark.parametrize(
    "ids", [pl.Series([2.0**53 + 2]), pl.Series([2.0**24 + 2], dtype=pl.Float32), pl.Series(["9007199254740994.0"])]
)
def test_floats_that_have_lost_digits_are_refused(ids):
    with pytest.raises(ValueError, match="floats up to [0-9]+, whose last digits are lost; write them as integers"):
        build_sequences(pl.DataFrame({"user": [1], "item": ids}))


def test_unsigned_integers_of_any_size(tmp_path):
    large = np.array([2**63 + 5, 2**64 - 1, 3], np.uint64)
    log = pl.DataFrame({"user": large, "item": large[::-1].copy()})
    expected = {str(2**63 + 5): ["3"], str(2**64 - 1): [str(2**64 - 1)], "3": [str(2**63 + 5)]}
    assert histories(*build_sequences(log)) == expected
    log.write_csv(tmp_path / "log.csv")
    assert histories(*build_sequences(tmp_path / "log.csv")) == expected
    log.write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user": [3], "item": [4]}).write_parquet(tmp_path / "b.parquet")
    assert histories(*build_sequences(tmp_path / "*.parquet"))["3"] == [str(2**63 + 5), "4"]
    small = pl.DataFrame({"user": large[2:], "item": large[2:]})
    assert histories(*build_sequences(small)) == {3: [3]}


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(
                ["1", "2", "10", "1.0", "10.0", "2.00", "007", "x", "NA", "", " ", "-1", "-1.0", "1.5", "1e3"]
            ),
            st.sampled_from(["5", "6", "5.0", "6.0", "y", "None", "\\N", "05"]),
        ),
        min_size=1,
        max_size=12,
    ),
    keep=st.booleans(),
)
def test_text_ids_against_plain_python(rows, keep):
    missing = {""} if keep else {"", *MISSING_IDS}
    rows = [(user.strip(), item.strip()) if not user.strip() else (user, item) for user, item in rows]
    good = [row for row in rows if not missing & set(row)]

    expected: dict = {}
    for user, item in zip(spelled([user for user, _ in good]), spelled([item for _, item in good])):
        expected.setdefault(user, []).append(item)
    log = pl.DataFrame(rows, ["user", "item"], orient="row")
    if not good:
        with pytest.raises(ValueError, match="has no interaction"):
            build_sequences(log, on_bad_rows="skip", keep_na_ids=keep)
    else:
        assert histories(*build_sequences(log, on_bad_rows="skip", keep_na_ids=keep)) == expected
