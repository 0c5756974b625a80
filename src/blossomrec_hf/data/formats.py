"""The file formats that logs come in: how each is recognised, and how it becomes a lazy frame of our columns."""

import ast
import csv
import difflib
import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl


OURS = ("user", "item", "rating", "timestamp")
Names = dict[str, str | None]  # our column -> the name asked for; "" for a timestamp means file order

_NO_SEPARATOR = "\x01"  # reads a line whole; no text file of the formats below holds it

# The names by which logs call their columns, most telling first; matched without regard to case.
_USUAL = {
    "user": (
        "user_id", "userid", "user", "uid", "reviewerid", "username", "user_name", "customer_id", "visitorid", "steamid",
    ),
    "item": (
        "item_id", "itemid", "item", "iid", "movieid", "movie_id", "parent_asin", "asin", "video_id", "business_id",
        "product_id", "productid", "location_id", "venue_id", "venueid", "app_id", "track_id", "artist_id", "isbn",
    ),
    "rating": ("rating", "overall", "stars", "score", "is_click", "hours"),
    "timestamp": ("timestamp", "unixreviewtime", "time_ms", "time", "ts", "datetime", "date", "event_time", "utctime"),
}  # fmt: skip


@dataclass
class Part:
    """
    One file (or frame) of a log. `frame` has our columns, and `row`, the line of its file, where lines do not follow
    from rows. `reopen` makes the frame of a corrected copy of a delimited file, whose fields `separator` parts.
    """

    frame: pl.LazyFrame
    name: str
    columns: tuple[str, ...]
    first_line: int = 1
    row_word: str = "line"
    separator: str | None = None
    reopen: Callable[[Path], pl.LazyFrame] | None = None


def find_columns(columns: Sequence[str], names: Names, where: str) -> dict[str, str]:
    """
    Our columns -> those of a log, by the names asked for or the usual ones.

    Raises:
        `ValueError`: a name that is asked for is not there, or none is known to be the user or the item.
    """
    found = {}
    plain = {name.lower().split(":")[0].strip(): name for name in reversed(columns)}
    for ours, usual in _USUAL.items():
        asked = names.get(ours)
        if asked is None:
            match = next((plain[name] for name in usual if name in plain), None)
        elif asked in columns or not asked:
            match = asked or None
        else:
            near = difflib.get_close_matches(asked, columns, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(map(repr, columns))}."
            )
            raise ValueError(f"{ours}={asked!r} is no column of {where}; {hint}")
        if match is None and ours in ("user", "item"):
            near = difflib.get_close_matches(ours, columns, n=3, cutoff=0.4)
            hint = f" Near matches: {', '.join(map(repr, near))}." if near else ""
            raise ValueError(
                f"{where} has no column known to hold the {ours}; it has {', '.join(map(repr, columns))}.{hint} Name it with "
                f"{ours}=…"
            )
        if match is not None:
            found[ours] = match
    return found


def named(frame: pl.LazyFrame, found: dict[str, str], extra: Iterable[str] = ()) -> pl.LazyFrame:
    """`frame` with the columns that `find_columns` found, under our names."""
    return frame.select(*(pl.col(theirs).alias(ours) for ours, theirs in found.items()), *extra)


def first_lines(path: Path, count: int) -> list[str]:
    """
    The first lines of a text file, gzip or not, blank ones left out.

    Raises:
        `OSError`: a gzip file that is none or is cut off.
    """
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    with opened as file:
        try:
            lines = [file.readline(1 << 20).decode("utf-8", "replace").rstrip("\r\n") for _ in range(count)]
        except (EOFError, gzip.BadGzipFile) as error:
            raise OSError(f"{path} is no complete gzip file ({error}); fetch it again.") from error
    return [line.lstrip("\ufeff") for line in lines if line.strip()] or [""]


def _lines(path: Path) -> pl.LazyFrame:
    """Every line that is not blank, and its number from 1."""
    frame = pl.scan_csv(
        path, has_header=False, separator=_NO_SEPARATOR, quote_char=None, infer_schema=False,
        row_index_name="row", row_index_offset=1, new_columns=["line"],
    )  # fmt: skip
    return frame.filter(pl.col("line").str.strip_chars() != "")


def _fields(path: Path, separator: str, columns: Sequence[str]) -> Part:
    """Lines without header, fields parted by `separator` in the order of `columns`; columns not ours stay unread."""
    fields = pl.col("line").str.splitn(separator, len(columns) + 1).struct
    kept = {name: f"field_{number}" for number, name in enumerate(columns) if name in OURS}
    values = (fields.field(field).str.strip_chars().replace("", None).alias(name) for name, field in kept.items())
    return Part(_lines(path).select("row", *values), str(path), tuple(kept))


def _words(path: Path) -> pl.LazyFrame:
    """The `user` that begins each line, and the other words as the list `item`."""
    words = pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    return _lines(path).select("row", words.list.first().alias("user"), words.list.slice(1).alias("item"))


def _pairs(path: Path, names: Names) -> Part:
    only = pl.when(pl.col("item").list.len() == 1).then(pl.col("item").list.first())
    return Part(_words(path).with_columns(only.alias("item")), str(path), ("user", "item"))


def _sequences(path: Path, names: Names) -> Part:
    return Part(_words(path).explode("item"), str(path), ("user", "item"))


def _delimited(path: Path, names: Names, separator: str) -> Part:
    header = next(csv.reader([first_lines(path, 1)[0]], delimiter=separator))
    found = find_columns(header, names, str(path))

    def reopen(file: Path) -> pl.LazyFrame:
        frame = pl.scan_csv(
            file, separator=separator, quote_char='"' if separator == "," else None, infer_schema=False,
            row_index_name="row", row_index_offset=2,
        )  # fmt: skip
        return named(frame, found, ["row"])

    return Part(reopen(path), str(path), tuple(found), separator=separator, reopen=reopen)


def _headless_csv(path: Path, names: Names) -> Part:
    """Amazon's ratings: user, item, rating, time in the 2014 edition; item, user, rating, time in that of 2018."""
    rows = [line.split(",") for line in first_lines(path, 50)]
    user = max(
        (0, 1), key=lambda place: sum(bool(_AMAZON_USER.fullmatch(row[place])) for row in rows if len(row) == 4)
    )
    columns = ("user", "item") if user == 0 else ("item", "user")
    return _fields(path, ",", (*columns, "rating", "timestamp"))


_AMAZON_USER = re.compile(r"A[0-9A-Z]{11,}")  # an item, an ASIN, has ten characters


def _json_lines(path: Path, names: Names) -> Part:
    try:
        header = list(json.loads(first_lines(path, 1)[0]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line 1 is no JSON object ({error}).") from error
    found = find_columns(header, names, str(path))
    escaped = {ours: theirs.replace("\\", "\\\\").replace("'", "\\'") for ours, theirs in found.items()}
    values = [pl.col("line").str.json_path_match(f"$['{theirs}']").alias(ours) for ours, theirs in escaped.items()]
    return Part(_lines(path).select("row", *values), str(path), tuple(found))


def _python_lines(path: Path, names: Names) -> Part:
    """UCSD's Steam: a Python dict a line, which no JSON reader takes."""
    found = find_columns(list(_literal(first_lines(path, 1)[0])), names, str(path))
    structure = pl.Struct(dict.fromkeys(found, pl.String))

    def parse(line: str) -> dict[str, str | None]:
        row = _literal(line)
        return {ours: None if row.get(theirs) is None else str(row[theirs]) for ours, theirs in found.items()}

    rows = pl.col("line").map_elements(parse, return_dtype=structure)
    return Part(_lines(path).select("row", rows.alias("line")).unnest("line"), str(path), tuple(found))


def _literal(line: str) -> dict:
    try:
        row = ast.literal_eval(line)
    except (ValueError, SyntaxError):
        return {}
    return row if isinstance(row, dict) else {}


def _parquet(path: Path, names: Names) -> Part:
    frame = pl.scan_parquet(path)
    found = find_columns(frame.collect_schema().names(), names, str(path))
    return Part(named(frame, found), str(path), tuple(found), first_line=0, row_word="row")


def _foursquare(path: Path, names: Names) -> Part:
    part = _fields(path, "\t", ("user", "item", "", "", "", "", "", "timestamp"))
    time = pl.col("timestamp").str.to_datetime("%a %b %d %H:%M:%S %z %Y", strict=False, time_unit="us")
    part.frame = part.frame.with_columns(time)
    return part


FORMATS: dict[str, Callable[[Path, Names], Part]] = {
    "csv": lambda path, names: _delimited(path, names, ","),
    "tsv": lambda path, names: _delimited(path, names, "\t"),
    "parquet": _parquet,
    "jsonl": _json_lines,
    "pairs": _pairs,  # SASRec: "user item" a line
    "sequences": _sequences,  # S3Rec: "user item item …" a line
    "recbole": lambda path, names: _delimited(path, names, "\t"),
    "ml-100k": lambda path, names: _fields(path, "\t", OURS),
    "ml-1m": lambda path, names: _fields(path, "::", OURS),
    "amazon-csv": _headless_csv,
    "gowalla": lambda path, names: _fields(path, "\t", ("user", "timestamp", "", "", "item")),
    "foursquare": _foursquare,
    "python-lines": _python_lines,
}


def sniff(path: Path, names: Names) -> str:
    """
    The format of a file, by its name and its first lines.

    Raises:
        `ValueError`: nothing known looks like it.
    """
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if suffix == "parquet":
        return "parquet"
    lines = first_lines(path, 20)
    if lines[0].startswith("{"):
        try:
            json.loads(lines[0])
            return "jsonl"
        except json.JSONDecodeError:
            return "python-lines"
    if suffix == "inter":
        return "recbole"
    if any(names.values()) or suffix == "tsv":
        return "tsv" if lines[0].count("\t") >= max(1, lines[0].count(",")) else "csv"
    if suffix == "csv":
        return "amazon-csv" if re.fullmatch(r"[^,]+,[^,]+,\d(\.\d)?,\d{9,10}", lines[0]) else "csv"
    if "::" in lines[0]:
        return "ml-1m"
    tabs = {line.count("\t") for line in lines}
    if tabs == {4} and all(re.match(r"\d{4}-\d\d-\d\dT", line.split("\t")[1]) for line in lines):
        return "gowalla"
    if tabs == {7}:
        return "foursquare"
    if tabs == {3} and all(line.replace("\t", "").replace(".", "").isdigit() for line in lines):
        return "ml-100k"
    widths = {len(line.split()) for line in lines}
    if widths == {2}:
        return "pairs"
    if min(widths) >= 2 and len(tabs) == 1 and tabs == {0} and "," not in lines[0]:
        return "sequences"
    raise ValueError(
        f"{path} is of no format known by its look (first line {lines[0][:80]!r}); name it with format=, one of "
        f"{', '.join(FORMATS)}, or name its columns with user=… and item=…"
    )


def without_ragged_lines(path: Path, separator: str, target: Path) -> tuple[int, int]:
    """
    Copies a delimited file without the rows that have more fields than its header.

    Returns:
        the line of the first such row, and how many there were.
    """
    opened = gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="", encoding="utf-8")
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    first = count = 0
    with opened as source, open(target, "w", newline="", encoding="utf-8") as copy:
        rows = csv.reader(source, delimiter=separator, quoting=quoting)
        writer = csv.writer(copy, delimiter=separator, quoting=quoting, quotechar=None if quoting else '"')
        width = len(header := next(rows))
        writer.writerow(header)
        for row in rows:
            if len(row) > width:
                first, count = first or rows.line_num, count + 1
            else:
                writer.writerow(row)
    return first, count
