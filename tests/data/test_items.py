"""The item table: categories, numbers and vectors, aligned with the vocabulary, against plain Python."""

import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.commands import prepare
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.intervals import are_intervals, interval_of
from blossomrec_hf.data.metadata import item_metadata, read_item_metadata, write_item_metadata
from blossomrec_hf.data.options import ItemOptions
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer
from blossomrec_hf.training import LogArguments


NUMBERS = st.one_of(st.none(), st.just(0.0), st.integers(-50, 50), st.floats(-1e6, 1e6), st.just(math.inf))
ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.sampled_from(["", "a", " b", "c d"]), max_size=4), NUMBERS), min_size=1, max_size=15
)  # fmt: skip
OPTIONS = ItemOptions(item_categories="genre", item_numbers="price", item_vectors="place")


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, joined=st.booleans(), items=st.lists(st.integers(0, 12), min_size=1, unique=True))
def test_features_are_those_of_plain_python(tmp_path_factory, rows, joined, items):
    tokenizer = BlossomRecTokenizer.from_items(items)
    table = {
        "item_id": [row[0] for row in rows],
        "genre": ["|".join(row[1]) if joined else row[1] for row in rows],
        "price": [row[2] for row in rows],
        "place": [[float(n), -1.0] for n in range(len(rows))],
    }
    frame = pl.DataFrame(
        table, schema_overrides={"price": pl.Float64} | ({} if joined else {"genre": pl.List(pl.String)}), strict=False
    )
    first = {item: n for n, (item, _, _) in reversed(list(enumerate(rows)))}
    if not any(item in first for item in items):
        return  # no vector has a length
    found = item_metadata(frame, tokenizer, OPTIONS)
    assert found["item"].to_list() == items and found["input_id"].to_list() == [2 + n for n in range(len(items))]
    known = [first.get(item) for item in items]
    genres = [
        None if n is None else list(dict.fromkeys(g.strip() for g in rows[n][1] if g.strip())) or None for n in known
    ]
    assert found["genre"].to_list() == genres
    counts = Counter(genre for given in genres for genre in given or ())
    names = found["genre"].dtype.inner.categories.to_list()
    assert names == sorted(counts, key=lambda genre: (-counts[genre], genre))
    for value, number in zip(found["price"].to_list(), known):
        number = None if number is None else rows[number][2]
        if number is None or not math.isfinite(number):
            assert value is None
        elif number == 0:
            assert value == ["0"]
        else:
            low, high = map(float, value[0].split(" to "))
            assert low * (1 - math.copysign(1e-3, low)) <= number <= high * (1 + math.copysign(1e-3, high))
            assert abs(math.log2(abs(high / low))) == pytest.approx(0.5, abs=1e-2)
    intervals = [float(name.split(" to ")[0]) for name in found["price"].dtype.inner.categories]
    assert intervals == sorted(intervals)
    assert found["place"].to_list() == [None if n is None else [n, -1] for n in known]
    folder = tmp_path_factory.mktemp("items")
    write_item_metadata(folder, found)
    assert read_item_metadata(folder).equals(found) and read_item_metadata(folder).schema == found.schema


@given(number=st.floats(-1e9, 1e9).filter(bool))
def test_intervals_are_recognized_by_their_names(number):
    found = item_metadata(
        pl.DataFrame({"item_id": [1], "price": [number]}),
        BlossomRecTokenizer.from_items([1]),
        ItemOptions(item_numbers="price"),
    )
    assert found["price"].to_list() == [[interval_of(number)]]
    assert are_intervals([interval_of(number), "0"])
    for names in ([interval_of(number), "cheap"], ["5 to 10"], ["8 to 5.657"], ["x to y"], ["nan to nan"], ["0"], []):
        assert not are_intervals(names)


FILES = {
    "items.csv": 'item_id,name,genre,price,place\n1,"A, a",x|y,3,1 2.5\n2,B,,0,3 4\n9,C,z,1,5 6\n',
    "items.jsonl": "".join(
        json.dumps(dict(zip(("item_id", "name", "genre", "price", "place"), row))) + "\n"
        for row in [(1, "A, a", ["x", "y"], 3, [1, 2.5]), (2, "B", [], 0, [3, 4]), (9, "C", ["z"], 1, [5, 6])]
    ),
    "spaces.item": (
        "item_id:token\tname:token_seq\tgenre:token_seq\tprice:float\tplace:float_seq\n"
        "1\tA, a\tx y\t3\t1 2.5\n2\tB\t\t0\t3 4\n9\tC\tz\t1\t5 6\n"
    ),
    "x.item": (
        "item_id:token\tname:token_seq\tgenre:token_seq\tprice:float\tplace:float_seq\n"
        "1\tA, a\tx|y\t3\t1 2.5\n2\tB\t\t0\t3 4\n9\tC\tz\t1\t5 6\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, "items.parquet"])
def test_the_command_stores_an_aligned_table_and_counts_what_is_missing(tmp_path, name):
    path = tmp_path / name
    if name == "items.parquet":
        pl.read_ndjson(FILES["items.jsonl"].encode()).write_parquet(path)
    else:
        path.write_text(FILES[name])
    (tmp_path / "log.csv").write_text("user,item\n1,1\n1,3\n1,2\n2,1\n")
    features = ["--item_categories", "genre", "--item_numbers", "price", "--item_vectors", "place"]
    prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--items", str(path), *features])
    table = read_item_metadata(tmp_path / "out")
    assert table.select("item", "title", "input_id", "genre", "price", "place").rows() == [
        (1, "A, a", 2, ["x", "y"], ["2.828 to 4"], [1.0, 2.5]),
        (3, None, 3, None, None, None),
        (2, "B", 4, None, ["0"], [3.0, 4.0]),
    ]
    assert len(load_from_disk(tmp_path / "out")) == 2
    notes = FilterReport.load(tmp_path / "out").notes
    assert notes[-3:] == ["2 of 3 items have no genre", "1 of 3 items have no price", "1 of 3 items have no place"]


def test_numbers_in_one_interval_are_reported(tmp_path):
    """Years are: there are two intervals per power of 2."""
    (tmp_path / "items.csv").write_text("item_id,year,price\n1,1995,3\n2,1996,9\n3,,9\n")
    (tmp_path / "log.csv").write_text("user,item\n1,1\n1,3\n1,2\n2,1\n")
    features = ["--items", str(tmp_path / "items.csv"), "--item_numbers", "year,price"]
    prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), *features])
    assert FilterReport.load(tmp_path / "out").notes[-2:] == [
        "1 of 3 items have no year",
        "all numbers of year lie in the interval 1448 to 2048; item_categories=… keeps each number apart",
    ]


def test_the_table_may_name_item_ids_as_the_log_does_and_have_any_separator(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("who,sku\nu,x1\nu,x2\nv,x1\n")
    (tmp_path / "items.csv").write_text("id;SKU;title;brand\n7;x1;One, first;a\n8;x2;Two;b\n")
    options = [*("--user", "who", "--items", str(tmp_path / "items.csv")), "--item_categories", "brand"]
    prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--item", "sku", *options])
    table = read_item_metadata(tmp_path / "out")
    assert table.select("item", "title", "brand").rows() == [("x1", "One, first", ["a"]), ("x2", "Two", ["b"])]
    log = LogArguments(data=str(tmp_path / "log.csv"), user="who", item="sku", titles=str(tmp_path / "items.csv"))
    assert log.item_titles(BlossomRecTokenizer.from_items(["x1"]))["title"].to_list() == ["One, first"]

    (tmp_path / "items.csv").write_text("article,title\nx1,One\n")
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "no"), "--item", "sku", *options])
    assert "the one of item ids has to be called as in the log (item=…), or item_id" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'item_id', 'price'; the one of titles has to be called title or"):
        item_metadata(pl.DataFrame({"item_id": [1], "price": [2]}), BlossomRecTokenizer.from_items([1]))


def test_genres_of_movielens(tmp_path):
    (tmp_path / "movies.dat").write_bytes(
        "1::Am\xe9lie (2001)::Comedy|Romance\n2::Heat (1995)::Action\n".encode("latin-1")
    )
    table = item_metadata(
        tmp_path / "movies.dat", BlossomRecTokenizer.from_items([2, 1]), ItemOptions(item_categories="genres")
    )
    assert table.rows() == [(2, "Heat (1995)", 2, ["Action"]), (1, "Amélie (2001)", 3, ["Comedy", "Romance"])]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"item_categories": "brand"}, "'brand' is no column of items; it has 'item', 'genre', 'place', 'odd'"),
        ({"item_vectors": "odd"}, "odd has vectors of 1 and 2 numbers; all need one length"),
        ({"item_vectors": "genre"}, "genre has vectors with values that are no finite numbers"),
        ({"item_vectors": "genre", "item_categories": "genre"}, "give different names"),
    ],
)
def test_what_is_no_feature_is_refused(options, said):
    items = pl.DataFrame({"item": [1, 2], "genre": ["x", "y"], "place": ["1 2", "3 4"], "odd": ["1", "1 2"]})
    with pytest.raises(ValueError, match=said):
        item_metadata(items, BlossomRecTokenizer.from_items([1, 2]), ItemOptions(**options))


def test_features_need_a_table(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("user,item\n1,1\n")
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--item_numbers", "price"])
    error = capsys.readouterr().err
    assert "are columns of an item table, but none is given; give its file with items=… (--items)." in error
    assert not (tmp_path / "out").exists()


def test_vectors_are_exact_in_float32():
    values = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)
    items = pl.DataFrame({"item": range(4), "v": values})
    table = item_metadata(items, BlossomRecTokenizer.from_items(range(4)), ItemOptions(item_vectors="v"))
    assert np.array_equal(table["v"].to_numpy(), values)
