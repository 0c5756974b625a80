"""Damaged logs: the result is that of a reader in plain Python, or a sentence; never a traceback of another library."""

import gzip
import json
import logging

import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plain_reader import has_lists, histories

from blossomrec_hf.data import build_sequences, text_files


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ROWS = [("7", "a", 30), ("8", "b", 20), ("7", "c", 10), ("9", "a", 15), ("8", "d", 5)]
TEXTS = {
    "csv": "user,title,item,timestamp\n" + "".join(f'{u},"T, {i}",{i},{t}\n' for u, i, t in ROWS),
    "tsv": "item\tuser\ttimestamp\n" + "".join(f"{i}\t{u}\t{t}\n" for u, i, t in ROWS),
    "jsonl": "".join(json.dumps({"user": int(u), "item": i, "timestamp": t}) + "\n" for u, i, t in ROWS),
    "ml-100k": "".join(f"{u}\t{i}\t5\t{t}\n" for u, i, t in ROWS),
    "ml-1m": "".join(f"{u}::{i}::5::{t}\n" for u, i, t in ROWS),
    "pairs": "".join(f"{u} {i}\n" for u, i, _ in ROWS),
    "sequences": "7 a c\n8 b d\n9 a\n",
}
SNIPPETS = [
    ",",
    "\t",
    "\n",
    "\r\n",
    '"',
    "::",
    ":",
    " ",
    "1",
    "0",
    ".0",
    "NA",
    "nan",
    "-",
    "x",
    "é",
    "{",
    "}",
    "5,5",
    "[1]",
    "null",
]


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """`text` with a few characters cut, doubled or put in, behind the header."""
    start = text.index("\n") + 1 if "timestamp\n" in text else 0
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(start, len(text)))
        cut = draw(st.integers(0, 6))
        new = draw(st.sampled_from(SNIPPETS) | st.just(text[place : place + 2 * cut]) | st.just(""))
        text = text[:place] + new + text[place + cut :]
    return text


@pytest.mark.parametrize("format", TEXTS)
def test_damaged_text_is_read_as_plain_python_reads_it(tmp_path, format):
    logging.disable(logging.WARNING)
    path = tmp_path / "log"

    @FUZZ
    @given(text=damaged(TEXTS[format]), compressed=st.booleans())
    def check(text, compressed):
        assume(text.strip() and (format != "jsonl" or text.lstrip().startswith('{"user":')))
        assume(format != "jsonl" or not has_lists(text))
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        expected, bad = histories(text, format)
        try:
            dataset, tokenizer = build_sequences(path, format=format, on_bad_rows="skip")
        except ValueError as error:
            # Refused as a whole: nothing good is left, a user with two lines, no time that is a number, lists, a title as header.
            assert "\n" not in str(error)
            wholly = (
                "has no interaction",
                "begins an earlier line",
                "is neither a number",
                "no column",
                "no JSON object",
                "may be a number or a text",
            )
            assert any(words in str(error) for words in wholly), error
            return
        times = (
            dataset["timestamps"]
            if "timestamps" in dataset.column_names
            else [[0] * len(row) for row in dataset["input_ids"]]
        )
        items = [tokenizer.decode_items(ids) for ids in dataset["input_ids"]]
        assert {user: list(zip(*events)) for user, *events in zip(dataset["user_id"], items, times)} == expected
        if bad:
            with pytest.raises(ValueError, match='on_bad_rows="skip"'):
                build_sequences(path, format=format)
        else:
            assert build_sequences(path, format=format)[0][:] == dataset[:]

    check()
    logging.disable(logging.NOTSET)


def _parquet(path) -> bytes:
    log = pl.DataFrame(ROWS, ["user", "item", "timestamp"], orient="row")
    pl.concat([log] * 20).with_columns(when=pl.from_epoch("timestamp"), price=pl.lit(1.5)).write_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("format", [*TEXTS, "parquet", "gzip"])
def test_damaged_bytes_give_a_sentence_or_a_result(tmp_path, format):
    """Whatever the bytes are; a compressed file has a checksum, so that its result is right as well."""
    logging.disable(logging.WARNING)
    path = tmp_path / "log"
    whole = _parquet(path) if format == "parquet" else TEXTS.get(format, TEXTS["csv"]).encode()
    whole = gzip.compress(whole) if format == "gzip" else whole
    name = None if format == "gzip" else format
    path = path.with_name("log.csv.gz" if format == "gzip" else "log")
    path.write_bytes(whole)
    right = build_sequences(path, format=name)[0][:]

    @FUZZ
    @given(
        changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=5),
        end=st.floats(0.2, 4).map(lambda share: min(share, 1)),
        sniffed=st.booleans(),
    )
    def check(changes, end, sniffed):
        content = whole
        for share, cut, new in changes:
            place = int(share * len(content))
            content = content[:place] + new + content[place + cut :]
        content = content[: int(end * len(content))]
        path.write_bytes(content)
        try:
            result = build_sequences(path, format=None if sniffed else name, on_bad_rows="skip")[0][:]
        except (ValueError, OSError) as error:
            assert str(error).endswith(".") or ";" in str(error) or str(path) in str(error)
            assert "\n" not in str(error) and not isinstance(error, UnicodeError)
        else:
            assert result == right or format != "gzip" or content[10:] != whole[10:]

    check()
    logging.disable(logging.NOTSET)


def test_a_gzip_bomb_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(text_files, "EXPANSION_CHECKED_FROM", 1 << 20)
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * (1 << 20)))
    refused = "log.csv.gz expands to more than 200 times its size"
    with pytest.raises(ValueError, match=refused):
        build_sequences(path)
    with pytest.raises(ValueError, match=refused):
        build_sequences(pl.DataFrame({"user": [1], "item": [2]}), items=path)
    path.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * (1 << 15)))  # a small file may be that dense
    assert len(build_sequences(path)[0]["input_ids"][0]) == 1 << 15
