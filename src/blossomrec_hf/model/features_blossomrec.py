"""Item features: categories and dense vectors of items, and the parts of item vectors that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .configuration_blossomrec import BlossomRecConfig


MIN_ITEMS = 2  # a category of fewer items teaches nothing about others and counts as unknown
_ROWS = 2**16  # rows of a dense table that are projected at a time, without gradients


class Categories(NamedTuple):
    """
    Categories of items, one or several per item.

    Attributes:
        names: names of the categories; the code of `names[i]` is i + 1, and 0 is the unknown category.
        codes: the codes of all items, item after item, int32 `[values]`. Every item has at least one.
        offsets: index of each item's first code, int32 `[items + 1]`.
    """

    names: list[str]
    codes: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def from_codes(cls, names: Sequence[str], items: np.ndarray, codes: np.ndarray, num_items: int) -> "Categories":
        """
        Categories from pairs of an item and a code, in any order. Items without a code get the unknown category.

        Args:
            items, codes: int `[pairs]`; items are counted from 0.
        """
        without = np.flatnonzero(np.bincount(items, minlength=num_items) == 0)
        size = len(names) + 1
        pairs = np.unique(np.append(items.astype(np.int64) * size + codes, without * size))
        offsets = np.append(0, np.cumsum(np.bincount(pairs // size, minlength=num_items)))
        return cls(list(names), *(torch.from_numpy(x.astype(np.int32)) for x in (pairs % size, offsets)))


@dataclass
class ItemFeatures:
    """
    Features of items, in the order of the vocabulary without `[PAD]` and `[UNK]`.

    Args:
        columns: by name, `Categories` or dense vectors, float16 `[items, size]` of length 1, or of zeros if missing.
    """

    columns: dict[str, Categories | torch.Tensor]

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Sequence[Any]], *, known: Mapping[str, Mapping[str, Any]] | None = None
    ) -> "ItemFeatures":
        """
        Features from lists and arrays.

        ```python
        features = ItemFeatures.from_columns({"genres": [["Drama"], ["Comedy", "Drama"], None], "plot": np.eye(3)})
        model = BlossomRecForSequentialRecommendation(BlossomRecConfig(vocab_size=5, item_features=features.config()))
        model.set_item_features(features)
        ```

        Args:
            columns: a value per item and column: a category (string or integer), a list of categories (strings), a vector
                (array or list of numbers), or `None` if it is missing. Vectors are scaled to length 1.
            known: `config.item_features` of a model, whose categories and sizes are kept: other categories are unknown,
                columns that are missing here are missing for all items, and other columns are ignored. By default, all
                categories of at least two items are known.

        Raises:
            ValueError: for columns of different lengths, for vectors of different lengths or with values that are not
                finite, for numbers among vectors, and for categories that are neither strings nor integers.
        """
        if not isinstance(columns, Mapping) or not columns:
            raise ValueError(f"`columns` is {columns!r:.80}; it must be a dictionary with at least one column.")
        for name, column in columns.items():
            if not hasattr(column, "__len__") or isinstance(column, str | Mapping):
                raise ValueError(
                    f"`columns[{name!r}]` is {column!r:.80}; it must be a list or an array with a value per item."
                )
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"`columns` have the lengths {lengths}; each needs one value per item.")
        num_items = next(iter(lengths.values()))
        if known is None:
            return cls({name: _column(name, values, num_items, None) for name, values in columns.items()})
        missing = [None] * num_items
        return cls({n: _column(n, columns.get(n, missing), num_items, feature) for n, feature in known.items()})

    def select(self, items: np.ndarray) -> "ItemFeatures":
        """The features of some items, counted from 0, in the order given."""
        chosen = {}
        for name, column in self.columns.items():
            if isinstance(column, Categories):
                starts, ends = column.offsets[:-1].numpy()[items], column.offsets[1:].numpy()[items]
                lengths = ends - starts
                rows = np.repeat(np.arange(len(items)), lengths)
                places = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
                codes = column.codes.numpy()[places]
                chosen[name] = Categories.from_codes(column.names, rows, codes, len(items))
            else:
                chosen[name] = column[torch.as_tensor(items)]
        return ItemFeatures(chosen)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return min(map(_num_items, self.columns.values()))

    def config(self) -> dict[str, dict[str, Any]]:
        """The value of `item_features` in the configuration of a model with these features."""
        return {
            name: {"kind": "categories", "names": list(column.names), "num_values": len(column.codes)}
            if isinstance(column, Categories)
            else {"kind": "vectors", "size": column.shape[1]}
            for name, column in self.columns.items()
        }


def _num_items(column: Categories | torch.Tensor) -> int:
    return len(column) if isinstance(column, torch.Tensor) else len(column.offsets) - 1


def _column(
    name: str, values: Sequence[Any], num_items: int, known: Mapping[str, Any] | None
) -> Categories | torch.Tensor:
    """The column of these values, with the names or the size of a known one."""
    if known is None:
        some = next((value for value in values if value is not None and np.size(value)), None)
        kind = "vectors" if _is_vector(some) else "categories"
    else:
        kind = known["kind"]
    if kind == "vectors":
        return unit_table(name, values, None if known is None else known["size"])
    lists = [_categories_of(name, item, value) for item, value in enumerate(values)]
    flat = [str(category) for categories in lists for category in categories]
    items = np.repeat(np.arange(num_items), [len(categories) for categories in lists])
    if known is None:
        counts: dict[str, int] = {}
        for categories in lists:
            for category in dict.fromkeys(map(str, categories)):
                counts[category] = counts.get(category, 0) + 1
        names = [category for category, count in counts.items() if count >= MIN_ITEMS]
    else:
        names = list(known["names"])
    codes = {category: code for code, category in enumerate(names, start=1)}
    return Categories.from_codes(names, items, np.array([codes.get(c, 0) for c in flat], np.int64), num_items)


def _categories_of(name: str, item: int, value: Any) -> list[str | int]:
    if value is None:
        return []
    categories = (
        list(value) if isinstance(value, list | tuple | set | frozenset | np.ndarray) and np.ndim(value) else [value]
    )
    for category in categories:
        if not isinstance(category, str | int | np.integer):
            raise ValueError(
                f"`columns[{name!r}]` has {category!r:.80} for item {item}; categories are strings or integers, and None is "
                "given in place of a missing one."
            )
    return categories


def _is_vector(value: Any) -> bool:
    if value is None or isinstance(value, str | Mapping | set | frozenset) or not np.ndim(value):
        return False
    return np.issubdtype(np.asarray(value[0]).dtype, np.number)


def unit_table(name: str, values: Sequence[Any] | np.ndarray, size: int | None = None) -> torch.Tensor:
    """
    Vectors of length 1 in float16 `[items, size]`, zeros for missing ones.

    Args:
        name: of the column, for messages.
        values: float `[items, size]`, or a vector or `None` per item.
        size: the size that they must have.

    Raises:
        ValueError: for vectors of another size, for a number in place of a vector, and for values that are not finite.
    """
    if not isinstance(values, np.ndarray):
        for item, value in enumerate(values):
            if value is not None and not hasattr(value, "__len__"):
                raise ValueError(
                    f"{name} has {value!r:.80} for item {item}; give a vector, or None in place of a missing one."
                )
        sizes = {len(value) for value in values if value is not None}
        size = size if size is not None or not sizes else next(iter(sizes))
        if sizes - {size}:
            raise ValueError(
                f"{name} has vectors of {min(sizes - {size})} numbers; {size} are expected, or categories as strings."
            )
        values = [np.zeros(size or 0) if value is None else np.asarray(value) for value in values]
    try:
        values = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has vectors with values that are no numbers ({error}); correct them.") from error
    if values.ndim != 2 or (size is not None and values.shape[1] != size):
        raise ValueError(f"{name} has the shape {list(values.shape)}; [items, {size or 'size'}] is expected.")
    if not np.isfinite(values).all():
        item = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise ValueError(f"{name} has numbers that are not finite for item {item}; correct them, or omit the vector.")
    norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    return torch.from_numpy((values / np.where(norms > 0, norms, 1)).astype(np.float16))


class CategoryVectors(nn.Embedding):
    """
    A learned vector per category. The vector of code 0, the unknown category, starts at zero.

    Args:
        num_rows: number of vocabulary ids.
        feature: its description in the configuration.
        hidden_size: length of the vectors.
    """

    def __init__(self, num_rows: int, feature: Mapping[str, Any], hidden_size: int) -> None:
        super().__init__(len(feature["names"]) + 1, hidden_size)
        self.names = list(feature["names"])
        self.register_buffer("codes", torch.zeros(feature["num_values"], dtype=torch.int32))
        self.register_buffer("offsets", torch.zeros(num_rows + 1, dtype=torch.int32))

    def forward(self) -> torch.Tensor:
        """The sum of each item's vectors, `[num_rows, hidden_size]`."""
        return nn.functional.embedding_bag(self.codes, self.weight, self.offsets, mode="sum", include_last_offset=True)

    def describe(self) -> dict[str, Any]:
        return {"kind": "categories", "names": self.names, "num_values": len(self.codes)}

    def is_set(self) -> bool:
        return self.offsets.is_meta or int(self.offsets[-1]) == len(self.codes)

    def check(self, name: str, column: Categories | torch.Tensor) -> None:
        if isinstance(column, torch.Tensor):
            raise ValueError(f"`features` has vectors in the column {name!r}, in which the model has categories.")
        if column.names != self.names:
            raise ValueError(
                f"`features` has other categories in the column {name!r} than the model; make it with "
                "`ItemFeatures.from_columns(columns, known=model.config.item_features)`."
            )
        wrong = column.codes[(column.codes < 0) | (column.codes > len(self.names))]
        if len(wrong):
            raise ValueError(
                f"`features` has the code {int(wrong[0])} in the column {name!r}; codes are 0 (unknown) to {len(self.names)}."
            )
        offsets = column.offsets
        if int(offsets[0]) or int(offsets[-1]) != len(column.codes) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"`features` has offsets in the column {name!r} that do not fit its codes.")

    def replace(self, first: int, column: Categories) -> None:
        """Replace the codes of all rows from `first` on."""
        codes = self.codes[: int(self.offsets[first])]
        ends = column.offsets[1:].to(self.offsets) + len(codes)
        self.codes = torch.cat([codes, column.codes.to(codes)])
        self.offsets = torch.cat([self.offsets[: first + 1], ends])

    def missing(self, num_items: int) -> Categories:
        """The column of items without the feature."""
        nothing = np.zeros(0, np.int64)
        return Categories.from_codes(self.names, nothing, nothing, num_items)

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1


class VectorProjection(nn.Module):
    """
    A learned projection of dense vectors. Their table is a frozen parameter in half precision.

    Args: as `CategoryVectors`.
    """

    def __init__(self, num_rows: int, feature: Mapping[str, Any], hidden_size: int) -> None:
        super().__init__()
        table = torch.zeros(num_rows, feature["size"], dtype=torch.float16)
        self.table = nn.Parameter(table, requires_grad=False)
        self.projection = nn.Linear(feature["size"], hidden_size, bias=False)

    def forward(self) -> torch.Tensor:
        """The projections `[num_rows, hidden_size]`; zeros for items without a vector."""
        table = self.table.detach()
        if torch.is_autocast_enabled(table.device.type):
            return self.projection(table)
        dtype = self.projection.weight.dtype
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.projection(table.to(dtype))
        return torch.cat([self.projection(part.to(dtype)) for part in table.split(_ROWS)])

    def describe(self) -> dict[str, Any]:
        return {"kind": "vectors", "size": self.table.shape[1]}

    def is_set(self) -> bool:
        return type(self.table) is not nn.Parameter or self.table.is_meta or bool(self.table.any())

    def check(self, name: str, column: Categories | torch.Tensor) -> None:
        if not isinstance(column, torch.Tensor):
            raise ValueError(f"`features` has categories in the column {name!r}, in which the model has vectors.")
        if column.dim() != 2 or column.shape[1] != self.table.shape[1]:
            raise ValueError(
                f"`features` has vectors of shape {list(column.shape)} in the column {name!r}; the model's have "
                f"{self.table.shape[1]} numbers."
            )
        if not bool(column.isfinite().all()):
            raise ValueError(f"`features` has numbers in the column {name!r} that are not finite; correct them.")

    def replace(self, first: int, column: torch.Tensor) -> None:
        """Replace all rows from `first` on."""
        table = torch.cat([self.table.detach()[:first], column.to(self.table)])
        self.table = nn.Parameter(table, requires_grad=False)

    def missing(self, num_items: int) -> torch.Tensor:
        """The column of items without the feature."""
        return self.table.new_zeros(num_items, self.table.shape[1])

    @property
    def num_rows(self) -> int:
        return len(self.table)


_KINDS = {"categories": CategoryVectors, "vectors": VectorProjection}


class FeatureVectors(nn.Module):
    """The parts of item vectors that follow from features: the sum over the features of a configuration, by name."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__()
        self.names = sorted(config.item_features)  # the order of a configuration changes when it is saved
        features = [config.item_features[name] for name in self.names]
        self.columns = nn.ModuleList(
            _KINDS[feature["kind"]](config.vocab_size, feature, config.hidden_size) for feature in features
        )
        self._is_set = False

    def forward(self) -> torch.Tensor:
        """`[vocab_size, hidden_size]`; zeros for [PAD] and [UNK]."""
        first, *others = (column() for column in self.columns)
        for vectors in others:
            first = first + vectors.to(first.device)
        return first

    def describe(self) -> dict[str, dict[str, Any]]:
        """The value of `item_features` in the configuration."""
        return {name: column.describe() for name, column in zip(self.names, self.columns)}

    def require_features(self) -> None:
        """
        Check once that the features are there, which a new model gets by `set_item_features`.

        Raises:
            ValueError: if they are not.
        """
        if not self._is_set:
            # All columns are set together; a column of zeros alone looks as if it was not.
            if not any(column.is_set() for column in self.columns):
                raise ValueError("The model has no features of its items; call `model.set_item_features` first.")
            self._is_set = True

    @torch.no_grad()
    def replace(self, first: int, features: ItemFeatures) -> None:
        """
        Replace the features of all vocabulary ids from `first` on.

        Raises:
            ValueError: if `features` do not fit the model; nothing is changed then.
        """
        if not isinstance(getattr(features, "columns", None), Mapping):
            raise ValueError(
                f"`features` is of {type(features).__name__}; make it with "
                "`ItemFeatures.from_columns(columns, known=model.config.item_features)`."
            )
        if sorted(features.columns) != self.names:
            raise ValueError(
                f"`features` has the columns {', '.join(sorted(features.columns))}; the model has {', '.join(self.names)}."
            )
        for name, column in zip(self.names, self.columns):
            given, expected = features.columns[name], column.num_rows - first
            column.check(name, given)
            if _num_items(given) != expected:
                raise ValueError(
                    f"`features` has {_num_items(given)} items in the column {name!r}; {expected} are expected."
                )
        for name, column in zip(self.names, self.columns):
            column.replace(first, features.columns[name])
        self._is_set = True

    @torch.no_grad()
    def resize(self, num_rows: int) -> None:
        """Change the number of vocabulary ids. New items have no features."""
        for column in self.columns:
            kept = min(column.num_rows, num_rows)
            column.replace(kept, column.missing(num_rows - kept))
