"""Raw ids of users and items: missing values, data types, and the codes that replace ids on disk."""

from collections.abc import Container, Mapping

import numpy as np
import polars as pl


# Texts that programs write for a missing value: pandas, R, JavaScript, databases.
MISSING_IDS = (
    "NA", "Na", "na", "N/A", "n/a", "#N/A", "<NA>", "NULL", "Null", "null", "NaN", "Nan", "NAN", "nan", "None", "NONE",
    "none", "\\N",
)  # fmt: skip
BLANKS = " \t\n\v\f\r"
FLOAT = r"^-?\d+\.0+$"  # an integer that is written as a float
EXPONENT = r"^-?\d\.\d+[eE]\+?\d+$"  # a large integer as spreadsheets and JSON writers show it
EXACT = {pl.Float32: 1 << 24, pl.Float64: 1 << 53}  # largest integer up to which a float names every integer


def id_type(types: Mapping[str, pl.DataType], name: str) -> pl.DataType:
    """
    The data type of ids that all files of a log share: Int64 or String.

    Args:
        types: the data type of the column in each file.
        name (`str`): `"user"` or `"item"`, for messages.

    Raises:
        ValueError: if a column is of another data type, or ids are integers in one file and strings in another.
    """
    kinds: dict[type, str] = {}
    for where, dtype in types.items():
        if dtype.is_integer() or dtype.is_float():
            # Integers above 2**63 are text, as they are in text files. Files with smaller ones follow.
            kinds.setdefault(pl.UInt64 if dtype in (pl.UInt64, pl.UInt128, pl.Int128) else pl.Int64, where)
        elif dtype in (pl.String, pl.Categorical, pl.Enum):
            kinds.setdefault(pl.String, where)
        elif dtype != pl.Null:
            raise ValueError(f"{where}: the column of {name} ids has type {dtype}; ids may be integers or strings.")
    if pl.String in kinds and len(kinds) > 1:
        numbers = next(where for kind, where in kinds.items() if kind != pl.String)
        raise ValueError(
            f"the ids of {name}s are integers in {numbers} and strings in {kinds[pl.String]}; ids may be integers or "
            "strings, not a mixture: write both files with one type."
        )
    return pl.Int64() if list(kinds) == [pl.Int64] else pl.String()


def as_ids(column: pl.Series, dtype: pl.DataType, *, keep_na: bool = False) -> pl.Series:
    """
    The ids of a column; missing ids are null.

    Args:
        dtype: data type of the result, from [`id_type`].
        keep_na (`bool`): whether texts such as "NA" are ids.

    Raises:
        ValueError: if floats are too large to name an integer exactly.
    """
    if column.dtype.is_float():
        largest = column.abs().fill_nan(None).max()
        if largest is not None and largest > EXACT[type(column.dtype)]:
            raise ValueError(
                f"the {column.name} ids are floats up to {largest:.0f}, whose last digits are lost; write them as integers."
            )
        column = column.set(column != column.round(), None).cast(pl.Int64, strict=False)
    if column.dtype.is_integer():
        return column.cast(dtype)
    column = column.cast(pl.String)
    missing = column.str.strip_chars(BLANKS).is_in(["", *([] if keep_na else MISSING_IDS)])
    return column.set(missing, None) if missing.any() else column


class Codes:
    """Codes 0, 1, 2 … of raw ids, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._known: pl.DataFrame | None = None
        self.size = 0

    def encode(self, ids: pl.Series) -> np.ndarray:
        """The codes (uint32) of a batch of ids; new ids are appended. All batches have one data type."""
        batch = pl.DataFrame({"id": ids})
        if self._known is None:
            self._known = pl.DataFrame({"id": ids[:0], "code": pl.Series([], dtype=pl.UInt32)})
        new = batch.select(pl.col("id").unique(maintain_order=True)).join(
            self._known, on="id", how="anti", maintain_order="left"
        )
        if new.height:
            new = new.with_columns(code=pl.int_range(self.size, self.size + new.height, dtype=pl.UInt32))
            self._known = pl.concat([self._known, new], rechunk=True)
            self.size += new.height
        return batch.join(self._known, on="id", how="left", maintain_order="left")["code"].to_numpy()

    def ids(self) -> pl.Series:
        """The raw ids by code: Int64 if every id is an integer, or a text that is plainly one; otherwise String."""
        if self._known is None:
            return pl.Series("id", [], dtype=pl.Int64)
        return as_integers(self._known["id"])

    def names(self) -> list[str]:
        """The ids by code, as texts."""
        return [] if self._known is None else self._known["id"].cast(pl.String).to_list()

    def read_floats_as_integers(self, known: Container[str] = ()) -> tuple[str, np.ndarray] | None:
        """
        Reads text ids such as "100.0", which pandas writes for integers in a column with gaps, as integers, if every id
        is an integer or such a float.

        Args:
            known: the ids of a vocabulary. If one of the floats is among them, nothing changes.

        Returns:
            One of the floats, and the new code of each code (uint32); `None` if nothing changes.
        """
        ids = self.ids()
        integers = floats_as_integers(ids, known)
        if integers is None:
            return None
        example = ids.filter(ids.str.contains(FLOAT))[0]
        codes = Codes()
        new_codes = codes.encode(integers)
        self._known, self.size = codes._known, codes.size
        return example, new_codes


def floats_note(name: str, example: str) -> str:
    """The sentence for the report on [`Codes.read_floats_as_integers`]."""
    return f"the {name} ids are floats with whole values such as '{example}': they are read as integers"


def exponent_error(example: str) -> ValueError:
    return ValueError(
        f"ids such as '{example}' are numbers with an exponent, whose last digits are lost; write them as integers."
    )


def as_integers(ids: pl.Series) -> pl.Series:
    """Text ids as Int64 if every one is a plain integer (without leading zeros); otherwise unchanged."""
    if ids.dtype != pl.String:
        return ids
    numbers = ids.cast(pl.Int64, strict=False)
    return numbers if (numbers.cast(pl.String) == ids).fill_null(False).all() else ids


def floats_as_integers(ids: pl.Series, known: Container[str] = ()) -> pl.Series | None:
    """
    Text ids as integers, see [`Codes.read_floats_as_integers`]; `None` if they stay texts.

    Raises:
        ValueError: if a float is too large to name an integer exactly, or has an exponent.
    """
    if ids.dtype != pl.String:
        return None
    if len(shortened := ids.filter(ids.str.contains(EXPONENT))):
        raise exponent_error(shortened[0])
    floats = ids.str.contains(FLOAT)
    if not floats.any():
        return None
    integers = as_integers(ids.str.replace(r"\.0+$", "").set(~floats, None).fill_null(ids))
    if integers.dtype == pl.String or any(text in known for text in ids.filter(floats)):
        return None
    if integers.filter(floats).abs().max() > EXACT[pl.Float64]:
        raise ValueError(
            f"ids such as '{ids.filter(floats)[0]}' are floats up to {integers.filter(floats).abs().max()}, whose last "
            "digits are lost; write them as integers."
        )
    return integers
