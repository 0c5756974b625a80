"""Rows of CSV and TSV against a parser in plain Python, wherever blocks of the file end."""

import csv
import gzip
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import parse

from blossomrec_hf.data import build_sequences, delimited, text_files
from blossomrec_hf.data.delimited import DelimitedFile
from blossomrec_hf.data.text_files import BadRows, LogFile


def read(path, separator: str, quoting: bool, bad: BadRows) -> list[tuple[int, list[str]]]:
    file = DelimitedFile(LogFile(str(path)), separator, quoting=quoting)
    width = len(file.columns)
    return [
        (row[-1], [field or "" for field in row[:-1]])
        for frame in file.read(range(width), bad)
        for row in frame.select(*map(str, range(width)), "row").rows()
    ]


@pytest.mark.parametrize("separator, quoting", [(",", True), ("\t", False)])
def test_any_text_is_read_as_a_plain_parser_reads_it(tmp_path_factory, separator, quoting):
    path = tmp_path_factory.mktemp("log") / "log.txt"

    @settings(max_examples=400, deadline=None)
    @given(
        body=st.lists(
            st.sampled_from([separator, separator, "\n", "\n", "\r\n", '"', '""', "a", "b ", "7", "é"]), max_size=40
        ).map("".join),
        width=st.integers(2, 4),
        block=st.sampled_from([3, 8, 21, 1 << 20]),
        piece=st.sampled_from([1, 5, 1 << 18]),
        compressed=st.booleans(),
    )
    def check(body, width, block, piece, compressed):
        text = separator.join(f"c{number}" for number in range(width)) + "\n" + body
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        bad = BadRows(skip=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_files, "BLOCK_BYTES", block)
            patch.setattr(delimited, "_PIECE", piece)
            rows = read(path, separator, quoting, bad)
        expected, wrong = parse(body, separator, quoting, width)
        assert rows == [(line + 2, fields) for line, fields in expected]
        assert bad.count == wrong

    check()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=3, max_size=3)
    )
)
def test_what_pythons_csv_writes_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "written.csv"
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["user", "a, title", "item"], *rows])
    path.write_bytes(b"\xef\xbb\xbf\n" + text.getvalue().encode())
    assert [fields for _, fields in read(path, ",", True, BadRows())] == rows


@pytest.mark.parametrize(
    "text, line, problem",
    [
        ("user,title,item,price\n1,Hammer,100,5\n1,Nails, 10 pack,101,7\n1,Saw,102,6\n", 3, "more fields than the header has"),
        (
            "user,title,item,timestamp,price\n1,Hammer,100,10,5\n1,Nails, 10 pack,101,20,7\n1,Saw,102,30,6\n",
            3, "more fields than the header has",
        ),
        ("user,title,item,price\n1,Hammer,100,5\n1,Nails,101\n1,Saw,102,6\n", 3, "fewer fields than the header has"),
        ('user,title,item\n1,"a\nb",100\n\n1,"Nails"s,101\n1,c,102\n', 5, "quotes that do not enclose a field"),
        ('user,title,item\n1,a,100\n1,"Nails,101\n1,c,102\n', 3, "quotes that do not enclose a field"),
    ],
    ids=["too many", "too many, with times", "too few", "text after a quote", "an open quote"],
)  # fmt: skip
def test_shifted_rows_are_named_or_skipped(tmp_path, text, line, problem):
    """Such a row has a value in every column that is read, too: that of another column."""
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"log.csv, line {line}: {problem}.*on_bad_rows=\"skip\""):
        build_sequences(path)
    dataset, tokenizer = build_sequences(path, on_bad_rows="skip")
    assert tokenizer.decode_items(dataset["input_ids"][0]) == [100, 102]
    assert "(1 bad rows skipped)" in dataset.info.description


def test_a_quote_inside_a_field_is_a_character(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user,title,item\n1,5" pipe,a"\n1,"say ""hi""",b\n1,3" nail,c\n')
    dataset, tokenizer = build_sequences(path)
    assert tokenizer.decode_items(dataset["input_ids"][0]) == ['a"', "b", "c"]


def test_lines_are_counted_inside_quotes(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user,title,item\n1,"a\nb\nc",2\n1,d,\n')
    with pytest.raises(ValueError, match="log.csv, line 5: not a usable item"):
        build_sequences(path)


def test_a_row_without_end_is_refused(tmp_path, monkeypatch):
    for module in (text_files, delimited):
        monkeypatch.setattr(module, "LONGEST_ROW", 1000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 300)
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,2\n1," + "3" * 5000)
    with pytest.raises(ValueError, match="log.csv, line 3: longer than"):
        build_sequences(path)
    path.write_text('user,item\n1,2\n1,"' + "3,\n" * 2000)
    with pytest.raises(ValueError, match="log.csv, line 3: quotes that do not enclose a field"):
        build_sequences(path)
