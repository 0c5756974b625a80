"""A log, batch by batch, as columns on disk in file order: codes of users and items, times, event types and weights."""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
from tqdm import tqdm

from .ids import BLANKS, MISSING_IDS, Codes, as_ids, floats_note, id_type
from .options import EventOptions, FilterOptions
from .parts import Part
from .readers import Log
from .text_files import BadRows
from .time_units import latest_time, time_unit
from .times import as_numbers, as_times


_CHUNK_ROWS = 1 << 22
_DTYPES = {
    "event_type": np.dtype(np.uint8),
    "weight": np.dtype(np.float32),
}  # of columns that are stored in another one


@dataclass
class Interactions:
    """
    The events of a log on disk, in file order.

    Args:
        folder (`Path`): folder of the files `log_NAME.bin`, one per column.
        columns: the data type of each column: `user` and `item` (uint32 codes), and, if they are read, `time` (uint32 if
            they are whole seconds; otherwise int64 or float64, in the log's unit), `event_type` (uint8 codes), `weight`
            (float32) and, of a given split, `part` (uint8, an index of [`~data.splits.PARTS`]).
        bad (`BadRows`): the rows that were skipped.
        rows (`int`): number of events.
        dropped (`int`): number of events that `min_rating` or `event_types` dropped.
        users, items, types (`Codes`): the ids and names of the codes.
        time_unit (`str`, *optional*): s, ms, us or ns.
    """

    folder: Path
    bad: BadRows = field(default_factory=BadRows)
    columns: dict[str, np.dtype] = field(default_factory=lambda: dict.fromkeys(("user", "item"), np.dtype(np.uint32)))
    rows: int = 0
    dropped: int = 0
    users: Codes = field(default_factory=Codes)
    items: Codes = field(default_factory=Codes)
    types: Codes = field(default_factory=Codes)
    time_unit: str | None = None

    def path(self, column: str) -> Path:
        return self.folder / f"log_{column}.bin"

    def read_floats_as_integers(self, known_items: Container[str] = ()) -> list[str]:
        """
        Merges text ids such as "100.0" with the integers that they name, see [`~data.ids.Codes`].

        Args:
            known_items: items of a vocabulary, which do not change.

        Returns:
            A sentence for each column that changed.
        """
        notes = []
        for name, codes, known in (("user", self.users, ()), ("item", self.items, known_items)):
            if (changed := codes.read_floats_as_integers(known)) is None:
                continue
            example, new_codes = changed
            column = np.memmap(self.path(name), np.uint32, "r+")
            for start in range(0, column.size, _CHUNK_ROWS):
                column[start : start + _CHUNK_ROWS] = new_codes[column[start : start + _CHUNK_ROWS]]
            column.flush()
            notes.append(floats_note(name, example))
        return notes


def ingest(log: Log, folder: Path, filters: FilterOptions, events: EventOptions) -> Interactions:
    """
    Streams a log to columns on disk, without the rows that `min_rating` and `event_types` drop.

    Raises:
        ValueError: if `on_bad_rows` is `"fail"` and a row has too many or too few fields, or no usable user, item, time
            (from 0 to the year 2100), event type, weight or, with `min_rating`, rating; the message names file and line.
            Also if ids are integers in one file and strings in another, floats have lost digits, times have several
            units, or there are more than 255 event types.
        OSError: if a compressed file ends early.
    """
    result = Interactions(folder, BadRows(skip=log.options.on_bad_rows == "skip"))
    roles = ["rating"] * (filters.min_rating is not None)
    roles += [role for role in ("timestamp", "event_type", "weight", "part") if role in log.parts[0].types]
    names = {"user": "user", "item": "item", "timestamp": "time"} | {
        name: name for name in ("event_type", "weight", "part")
    }
    if "event_type" in roles and events.type_list is not None:
        result.types.encode(pl.Series(events.type_list))
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(result.path(name), "w+b"))
            for role, name in names.items()
            if role in ("user", "item", *roles)
        }
        for batch in clean_batches(log, roles, result):
            height = batch.height
            if filters.min_rating is not None:
                batch = batch.filter(pl.col("rating") >= filters.min_rating)
            if "event_type" in roles and events.type_list is not None:
                batch = batch.filter(pl.col("event_type").is_in(events.type_list))
            result.dropped += height - batch.height
            result.rows += batch.height
            for role, name in names.items():
                if name in files and batch.height:
                    _append(result, files[name], name, _encoded(result, batch[role]))
    return result


def _encoded(result: Interactions, column: pl.Series) -> np.ndarray:
    """The values of a column as they are stored, in their own data type or a code."""
    if column.name in ("user", "item"):
        return (result.users if column.name == "user" else result.items).encode(column)
    if column.name != "event_type":
        return column.to_numpy()
    places = column.to_physical()
    first = places.arg_unique().sort()  # the few different names are encoded, and looked up
    codes = result.types.encode(column.gather(first).cast(pl.String))
    if result.types.size > 255:
        raise ValueError(
            f"the column of event types has more than 255 of them ({', '.join(result.types.names()[:3])}, …); name another "
            "with event_type=…"
        )
    code_of_place = np.zeros(int(places.max()) + 1, np.uint8)
    code_of_place[places.gather(first).to_numpy()] = codes
    return code_of_place[places.to_numpy()]


def _append(result: Interactions, file: BinaryIO, name: str, values: np.ndarray) -> None:
    """
    Appends the values of a batch to the file of a column. Whole seconds are stored in 32 bits, which last until 2106; at the
    first fraction, times become floats.
    """
    seconds = name == "time" and values.dtype == np.int64 and result.time_unit == "s"
    first = np.dtype(np.uint32) if seconds else _DTYPES.get(name, values.dtype)
    stored = result.columns.setdefault(name, first)
    if name == "time" and stored.kind != "f" and values.dtype.kind == "f":
        file.seek(0)
        earlier = np.fromfile(file, stored).astype(np.float64)
        file.seek(0)
        earlier.tofile(file)
        stored = result.columns[name] = np.dtype(np.float64)
    values.astype(stored, copy=False).tofile(file)


def clean_batches(log: Log, roles: list[str], result: Interactions) -> Iterator[pl.DataFrame]:
    """
    The good rows of a log in batches, with `user`, `item` and the columns of other `roles` in their final types. Bad rows
    and the unit of times are recorded in `result`.
    """
    types = {
        name: id_type({part.name: part.types[name] for part in log.parts}, name) for name in ("user", "item")
    }  # fmt: skip
    times = _Times(log.options.time_format, result)
    with tqdm(desc="read", unit=" rows", unit_scale=True, disable=None) as bar:
        for part in log.parts:
            times.part = part
            for batch in part.read(("user", "item", *roles), result.bad):
                columns = [
                    as_ids(batch[name], dtype, keep_na=log.options.keep_na_ids) for name, dtype in types.items()
                ]
                for role in roles:
                    columns.append(times.read(batch[role]) if role == "timestamp" else _READ[role](batch[role]))
                yield _good_rows(batch, pl.DataFrame(columns), part, result)
                bar.update(batch.height)


def _weights(column: pl.Series) -> pl.Series:
    weights = as_numbers(column).cast(pl.Float32)
    return weights.set(~((weights >= 0) & weights.is_finite()), None)


def _types(column: pl.Series) -> pl.Series:
    """Names of event types, as categories; null for missing ones."""
    column = column if column.dtype == pl.Categorical else column.cast(pl.String).cast(pl.Categorical)
    found = column.unique().drop_nulls().cast(pl.String)
    names = found.str.strip_chars(BLANKS)
    names = names.set(names.is_in(["", *MISSING_IDS]), None)
    return column if names.equals(found, null_equal=True) else column.replace_strict(found, names).cast(pl.Categorical)


_READ: dict[str, Callable[[pl.Series], pl.Series]] = {
    "rating": as_numbers,
    "weight": _weights,
    "event_type": _types,
    "part": lambda column: column,
}


class _Times:
    """Reads the times of a log, which have one unit in all of its files."""

    def __init__(self, time_format: str | None, result: Interactions) -> None:
        self.time_format, self.result = time_format, result
        self.part: Part | None = None
        self._first: tuple[str, bool] | None = None  # the file, and whether its times are dates
        self._checked: set[str] = set()

    def read(self, column: pl.Series) -> pl.Series:
        """
        The times of a batch as numbers; null if a time is not from 0 to the year 2100.

        Raises:
            ValueError: if the unit is another one than in an earlier file, or see [`~data.times.as_times`].
        """
        name = self.part.name
        times, are_dates = as_times(column, self.time_format, name)
        if times.null_count() < len(times):
            unit = self.result.time_unit
            if name not in self._checked:
                unit = "us" if are_dates else time_unit(times.median())
            if self._first is None:
                self._first = (name, are_dates)
                self.result.time_unit = unit
            first, first_are_dates = self._first
            if are_dates != first_are_dates or unit != self.result.time_unit:
                raise ValueError(
                    f"{name} has times in {_words(unit, are_dates)}, but {first} in "
                    f"{_words(self.result.time_unit, first_are_dates)}; write all times in one unit."
                )
            self._checked.add(name)
        return times.set(~times.is_between(0, latest_time(self.result.time_unit)), None)


def _words(unit: str, are_dates: bool) -> str:
    return "dates" if are_dates else unit


def _good_rows(batch: pl.DataFrame, clean: pl.DataFrame, part: Part, result: Interactions) -> pl.DataFrame:
    """The final columns (`clean`) of a batch, without bad rows."""
    nulls = {column.name: column.is_null() for column in clean if column.null_count()}
    if not nulls:
        return clean
    bad = pl.DataFrame(nulls).select(pl.any_horizontal(pl.all())).to_series()
    place = int(bad.arg_true()[0])
    wrong = [name for name, null in nulls.items() if null[place]]
    values = ", ".join(f"{name} {batch[name][place]!r}" for name in wrong)
    first = (
        f"{part.name}, {part.row_word} {batch['row'][place]}: not a usable {' or '.join(wrong)} ({values}). "
        "An event has a user, an item, a time from 0 to the year 2100 if the log has times, an event type and a weight of 0 or "
        "more if they are read, and a number as rating if min_rating is given; empty, NA, NULL, nan and None are missing ids, "
        "unless keep_na_ids is given"
    )
    counted = pl.Series(bad)
    for name, null in nulls.items():
        if count := int((null & counted).sum()):
            result.bad.add(f"no usable {name}", count, first)
            counted &= ~null
    return clean.filter(~bad)
