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
    assert dataset["timestamps"][0] == [1704067200, 1704153600]


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


def test_a_name_of_two_columns_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item,item,note,note\n1,a,b,c,d\n")
    with pytest.raises(ValueError, match="log.csv has 2 columns called 'item'.*; give each a name of its own"):
        build_sequences(path)
    path.write_text("user_id,item,User ID,note,note\n1,a,2,c,d\n")
    dataset, _ = build_sequences(path)
    assert dataset["user_id"] == [1]
    assert "the user is read from the column 'user_id', not from 'User ID'" in dataset.info.description


def test_an_event_is_no_header(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("1,10,100\n1,11,101\n")
    with pytest.raises(ValueError, match="If its first row is an event, name the columns with columns=…"):
        build_sequences(path)
    dataset, _ = build_sequences(path, user="1", item="10", timestamp="100")
    assert "the first row is read as the names of columns, though '1' is a number" in dataset.info.description


@pytest.mark.parametrize(
    "text, options",
    [
        ("user;item\n1;a\n", {}),
        ("user;price;item\n1;3,5;a\n", {}),
        ("user|item\n1|a\n", {}),
        ('"user"^"item"\n1^"a"\n', {"separator": "^"}),
        ("item~user\n'a~1\n", {"separator": "~"}),
        ("kunde;preis;artikel\n1;3,5;a\n", {"user": "kunde", "item": "artikel"}),
        ("1;x;a\n", {"columns": "user,,item"}),
        ("1|a|x\n", {"columns": "kunde, artikel, y", "user": "kunde", "item": "artikel"}),
        ('1\t"a\n', {"columns": "user,item"}),
        ('1\t"a"\n', {"columns": "user,item", "quoting": True}),
    ],
)
def test_separators_are_recognized_or_named(tmp_path, text, options):
    path = tmp_path / "log.txt"
    path.write_text(text)
    dataset, tokenizer = build_sequences(path, **options)
    assert list(dataset["user_id"]) == [1]
    assert tokenizer.decode_items(dataset["input_ids"][0])[0].strip("\"'") == "a"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"separator": "::"}, "separator is '::'; it may be one ASCII character"),
        ({"separator": '"'}, "separator is '\"'; it may be one ASCII character"),
        ({"encoding": "utf-7.5"}, "encoding is 'utf-7.5', which is unknown"),
        ({"columns": "user,item,user"}, "columns is 'user,item,user'; give each column a name of its own"),
        ({"columns": "user,sku"}, "has no column known to be the item"),
    ],
)
def test_options_of_text_are_checked(tmp_path, options, said):
    (tmp_path / "log.txt").write_text("1,a\n")
    with pytest.raises(ValueError, match=said):
        build_sequences(tmp_path / "log.txt", **options)


@pytest.mark.parametrize("name", ["log.txt", "log.csv", "log"])
@pytest.mark.parametrize("separator", ["\t", ","])
def test_a_header_is_seen_whatever_the_file_is_called(tmp_path, name, separator):
    """Two columns with a tab in between look like pairs otherwise, whose first event would be (user_id, item_id)."""
    path = tmp_path / name
    path.write_text("user_id,item_id\n1,a\n1,b\n".replace(",", separator))
    assert events(*build_sequences(path)) == [["a", "b"]]


@pytest.mark.parametrize("format", ["pairs", "sequences"])
def test_a_header_is_no_event(tmp_path, format):
    path = tmp_path / "log.txt"
    path.write_text("user_id item_id\n1 2\n3 4\n")
    for given in (None, format):
        with pytest.raises(
            ValueError, match="log.txt begins with names of columns .'user_id item_id'.*remove this line"
        ):
            build_sequences(path, format=given)


def test_names_for_a_format_that_has_none(tmp_path):
    """Its times can be left unread all the same."""
    path = tmp_path / "ratings.dat"
    path.write_text("1::a::5::20\n1::b::5::10\n")
    assert events(*build_sequences(path)) == [["b", "a"]]
    dataset, tokenizer = build_sequences(path, format="ml-1m", timestamp="")
    assert events(dataset, tokenizer) == [["a", "b"]] and "timestamps" not in dataset.column_names
    assert "no times are read" in dataset.info.description
    with pytest.raises(
        ValueError, match="item='sku' names a column, but the columns of the format ml-1m have no names"
    ):
        build_sequences(path, format="ml-1m", item="sku")


@pytest.mark.parametrize(
    "text, arguments, said",
    [
        ('{"session": 1, "events": [{"aid": 5, "ts": 7}]}', {"user": "session", "item": "events"}, "item 'events'"),
        ('{"user": {"id": 1}, "item": 3}', {}, "user 'user'"),
        ('{"user": 1, "item": 3, "time": {"$date": 7}}', {}, "timestamp 'time'"),
        ("{u'user': ['a'], 'item': 3}", {}, "user 'user'"),
    ],
)
def test_values_of_several_parts_are_no_ids(tmp_path, text, arguments, said):
    path = tmp_path / "log.json"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=f"log.json: the {said} may be a number or a text, not .*event per line"):
        build_sequences(path, **arguments)
