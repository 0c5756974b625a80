"""The file formats that logs come in: how each is recognised, and how it is read in batches of our columns."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import OURS, Names, find_columns, is_header, numbers
from .delimited import DelimitedFile
from .ids import Codes
from .text_files import BadRows, first_lines, read_lines


BATCH_ROWS = 1 << 20


@dataclass
class Part:
    """
    One file (or frame) of a log.

    Args:
        name (`str`): of the file, for people.
        types: our columns that it has, and their types.
        read: gives the columns asked for, batch by batch, and `row`, the number of the line (of a table: of the row). Rows
            that are not of the format go to the `BadRows`.
        row_word (`str`): what `row` counts.
    """

    name: str
    types: Mapping[str, pl.DataType]
    read: Callable[[Sequence[str], BadRows], Iterator[pl.DataFrame]]
    row_word: str = "line"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Makes errors of Polars and Arrow about the file `name` a sentence."""
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


def table(frame: pl.LazyFrame, name: str, names: Names, notes: list[str]) -> Part:
    """
    A table as a part of a log.

    Raises:
        `ValueError`: see [`~data.columns.find_columns`]; a table that cannot be read.
    """
    with reading(name):
        schema = frame.collect_schema()
    return _table_part(
        name, schema, names, notes, lambda columns: frame.select(columns).collect_batches(chunk_size=BATCH_ROWS)
    )  # fmt: skip


def _table_part(
    name: str,
    schema: pl.Schema,
    names: Names,
    notes: list[str],
    batches: Callable[[Sequence[str]], Iterable[pl.DataFrame]],
) -> Part:
    found = find_columns(schema.names(), names, name, notes)

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        first = 0
        with reading(name):
            for batch in batches(list({found[ours] for ours in wanted})):
                row = pl.int_range(first, first + batch.height).alias("row")
                yield batch.select(row, *(pl.col(found[ours]).alias(ours) for ours in wanted))
                first += batch.height

    return Part(name, {ours: schema[theirs] for ours, theirs in found.items()}, read, row_word="row")


def _parquet(path: Path, names: Names, notes: list[str]) -> Part:
    """By Arrow, because Polars panics at some damaged files."""

    def batches(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                batch.validate(full=True)
                yield pl.from_arrow(pa.Table.from_batches([batch]).replace_schema_metadata(None))

    with reading(str(path)), pq.ParquetFile(path, page_checksum_verification=True) as file:
        str(file.schema_arrow)  # raises if a name is not UTF-8, at which Polars panics
        schema = pl.from_arrow(file.schema_arrow.remove_metadata().empty_table()).schema
    return _table_part(str(path), schema, names, notes, batches)


def _text_part(
    path: Path, types: Mapping[str, pl.DataType], batches: Callable[[BadRows], Iterator[pl.LazyFrame]]
) -> Part:
    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(path)):
            for batch in batches(bad):
                yield batch.select("row", *wanted).collect()

    return Part(str(path), types, read)


def _strings(columns: Sequence[str]) -> dict[str, pl.DataType]:
    return dict.fromkeys(columns, pl.String())


def _fields(path: Path, separator: str, columns: Sequence[str]) -> Part:
    """Lines without header and quotes, fields in the order of `columns`, of which those not ours have no name."""
    kept = {name: f"field_{number}" for number, name in enumerate(columns) if name}
    fields = pl.col("line").str.splitn(separator, len(columns)).struct
    values = [fields.field(field).str.strip_chars().alias(name) for name, field in kept.items()]

    def batches(bad: BadRows) -> Iterator[pl.LazyFrame]:
        for lines in read_lines(path):
            count = lines["line"].str.count_matches(separator, literal=True) + 1
            for problem, wrong in (("more", count > len(columns)), ("fewer", count < len(columns))):
                if wrong.any():
                    place = int(wrong.arg_true()[0])
                    problem += " fields than its format has"
                    where = f"{path}, line {lines['row'][place]}: {problem} ({count[place]}, not {len(columns)})"
                    bad.add(problem, int(wrong.sum()), where)
            yield lines.lazy().filter(count == len(columns)).select("row", *values)

    return _text_part(path, _strings(kept), batches)


def _words(lines: pl.DataFrame) -> pl.DataFrame:
    """The words of each line as a list."""
    words = pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    return lines.select("row", words.alias("words"))


def _check_no_header(path: Path) -> None:
    first = first_lines(path, 1)[0]
    if is_header(first.split()):
        raise ValueError(
            f"{path} begins with names of columns ({first[:80]!r}), which a format without names would read as an event; "
            "remove this line, or separate the values by commas or tabs."
        )


def _pairs(path: Path, names: Names, notes: list[str]) -> Part:
    _check_no_header(path)
    only = pl.when(pl.col("words").list.len() == 2).then(pl.col("words").list.last())
    values = (pl.col("words").list.first().alias("user"), only.alias("item"))
    return _text_part(
        path, _strings(("user", "item")), lambda _: (_words(lines).lazy().select("row", *values) for lines in read_lines(path))
    )  # fmt: skip


def _sequences(path: Path, names: Names, notes: list[str]) -> Part:
    """A user and all items of the user a line."""
    _check_no_header(path)

    def batches(bad: BadRows) -> Iterator[pl.LazyFrame]:
        seen = Codes()
        for lines in read_lines(path):
            words = _words(lines).with_columns(user=pl.col("words").list.first())
            if len(alone := words.filter(pl.col("words").list.len() == 1)):
                bad.add("a user and no item", len(alone), f"{path}, line {alone['row'][0]}: a user and no item")
            words = words.filter(pl.col("words").list.len() > 1)
            size = seen.size
            codes = pl.Series(seen.encode(words["user"]))
            if seen.size - size < len(codes):
                again = int(((codes < size) | ~codes.is_first_distinct()).arg_true()[0])
                raise ValueError(
                    f"{path}, line {words['row'][again]}: the user {words['user'][again]!r} begins an earlier line as well, "
                    "but a line of this format is a user and all items of this user; if the lines are items without a "
                    'user, pass format="item-sequences".'
                )
            yield words.lazy().select("row", "user", pl.col("words").list.slice(1).alias("item")).explode("item")

    return _text_part(path, _strings(("user", "item")), batches)


def _item_sequences(path: Path, names: Names, notes: list[str]) -> Part:
    """The items of one user a line; the users are called after their lines."""
    values = ("row", pl.col("row").cast(pl.String).alias("user"), pl.col("words").alias("item"))
    return _text_part(
        path, _strings(("user", "item")),
        lambda _: (_words(lines).lazy().select(*values).explode("item") for lines in read_lines(path)),
    )  # fmt: skip


def _delimited(path: Path, names: Names, notes: list[str], separator: str) -> Part:
    file = DelimitedFile(path, separator, quoting=separator == ",")
    found = find_columns(file.columns, names, str(path), notes)
    if odd := numbers(found.values()):
        notes.append(
            f"the first row is read as the names of columns, though {odd[0]!r} is a number; if it is an event, write the names "
            "of the columns above it"
        )
    places = {ours: file.columns.index(theirs) for ours, theirs in found.items()}

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(path)):
            for batch in file.read([places[name] for name in wanted], bad):
                yield batch.select("row", *(pl.col(str(places[name])).alias(name) for name in wanted))

    return Part(str(path), _strings(found), read)


def _headless_csv(path: Path, names: Names, notes: list[str]) -> Part:
    """Amazon's ratings: user, item, rating, time in the 2014 edition; item, user, rating, time in that of 2018."""
    rows = [line.split(",") for line in first_lines(path, 50)]
    user = max(
        (0, 1), key=lambda place: sum(bool(_AMAZON_USER.fullmatch(row[place])) for row in rows if len(row) == 4)
    )
    columns = ("user", "item") if user == 0 else ("item", "user")
    return _fields(path, ",", (*columns, "rating", "timestamp"))


_AMAZON_USER = re.compile(r"A[0-9A-Z]{11,}")  # an item, an ASIN, has ten characters


def _json_lines(path: Path, names: Names, notes: list[str]) -> Part:
    found = _find_keys(path, _json, names, notes)
    escaped = {ours: theirs.replace("\\", "\\\\").replace("'", "\\'") for ours, theirs in found.items()}
    values = [pl.col("line").str.json_path_match(f"$['{theirs}']").alias(ours) for ours, theirs in escaped.items()]
    return _text_part(
        path, _strings(found), lambda _: (lines.lazy().select("row", *values) for lines in read_lines(path))
    )


def _find_keys(path: Path, parse: Callable[[str], dict | None], names: Names, notes: list[str]) -> dict[str, str]:
    """
    Our columns -> the keys of the first lines, of which some may lack one.

    Raises:
        `ValueError`: no keys, see [`~data.columns.find_columns`], or a list, an object or a truth value where an id or a
            time belongs.
    """
    rows = [parse(line) or {} for line in first_lines(path, 100)]
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    if not keys:
        raise ValueError(f"{path}, line 1 is no JSON object; a log has one a line.")
    found = find_columns(keys, names, str(path), notes)
    for ours, theirs in found.items():
        wrong = next((row[theirs] for row in rows if isinstance(row.get(theirs), (list, dict, bool))), None)
        if wrong is not None and ours != "rating":
            raise ValueError(
                f"{path}: the {ours} {theirs!r} may be a number or a text, not {repr(wrong)[:60]}; write an "
                "interaction a line."
            )
    return found


def _json(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _python_lines(path: Path, names: Names, notes: list[str]) -> Part:
    """UCSD's Steam: a Python dict a line, which no JSON reader takes."""
    found = _find_keys(path, _literal, names, notes)

    def parse(line: str) -> dict[str, str | None]:
        row = _literal(line)
        return {ours: None if row.get(theirs) is None else str(row[theirs]) for ours, theirs in found.items()}

    rows = pl.col("line").map_elements(parse, return_dtype=pl.Struct(_strings(found)))
    return _text_part(
        path, _strings(found),
        lambda _: (lines.lazy().select("row", rows.alias("line")).unnest("line") for lines in read_lines(path)),
    )  # fmt: skip


def _literal(line: str) -> dict:
    try:
        row = ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _foursquare(path: Path, names: Names, notes: list[str]) -> Part:
    part = _fields(path, "\t", ("user", "item", "", "", "", "", "", "timestamp"))
    fields = part.read

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        time = pl.col("timestamp").str.to_datetime("%a %b %d %H:%M:%S %z %Y", strict=False, time_unit="us")
        for batch in fields(wanted, bad):
            yield batch.with_columns(time) if "timestamp" in wanted else batch

    part.types, part.read = {**part.types, "timestamp": pl.Datetime("us", "UTC")}, read
    return part


FORMATS: dict[str, Callable[[Path, Names, list[str]], Part]] = {
    "csv": lambda path, names, notes: _delimited(path, names, notes, ","),
    "tsv": lambda path, names, notes: _delimited(path, names, notes, "\t"),
    "parquet": _parquet,
    "jsonl": _json_lines,
    "pairs": _pairs,  # SASRec: "user item" a line
    "sequences": _sequences,  # S3Rec: "user item item …" a line
    "item-sequences": _item_sequences,  # gSASRec: "item item …" a line
    "recbole": lambda path, names, notes: _delimited(path, names, notes, "\t"),
    "ml-100k": lambda path, names, notes: _fields(path, "\t", OURS),
    "ml-1m": lambda path, names, notes: _fields(path, "::", OURS),
    "amazon-csv": _headless_csv,
    "gowalla": lambda path, names, notes: _fields(path, "\t", ("user", "timestamp", "", "", "item")),
    "foursquare": _foursquare,
    "python-lines": _python_lines,
}
WITH_NAMES = ("csv", "tsv", "parquet", "jsonl", "recbole", "python-lines")  # of their columns


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
        return "python-lines" if _json(lines[0]) is None else "jsonl"
    if suffix == "inter":
        return "recbole"
    for format, separator in (("tsv", "\t"), ("csv", ",")):
        if is_header(lines[0].replace('"', "").split(separator)):
            return format
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
