"""Parts of a log that are tables: frames in memory and Parquet files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import find_columns
from .options import LogOptions
from .parts import Part, reading
from .text_files import BadRows


BATCH_ROWS = 1 << 20


def open_table(frame: pl.LazyFrame, name: str, options: LogOptions, notes: list[str]) -> Part:
    """
    A table in memory as a part of a log.

    Raises:
        ValueError: if a column is not found (see [`~data.columns.find_columns`]) or the table cannot be read.
    """
    with reading(name):
        schema = frame.collect_schema()
    return _table_part(
        name, schema, options, notes, lambda columns: frame.select(columns).collect_batches(chunk_size=BATCH_ROWS)
    )  # fmt: skip


def _table_part(
    name: str,
    schema: pl.Schema,
    options: LogOptions,
    notes: list[str],
    batches: Callable[[Sequence[str]], Iterable[pl.DataFrame]],
) -> Part:
    found = find_columns(schema.names(), options.column_names, name, notes)

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        first = 0
        with reading(name):
            for batch in batches(list({found[role] for role in wanted})):
                row = pl.int_range(first, first + batch.height).alias("row")
                yield batch.select(row, *(pl.col(found[role]).alias(role) for role in wanted))
                first += batch.height

    return Part(name, {role: schema[column] for role, column in found.items()}, read, row_word="row")


def open_parquet(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """A Parquet file. Arrow reads it, because Polars panics at some damaged files."""

    def batches(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                batch.validate(full=True)
                yield pl.from_arrow(pa.Table.from_batches([batch]).replace_schema_metadata(None))

    with reading(str(path)), pq.ParquetFile(path, page_checksum_verification=True) as file:
        str(file.schema_arrow)  # raises if a name is not UTF-8, at which Polars panics
        schema = pl.from_arrow(file.schema_arrow.remove_metadata().empty_table()).schema
    return _table_part(str(path), schema, options, notes, batches)
