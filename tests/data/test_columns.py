"""Columns by their usual names, and what is said where they are not sure or not there."""

import logging

import pytest

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.filters import FilterReport


def events(dataset, tokenizer) -> list[list]:
    return [tokenizer.decode_items(ids) for ids in dataset["input_ids"]]


@pytest.mark.parametrize(
    "name",
    [
        "created_at", "Created At", "event_timestamp", "timestamp_ms", "eventdate", "t_dat", "purchase_date", "review_date",
        "order_time", "event_time", "eventTime", "InvoiceDate", "transaction-date", "time_stamp", "Timestamp:float",
    ],
)  # fmt: skip
def test_columns_of_times_are_known(tmp_path, name):
    path = tmp_path / "log.csv"
    path.write_text(f"user_id,item_id,{name}\n1,a,2024-01-02T00:00:00Z\n1,b,2024-01-01T00:00:00Z\n")
    dataset, tokenizer = build_sequences(path)
    assert events(dataset, tokenizer) == [["b", "a"]]
    assert dataset["timestamps"][0] == [1704067200_000000, 1704153600_000000]


@pytest.mark.parametrize(
    "arguments, said", [({}, "no column of times is used"), ({"timestamp": ""}, "no times are read")]
)
def test_a_log_without_times_is_said_to_be(tmp_path, caplog, arguments, said):
    path = tmp_path / "log.csv"
    path.write_text("user,item,happened\n1,a,2\n1,b,1\n")
    dataset, tokenizer = build_sequences(path, output_dir=tmp_path / "built", **arguments)
    assert events(dataset, tokenizer) == [["a", "b"]]
    assert [
        record.message for record in caplog.records if record.levelno == logging.WARNING and said in record.message
    ]
    assert said in FilterReport.load(tmp_path / "built").notes[0] and said in dataset.info.description


def test_a_log_with_times_is_read_without_notes(tmp_path, caplog):
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n1,a,2\n1,b,1\n")
    build_sequences(path, output_dir=tmp_path / "built")
    assert FilterReport.load(tmp_path / "built").notes == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_two_candidates_are_named(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,date,created_at\n1,a,2,1\n1,b,1,2\n")
    dataset, tokenizer = build_sequences(path)
    assert events(dataset, tokenizer) == [["b", "a"]]
    assert "the timestamp is read from the column 'date', not from 'created_at'" in dataset.info.description
    assert "not from" not in build_sequences(path, timestamp="created_at")[0].info.description


def test_the_file_that_has_no_times_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,time\n1,a,2\n1,b,1\n")
    (tmp_path / "b.csv").write_text("user,item,when\n1,c,2\n")
    with pytest.raises(ValueError, match=r"b.csv has no column known to be the time, but .*a.csv has.*timestamp=\"\""):
        build_sequences(tmp_path)
    assert events(*build_sequences(tmp_path, timestamp="")) == [["a", "b", "c"]]


def test_the_file_that_has_no_ratings_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,rating\n1,a,2\n")
    (tmp_path / "b.csv").write_text("user,item\n1,c\n")
    with pytest.raises(ValueError, match="min_rating is 2, but .*b.csv has no rating known"):
        build_sequences(tmp_path, min_rating=2)
