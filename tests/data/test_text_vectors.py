"""Texts of the item table as vectors, by a small model of `sentence-transformers` whose weights come with WordLlama."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from blossomrec_hf.commands import prepare
from blossomrec_hf.data import text_vectors
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.metadata import item_metadata, read_item_metadata
from blossomrec_hf.data.options import ItemOptions
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


WORDLLAMA = Path(find_spec("wordllama").origin).parent  # a file of word vectors and a tokenizer, both in the wheel


@pytest.fixture(scope="module")
def words() -> tuple[Tokenizer, np.ndarray]:
    """WordLlama's tokenizer and its vectors, float32 [32000, 256]."""
    (vectors,) = load_file(WORDLLAMA / "weights" / "l2_supercat_256.safetensors").values()
    tokenizer = Tokenizer.from_file(str(WORDLLAMA / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    return tokenizer, vectors.astype(np.float32)


@pytest.fixture(scope="module")
def model(words, tmp_path_factory) -> str:
    """The folder of the model, as `sentence-transformers` saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = tmp_path_factory.mktemp("model")
    SentenceTransformer(modules=[StaticEmbedding(words[0], embedding_weights=words[1])]).save_pretrained(str(folder))
    return str(folder)


def plain(words, text: str) -> np.ndarray:
    """The mean of the vectors of a text's tokens."""
    tokenizer, vectors = words
    return vectors[tokenizer.encode(text, add_special_tokens=False).ids].mean(0)


ITEMS = (
    "item_id:token\tmovie_title:token_seq\tdescription:token_seq\n"
    "1\tToy Story\tA cowboy doll and a space ranger.\n2\tHeat\t \n3\tToy Story\t\n9\tNot in the log\tNothing\n"
)


def test_the_command_stores_vectors_and_counts_missing_texts(tmp_path, model, words):
    (tmp_path / "log.csv").write_text("user,item\n1,1\n1,3\n1,2\n2,4\n2,1\n")
    (tmp_path / "x.item").write_text(ITEMS)
    text = ["--item_text", "movie_title,description", "--text_model", model]
    prepare.main(
        [str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--items", str(tmp_path / "x.item"), *text]
    )
    table = read_item_metadata(tmp_path / "out")
    assert table.schema["movie_title_vector"] == table.schema["description_vector"] == pl.Array(pl.Float32, 256)
    assert table["item"].to_list() == [1, 3, 2, 4]
    assert table["title"].to_list() == ["Toy Story", "Toy Story", "Heat", None]
    assert table["movie_title_vector"].is_null().to_list() == [False, False, False, True]
    assert table["description_vector"].is_null().to_list() == [False, True, True, True]
    for vector, title in zip(table["movie_title_vector"].to_list(), ["Toy Story", "Toy Story", "Heat"]):
        assert np.allclose(vector, plain(words, title), atol=1e-6)
    assert np.allclose(
        table["description_vector"][0].to_numpy(), plain(words, "A cowboy doll and a space ranger."), atol=1e-6
    )
    assert FilterReport.load(tmp_path / "out").notes[-4:] == [
        "1 of 4 items have no movie_title",
        "3 of 4 items have no description",
        f"movie_title_vector has 256 numbers per item, of movie_title by {model}",
        f"description_vector has 256 numbers per item, of description by {model}",
    ]


def test_texts_of_like_items_have_like_vectors(model):
    titles = [
        "cordless hammer drill 18V",
        "cordless screwdriver",
        "chocolate cookies",
        "butter biscuits with chocolate",
    ]
    items = pl.DataFrame({"item": range(4), "title": titles})
    vectors = item_metadata(
        items, BlossomRecTokenizer.from_items([2, 0, 3, 1]), ItemOptions(item_text="title", text_model=model)
    )
    assert vectors["item"].to_list() == [2, 0, 3, 1]
    vectors = vectors["title_vector"].to_numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, 0)
    assert likeness.argmax(1).tolist() == [2, 3, 0, 1]


def test_many_texts_in_any_order_have_the_vectors_of_each_alone(model, words, monkeypatch):
    """Over chunk boundaries, with repeats and gaps."""
    monkeypatch.setattr(text_vectors, "_CHUNK", 7)
    rng = np.random.default_rng(4)
    texts = [" ".join(rng.choice(["red", "shoe", "of", "Ω", "42"], rng.integers(0, 9))) for _ in range(60)]
    column = text_vectors.as_texts(pl.Series("t", [*texts, None, " \n"]))
    found = text_vectors.text_vectors(column, text_vectors.load_text_model(model))
    assert found.is_null().to_list() == [not text for text in [*texts, "", ""]]
    for text, vector in zip(texts, found.to_list()):
        if text:
            assert np.allclose(vector, plain(words, text), atol=1e-6)


def test_lists_and_numbers_are_texts_and_structures_are_not():
    lists = text_vectors.as_texts(pl.Series("t", [["a ", "b"], [], None, [None, "c"]]))
    assert lists.to_list() == ["a  b", None, None, "c"]
    assert text_vectors.as_texts(pl.Series("t", [1, None])).to_list() == ["1", None]
    with pytest.raises(ValueError, match="item_text has 'details', whose values are Struct.*name a column of texts"):
        text_vectors.as_texts(pl.Series("details", [{"color": "red"}]))


@pytest.mark.parametrize(
    "items, text, said",
    [
        ({"item": [1], "title": ["x"]}, "name", "'name' is no column of items; it has 'item', 'title'"),
        ({"item": [1], "title": [" "]}, "title", "no item of the vocabulary has a text"),
        ({"item": [1], "title": ["x"]}, "title,title", "item_text has the columns 'title', 'title'; give different"),
        ({"item": [1], "t": ["x"], "t_vector": [[1.0]]}, "t", "has a column 't_vector' already"),
    ],
)
def test_what_is_no_text_is_refused(model, items, text, said):
    with pytest.raises(ValueError, match=said):
        item_metadata(
            pl.DataFrame(items), BlossomRecTokenizer.from_items([1]), ItemOptions(item_text=text, text_model=model)
        )


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "no-owner/no-model"])
def test_an_unknown_model_is_one_sentence_before_the_log_is_read(tmp_path, capsys, name):
    (tmp_path / "items.csv").write_text("item,title\n1,a\n")
    (tmp_path / "log.csv").write_text("user,item\n1,\n")  # a bad row, which would be named if it were read
    with pytest.raises(SystemExit, match="2"):
        prepare.main(
            [str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--items", str(tmp_path / "items.csv")]
            + ["--item_text", "title", "--text_model", name]
        )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"text_model is '{name}', which could not be loaded (") and said.endswith("(owner/name).")
    assert not (tmp_path / "out").exists()


def test_without_the_package_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(text_vectors, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package sentence-transformers: pip install blossomrec-hf\[text\]"
    ):
        item_metadata(
            pl.DataFrame({"item": [1], "title": ["x"]}),
            BlossomRecTokenizer.from_items([1]),
            ItemOptions(item_text="title"),
        )
