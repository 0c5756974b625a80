"""The file formats of logs: how each is recognized and opened. A new format is one call of [`register_format`]."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .columns import is_header
from .layouts import LAYOUTS, Layout
from .lines import (
    find_separator,
    open_amazon_ratings,
    open_delimited,
    open_fields,
    open_foursquare,
    open_impressions,
    open_item_sequences,
    open_json_lines,
    open_pairs,
    open_python_lines,
    open_sequences,
    parse_json,
)
from .options import LogOptions
from .parts import Part
from .tables import open_parquet
from .text_files import LogFile, first_lines


@dataclass(frozen=True)
class Look:
    """
    What a file is recognized by.

    Args:
        suffix (`str`): the last suffix of its name in lowercase, without a dot and before `.gz` or `.zst`.
        lines (`list[str]`): its first lines that are not blank; an empty line if it is Parquet.
        options ([`LogOptions`]): the options given.
    """

    suffix: str
    lines: list[str]
    options: LogOptions

    @property
    def named(self) -> bool:
        """Whether an option names columns or how they are separated."""
        options = self.options
        return any((*options.column_names.values(), options.columns, options.separator))

    @property
    def first(self) -> str:
        return self.lines[0]

    def has_fields(self, separator: str, count: int) -> bool:
        """Whether every line has `count` fields."""
        return all(line.count(separator) + 1 == count for line in self.lines)


@dataclass(frozen=True)
class Format:
    """
    A file format.

    Args:
        open: opens a file as a [`~data.parts.Part`]. It gets the [`LogFile`], the [`~data.options.LogOptions`] and a list, to which
            it may add sentences for the report on how the file is read.
        looks_like (*optional*): whether a file is of this format; by default, only `format=` selects it.
        has_column_names (`bool`): whether the columns have names, which `user=`, `item=`, `timestamp=` and `rating=` choose
            from.
        defaults (`dict`): options of the format, for those that are not given.
    """

    open: Callable[[LogFile, LogOptions, list[str]], Part]
    looks_like: Callable[[Look], bool] | None = None
    has_column_names: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def complete(self, options: LogOptions) -> LogOptions:
        """The options given, and the defaults of the format for the others."""
        return replace(options, **{name: x for name, x in self.defaults.items() if getattr(options, name) is None})


def _is_json(look: Look) -> bool:
    return look.first.startswith("{") and parse_json(look.first) is not None


def _is_python(look: Look) -> bool:
    return look.first.startswith("{") and parse_json(look.first) is None


def _is_tsv(look: Look) -> bool:
    return find_separator(look.first, look.options) == "\t" and _is_delimited(look)


def _is_delimited(look: Look) -> bool:
    header = is_header(look.first.replace('"', "").split(find_separator(look.first, look.options)))
    return header or look.named or look.suffix in ("csv", "tsv")


def _is_amazon_ratings(look: Look) -> bool:
    ratings = re.fullmatch(r"[^,]+,[^,]+,\d(\.\d)?,\d{9,10}", look.first)
    return look.suffix == "csv" and not look.named and ratings is not None


def _is_gowalla(look: Look) -> bool:
    dated = all(re.match(r"[^\t]*\t\d{4}-\d\d-\d\dT", line) for line in look.lines)
    return look.has_fields("\t", 5) and dated


def _is_movielens_100k(look: Look) -> bool:
    digits = all(line.replace("\t", "").replace(".", "").isdigit() for line in look.lines)
    return look.has_fields("\t", 4) and digits


def _is_sequences(look: Look) -> bool:
    words = min(len(line.split()) for line in look.lines)
    return words >= 2 and look.has_fields("\t", 1) and "," not in look.first


# By descending generality: the last format that a file looks like is its format.
FORMATS: dict[str, Format] = {
    "item-sequences": Format(open_item_sequences),  # gSASRec: "item item …" per line
    "sequences": Format(open_sequences, _is_sequences),  # S3-Rec: "user item item …" per line
    "pairs": Format(
        open_pairs, lambda look: all(len(line.split()) == 2 for line in look.lines)
    ),  # SASRec: "user item"
    "impressions": Format(open_impressions),  # MIND
    "ml-100k": Format(
        partial(open_fields, separator="\t", columns=("user", "item", "rating", "timestamp")), _is_movielens_100k
    ),
    "foursquare": Format(open_foursquare, lambda look: look.has_fields("\t", 8)),
    "gowalla": Format(
        partial(open_fields, separator="\t", columns=("user", "timestamp", "", "", "item")), _is_gowalla
    ),
    "ml-1m": Format(
        partial(open_fields, separator="::", columns=("user", "item", "rating", "timestamp")),
        lambda look: "::" in look.first,
    ),
    "csv": Format(open_delimited, _is_delimited, has_column_names=True),
    "amazon-csv": Format(open_amazon_ratings, _is_amazon_ratings),
    "tsv": Format(partial(open_delimited, separator="\t"), _is_tsv, has_column_names=True),
    "recbole": Format(
        partial(open_delimited, separator="\t"), lambda look: look.suffix == "inter", has_column_names=True
    ),
    "jsonl": Format(open_json_lines, _is_json, has_column_names=True),
    "python-lines": Format(open_python_lines, _is_python, has_column_names=True),
    "parquet": Format(open_parquet, lambda look: look.suffix == "parquet", has_column_names=True),
}


def _has_pattern(look: Look, *, layout: Layout) -> bool:
    if look.named or not layout.pattern:
        return False
    lines = look.lines if layout.columns != look.first else look.lines[:1]
    return all(re.fullmatch(layout.pattern, line) for line in lines)


FORMATS |= {
    name: Format(
        FORMATS[layout.format].open,
        partial(_has_pattern, layout=layout),
        has_column_names=FORMATS[layout.format].has_column_names,
        defaults=layout.options,
    )
    for name, layout in LAYOUTS.items()
}


def register_format(name: str, format: Format) -> None:
    """
    Adds a file format, which `format=` and `--format` accept by `name`. It is recognized before the formats that were
    registered earlier.

    Raises:
        ValueError: if there is a format of this name.
    """
    if name in FORMATS:
        raise ValueError(f"name is {name!r}, which is a format already; give another name.")
    FORMATS[name] = format


def recognize_format(file: LogFile, options: LogOptions) -> str:
    """
    The name of a file's format, by the file's name and first lines.

    Raises:
        ValueError: if the file looks like no known format.
    """
    lines = [""] if file.suffix == "parquet" else first_lines(file, 20)
    look = Look(file.suffix, lines, options)
    for name, format in reversed(FORMATS.items()):
        if format.looks_like is not None and format.looks_like(look):
            return name
    raise ValueError(
        f"{file} looks like no known format (first line {look.first[:80]!r}); name its format with format=, one of "
        f"{', '.join(sorted(FORMATS))}, or its columns with user=… and item=…"
    )
