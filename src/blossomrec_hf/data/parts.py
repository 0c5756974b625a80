"""Parts of a log: one file or table each, read in batches of the columns that a build needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from .text_files import BadRows


@dataclass
class Part:
    """
    One file or table of a log.

    Args:
        name (`str`): name of the file, for messages.
        types: data types of the columns that the part has, by their names here (`user`, `item`, `rating`, `timestamp`).
        read: yields the requested columns in batches, with a column `row`: the number of the line (in a table: of the
            row). Rows that are not of the format go to the `BadRows`.
        row_word (`str`): what `row` counts.
    """

    name: str
    types: Mapping[str, pl.DataType]
    read: Callable[[Sequence[str], BadRows], Iterator[pl.DataFrame]]
    row_word: str = "line"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns the errors of Polars and Arrow about the file `name` into a `ValueError` or `OSError` of one sentence."""
    try:
        yield
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        pa.ArrowException,
        UnicodeError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and name in str(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise kind(f"{name} can not be read to its end ({reason[0]}); is it complete and of this format?") from error


def explode(rows: pl.DataFrame, lists: Sequence[str]) -> pl.DataFrame:
    """
    One row per element of the columns `lists`. Rows with empty lists disappear; missing lists, and lists of different
    lengths in one row, give one row without values.
    """
    lengths = [pl.col(name).list.len() for name in lists]
    same = pl.all_horizontal(length.eq_missing(lengths[0]) for length in lengths)
    rows = rows.with_columns(pl.when(same).then(pl.col(name)).alias(name) for name in lists)
    return rows.filter(lengths[0].fill_null(1) > 0).explode(lists)
