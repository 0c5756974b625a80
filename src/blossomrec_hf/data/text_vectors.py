"""Texts of items as vectors, by a model of `sentence-transformers`: `pip install blossomrec-hf[text]`."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ..utils.progress import progress_bar


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CHUNK = 4096  # texts between two steps of the progress bar


def load_text_model(name: str) -> "SentenceTransformer":
    """
    Loads a text model, on a GPU if there is one.

    Args:
        name (`str`): a folder, or the name of a repository on the Hub.

    Raises:
        ValueError: if `sentence-transformers` is not installed, or there is no such model.
    """
    if find_spec("sentence_transformers") is None:
        raise ValueError("item_text needs the package sentence-transformers: pip install blossomrec-hf[text].")
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name)
    except Exception as error:  # it has no error of its own for a name without a model
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"text_model is {name!r}, which could not be loaded ({reason}); give the folder of a model of "
            "sentence-transformers, or its name on the Hub (owner/name)."
        ) from error


def as_texts(column: pl.Series) -> pl.Series:
    """
    The texts of a column, without spaces around them; null for missing and empty ones. A list is one text, joined by spaces.

    Raises:
        ValueError: if the column has neither texts nor numbers.
    """
    if isinstance(column.dtype, (pl.List, pl.Array)):
        column = column.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    if column.dtype.is_nested():
        raise ValueError(f"item_text has {column.name!r}, whose values are {column.dtype}; name a column of texts.")
    texts = column.cast(pl.String).str.strip_chars()
    return texts.set(texts == "", None)


def text_vectors(texts: pl.Series, model: "SentenceTransformer") -> pl.Series:
    """
    The vector of each text, as an array of float32; null for a null.

    Equal texts are encoded once, as documents (a model may have a prompt of its own for these).

    Raises:
        ValueError: if there is no text, or the model returns values that are no finite numbers.
    """
    texts = texts.alias("text")
    different = texts.drop_nulls().unique(maintain_order=True)
    if different.is_empty():
        raise ValueError("item_text names a column in which no item of the vocabulary has a text; name another.")
    different = different.gather(different.str.len_chars().arg_sort())  # texts of one batch are padded to one length
    parts = []
    with progress_bar(total=len(different), description="encode texts") as bar:
        for start in range(0, len(different), _CHUNK):
            chunk = different[start : start + _CHUNK].to_list()
            parts.append(np.asarray(model.encode_document(chunk, show_progress_bar=False), np.float32))
            bar.update(len(chunk))
    vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        raise ValueError("text_model returned vectors with values that are no finite numbers; name another model.")
    numbered = different.to_frame().with_row_index("place")
    place = texts.to_frame().join(numbered, on="text", how="left", maintain_order="left")["place"]
    rows = pl.DataFrame({"vector": vectors[place.fill_null(0).to_numpy()], "place": place})
    return rows.select(pl.when(pl.col("place").is_not_null()).then("vector"))["vector"]
