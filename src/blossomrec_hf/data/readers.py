"""Readers: whatever a log is stored as -> lazy frames with the columns user, item and, where known, rating and timestamp."""

import csv
import difflib
import gzip
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl


logger = logging.getLogger(__name__)

_NO_SEPARATOR = "\x01"  # reads a line whole; no text file of the formats below holds it

# The names by which logs call their columns, most telling first; a file's own header is matched without regard to case.
_USER = ("user_id", "userid", "user", "uid", "reviewerid", "user_name", "username", "customer_id", "visitorid", "steamid")
_ITEM = ("item_id", "itemid", "item", "iid", "movieid", "parent_asin", "asin", "video_id", "business_id", "product_id")
_ITEM += ("productid", "location_id", "venue_id", "venueid", "app_id", "track_id", "artist_id", "isbn")
_RATING = ("rating", "overall", "stars", "score", "is_click")
_TIME = ("timestamp", "unixreviewtime", "time_ms", "time", "ts", "date", "datetime", "event_time", "check_in_time")


@dataclass
class Part:
    """One file (or frame) of a log: `frame` has columns user, item, …, and `row` where lines do not follow from rows."""

    frame: pl.LazyFrame
    name: str
    first_line: int = 1
    row_word: str = "line"


@dataclass
class Log:
    """A log to be read in one pass, part after part."""

    parts: list[Part]
    name: str
    format: str
    has_rating: bool
    has_timestamp: bool


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
        source: a file, a folder or a glob of files of one format (read in name order), a Polars or pandas frame or a
            `datasets.Dataset`.
        format (`str`, *optional*): one of [`FORMATS`]; found out by looking if not given.
        user, item, timestamp, rating (`str`, *optional*): the names of the columns where a file names its columns; the
            usual names are found without.

    Raises:
        `FileNotFoundError`: nothing is there.
        `ValueError`: an empty file, a column that is not there (the message names near matches), an unknown format.
    """
    names = {"user": user, "item": item, "timestamp": timestamp, "rating": rating}
    if not isinstance(source, (str, Path)):
        return _from_frame(_as_polars(source), names)
    paths = _files(Path(source))
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; it may be one of {', '.join(sorted(FORMATS))}.")
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; a log needs at least one interaction.")
    format = format or sniff(paths[0])
    logger.info("reading %d file(s) as %s, first %s", len(paths), format, paths[0])
    logs = [FORMATS[format](path, names) for path in paths]
    return Log(
        [part for log in logs for part in log.parts],
        str(source),
        format,
        all(log.has_rating for log in logs),
        all(log.has_timestamp for log in logs),
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    else:
        files = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not files:
        raise FileNotFoundError(f"source {str(path)!r} is no file, no folder with files and no pattern that finds any.")
    return files


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


def _from_frame(frame: pl.LazyFrame, names: dict[str, str | None]) -> Log:
    return _named(Part(frame, "source", first_line=0, row_word="row"), frame.collect_schema().names(), names, "frame")


def _named(part: Part, columns: Sequence[str], names: dict[str, str | None], format: str) -> Log:
    """`part` with the columns that `names` and the usual names point to, under our names."""
    found = {
        ours: _column(ours, names[ours], columns, usual, needed, part.name)
        for ours, usual, needed in (
            ("user", _USER, True),
            ("item", _ITEM, True),
            ("rating", _RATING, False),
            ("timestamp", _TIME, False),
        )
    }
    keep = [pl.col(theirs).alias(ours) for ours, theirs in found.items() if theirs is not None]
    if "row" in columns and part.row_word == "line":
        keep.append(pl.col("row"))
    part.frame = part.frame.select(keep)
    return Log([part], part.name, format, found["rating"] is not None, found["timestamp"] is not None)


def _column(
    ours: str, asked: str | None, columns: Sequence[str], usual: tuple[str, ...], needed: bool, where: str
) -> str | None:
    if asked is not None:
        if asked in columns:
            return asked
        near = difflib.get_close_matches(asked, columns, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(map(repr, columns))}."
        raise ValueError(f"{ours}={asked!r} is no column of {where}; {hint}")
    plain = {name.lower().split(":")[0].strip(): name for name in reversed(columns)}
    match = next((plain[name] for name in usual if name in plain), None)
    if match is None and needed:
        near = difflib.get_close_matches(ours, columns, n=3, cutoff=0.4)
        hint = f"near matches: {', '.join(map(repr, near))}. " if near else ""
        raise ValueError(
            f"{where} has no column known to hold the {ours}; it has {', '.join(map(repr, columns))}. {hint}"
            f"Name it with {ours}=…"
        )
    return match


def _lines(path: Path) -> pl.LazyFrame:
    return pl.scan_csv(
        path, has_header=False, separator=_NO_SEPARATOR, quote_char=None, infer_schema=False,
        row_index_name="row", row_index_offset=1, new_columns=["line"],
    )  # fmt: skip


def _read_fields(path: Path, separator: str, columns: Sequence[str]) -> Log:
    """Lines without header: fields parted by `separator`, in the order of `columns`; what is beyond stays unread."""
    fields = pl.col("line").str.splitn(separator, len(columns) + 1).struct
    frame = _lines(path).filter(pl.col("line").str.strip_chars() != "")
    frame = frame.select(
        "row", *(fields.field(f"field_{i}").alias(name) for i, name in enumerate(columns) if name in _OURS)
    )
    return Log([Part(frame, str(path))], str(path), "", "rating" in columns, "timestamp" in columns)


_OURS = ("user", "item", "rating", "timestamp")


def _read_pairs(path: Path, names: dict[str, str | None]) -> Log:
    separator = "\t" if "\t" in first_lines(path, 1)[0] else " "
    return _read_fields(path, separator, ("user", "item"))


def _read_sequences(path: Path, names: dict[str, str | None]) -> Log:
    fields = pl.col("line").str.strip_chars().str.splitn(" ", 2).struct
    frame = _lines(path).filter(pl.col("line").str.strip_chars() != "")
    frame = frame.select("row", fields.field("field_0").alias("user"), fields.field("field_1").alias("item"))
    frame = frame.with_columns(pl.col("item").str.strip_chars().str.split(" ")).explode("item")
    return Log([Part(frame, str(path))], str(path), "", False, False)


def _read_delimited(path: Path, names: dict[str, str | None], separator: str | None = None) -> Log:
    header = first_lines(path, 1)[0]
    separator = separator or ("\t" if header.count("\t") >= max(1, header.count(",")) else ",")
    quote = '"' if separator == "," else None
    frame = pl.scan_csv(
        path, separator=separator, quote_char=quote, infer_schema=False, row_index_name="row", row_index_offset=2
    )
    columns = next(csv.reader([header.lstrip("\ufeff")], delimiter=separator))
    return _named(Part(frame, str(path)), ["row", *columns], names, "")


def _read_parquet(path: Path, names: dict[str, str | None]) -> Log:
    frame = pl.scan_parquet(path)
    return _named(Part(frame, str(path), 0, "row"), frame.collect_schema().names(), names, "")


FORMATS: dict[str, Callable[[Path, dict[str, str | None]], Log]] = {
    "pairs": _read_pairs,
    "sequences": _read_sequences,
    "recbole": lambda path, names: _read_delimited(path, names, "\t"),
    "csv": lambda path, names: _read_delimited(path, names, ","),
    "tsv": lambda path, names: _read_delimited(path, names, "\t"),
    "parquet": _read_parquet,
    "ml-1m": lambda path, names: _read_fields(path, "::", ("user", "item", "rating", "timestamp")),
    "ml-100k": lambda path, names: _read_fields(path, "\t", ("user", "item", "rating", "timestamp")),
}


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines of a text file, gzip or not; undecodable bytes are replaced."""
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    with opened as file:
        lines = [file.readline().decode("utf-8", "replace").rstrip("\r\n") for _ in range(count)]
    return [line for line in lines if line] or [""]


def sniff(path: Path) -> str:
    """The format of a file, by its name and its first lines."""
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if suffix in ("parquet", "csv", "tsv"):
        return suffix
    if suffix == "inter":
        return "recbole"
    lines = first_lines(path, 20)
    if "::" in lines[0]:
        return "ml-1m"
    if all(line.count("\t") == 3 for line in lines):
        return "ml-100k"
    widths = {len(line.split()) for line in lines}
    if widths == {2}:
        return "pairs"
    if min(widths) >= 2:
        return "sequences"
    raise ValueError(f"{path} is of no format known by its look; name it with format=, one of {', '.join(FORMATS)}.")
