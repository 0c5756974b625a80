"""Parts of a log that are tables: frames in memory and Parquet files."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import find_columns
from .options import LogOptions
from .parts import Part, explode, reading
from .text_files import BadRows, LogFile


BATCH_ROWS = 1 << 20


def open_table(frame: pl.LazyFrame, name: str, options: LogOptions, notes: list[str]) -> Part:
    """
    A table in memory as a part of a log. Columns of lists give a row per element.

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
    types = {role: schema[column] for role, column in found.items()}
    lists = [role for role, dtype in types.items() if isinstance(dtype, (pl.List, pl.Array))]
    lists = lists if "item" in lists else []
    types |= {role: types[role].inner for role in lists}

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        first = 0
        with reading(name):
            for batch in batches(list({found[role] for role in wanted})):
                row = pl.int_range(first, first + batch.height).alias("row")
                first += batch.height
                batch = batch.select(row, *(pl.col(found[role]).alias(role) for role in wanted))
                exploded = [role for role in wanted if role in lists]
                yield explode(batch, exploded) if exploded else batch

    return Part(name, types, read, row_word="row")


def open_parquet(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """A Parquet file. Arrow reads it, because Polars panics at some damaged files."""

    def batches(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        options = {"page_checksum_verification": True, "read_dictionary": names_of_few}
        read: list[pl.DataFrame] = []
        with file.open_stored() as stored, pq.ParquetFile(stored, **options) as table:
            for batch in table.iter_batches(
                BATCH_ROWS, columns=columns
            ):  # with codes, a batch ends with its row group
                batch.validate(full=True)
                read.append(pl.from_arrow(pa.Table.from_batches([batch]).replace_schema_metadata(None)))
                if sum(frame.height for frame in read) >= BATCH_ROWS // 2:
                    yield pl.concat(read)
                    read.clear()
        if read:
            yield pl.concat(read)

    with reading(str(file)), file.open_stored() as stored, pq.ParquetFile(stored) as table:
        str(table.schema_arrow)  # raises if a name is not UTF-8, at which Polars panics
        schema = pl.from_arrow(table.schema_arrow.remove_metadata().empty_table()).schema
    # Arrow reads a column of few names as codes twice as fast as as texts.
    names_of_few = [options.event_type] if schema.get(options.event_type) == pl.String else []
    return _table_part(str(file), schema, options, notes, batches)
