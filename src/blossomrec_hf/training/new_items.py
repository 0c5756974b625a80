"""A catalogue that grows: new items in tokenizer and model, from their mean or from given vectors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from ..tokenization_blossomrec import BlossomRecTokenizer


def add_items(
    model: PreTrainedModel,
    tokenizer: BlossomRecTokenizer,
    items: Sequence[Any],
    *,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> int:
    """
    Adds those of `items` that the catalogue does not hold. The old items' rows stay as they are.

    Args:
        items: raw item ids.
        vectors: where an item begins, float [hidden_size] by its raw id as text (see [`read_item_vectors`]); the
            others, and all where it is left out, begin at the mean of the old items.

    Returns:
        how many were new.

    Raises:
        ValueError: for a vector of another width than the model's, or one that is not finite. Nothing is changed then.
    """
    first_new, width = len(tokenizer), model.config.hidden_size
    vectors = {} if vectors is None else vectors
    for item, vector in vectors.items():
        if vector.shape != (width,):
            raise ValueError(
                f"`vectors` holds {vector.shape} for the item {item!r}, but the model's `hidden_size` is {width}: bring "
                "the vectors to that width first, by PCA for example."
            )
        if not np.isfinite(vector).all():
            raise ValueError(f"`vectors` holds numbers for the item {item!r} that are not finite.")
    num_added = tokenizer.add_items(items)
    if num_added:
        model.resize_token_embeddings(len(tokenizer))
        new_ids = range(first_new, len(tokenizer))
        given = [
            (row, vectors[str(item)])
            for row, item in zip(new_ids, tokenizer.decode_items(new_ids))
            if str(item) in vectors
        ]
        if given:
            rows, values = zip(*given)
            weights = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
            with torch.no_grad():
                for weight in weights.values():
                    weight[list(rows)] = torch.from_numpy(np.stack(values)).to(weight)
    return num_added


def read_item_vectors(path: str | Path) -> dict[str, np.ndarray]:
    """
    Reads one vector an item, by the item's raw id as text.

    Args:
        path: a Parquet file with the columns `item` and `vector` (lists of numbers), or a safetensors file with one
            tensor an item, named by it.

    Raises:
        ValueError: for another kind of file, or a Parquet file without these columns.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix != ".parquet":
        raise ValueError(f"`path` is {path}; item vectors are read from .parquet or .safetensors.")
    table = pl.read_parquet(path)
    if missing := {"item", "vector"} - set(table.columns):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(table.columns)}.")
    return {
        str(item): np.asarray(vector, dtype=np.float32) for item, vector in table.select("item", "vector").iter_rows()
    }


def freeze_all_but_items(model: PreTrainedModel, first_item: int) -> None:
    """
    Leaves only the embeddings of the items from vocabulary id `first_item` on to be trained (2: of all items). The
    gradient of the rows before is set to zero, so an optimizer must not decay them.
    """
    model.requires_grad_(False)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in tables.values():
        weight.requires_grad_(True)
        if first_item > 2:
            weight.register_hook(lambda gradient: torch.cat([gradient[:first_item] * 0, gradient[first_item:]]))
