"""Features for a model from the item table, against plain Python."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import blossomrec_hf
from blossomrec_hf.data.item_features import (
    choose_columns,
    feature_columns,
    item_features,
    load_item_features,
    save_item_features,
)
from blossomrec_hf.data.metadata import item_metadata
from blossomrec_hf.data.options import ItemOptions
from blossomrec_hf.model.features_blossomrec import Categories, ItemFeatures
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


OPTIONS = ItemOptions(item_categories="genre", item_numbers="price", item_vectors="place")


def draw_table(num_items: int = 40) -> tuple[pl.DataFrame, int]:
    """An item table with features, in which some are missing, and the number of items of its vocabulary."""
    genres = ["|".join(np.random.choice(list("abcdef"), np.random.randint(0, 4))) for _ in range(num_items)]
    prices = [None if np.random.rand() < 0.2 else float(np.random.choice([0, 1, 3, 50])) for _ in range(num_items)]
    places = [None if np.random.rand() < 0.2 else np.random.randn(3).tolist() for _ in range(num_items)]
    frame = pl.DataFrame({"item_id": range(num_items), "genre": genres, "price": prices, "place": places})
    tokenizer = BlossomRecTokenizer.from_items(np.random.permutation(num_items + 3).tolist())  # three without a row
    return item_metadata(frame, tokenizer, OPTIONS), tokenizer.num_items


def test_codes_and_vectors_are_those_of_plain_python(tmp_path):
    table, num_items = draw_table()
    table.write_parquet(tmp_path / "items.parquet")
    table = pl.read_parquet(tmp_path / "items.parquet")
    assert feature_columns(table) == ["genre", "price", "place"]
    features = item_features(table, num_items)
    for name in ("genre", "price"):
        rows, column = table[name].to_list(), features.columns[name]
        counts = Counter(value for row in rows for value in set(row or []))
        assert set(column.names) == {value for value, count in counts.items() if count >= 2}
        expected = [
            sorted({column.names.index(v) + 1 if v in column.names else 0 for v in row or []}) or [0] for row in rows
        ]
        ends = column.offsets.tolist()
        assert [column.codes[start:end].tolist() for start, end in zip(ends, ends[1:])] == expected
    for vector, row in zip(features.columns["place"], table["place"].to_list(), strict=True):
        unit = torch.zeros(3) if row is None else torch.tensor(row) / torch.tensor(row).norm()
        torch.testing.assert_close(vector.float(), unit, rtol=0, atol=1e-3)
    lists = ItemFeatures.from_columns(
        {name: table[name].to_list() for name in features.columns}, known=features.config()
    )
    for name, column in lists.columns.items():
        if isinstance(column, Categories):
            assert column.names == features.columns[name].names
            assert torch.equal(column.codes, features.columns[name].codes)
        else:
            assert torch.equal(column, features.columns[name])


def test_the_year_of_titles_is_a_category_if_it_is_named():
    titles = ["Toy Story (1995)", "1984", "Heat (1995) ", "Seven (aka Se7en) (1999)", None]
    frame = pl.DataFrame({"item_id": range(5), "title": titles})
    tokenizer = BlossomRecTokenizer.from_items(range(5))
    table = item_metadata(frame, tokenizer, ItemOptions(item_categories="year"))
    assert table["year"].to_list() == [["1995", "1990s"], None, ["1995", "1990s"], ["1999", "1990s"], None]
    own = frame.with_columns(year=pl.lit("2001"))  # a column of that name is used as it is
    assert item_metadata(own, tokenizer, ItemOptions(item_categories="year"))["year"].to_list() == [["2001"]] * 5
    with pytest.raises(ValueError, match="'year' is no column of items, and no title ends with a year"):
        item_metadata(frame[1:2], tokenizer, ItemOptions(item_categories="year"))


def test_columns_of_a_model_are_kept():
    table, num_items = draw_table()
    known = item_features(table, num_items).config()
    other = item_metadata(
        pl.DataFrame({"item_id": [0, 1, 2], "genre": ["f|new", "new", ""], "price": [1.0, 9e9, 2], "place": [[1.0, 0, 0]] * 3}),
        BlossomRecTokenizer.from_items([2, 0, 1]),
        OPTIONS,
    )  # fmt: skip
    features = item_features(other, 3, known=known)
    names = known["genre"]["names"]
    f = names.index("f") + 1 if "f" in names else 0
    assert features.columns["genre"].codes.tolist() == ([0, 0, f, 0] if f else [0, 0, 0])
    assert features.columns["genre"].names == names
    narrow = other.with_columns(place=pl.Series([[1.0, 0]] * 3, dtype=pl.Array(pl.Float32, 2)))
    with pytest.raises(ValueError, match=r"place has the shape \[3, 2\]; \[items, 3\] is expected"):
        item_features(narrow, 3, known=known)
    swapped = other.rename({"place": "genre", "genre": "place"})
    with pytest.raises(ValueError, match="vectors in the column 'genre', but the model has categories there"):
        item_features(swapped, 3, known=known)


def test_text_is_categories_if_it_is_named():
    table = pl.DataFrame({"input_id": [2, 3, 4], "title": ["x", "y", "z"], "genres": ["a|b", "a", None]})
    with pytest.raises(
        ValueError, match="has no features, only the columns input_id, title, genres.*--item_categories"
    ):
        item_features(table, 3)
    with pytest.raises(ValueError, match="no column 'genre'; its columns are input_id, title, genres"):
        item_features(table, 3, ["genre"])
    features = item_features(table, 4, ["genres"])
    assert features.columns["genres"].names == ["a"]
    assert features.columns["genres"].offsets.tolist() == [0, 2, 3, 4, 5]


def test_a_file_of_features_needs_no_polars(tmp_path):
    features = item_features(*draw_table())
    path = tmp_path / "features.safetensors"
    path.write_bytes(save_item_features(features))
    loaded = load_item_features(path.read_bytes())
    assert loaded.config() == features.config()
    for name, column in features.columns.items():
        for one, other in zip(column, loaded.columns[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert list(choose_columns(loaded, ["price"]).columns) == ["price"]
    with pytest.raises(ValueError, match="names 'size'; the features of the data are genre, price, place"):
        choose_columns(loaded, ["price", "size"])
    code = (
        "import sys; from pathlib import Path; from blossomrec_hf.data.item_features import load_item_features\n"
        "print(load_item_features(Path(sys.argv[1]).read_bytes()).num_items)\n"
        "assert not {'polars', 'pyarrow', 'datasets'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(blossomrec_hf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.split() == ["43"], done.stderr
