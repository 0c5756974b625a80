"""open_log: whatever a log is stored as -> lazy frames with the columns user, item and, where known, rating and timestamp."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..utils.files import recover_folder
from . import known_sets
from .formats import FORMATS, Names, Part, find_columns, named, sniff


logger = logging.getLogger(__name__)


@dataclass
class Log:
    """A log to be read in one pass, part after part."""

    parts: list[Part]
    name: str
    format: str
    licence: str | None = None
    titles: Path | None = None

    @property
    def has_rating(self) -> bool:
        return all("rating" in part.columns for part in self.parts)

    @property
    def has_timestamp(self) -> bool:
        return all("timestamp" in part.columns for part in self.parts)


def open_log(
    source: Any,
    *,
    format: str | None = None,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
) -> Log:
    """
    Opens a log without reading it.

    Args:
        source: a file, a folder or a glob of files of one format (read in name order); the name of a public set
            (`ml-1m`, … see [`~data.known_sets.KNOWN`]), downloaded once; a folder of `Dataset.save_to_disk` or the id
            of a data set on the Hub (its split `train`); a Polars or pandas frame, a pyarrow table or a `Dataset`.
        format (`str`, *optional*): found out by looking if not given. `csv`, `tsv`, `parquet`, `jsonl` and `recbole` name
            their columns; `pairs` (user item), `sequences` (user item item …), `ml-100k` (`u.data`), `ml-1m` (`::`),
            `amazon-csv` (ratings without header, 2014 or 2018), `gowalla`, `foursquare` and `python-lines` (Steam) do
            not need to. Each may be gzip-compressed (`.gz`), Parquet aside.
        user, item, timestamp, rating (`str`, *optional*): the names of the columns; the usual ones are found without.
            `timestamp=""` leaves times unread, so that file order counts.

    Raises:
        `FileNotFoundError`: nothing is there; for a public set that can not be fetched, where to put it by hand.
        `ValueError`: an empty file, a column that is not there (with near matches), an unknown format.
    """
    names: Names = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    if not isinstance(source, (str, Path)):
        return _frame_log(_as_polars(source), names, "source")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; it may be one of {', '.join(sorted(FORMATS))}.")
    path = Path(source)
    recover_folder(path)
    if str(source) in known_sets.KNOWN and not path.exists():
        known = known_sets.KNOWN[str(source)]
        folder = known_sets.fetch(str(source))
        files, name, format = [folder / known.log], str(source), known.format
        licence, titles = known.licence, folder / known.titles if known.titles else None
    elif (path / "state.json").is_file() or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _frame_log(_as_polars(_stored_dataset(str(source))), names, str(source))
    else:
        files, name, licence, titles = _files(path), path.name, None, None  # a card needs no folder of ours
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; a log needs at least one interaction.")
    format = format or sniff(files[0], names)
    logger.info("reading %d file(s) as %s, first %s", len(files), format, files[0])
    return Log([FORMATS[format](file, names) for file in files], name, format, licence, titles)


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
            f"source can not be read as a table ({error}); a column of ids may hold integers or strings, not a mixture."
        ) from error
    raise ValueError(
        f"source is a {type(source).__name__}; it may be a path, a Polars or pandas frame, a pyarrow table or a Dataset."
    )


def _frame_log(frame: pl.LazyFrame, names: Names, name: str) -> Log:
    found = find_columns(frame.collect_schema().names(), names, name)
    return Log([Part(named(frame, found), name, tuple(found), first_line=0, row_word="row")], name, "table")
