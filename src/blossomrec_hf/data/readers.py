"""open_log: whatever a log is stored as -> lazy frames with the columns user, item and, where known, rating and timestamp."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ..utils.files import recover_folder
from . import known_sets
from .columns import Names, no_times_note
from .formats import FORMATS, WITH_NAMES, Part, sniff, table
from .times import check_time_type


logger = logging.getLogger(__name__)


@dataclass
class Log:
    """A log to be read in one pass, part after part; `notes` are sentences on how it is read, for its user."""

    parts: list[Part]
    name: str
    format: str
    licence: str | None = None
    titles: Path | None = None
    time_format: str | None = None
    keep_na_ids: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def has_timestamp(self) -> bool:
        return "timestamp" in self.parts[0].types

    def require_rating(self, asked: str) -> None:
        """Raises `ValueError` if a part has no rating; `asked` is the argument that needs one."""
        for part in self.parts:
            if "rating" not in part.types:
                raise ValueError(f"{asked}, but {part.name} has no rating known; name its column with rating=…")
            dtype = part.types["rating"]
            if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Null)):
                raise ValueError(f"{asked}, but the ratings of {part.name} have type {dtype}; they may be numbers.")


def open_log(
    source: Any,
    *,
    format: str | None = None,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
    time_format: str | None = None,
    keep_na_ids: bool = False,
) -> Log:
    """
    Opens a log without reading it.

    Args:
        source: a file, a folder or a glob of files of one format (read in name order); the name of a public set
            (`ml-1m`, … see [`~data.known_sets.KNOWN`]), downloaded once; a folder of `Dataset.save_to_disk` or the id
            of a data set on the Hub (its split `train`); a Polars or pandas frame, a pyarrow table or a `Dataset`.
        format (`str`, *optional*): found out by looking if not given. `csv`, `tsv`, `parquet`, `jsonl` and `recbole` name
            their columns; `pairs` (user item), `sequences` (user item item …, a user a line), `item-sequences` (item
            item …, never found out: the users are the numbers of the lines), `ml-100k` (`u.data`), `ml-1m` (`::`),
            `amazon-csv` (ratings without header, 2014 or 2018), `gowalla`, `foursquare` and `python-lines` (Steam) do
            not need to. Each may be gzip-compressed (`.gz`), Parquet aside.
        user, item, timestamp, rating (`str`, *optional*): the names of the columns; the usual ones are found without.
            `timestamp=""` leaves times unread, so that file order counts.
        time_format (`str`, *optional*): how texts of times are written, as for `strftime` (`"%d/%m/%Y %H:%M"`). Numbers
            and ISO 8601 are read without it.
        keep_na_ids (`bool`): read texts such as `NA`, `NULL`, `nan` and `None` as ids. They are missing ids otherwise.

    Raises:
        `FileNotFoundError`: nothing is there; for a public set that can not be fetched, where to put it by hand.
        `ValueError`: an empty or damaged file, a column that is not there (with near matches), an unknown format, files
            with and without times.
    """
    names: Names = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    options: dict[str, Any] = {"time_format": time_format, "keep_na_ids": keep_na_ids}
    if not isinstance(source, (str, Path)):
        return _table_log(_as_polars(source), names, "source", options)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; it may be one of {', '.join(sorted(FORMATS))}.")
    path = Path(source)
    recover_folder(path)
    if str(source) in known_sets.KNOWN and not path.exists():
        known = known_sets.KNOWN[str(source)]
        folder = known_sets.fetch(str(source))
        files, name, format = [folder / known.log], str(source), known.format
        options |= {"licence": known.licence, "titles": folder / known.titles if known.titles else None}
    elif (path / "state.json").is_file() or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _table_log(_as_polars(_stored_dataset(str(source))), names, str(source), options)
    else:
        files, name = _files(path), path.name  # a card needs no folder of ours
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; a log needs at least one interaction.")
    notes: list[str] = []
    if format is None:
        format = sniff(files[0], names)
        if format == "sequences":
            notes.append(
                'each line is read as a user and the items of this user; format="item-sequences" is without users'
            )
    if format == "item-sequences" and len(files) > 1:
        raise ValueError(
            f"source is {len(files)} files, but the users of item-sequences are the numbers of their lines; join the files."
        )
    logger.info("reading %d file(s) as %s, first %s", len(files), format, files[0])
    parts = [FORMATS[format](file, names, notes) for file in files]
    if format not in WITH_NAMES:
        if asked := [f"{ours}={theirs!r}" for ours, theirs in names.items() if theirs]:
            raise ValueError(
                f"{asked[0]} names a column, but the columns of the format {format} have no names; leave it out."
            )
        if timestamp == "":
            for part in parts:
                part.types = {ours: dtype for ours, dtype in part.types.items() if ours != "timestamp"}
    return _log(parts, name, format, names, notes, options)


def _table_log(frame: pl.LazyFrame, names: Names, name: str, options: dict[str, Any]) -> Log:
    notes: list[str] = []
    return _log([table(frame, name, names, notes)], name, "table", names, notes, options)


def _log(
    parts: list[Part], name: str, format: str, names: Names, notes: list[str], options: dict[str, Any]
) -> Log:  # fmt: skip
    timed = [part for part in parts if "timestamp" in part.types]
    if timed and len(timed) < len(parts):
        without = next(part for part in parts if part not in timed)
        raise ValueError(
            f"{without.name} has no column known to be the time, but {timed[0].name} has; name the column with timestamp=…, "
            'or pass timestamp="" to read every history in the order of rows.'
        )
    for part in timed:
        check_time_type(part.types["timestamp"], part.name)
    if not timed:
        notes.append(no_times_note(names))
    return Log(parts, name, format, notes=list(dict.fromkeys(notes)), **options)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    else:
        files = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not files:
        raise FileNotFoundError(
            f"source {str(path)!r} is no file, no folder with files and no pattern that finds any, nor one of the public "
            f"sets {', '.join(known_sets.KNOWN)}."
        )
    return files


def _stored_dataset(source: str) -> Any:
    from datasets import load_dataset, load_from_disk

    if Path(source).exists():
        return load_from_disk(source)
    try:
        return load_dataset(source, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"source {source!r} is no file or folder here, and no data set of that id could be loaded from the Hub "
            f"({type(error).__name__}: {error})."
        ) from error


def _as_polars(source: Any) -> pl.LazyFrame:
    if isinstance(source, pl.LazyFrame):
        return source
    if isinstance(source, pl.DataFrame):
        return source.lazy()
    module = type(source).__module__.split(".")[0]
    try:
        if module == "pandas":
            return pl.from_pandas(source).lazy()
        if module == "datasets":
            return pl.from_arrow(source.with_format("arrow")[:]).lazy()
        if module == "pyarrow":
            return pl.from_arrow(source).lazy()
    except Exception as error:
        raise ValueError(
            f"source can not be read as a table ({error}); each column needs a name of its own and values of one type, not a "
            "mixture, and a DatasetDict has to be one of its splits."
        ) from error
    raise ValueError(
        f"source is a {type(source).__name__}; it may be a path, a Polars or pandas frame, a pyarrow table or a Dataset."
    )
