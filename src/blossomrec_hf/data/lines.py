"""Parts of a log that are text files with a line per event or per user."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from .columns import find_columns, is_header, numbers
from .delimited import DelimitedFile
from .ids import Codes
from .options import LogOptions
from .parts import Part, reading
from .text_files import BadRows, first_lines, read_lines


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


def open_fields(path: Path, options: LogOptions, notes: list[str], *, separator: str, columns: Sequence[str]) -> Part:
    """Lines of fields without a header and without quotes. `columns` names the fields in order, "" those not to read."""
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
    """The words of each line, as a list."""
    words = pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    return lines.select("row", words.alias("words"))


def _check_no_header(path: Path) -> None:
    first = first_lines(path, 1)[0]
    if is_header(first.split()):
        raise ValueError(
            f"{path} begins with names of columns ({first[:80]!r}), which a format without names would read as an event; "
            "remove this line, or separate the values by commas or tabs."
        )


def open_pairs(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """SASRec: a line is a user and an item."""
    _check_no_header(path)
    only = pl.when(pl.col("words").list.len() == 2).then(pl.col("words").list.last())
    values = (pl.col("words").list.first().alias("user"), only.alias("item"))
    return _text_part(
        path, _strings(("user", "item")), lambda _: (_words(lines).lazy().select("row", *values) for lines in read_lines(path))
    )  # fmt: skip


def open_sequences(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """S3-Rec: a line is a user and all items of this user."""
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


def open_item_sequences(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """gSASRec: a line is the items of one user. The numbers of the lines are the user ids."""
    values = ("row", pl.col("row").cast(pl.String).alias("user"), pl.col("words").alias("item"))
    return _text_part(
        path, _strings(("user", "item")),
        lambda _: (_words(lines).lazy().select(*values).explode("item") for lines in read_lines(path)),
    )  # fmt: skip


def open_delimited(path: Path, options: LogOptions, notes: list[str], *, separator: str) -> Part:
    """Rows of values between separators, below a row of the names of the columns."""
    file = DelimitedFile(path, separator, quoting=separator == ",")
    found = find_columns(file.columns, options.column_names, str(path), notes)
    if odd := numbers(found.values()):
        notes.append(
            f"the first row is read as the names of columns, though {odd[0]!r} is a number; if it is an event, write the names "
            "of the columns above it"
        )
    places = {role: file.columns.index(column) for role, column in found.items()}

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(path)):
            for batch in file.read([places[name] for name in wanted], bad):
                yield batch.select("row", *(pl.col(str(places[name])).alias(name) for name in wanted))

    return Part(str(path), _strings(found), read)


def open_amazon_ratings(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """Amazon ratings: user, item, rating, time in the edition of 2014; item, user, rating, time in that of 2018."""
    rows = [line.split(",") for line in first_lines(path, 50)]
    user = max(
        (0, 1), key=lambda place: sum(bool(_AMAZON_USER.fullmatch(row[place])) for row in rows if len(row) == 4)
    )
    columns = ("user", "item") if user == 0 else ("item", "user")
    return open_fields(path, options, notes, separator=",", columns=(*columns, "rating", "timestamp"))


_AMAZON_USER = re.compile(r"A[0-9A-Z]{11,}")  # an item, an ASIN, has ten characters


def open_json_lines(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """A line is a JSON object."""
    found = _find_keys(path, parse_json, options, notes)
    escaped = {role: column.replace("\\", "\\\\").replace("'", "\\'") for role, column in found.items()}
    values = [pl.col("line").str.json_path_match(f"$['{column}']").alias(role) for role, column in escaped.items()]
    return _text_part(
        path, _strings(found), lambda _: (lines.lazy().select("row", *values) for lines in read_lines(path))
    )


def _find_keys(
    path: Path, parse: Callable[[str], dict | None], options: LogOptions, notes: list[str]
) -> dict[str, str]:
    """
    The key of each column, found in the first lines; a line may lack a key.

    Raises:
        ValueError: if there are no keys, a column is not found (see [`~data.columns.find_columns`]), or an id or a time is
            a list, an object or a truth value.
    """
    rows = [parse(line) or {} for line in first_lines(path, 100)]
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    if not keys:
        raise ValueError(f"{path}, line 1 is no JSON object; a log has one per line.")
    found = find_columns(keys, options.column_names, str(path), notes)
    for role, column in found.items():
        wrong = next((row[column] for row in rows if isinstance(row.get(column), (list, dict, bool))), None)
        if wrong is not None and role != "rating":
            raise ValueError(
                f"{path}: the {role} {column!r} may be a number or a text, not {repr(wrong)[:60]}; write an "
                "event per line."
            )
    return found


def parse_json(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def open_python_lines(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """UCSD's Steam reviews: a line is a Python dict, which is not JSON."""
    found = _find_keys(path, _literal, options, notes)

    def parse(line: str) -> dict[str, str | None]:
        row = _literal(line)
        return {role: None if row.get(column) is None else str(row[column]) for role, column in found.items()}

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


def open_foursquare(path: Path, options: LogOptions, notes: list[str]) -> Part:
    """Foursquare check-ins: eight fields, the last one a time such as "Tue Apr 03 18:00:09 +0000 2012"."""
    columns = ("user", "item", "", "", "", "", "", "timestamp")
    part = open_fields(path, options, notes, separator="\t", columns=columns)
    fields = part.read

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        time = pl.col("timestamp").str.to_datetime("%a %b %d %H:%M:%S %z %Y", strict=False, time_unit="us")
        for batch in fields(wanted, bad):
            yield batch.with_columns(time) if "timestamp" in wanted else batch

    part.types, part.read = {**part.types, "timestamp": pl.Datetime("us", "UTC")}, read
    return part
