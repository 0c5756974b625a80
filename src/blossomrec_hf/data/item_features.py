"""Item features for a model, from the item table of a vocabulary or from a file that needs no polars."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save


if TYPE_CHECKING:
    import polars as pl

    from ..model.features_blossomrec import Categories, ItemFeatures


def feature_columns(table: "pl.DataFrame") -> list[str]:
    """The columns of an item table that are features: lists of categories, and vectors."""
    import polars as pl

    return [name for name, dtype in table.schema.items() if isinstance(dtype, (pl.List, pl.Array))]


def item_features(
    table: "pl.DataFrame",
    num_items: int,
    columns: Sequence[str] | None = None,
    *,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> "ItemFeatures":
    """
    Features of the items of a vocabulary, from its item table.

    Args:
        table: see [`~data.metadata.item_metadata`]. Items without a row have no features.
        num_items: number of items of the vocabulary.
        columns: names of the features; a column of text has categories, several of one item separated by |. By default,
            all columns with lists of categories and with vectors. Categories of a single item count as unknown.
        known: `config.item_features` of a model, whose columns, categories and sizes are kept; other categories are unknown.

    Raises:
        ValueError: if a column is missing or has another kind of values, if there is none, or if vectors do not fit.
    """
    import polars as pl

    from ..model.features_blossomrec import ItemFeatures, unit_table
    from ..model.ids_blossomrec import NUM_SPECIAL_IDS

    if columns is None and known is None:
        columns = feature_columns(table)
        if not columns:
            raise ValueError(
                f"The item table has no features, only the columns {', '.join(table.columns)}; prepare the data with "
                "`--item_categories`, `--item_numbers`, `--item_vectors` or `--item_text`."
            )
    columns = list(known) if known is not None else list(columns)
    if missing := [name for name in columns if name not in table.columns]:
        raise ValueError(
            f"The item table has no column {missing[0]!r}; its columns are {', '.join(table.columns) or 'none'}."
        )
    ids = pl.DataFrame(
        {"input_id": pl.int_range(NUM_SPECIAL_IDS, num_items + NUM_SPECIAL_IDS, dtype=pl.Int32, eager=True)}
    )
    aligned = ids.join(table.select("input_id", *columns), on="input_id", how="left", maintain_order="left")
    features = {}
    for name in columns:
        column, feature = aligned[name], None if known is None else known[name]
        is_dense = isinstance(column.dtype, pl.Array)
        if feature is not None and is_dense != (feature["kind"] == "vectors"):
            raise ValueError(
                f"The item table has {'vectors' if is_dense else 'categories'} in the column {name!r}, but the model has "
                f"{feature['kind']} there."
            )
        if is_dense:
            vectors = np.zeros((num_items, column.dtype.size), np.float32)
            vectors[column.is_not_null().to_numpy()] = column.drop_nulls().to_numpy()
            features[name] = unit_table(name, vectors, None if feature is None else feature["size"])
        else:
            features[name] = _categories(column, None if feature is None else feature["names"])
    return ItemFeatures(features)


def _categories(column: "pl.Series", names: Sequence[str] | None) -> "Categories":
    import polars as pl

    from ..model.features_blossomrec import MIN_ITEMS, Categories
    from .metadata import as_categories

    if not isinstance(column.dtype, pl.List):
        column = as_categories(column)
    lengths = column.list.len().fill_null(0).to_numpy()
    flat = column.filter(column.list.len() > 0).explode()
    order = flat.dtype.categories.to_list() if isinstance(flat.dtype, pl.Enum) else None
    pairs = pl.DataFrame({"item": np.repeat(np.arange(len(column)), lengths), "name": flat.cast(pl.String)}).unique()
    if names is None:
        counts = pairs["name"].value_counts(name="count").filter(pl.col("count") >= MIN_ITEMS)
        kept = counts.sort(["count", "name"], descending=[True, False])["name"].to_list()
        names = kept if order is None else sorted(kept, key={name: i for i, name in enumerate(order)}.get)
    codes = (
        pairs["name"].replace_strict(list(names), list(range(1, len(names) + 1)), default=0, return_dtype=pl.Int64)
        if names
        else pl.zeros(len(pairs), pl.Int64, eager=True)
    )
    return Categories.from_codes(names, pairs["item"].to_numpy(), codes.to_numpy(), len(column))


def save_item_features(features: "ItemFeatures") -> bytes:
    """The content of a `.safetensors` file with the features."""
    from ..model.features_blossomrec import Categories

    tensors = {}
    for number, column in enumerate(features.columns.values()):
        parts = column._asdict() if isinstance(column, Categories) else {"vectors": column}
        parts.pop("names", None)
        tensors |= {f"{number}.{part}": np.ascontiguousarray(values.numpy()) for part, values in parts.items()}
    return save(tensors, {"item_features": json.dumps(features.config())})


def load_item_features(content: bytes) -> "ItemFeatures":
    """The features in the content of a file of [`save_item_features`]."""
    import torch

    from ..model.features_blossomrec import Categories, ItemFeatures

    size = int.from_bytes(content[:8], "little")
    described = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["item_features"])
    tensors = {name: torch.from_numpy(values) for name, values in load(content).items()}
    return ItemFeatures(
        {
            name: Categories(feature["names"], tensors[f"{number}.codes"], tensors[f"{number}.offsets"])
            if feature["kind"] == "categories"
            else tensors[f"{number}.vectors"]
            for number, (name, feature) in enumerate(described.items())
        }
    )


def choose_columns(features: "ItemFeatures", columns: Sequence[str] | None) -> "ItemFeatures":
    """
    Some of the features, by default all.

    Raises:
        ValueError: if there is no such column.
    """
    if missing := [name for name in columns or [] if name not in features.columns]:
        raise ValueError(
            f"`item_features` names {missing[0]!r}; the features of the data are {', '.join(features.columns)}."
        )
    return type(features)({name: features.columns[name] for name in columns or features.columns})
