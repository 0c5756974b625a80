"""A log, batch by batch, into three columns on disk: user code, item code, time, in file order."""

from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from .ids import Codes, as_ids, floats_note, id_type
from .parts import Part
from .readers import Log
from .text_files import BadRows
from .time_units import latest_time, time_unit
from .times import as_numbers, as_times


_CHUNK_ROWS = 1 << 22


@dataclass
class Interactions:
    """The columns of a log on disk under `folder`, in file order, and what its codes stand for."""

    folder: Path
    bad: BadRows = field(default_factory=BadRows)
    rows: int = 0
    users: Codes = field(default_factory=Codes)
    items: Codes = field(default_factory=Codes)
    time_dtype: np.dtype | None = None
    time_unit: str | None = None
    below_rating: int = 0

    def read_floats_as_integers(self, known_items: Container[str] = ()) -> list[str]:
        """
        Merges text ids such as "100.0" with the integers that they name, see [`~data.ids.Codes`].

        Args:
            known_items: items of the vocabulary that stay as they are.

        Returns:
            a sentence for each column that changed.
        """
        notes = []
        for name, codes, known in (("user", self.users, ()), ("item", self.items, known_items)):
            if (changed := codes.read_floats_as_integers(known)) is None:
                continue
            example, new_codes = changed
            column = np.memmap(self.folder / f"log_{name}.bin", np.uint32, "r+")
            for start in range(0, column.size, _CHUNK_ROWS):
                column[start : start + _CHUNK_ROWS] = new_codes[column[start : start + _CHUNK_ROWS]]
            column.flush()
            notes.append(floats_note(name, example))
        return notes


def ingest(log: Log, folder: Path, *, min_rating: float | None = None) -> Interactions:
    """
    Streams `log` to `log_user.bin`, `log_item.bin` (uint32) and, if it has times, `log_time.bin` (int64 or float64).

    Raises:
        ValueError: if `on_bad_rows` is `"fail"` and a row has too many or too few fields, or no usable user, item, time
            (from 0 to the year 2100) or, with `min_rating`, rating; the message names file and line. Also if ids are
            integers in one file and strings in another, floats have lost digits, or times have several units.
        OSError: if a compressed file ends early.
    """
    result = Interactions(folder, BadRows(skip=log.options.on_bad_rows == "skip"))
    numeric = ["rating"] * (min_rating is not None) + ["timestamp"] * log.has_timestamp
    with ExitStack() as stack:
        paths = (folder / f"log_{name}.bin" for name in ("user", "item", "time"))
        users, items, times = (stack.enter_context(open(path, "wb")) for path in paths)
        for batch in clean_batches(log, numeric, result):
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


def clean_batches(log: Log, numeric: list[str], result: Interactions) -> Iterator[pl.DataFrame]:
    """
    The good rows of a log, batch by batch, with `user`, `item` and the columns `numeric` in their final types. Bad rows
    and what the times are like are noted in `result`.
    """
    types = {
        name: id_type({part.name: part.types[name] for part in log.parts}, name) for name in ("user", "item")
    }  # fmt: skip
    times = _Times(log.options.time_format, result)
    with tqdm(desc="read", unit=" rows", unit_scale=True, disable=None) as bar:
        for part in log.parts:
            times.part = part
            for batch in part.read(("user", "item", *numeric), result.bad):
                columns = [
                    as_ids(batch[name], dtype, keep_na=log.options.keep_na_ids) for name, dtype in types.items()
                ]
                if "rating" in numeric:
                    columns.append(as_numbers(batch["rating"]))
                if "timestamp" in numeric:
                    columns.append(times.read(batch["timestamp"]))
                yield _good_rows(batch, pl.DataFrame(columns), part, result)
                bar.update(batch.height)


class _Times:
    """The times of a log, which have one unit in all of its files."""

    def __init__(self, time_format: str | None, result: Interactions) -> None:
        self.time_format, self.result = time_format, result
        self.part: Part | None = None
        self._first: tuple[str, bool] | None = None  # the file, and whether its times are dates
        self._checked: set[str] = set()

    def read(self, column: pl.Series) -> pl.Series:
        """
        The times of a batch as numbers; null where there is none from 0 to the year 2100.

        Raises:
            `ValueError`: another unit than in the files before, or see [`~data.times.as_times`].
        """
        name = self.part.name
        times, are_dates = as_times(column, self.time_format, name)
        if times.null_count() < len(times):
            unit = "us" if are_dates else time_unit(times.median())
            if self._first is None:
                self._first = (name, are_dates)
                self.result.time_unit = unit
                self.result.time_dtype = np.dtype(np.float64 if times.dtype.is_float() else np.int64)
            first, first_are_dates = self._first
            if are_dates != first_are_dates or (name not in self._checked and unit != self.result.time_unit):
                raise ValueError(
                    f"{name} has times in {_words(unit, are_dates)}, but {first} in "
                    f"{_words(self.result.time_unit, first_are_dates)}; write all times in one unit."
                )
            self._checked.add(name)
        return times.set(~times.is_between(0, latest_time(self.result.time_unit)), None)


def _words(unit: str, are_dates: bool) -> str:
    return "dates" if are_dates else unit


def _good_rows(batch: pl.DataFrame, clean: pl.DataFrame, part: Part, result: Interactions) -> pl.DataFrame:
    """`clean`, the final columns of `batch`, without bad rows."""
    nulls = {column.name: column.is_null() for column in clean if column.null_count()}
    if not nulls:
        return clean
    bad = pl.DataFrame(nulls).select(pl.any_horizontal(pl.all())).to_series()
    place = int(bad.arg_true()[0])
    wrong = [name for name, null in nulls.items() if null[place]]
    values = ", ".join(f"{name} {batch[name][place]!r}" for name in wrong)
    first = (
        f"{part.name}, {part.row_word} {batch['row'][place]}: not a usable {' or '.join(wrong)} ({values}). "
        "An interaction has a user, an item, a time from 0 to the year 2100 if the log has times, and a number as rating if "
        "min_rating asks for it; empty, NA, NULL, nan and None are missing ids, unless keep_na_ids is given"
    )
    counted = pl.Series(bad)
    for name, null in nulls.items():
        if count := int((null & counted).sum()):
            result.bad.add(f"no usable {name}", count, first)
            counted &= ~null
    return clean.filter(~bad)
