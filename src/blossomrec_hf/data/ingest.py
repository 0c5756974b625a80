"""A log, batch by batch, into three columns on disk: user code, item code, time, in file order."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import polars.selectors as cs
from tqdm import tqdm

from .formats import Part, without_ragged_lines
from .readers import Log


BATCH_ROWS = 1 << 20
_YEAR_2100 = 4_102_444_800  # in seconds
_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class Codes:
    """Raw ids -> codes 0, 1, 2 … in the order they are first seen."""

    def __init__(self) -> None:
        self._known: pl.DataFrame | None = None
        self.size = 0

    def encode(self, ids: pl.Series) -> np.ndarray:
        """uint32 codes of a batch of ids; ids never seen before are appended."""
        batch = pl.DataFrame({"id": ids})
        if self._known is not None and self._known.schema["id"] != ids.dtype:
            raise ValueError(
                f"the ids of {ids.name}s are {self._known.schema['id']} in one file and {ids.dtype} in another; ids may be "
                "integers or strings, not a mixture."
            )
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
        """The raw ids by code: Int64 where every one is an integer (text: a plainly written one), else String."""
        if self._known is None:
            return pl.Series("id", [], dtype=pl.Int64)
        return as_integers(self._known["id"])


def as_integers(ids: pl.Series) -> pl.Series:
    """Text ids as Int64 if every one is a plainly written integer (no leading zeros), else as they are."""
    if ids.dtype != pl.String:
        return ids
    numbers = ids.cast(pl.Int64, strict=False)
    return numbers if (numbers.cast(pl.String) == ids).fill_null(False).all() else ids


@dataclass
class Interactions:
    """The columns of a log on disk under `folder`, in file order, and what its codes stand for."""

    folder: Path
    rows: int = 0
    users: Codes = field(default_factory=Codes)
    items: Codes = field(default_factory=Codes)
    time_dtype: np.dtype | None = None
    time_unit: str | None = None
    bad_rows: int = 0
    below_rating: int = 0


def ingest(
    log: Log, folder: Path, *, min_rating: float | None = None, on_bad_rows: Literal["fail", "skip"] = "fail"
) -> Interactions:
    """
    Streams `log` to `log_user.bin`, `log_item.bin` (uint32) and `log_time.bin` (int64 or float64, absent without times).

    Raises:
        `ValueError`: while `on_bad_rows="fail"`, a row without a usable user, item, rating (if `min_rating` asks for it)
            or time (negative, or past the year 2100), or with too many fields; the message names file and line. Ids that
            are integers in one file and strings in another.
        `OSError`: a compressed file that ends early.
    """
    result = Interactions(folder)
    numeric = ["rating"] * (min_rating is not None) + ["timestamp"] * log.has_timestamp
    with ExitStack() as stack:
        paths = (folder / f"log_{name}.bin" for name in ("user", "item", "time"))
        users, items, times = (stack.enter_context(open(path, "wb")) for path in paths)
        for batch in clean_batches(log, numeric, result, on_bad_rows):
            if min_rating is not None:
                height = batch.height
                batch = batch.filter(pl.col("rating") >= min_rating)
                result.below_rating += height - batch.height
            result.users.encode(batch["user"]).tofile(users)
            result.items.encode(batch["item"]).tofile(items)
            if log.has_timestamp and batch.height:
                time = batch["timestamp"].to_numpy()
                if time.dtype.kind == "f" and result.time_dtype == np.int64:  # the first fraction comes late
                    times.flush()
                    earlier = np.fromfile(times.name, np.int64).astype(np.float64)
                    times.seek(0)
                    earlier.tofile(times)
                    result.time_dtype = np.dtype(np.float64)
                time.astype(result.time_dtype).tofile(times)
            result.rows += batch.height
    return result


def clean_batches(log: Log, numeric: list[str], result: Interactions, on_bad_rows: str) -> Iterator[pl.DataFrame]:
    """
    The good rows of a log, batch by batch, with `user`, `item` and the columns `numeric` in their final types. Bad rows
    and what the times are like are noted in `result`, whose folder may be written to.
    """
    with tqdm(desc="read", unit=" rows", unit_scale=True, disable=None) as bar:
        for part in log.parts:
            line = part.first_line
            for batch in _batches(part, numeric, result, on_bad_rows):
                yield _clean(batch, line, part, numeric, result, on_bad_rows)
                line += batch.height
                bar.update(batch.height)


def _batches(part: Part, numeric: list[str], result: Interactions, on_bad_rows: str) -> Iterator[pl.DataFrame]:
    """The rows of a part, batch by batch; only the columns that are needed are read."""
    rows = 0
    try:
        for batch in _needed(part.frame, numeric).collect_batches(chunk_size=BATCH_ROWS):
            yield batch
            rows += batch.height
    except (pl.exceptions.PolarsError, OSError) as error:
        if part.reopen is None or "more fields" not in str(error):
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{part.name} can not be read to its end ({str(error).splitlines()[0]}). Is it complete, UTF-8 and of this format?"
            ) from error
        corrected = result.folder / "corrected"
        line, count = without_ragged_lines(Path(part.name), part.separator, corrected)
        if on_bad_rows == "fail":
            raise ValueError(
                f"{part.name}, line {line}: more fields than the header has. Correct the file, or pass "
                'on_bad_rows="skip" to drop and count such rows.'
            ) from error
        result.bad_rows += count
        yield from _needed(part.reopen(corrected), numeric).slice(rows).collect_batches(chunk_size=BATCH_ROWS)
        corrected.unlink()


def _needed(frame: pl.LazyFrame, numeric: list[str]) -> pl.LazyFrame:
    return frame.select(pl.col("user", "item", *numeric), cs.by_name("row", require_all=False))


def _clean(
    batch: pl.DataFrame, first: int, part: Part, numeric: list[str], result: Interactions, on_bad_rows: str
) -> pl.DataFrame:
    """`batch` with its columns in their final types and without bad rows."""
    clean = batch.with_columns(
        *(_as_id(batch, name) for name in ("user", "item")),
        *(_as_number(batch[name]).alias(name) for name in numeric),
    )
    checks = {name: pl.col(name).is_null() for name in ("user", "item", *numeric)}
    if "timestamp" in numeric:
        time = clean["timestamp"]
        if result.time_dtype is None and time.len() > time.null_count():
            result.time_dtype = np.dtype(np.float64 if time.dtype.is_float() else np.int64)
            result.time_unit = time_unit(time.drop_nulls().median())
        checks["timestamp"] |= ~pl.col("timestamp").is_between(0, latest_time(result.time_unit))
    bad = clean.select(pl.any_horizontal(*checks.values()).fill_null(True)).to_series()
    count = int(bad.sum())
    if not count:
        return clean
    if on_bad_rows == "fail":
        row = int(bad.arg_true()[0])
        wrong = [name for name, check in checks.items() if clean[row].select(check.fill_null(True)).item()]
        line = clean["row"][row] if "row" in clean.columns else first + row
        values = ", ".join(f"{name} {batch[name][row]!r}" for name in wrong)
        raise ValueError(
            f"{part.name}, {part.row_word} {line}: not a usable {' or '.join(wrong)} ({values}). "
            "An interaction has a user, an item, a time from 0 to the year 2100 if the log has times, and a number as rating "
            'if min_rating asks for it. Correct the file, or pass on_bad_rows="skip" to drop and count such rows.'
        )
    result.bad_rows += count
    return clean.filter(~bad)


def _as_id(batch: pl.DataFrame, name: str) -> pl.Expr:
    dtype = batch.schema[name]
    if dtype.is_integer():
        return pl.col(name).cast(pl.Int64)
    if dtype.is_float():  # pandas turns integers with a gap into floats
        column = pl.col(name)
        return pl.when(column == column.round()).then(column).cast(pl.Int64, strict=False)
    if dtype in (pl.Categorical, pl.Enum, pl.String):
        return pl.col(name).cast(pl.String)
    if dtype == pl.Null:
        return pl.col(name).cast(pl.String)
    raise ValueError(f"column of {name} ids has type {dtype}; ids may be integers or strings, not a mixture.")


def _as_number(column: pl.Series) -> pl.Series:
    """Numbers stay; dates and texts of dates become microseconds since 1970; what can not be read becomes null."""
    if column.dtype in (pl.Datetime, pl.Date):
        return column.cast(pl.Datetime("us")).to_physical()
    text = column.dtype == pl.String
    column = column.str.strip_chars() if text else column
    whole = column.cast(pl.Int64, strict=False) if text or column.dtype.is_integer() else None
    if whole is not None and whole.null_count() == column.null_count():
        return whole
    number = column.cast(pl.Float64, strict=False)
    if text and number.null_count() == column.len():
        return column.str.to_datetime(strict=False, time_unit="us", time_zone="UTC").to_physical()
    whole = number.cast(pl.Int64, strict=False)
    return whole if (whole == number).fill_null(True).all() else number


def time_unit(median: float) -> str:
    """The unit in which a log's middle time lies before the year 2100; counters (1, 2, 3 …) count as seconds."""
    return next((unit for unit, scale in _UNITS.items() if median <= _YEAR_2100 * scale), "ns")


def units_per_second(median: float) -> int:
    """How many of a log's time units a second has, by its middle time."""
    return _UNITS[time_unit(median)]


def latest_time(unit: str | None) -> int:
    """The start of the year 2100: what is later is no time of an interaction."""
    return _YEAR_2100 * _UNITS[unit or "s"]
