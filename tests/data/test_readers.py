"""Every format: recognized by its look, read to the same three events."""

import gzip
import json

import polars as pl
import pytest
from datasets import Dataset

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.metadata import item_metadata, join_item_metadata, read_item_metadata
from blossomrec_hf.data.options import ItemOptions
from blossomrec_hf.data.readers import open_log
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


AMAZON_USERS = ("A2SUAM1J3GNN3B", "A1C6M8LCIX4M6M")
EARLY, MIDDLE, LATE = 1_300_000_000, 1_300_000_100, 1_300_000_200


def json_lines(keys: tuple[str, ...], rows: list[tuple]) -> str:
    return "".join(json.dumps({**dict(zip(keys, row)), "text": 'it\'s "fine"'}) + "\n" for row in rows)


# name: (file name, text, format found, users, items of the first user in time order, its times)
CASES = {
    "ml-100k": ("u.data", f"7\t5\t3\t{LATE}\n8\t5\t3\t9\n7\t6\t4\t{EARLY}\n", "ml-100k", [7, 8], [6, 5], [EARLY, LATE]),
    "ml-1m": ("ratings.dat", f"7::5::3::{LATE}\n8::5::3::9\n7::6::4::{EARLY}\n", "ml-1m", [7, 8], [6, 5], [EARLY, LATE]),
    "ml-32m": (
        "ratings.csv", f"userId,movieId,rating,timestamp\n7,5,3.5,{LATE}\n8,5,3.0,9\n7,6,4,{EARLY}\n",
        "csv", [7, 8], [6, 5], [EARLY, LATE],
    ),
    "amazon 2014 csv": (
        "ratings_Beauty.csv",
        f"{AMAZON_USERS[0]},0000000078,5.0,{LATE}\n{AMAZON_USERS[1]},B00005N7P0,1.0,{MIDDLE}\n"
        f"{AMAZON_USERS[0]},B00005N7P0,5.0,{EARLY}\n",
        "amazon-csv", list(AMAZON_USERS), ["B00005N7P0", "0000000078"], [EARLY, LATE],
    ),
    "amazon 2018 csv": (
        "Video_Games.csv",
        f"0000000078,{AMAZON_USERS[0]},5.0,{LATE}\nB00005N7P0,{AMAZON_USERS[1]},1.0,{MIDDLE}\n"
        f"B00005N7P0,{AMAZON_USERS[0]},5.0,{EARLY}\n",
        "amazon-csv", list(AMAZON_USERS), ["B00005N7P0", "0000000078"], [EARLY, LATE],
    ),
    "amazon 2023 csv": (
        "All_Beauty.csv", f"user_id,parent_asin,rating,timestamp\nAA,B1,5.0,{LATE}000\nBB,B1,5.0,1\nAA,B2,5.0,{EARLY}000\n",
        "csv", ["AA", "BB"], ["B2", "B1"], [EARLY, LATE],
    ),
    "amazon 2018 json": (
        "reviews_Beauty_5.json",
        json_lines(
            ("reviewerID", "asin", "overall", "unixReviewTime"),
            [("A1", "B1", 5.0, LATE), ("A2", "B1", 5.0, 1), ("A1", "B2", 5.0, EARLY)],
        ),
        "jsonl", ["A1", "A2"], ["B2", "B1"], [EARLY, LATE],
    ),
    "yelp": (
        "yelp_academic_dataset_review.json",
        json_lines(
            ("review_id", "user_id", "business_id", "stars", "date"),
            [
                ("r", "u 1", "é", 5, "2011-03-13 07:10:00"), ("r", "u2", "b", 5, "2011-03-13 07:10:00"),
                ("r", "u 1", "b", 5, "2011-03-13 07:06:40"),
            ],
        ),
        "jsonl", ["u 1", "u2"], ["b", "é"], [EARLY, LATE],
    ),
    "steam": (
        "steam_reviews.json",
        "{u'username': u'al \"x\"', u'product_id': u'725280', u'text': u'it\\'s', u'date': u'2017-12-17'}\n"
        "{u'username': u'bo', u'product_id': u'725280', u'date': u'2017-12-17'}\n"
        "{u'username': u'al \"x\"', u'product_id': u'3', u'date': u'2017-12-16'}\n",
        "python-lines", ['al "x"', "bo"], [3, 725280], [1513382400, 1513468800],
    ),
    "gowalla": (
        "loc-gowalla_totalCheckins.txt",
        "0\t2011-03-13T07:10:00Z\t30.2\t-97.7\t22847\n1\t2010-10-18T22:17:43Z\t30.2\t-97.7\t420315\n"
        "0\t2011-03-13T07:06:40Z\t30.2\t-97.7\t420315\n",
        "gowalla", [0, 1], [420315, 22847], [EARLY, LATE],
    ),
    "foursquare": (
        "dataset_TSMC2014_NYC.txt",
        "470\tv1\tc\tArts & Crafts\t40.7\t-74.0\t-240\tSun Mar 13 07:10:00 +0000 2011\n"
        "979\tv2\tc\tBridge\t40.6\t-74.0\t-240\tTue Apr 03 18:00:25 +0000 2012\n"
        "470\tv2\tc\tBridge\t40.7\t-74.0\t-240\tSun Mar 13 07:06:40 +0000 2011\n",
        "foursquare", [470, 979], ["v2", "v1"], [EARLY, LATE],
    ),
    "kuairand": (
        "log_standard.csv",
        f"user_id,video_id,date,hourmin,time_ms,is_click\n0,3,20220421,1900,{LATE}000,1\n9,3,20220421,1900,{LATE}000,0\n"
        f"0,4,20220421,1900,{EARLY}000,1\n",
        "csv", [0, 9], [4, 3], [EARLY, LATE],
    ),
    "recbole": (
        "x.inter", f"user_id:token\titem_id:token\ttimestamp:float\n7\ta\t{LATE}\n8\ta\t1\n7\tb\t{EARLY}.0\n",
        "recbole", [7, 8], ["b", "a"], [EARLY, LATE],
    ),
    "tsv": ("x.tsv", f"item\tuser\tts\na\t7\t{LATE}\na\t8\t1\n\"b\t7\t{EARLY}\n", "tsv", [7, 8], ['"b', "a"], [EARLY, LATE]),
    "pairs": ("x.txt", "7 6\n8 5\n7 5\n", "pairs", [7, 8], [6, 5], None),
    "sequences": ("x.txt", "7 6 5\n8 5\n9 1 2 3\n", "sequences", [7, 8, 9], [6, 5], None),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", CASES)
def test_formats(tmp_path, case, compressed):
    name, text, found, users, items, times = CASES[case]
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    assert open_log(path).format == found
    for format in (None, found):
        dataset, tokenizer = build_sequences(path, format=format)
        assert list(dataset["user_id"]) == users
        assert tokenizer.decode_items(dataset["input_ids"][0]) == items
        if times is not None:
            assert dataset["timestamps"][0] == times
        else:
            assert "timestamps" not in dataset.column_names


@pytest.mark.parametrize(
    "name, text",
    [
        ("crlf.txt", "7 6\r\n7 5\r\n"),
        ("blanks.txt", "7  6 \n\n7\t5\n"),
        ("crlf.dat", "7::6::3::5\r\n7::5::2::6\r\n"),
        ("bom.csv", "\ufeffuser,item\r\n7,6\r\n7,5\r\n"),
        ("crlf.jsonl", '{"user":7,"item":6}\r\n\r\n{"user":7,"item":5}\r\n'),
    ],
)
def test_the_ways_in_which_lines_end(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    dataset, tokenizer = build_sequences(tmp_path / name)
    assert dataset["user_id"][:] == [7] and tokenizer.decode_items(dataset["input_ids"][0]) == [6, 5]


def test_a_missing_field_is_no_id(tmp_path):
    (tmp_path / "u.data").write_text("7\t5\t3\t1\n7\t \t3\t2\n")
    with pytest.raises(ValueError, match="u.data, line 2: not a usable item"):
        build_sequences(tmp_path / "u.data", format="ml-100k")
    (tmp_path / "log.txt").write_text("7 5\n7 5 6\n")
    with pytest.raises(ValueError, match="log.txt, line 2: not a usable item"):
        build_sequences(tmp_path / "log.txt", format="pairs")


def test_columns_by_name_and_file_order(tmp_path):
    path = tmp_path / "odd.dat"
    path.write_text("who,what,when,timestamp\n1,a,9,1\n1,b,8,2\n")
    dataset, tokenizer = build_sequences(path, user="who", item="what", timestamp="when")
    assert tokenizer.decode_items(dataset["input_ids"][0]) == ["b", "a"]
    dataset, tokenizer = build_sequences(path, user="who", item="what", timestamp="")
    assert tokenizer.decode_items(dataset["input_ids"][0]) == ["a", "b"] and "timestamps" not in dataset.column_names


def test_shards_are_read_in_name_order(tmp_path):
    log = pl.DataFrame({"user": [1, 2, 1, 1, 2, 3], "item": [1, 2, 3, 4, 5, 6]})
    for number, start in enumerate((0, 2, 4)):
        log[start : start + 2].write_parquet(tmp_path / f"part-{number}.parquet")
    whole = build_sequences(log)[0]
    for source in (tmp_path, tmp_path / "part-*.parquet", str(tmp_path)):
        assert build_sequences(source)[0][:] == whole[:]


def test_a_saved_dataset_is_a_source(tmp_path):
    log = {"user": [1, 2, 1], "item": ["a", "b", "c"]}
    Dataset.from_dict(log).save_to_disk(tmp_path / "log")
    assert build_sequences(tmp_path / "log")[0][:] == build_sequences(Dataset.from_dict(log))[0][:]


def test_a_data_set_of_the_hub_is_a_source(monkeypatch):
    """The Hub is replaced: what counts is that the id reaches `load_dataset`, and that its rows come out."""
    stored = {"me/log": Dataset.from_dict({"user": [1, 2, 1], "item": ["a", "b", "c"]})}

    def load_dataset(name, split):
        assert split == "train"
        return stored[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert build_sequences("me/log")[0]["input_ids"][0] == [2, 4]
    with pytest.raises(FileNotFoundError, match="'me/other' is no file or folder here, and no data set"):
        build_sequences("me/other")


def test_missing_columns_name_the_near_ones(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("usr,item\n1,2\n")
    with pytest.raises(ValueError, match=r"no column known to be the user; it has 'usr', 'item'. Near matches: 'usr'"):
        build_sequences(path)
    with pytest.raises(ValueError, match="item='itm' is no column of .*log.csv; did you mean 'item'"):
        build_sequences(path, user="usr", item="itm")


def test_a_truncated_gzip_is_named(tmp_path):
    text = "user,item\n" + "".join(f"{n},{n * 7919 % 10007}\n" for n in range(50_000))
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(text.encode())[:-5000])
    with pytest.raises(OSError, match="log.csv.gz can not be read to its end"):
        build_sequences(path, output_dir=tmp_path / "out")
    path.write_bytes(b"no gzip at all")
    with pytest.raises(OSError, match="no complete gzip file"):
        build_sequences(path, output_dir=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv.gz"]


def test_rows_with_too_many_fields(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user,item\n1,"a\nb"\n2,3,4\n1,5\n7,8,9\n')
    with pytest.raises(ValueError, match="log.csv, line 4: more fields"):
        build_sequences(path)
    dataset, tokenizer = build_sequences(path, on_bad_rows="skip")
    assert tokenizer.decode_items(dataset["input_ids"][0]) == ["a\nb", "5"]
    assert len(dataset) == 1 and "(2 bad rows skipped)" in dataset.info.description


def test_lines_that_are_no_json(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"user": 1, "item": 2}\n{"user": 1, "item"\n{"user": 1, "item": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: not a usable user or item"):
        build_sequences(path)
    assert build_sequences(path, on_bad_rows="skip")[0]["input_ids"][0] == [2, 3]


def test_rating_is_checked_only_when_it_counts(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item,rating\n1,2,good\n1,3,5\n")
    assert build_sequences(path)[0]["input_ids"][0] == [2, 3]
    with pytest.raises(ValueError, match="line 2: not a usable rating .rating 'good'"):
        build_sequences(path, min_rating=3)


def test_shards_with_ids_of_two_types_are_refused(tmp_path):
    pl.DataFrame({"user": [1], "item": [1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user": [1], "item": ["x"]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="ids of items are integers in .*a.parquet and strings in .*b.parquet"):
        build_sequences(tmp_path)


@pytest.mark.parametrize(
    "name, text, arguments, error, named",
    [
        ("log.csv", "", {}, ValueError, "log.csv is empty"),
        ("log.csv", "user,item\n", {}, ValueError, "has no interaction"),
        ("log.xyz", "one two three\nfour\n", {}, ValueError, "looks like no known format"),
        ("log.csv", "user,item\n1,2\n", {"format": "xml"}, ValueError, "format is 'xml'"),
        ("log.jsonl", "{]\n", {"format": "jsonl"}, ValueError, "line 1 is no JSON object"),
    ],
)
def test_other_bad_files(tmp_path, name, text, arguments, error, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=named):
        build_sequences(tmp_path / name, **arguments)


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"user,item\n1,caf\xe9\x81\n")
    with pytest.raises(ValueError, match="log.csv can not be read to its end: line 2 .* encoding="):
        build_sequences(tmp_path / "log.csv")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file, no folder"):
        build_sequences(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match="source is a int"):
        build_sequences(3)


@pytest.mark.parametrize(
    "name, text",
    [
        ("movies.dat", "1::Toy Story (1995)::Animation\n2::Am\xe9lie::Comedy\n9::Unseen::Drama\n"),
        ("u.item", "1|Toy Story (1995)|01-Jan-1995||http\n2|Am\xe9lie|x\n9|Unseen|x\n"),
        ("x.item", "item_id:token\tmovie_title:token_seq\n1\tToy Story (1995)\n2\tAm\xe9lie\n"),
        ("movies.csv", 'movieId,title,genres\n1,"Toy Story (1995)",A\n2,Am\xe9lie,B\n'),
        ("meta.jsonl", '{"item_id": "1", "title": "Toy Story (1995)"}\n{"item_id": "2", "title": "Am\xe9lie"}\n'),
    ],
)
def test_titles(tmp_path, name, text):
    (tmp_path / name).write_text(text, "latin-1" if name in ("movies.dat", "u.item") else "utf-8")
    titles = item_metadata(tmp_path / name, BlossomRecTokenizer.from_items([2, 1, 5]))
    assert titles.select("item", "title", "input_id").rows() == [(2, "Amélie", 2), (1, "Toy Story (1995)", 3)]


def test_titles_of_items_that_were_written_as_floats():
    tokenizer = BlossomRecTokenizer.from_items([2, 100])
    for ids in (["100.0", "2.0", "x"], [100.0, 2.0, 3.0]):
        titles = item_metadata(pl.DataFrame({"item_id": ids, "title": ["A", "B", "C"]}), tokenizer)
        assert titles.select("item", "title").rows() == [(2, "B"), (100, "A")]


def test_titles_stand_beside_the_dataset(tmp_path):
    log = pl.DataFrame({"user": [1, 1], "item": ["a", "b"]})
    titles = pl.DataFrame({"item_id": ["b", "a", "c"], "title": ["B!", "A!", "C!"], "year": [1, 2, 3]})
    build_sequences(log, items=titles, output_dir=tmp_path / "log")
    rows = [("a", "A!", 2, 2), ("b", "B!", 3, 1)]
    saved = read_item_metadata(tmp_path / "log")
    assert saved.rows() == rows
    other = pl.DataFrame(
        {"item": ["c", "b"], "title": ["C?", "B?"], "input_id": [4, 3]}, schema_overrides=saved.schema
    )
    assert join_item_metadata([other, None, saved]).rows() == [
        ("a", "A!", 2, 2), ("b", "B?", 3, None), ("c", "C?", 4, None)
    ]  # fmt: skip
    assert join_item_metadata([None, None]) is None
    assert read_item_metadata(tmp_path) is None
    with pytest.raises(ValueError, match="the one of item ids has to be called"):
        item_metadata(pl.DataFrame({"key": [1]}), BlossomRecTokenizer.from_items([1]))


def test_item_tables_with_other_categories_are_merged():
    """A new log rarely has exactly the categories of the earlier one."""

    def table(first: int, genres: list[str], width: int = 2):
        items = range(first, first + len(genres))
        frame = pl.DataFrame({"item_id": items, "genre": genres, "place": [[0.5] * width] * len(genres)})
        options = ItemOptions(item_categories="genre", item_vectors="place")
        return item_metadata(frame, BlossomRecTokenizer.from_items(list(range(1, 9))), options)

    joined = join_item_metadata([table(4, ["c|a", "d"]), table(1, ["a", "b", "a|b", "b"])])
    assert joined["genre"].to_list() == [["a"], ["b"], ["a", "b"], ["c", "a"], ["d"]]
    assert joined["item"].to_list() == [1, 2, 3, 4, 5]
    again = item_metadata(joined, BlossomRecTokenizer.from_items(list(range(1, 9))))  # as a command reads it
    assert again["genre"].to_list() == joined["genre"].to_list()
    assert set(joined["genre"].dtype.inner.categories) == set("abcd")
    with pytest.raises(ValueError, match="place has vectors of 2 and 3 numbers in two item tables"):
        join_item_metadata([table(1, ["a"]), table(2, ["b"], width=3)])
    new = pl.DataFrame(
        {"item_id": [7, 8], "title": ["G", "H"], "genre": ["a|e", None], "place": ["1 2", None]}
    )  # as in a CSV file
    for parts in ([new, joined], [joined, new]):
        grown = join_item_metadata(
            [item_metadata(part, BlossomRecTokenizer.from_items(range(1, 9))) for part in parts]
        )
        assert grown.filter(pl.col("item") == 7)["genre"].to_list() == [["a", "e"]]
        assert grown.filter(pl.col("item") == 7)["place"].to_list() == [[1.0, 2.0]]
        assert grown.filter(pl.col("item") < 7)["genre"].to_list() == joined["genre"].to_list()


def test_numbers_of_a_new_item_file_join_the_intervals_of_a_stored_table():
    tokenizer = BlossomRecTokenizer.from_items(range(1, 5))
    old = pl.DataFrame({"item_id": [1, 2], "price": [3.0, 9.0]})
    stored = item_metadata(old, tokenizer, ItemOptions(item_numbers="price"))
    for prices in (["3.5", " 0", "a lot"], [3.5, 0.0, None]):  # as in a CSV file, and as in a Parquet file
        new = item_metadata(pl.DataFrame({"item_id": [2, 3, 4], "title": ["B", "C", "D"], "price": prices}), tokenizer)
        joined = join_item_metadata([new, stored])
        assert joined["price"].to_list() == [["2.828 to 4"], ["2.828 to 4"], ["0"], None]
