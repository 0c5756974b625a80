"""Parts of a log that are text files with a line per event or per user."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from .columns import find_columns, is_header, numbers
from .delimited import DelimitedFile
from .ids import Codes
from .options import LogOptions
from .parts import Part, explode, reading
from .text_files import BadRows, LogFile, first_lines, read_lines


def _text_part(
    file: LogFile, types: Mapping[str, pl.DataType], batches: Callable[[BadRows], Iterator[pl.LazyFrame]]
) -> Part:
    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(file)):
            for batch in batches(bad):
                yield batch.select("row", *wanted).collect()

    return Part(str(file), types, read)


def _strings(columns: Sequence[str]) -> dict[str, pl.DataType]:
    return dict.fromkeys(columns, pl.String())


def open_fields(
    file: LogFile, options: LogOptions, notes: list[str], *, separator: str, columns: Sequence[str]
) -> Part:
    """Lines of fields without a header and without quotes. `columns` names the fields in order, "" those not to read."""
    kept = {name: f"field_{number}" for number, name in enumerate(columns) if name}
    fields = pl.col("line").str.splitn(separator, len(columns)).struct
    values = [fields.field(field).str.strip_chars().alias(name) for name, field in kept.items()]

    def batches(bad: BadRows) -> Iterator[pl.LazyFrame]:
        for lines in read_lines(file):
            count = lines["line"].str.count_matches(separator, literal=True) + 1
            for problem, wrong in (("more", count > len(columns)), ("fewer", count < len(columns))):
                if wrong.any():
                    place = int(wrong.arg_true()[0])
                    problem += " fields than its format has"
                    where = f"{file}, line {lines['row'][place]}: {problem} ({count[place]}, not {len(columns)})"
                    bad.add(problem, int(wrong.sum()), where)
            yield lines.lazy().filter(count == len(columns)).select("row", *values)

    return _text_part(file, _strings(kept), batches)


def _words(lines: pl.DataFrame) -> pl.DataFrame:
    """The words of each line, as a list."""
    words = pl.col("line").str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ")
    return lines.select("row", words.alias("words"))


def _check_no_header(file: LogFile) -> None:
    first = first_lines(file, 1)[0]
    if is_header(first.split()):
        raise ValueError(
            f"{file} begins with names of columns ({first[:80]!r}), which a format without names would read as an event; "
            "remove this line, or separate the values by commas or tabs."
        )


def open_pairs(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """SASRec: a line is a user and an item."""
    _check_no_header(file)
    only = pl.when(pl.col("words").list.len() == 2).then(pl.col("words").list.last())
    values = (pl.col("words").list.first().alias("user"), only.alias("item"))
    return _text_part(
        file, _strings(("user", "item")), lambda _: (_words(lines).lazy().select("row", *values) for lines in read_lines(file))
    )  # fmt: skip


def open_sequences(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """S3-Rec: a line is a user and all items of this user."""
    _check_no_header(file)

    def batches(bad: BadRows) -> Iterator[pl.LazyFrame]:
        seen = Codes()
        for lines in read_lines(file):
            words = _words(lines).with_columns(user=pl.col("words").list.first())
            if len(alone := words.filter(pl.col("words").list.len() == 1)):
                bad.add("a user and no item", len(alone), f"{file}, line {alone['row'][0]}: a user and no item")
            words = words.filter(pl.col("words").list.len() > 1)
            size = seen.size
            codes = pl.Series(seen.encode(words["user"]))
            if seen.size - size < len(codes):
                again = int(((codes < size) | ~codes.is_first_distinct()).arg_true()[0])
                raise ValueError(
                    f"{file}, line {words['row'][again]}: the user {words['user'][again]!r} begins an earlier line as well, "
                    "but a line of this format is a user and all items of this user; if the lines are items without a "
                    'user, pass format="item-sequences".'
                )
            yield words.lazy().select("row", "user", pl.col("words").list.slice(1).alias("item")).explode("item")

    return _text_part(file, _strings(("user", "item")), batches)


def open_item_sequences(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """gSASRec: a line is the items of one user. The numbers of the lines are the user ids."""
    values = ("row", pl.col("row").cast(pl.String).alias("user"), pl.col("words").alias("item"))
    return _text_part(
        file, _strings(("user", "item")),
        lambda _: (_words(lines).lazy().select(*values).explode("item") for lines in read_lines(file)),
    )  # fmt: skip


def open_impressions(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """MIND: impression, user, time, history and the articles shown, such as "N1-0 N2-1", of which those with 1 are events."""
    part = open_fields(file, options, notes, separator="\t", columns=("", "user", "timestamp", "", "item"))
    shown = part.read

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        clicked = pl.col("item").str.extract_all(r"\S+-1\b").list.eval(pl.element().str.strip_suffix("-1"))
        for batch in shown(list(dict.fromkeys(["item", *wanted])), bad):
            yield explode(batch.with_columns(clicked), ["item"]).select("row", *wanted)

    return replace(part, read=read)


def open_delimited(file: LogFile, options: LogOptions, notes: list[str], *, separator: str | None = None) -> Part:
    """
    Rows of values between separators, below a row of the names of the columns unless `columns` names them.

    Args:
        separator (`str`, *optional*): that of the format, unless the options name another; by default, recognized.
    """
    separator = options.separator or separator or find_separator(first_lines(file, 1)[0], options)
    quoting = separator != "\t" if options.quoting is None else options.quoting
    table = DelimitedFile(file, separator, quoting=quoting, columns=options.column_list)
    if any(name.split(":")[0] == "item_id_list" for name in table.columns):
        raise ValueError(
            f"{file} has the column item_id_list, so that a row is a history with its next item and no event; give the file of "
            "events from which it was made."
        )
    found = find_columns(table.columns, options.column_names, str(file), notes)
    if odd := numbers(found.values()):
        notes.append(
            f"the first row is read as the names of columns, though {odd[0]!r} is a number; if it is an event, name the columns "
            "with columns=…"
        )
    places = {role: table.columns.index(column) for role, column in found.items()}

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(file)):
            for batch in table.read([places[name] for name in wanted], bad):
                yield batch.select("row", *(pl.col(str(places[name])).alias(name) for name in wanted))

    return Part(str(file), _strings(found), read)


def find_separator(line: str, options: LogOptions) -> str:
    """The separator of a file: that of a header of usual names, of as many fields as named columns, or the most frequent."""
    if options.separator is not None:
        return options.separator
    fields = {separator: line.replace('"', "").split(separator) for separator in ",\t;|"}
    for separator, names in fields.items():
        if is_header(names) if options.columns is None else len(names) == len(options.column_list):
            return separator
    return max(fields, key=lambda separator: len(fields[separator]))


def open_amazon_ratings(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """Amazon ratings: user, item, rating, time in the edition of 2014; item, user, rating, time in that of 2018."""
    rows = [line.split(",") for line in first_lines(file, 50)]
    user = max(
        (0, 1), key=lambda place: sum(bool(_AMAZON_USER.fullmatch(row[place])) for row in rows if len(row) == 4)
    )
    columns = ("user", "item") if user == 0 else ("item", "user")
    return open_fields(file, options, notes, separator=",", columns=(*columns, "rating", "timestamp"))


_AMAZON_USER = re.compile(r"A[0-9A-Z]{11,}")  # an item, an ASIN, has ten characters


def open_json_lines(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """
    A line is a JSON object: an event, or a user or session with lists of events. A list has objects, whose keys are
    columns (`{"session": 1, "events": [{"aid": 5, "ts": 7}]}`), or is one of several lists of equal length.
    """
    rows = [parse_json(line) or {} for line in first_lines(file, 100)]
    keys = _find_keys(file, rows, options, notes)
    if not any(key.is_list for key in keys.values()):
        names = {role: key.top.replace("\\", "\\\\").replace("'", "\\'") for role, key in keys.items()}
        values = [pl.col("line").str.json_path_match(f"$['{name}']").alias(role) for role, name in names.items()]
        return _text_part(
            file, _strings(keys), lambda _: (lines.lazy().select("row", *values) for lines in read_lines(file))
        )
    leaves: dict[str, dict[str, pl.DataType]] = {}
    for key in keys.values():
        leaves.setdefault(key.top, {}).update({key.leaf: pl.String()} if key.leaf else {})
    types = {
        key.top: (pl.List(pl.Struct(leaves[key.top]) if key.leaf else pl.String) if key.is_list else pl.String())
        for key in keys.values()
    }
    values = [key.values().alias(role) for role, key in keys.items()]
    lists = [role for role, key in keys.items() if key.is_list]

    def batches(bad: BadRows) -> Iterator[pl.LazyFrame]:
        for lines in read_lines(file):
            objects = lines.select("row", object=_decode(lines["line"], pl.Struct(types))).unnest("object")
            yield explode(objects.select("row", *values), lists).lazy()

    return _text_part(file, _strings(keys), batches)


@dataclass(frozen=True)
class _Key:
    """A key of JSON objects, or a key (`leaf`) of the objects in a list (`top`)."""

    top: str
    leaf: str = ""
    is_list: bool = False

    def values(self) -> pl.Expr:
        column = pl.col(self.top)
        return column.list.eval(pl.element().struct.field(self.leaf)) if self.leaf else column


def _find_keys(
    file: LogFile, rows: list[dict], options: LogOptions, notes: list[str], *, lists: bool = True
) -> dict[str, _Key]:
    """
    The key of each column, found in the first lines; a line may lack a key.

    Args:
        lists (`bool`): whether the values of a column may be in lists.

    Raises:
        ValueError: if there are no keys, a column is not found (see [`~data.columns.find_columns`]), or an id or a time is
            an object, a truth value or a list in a list.
    """
    tops: dict[str, _Key] = {}
    leaves: dict[str, _Key] = {}
    for row in rows:
        for top, value in row.items():
            elements = value if isinstance(value, list) and lists else []
            objects = [element for element in elements if isinstance(element, dict)]
            tops[str(top)] = _Key(str(top), is_list=bool(elements) and not objects or tops.get(top, _Key("")).is_list)
            for leaf in dict.fromkeys(str(leaf) for element in objects for leaf in element):
                leaves[f"{top}.{leaf}"] = leaves[leaf] = _Key(str(top), leaf, is_list=True)
    keys = leaves | tops
    if not keys:
        raise ValueError(f"{file}, line 1 is no JSON object; a log has one per line.")
    found = {
        role: keys[column] for role, column in find_columns(list(keys), options.column_names, str(file), notes).items()
    }
    for role, key in found.items():
        values = [row.get(key.top) for row in rows]
        if key.is_list and found["item"].is_list:
            values = [element for value in values if isinstance(value, list) for element in value]
            values = [
                element.get(key.leaf) if key.leaf and isinstance(element, dict) else element for element in values
            ]
        wrong = next((value for value in values if isinstance(value, (list, dict, bool))), None)
        if wrong is not None and role != "rating":
            name = f"{key.top}.{key.leaf}" if key.leaf else key.top
            raise ValueError(
                f"{file}: the {role} {name!r} may be a number or a text, not {repr(wrong)[:60]}; write an event per line."
            )
    return found


def _decode(lines: pl.Series, dtype: pl.DataType) -> pl.Series:
    """JSON objects as structs; null for a line that is none. Polars refuses all lines for one, so they are halved."""
    try:
        return lines.str.json_decode(dtype)
    except pl.exceptions.PolarsError:
        if len(lines) == 1:
            return pl.Series(lines.name, [None], dtype)
        half = len(lines) // 2
        return pl.concat([_decode(lines[:half], dtype), _decode(lines[half:], dtype)])


def parse_json(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def open_python_lines(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """UCSD's Steam reviews: a line is a Python dict, which is not JSON."""
    rows = [_literal(line) for line in first_lines(file, 100)]
    found = {role: key.top for role, key in _find_keys(file, rows, options, notes, lists=False).items()}

    def parse(line: str) -> dict[str, str | None]:
        row = _literal(line)
        return {role: None if row.get(key) is None else str(row[key]) for role, key in found.items()}

    values = pl.col("line").map_elements(parse, return_dtype=pl.Struct(_strings(found)))
    return _text_part(
        file, _strings(found),
        lambda _: (lines.lazy().select("row", values.alias("line")).unnest("line") for lines in read_lines(file)),
    )  # fmt: skip


def _literal(line: str) -> dict:
    try:
        row = ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def open_foursquare(file: LogFile, options: LogOptions, notes: list[str]) -> Part:
    """Foursquare check-ins: eight fields, the last one a time such as "Tue Apr 03 18:00:09 +0000 2012"."""
    columns = ("user", "item", "", "", "", "", "", "timestamp")
    part = open_fields(file, options, notes, separator="\t", columns=columns)
    fields = part.read

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        time = pl.col("timestamp").str.to_datetime("%a %b %d %H:%M:%S %z %Y", strict=False, time_unit="us")
        for batch in fields(wanted, bad):
            yield batch.with_columns(time) if "timestamp" in wanted else batch

    part.types, part.read = {**part.types, "timestamp": pl.Datetime("us", "UTC")}, read
    return part
