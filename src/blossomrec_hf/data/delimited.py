"""Comma- and tab-separated values: every row is checked before Polars reads it, which would shift rows that are too long."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl

from .text_files import (
    BOM,
    GZIP_ERRORS,
    LONGEST_ROW,
    BadRows,
    incomplete_gzip,
    not_utf8,
    open_text,
    read_blocks,
    too_long,
    with_end,
)


_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_PIECE = 1 << 18  # bytes looked at together: they and what is derived from them fit into a processor's cache


class DelimitedFile:
    """
    A text file whose first row names its columns.

    A field that begins with a quote ends with one, if `quoting`; any other quote is a character of its field.

    Args:
        path: may be compressed with gzip.
        separator (`str`): one ASCII character.
        quoting (`bool`): whether fields may be quoted.

    Attributes:
        columns (`list[str]`): the names of the columns.

    Raises:
        `ValueError`: no header. `OSError`: no complete gzip file.
    """

    def __init__(self, path: Path, separator: str, *, quoting: bool) -> None:
        self.path, self.separator, self.quoting = path, separator, quoting
        self._syntax = _Syntax(separator.encode(), quoting)
        with open_text(path) as file:
            try:
                block = file.read(1 << 20) + b"\n"
            except GZIP_ERRORS as error:
                raise incomplete_gzip(path, error) from error
        start = len(BOM) if block.startswith(BOM) else 0
        while (header := self._syntax.row.match(block, start)) and not header[0].strip():
            start = header.end()
        if header is None or separator.encode() not in header[0]:
            line = block[start : start + 80].decode("utf-8", "replace").splitlines()[:1]
            raise ValueError(
                f"{path} has no header of names separated by {separator!r} (first line {''.join(line)!r}); write the log "
                "with commas or tabs, and the names of its columns in the first row."
            )
        self.columns = [_unquoted(name).decode("utf-8", "replace") for name in self._syntax.fields(header[0])]
        self._start, self._first_line = header.end(), 1 + block.count(b"\n", 0, header.end())

    def read(self, wanted: Sequence[int], bad: BadRows) -> Iterator[pl.DataFrame]:
        """
        The rows in blocks, without blank ones. Rows with more or fewer fields than the header go to `bad`.

        Args:
            wanted: the places of the columns to read.

        Yields:
            `polars.DataFrame`: `row` (int64, from 1), the line on which a row begins, and for each of `wanted` a column
            of strings, called "0", "1" … by place.

        Raises:
            `ValueError`: see [`BadRows`]; text that is no UTF-8; a row longer than 16 MiB.
            `OSError`: no complete gzip file.
        """
        rest, line, wanted = b"", self._first_line, sorted(set(wanted))
        for block in chain(with_end(read_blocks(self.path, self._start)), [b""]):
            data = rest + block
            rows = self._syntax.split(data, last=not block)
            if rows is None:
                raise too_long(self.path, line)
            yield from self._frames(rows, line, wanted, bad)
            rest, line = data[rows.used :], line + data.count(b"\n", 0, rows.used)

    def _frames(self, rows: "_Rows", line: int, wanted: Sequence[int], bad: BadRows) -> Iterator[pl.DataFrame]:
        """One frame of the good rows, or none."""
        width, data, lines = len(self.columns), rows.data, line + rows.lines
        good = rows.fields == width
        if not good.all():
            starts = np.append(0, rows.ends[:-1])
            faulty = [n for n in np.flatnonzero(~good) if data[starts[n] : rows.ends[n]].strip()]
            fields = rows.fields[faulty]
            for problem, chosen in (
                ("more fields than the header has", fields > width),
                ("fewer fields than the header has", (fields < width) & (fields > 0)),
                ("quotes that do not enclose a field", fields == 0),
            ):
                if chosen.any():
                    first = faulty[int(np.argmax(chosen))]
                    counted = f" ({rows.fields[first]}, not {width})" if rows.fields[first] else ""
                    bad.add(problem, int(chosen.sum()), f"{self.path}, line {lines[first]}: {problem}{counted}")
            data = b"".join(data[start:end] for start, end in zip(starts[good], rows.ends[good]))
        if not good.any():
            return
        try:
            frame = pl.read_csv(
                data, has_header=False, separator=self.separator, quote_char='"' if self.quoting else None,
                infer_schema=False, columns=wanted,
            )  # fmt: skip
        except pl.exceptions.PolarsError as error:
            try:
                data.decode()
            except UnicodeDecodeError as position:
                number = int(np.searchsorted(rows.ends, position.start, side="right")) if good.all() else 0
                raise not_utf8(self.path, lines[number]) from error
            raise
        if frame.height != good.sum():
            raise ValueError(
                f"{self.path}, after line {line}: {frame.height} rows where {good.sum()} were counted; is this a text "
                f"file of values separated by {self.separator!r}?"
            )
        frame.columns = list(map(str, wanted))
        yield frame.with_columns(row=pl.Series(lines[good], dtype=pl.Int64))


@dataclass
class _Rows:
    """
    The complete rows at the start of a block: their bytes as `data`, and for each row where it `ends` in it, how many
    `fields` it has (0: it is malformed) and the place of its line among the block's `lines`. `used` bytes of the block
    made them.
    """

    data: bytes
    ends: np.ndarray
    fields: np.ndarray
    lines: np.ndarray
    used: int


class _Syntax:
    """What separates fields and rows."""

    def __init__(self, separator: bytes, quoting: bool) -> None:
        self.separator, self.quoting = separator, quoting
        mark = re.escape(separator)
        quoted = rb'"[^"]*+(?:""[^"]*+)*+'
        plain = rb"[^%s\n]*+" % mark
        field = rb'(?:%s"|(?!")%s)' % (quoted, plain) if quoting else plain
        self._field = re.compile(field)
        self.row = re.compile(rb"%s(?:%s%s)*+\r?\n" % (field, mark, field))
        self._open_quote = re.compile(rb'(?:%s%s)*+%s(?:"\r?)?\Z' % (field, mark, quoted))

    def fields(self, row: bytes) -> list[bytes]:
        """The fields of a well-formed row, with their quotes."""
        row, fields, place = row.removesuffix(b"\n").removesuffix(b"\r"), [], 0
        while True:
            field = self._field.match(row, place)
            fields.append(field[0])
            if field.end() == len(row):
                return fields
            place = field.end() + 1

    def split(self, block: bytes, *, last: bool) -> _Rows | None:
        """The rows of a block that begins with one; `None` if a row is longer than any may be."""
        array = np.frombuffer(block, np.uint8)
        quoted = self.quoting and b'"' in block
        if quoted and (last or self._quotes_are_irregular(array)):
            return self._split_one_by_one(block, last)
        places = _concatenate(self._marks(array, quoted))
        row_ends = np.flatnonzero(array[places] == _NEWLINE)
        ends = places[row_ends] + 1
        used = int(ends[-1]) if ends.size else 0
        if len(block) - used > LONGEST_ROW:
            return self._split_one_by_one(block, last) if quoted else None
        lines = np.arange(ends.size)
        if quoted:
            newlines = _concatenate(_places(array, _NEWLINE))
            lines = np.searchsorted(newlines, np.append(0, ends[:-1])[: ends.size])
        return _Rows(block[:used], ends, np.diff(row_ends, prepend=-1), lines, used)

    def _marks(self, array: np.ndarray, quoted: bool) -> Iterator[np.ndarray]:
        """The places of separators and of row ends, those inside quotes aside."""
        inside = False
        for start, piece in _pieces(array):
            mark = (piece == _NEWLINE) | (piece == ord(self.separator))
            if quoted:
                within = np.logical_xor.accumulate(piece == _QUOTE) ^ inside
                mark &= ~within
                inside = within[-1]
            yield np.flatnonzero(mark) + start

    def _quotes_are_irregular(self, array: np.ndarray) -> bool:
        """Whether a quote is neither at the start or end of a field nor one of a pair."""
        quotes = _concatenate(_places(array, _QUOTE))
        opening, closing = quotes[0::2], quotes[1::2]
        limits = np.frombuffer(self.separator + b'\n"', np.uint8)
        after = closing[closing + 1 < array.size] + 1
        after = after[~np.isin(array[after], limits)]  # what is left may be the \r of a row that ends with \r\n
        next_to_last = after + 1 < array.size
        ends = (array[after] == _RETURN) & (
            array[np.where(next_to_last, after + 1, after)] == _NEWLINE
        ) | ~next_to_last
        return not (np.isin(array[opening[opening > 0] - 1], limits).all() and ends.all())

    def _split_one_by_one(self, block: bytes, last: bool) -> _Rows | None:
        """As `split`, for blocks with quotes in odd places: slower, and each quote in a plain field is doubled."""
        place, line = 0, 0
        pieces, fields, lines = [], [], []
        while place < len(block):
            match = self.row.match(block, place)
            if match is None:
                end = block.find(b"\n", place) + 1
                waits = not last and (not end or self._open_quote.match(block, place) is not None)
                if waits and len(block) - place <= LONGEST_ROW:
                    break
                if not end:
                    return None
                piece, count = block[place:end], 0
            else:
                end, piece = match.end(), match[0]
                if b'"' in piece:
                    parts = self.fields(piece)
                    piece, count = self.separator.join(map(_quoted, parts)) + b"\n", len(parts)
                else:
                    count = piece.count(self.separator) + 1
            pieces.append(piece)
            fields.append(count)
            lines.append(line)
            line += block.count(b"\n", place, end)
            place = end
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        return _Rows(b"".join(pieces), ends, np.array(fields, np.int64), np.array(lines, np.int64), place)


def _pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((start, array[start : start + _PIECE]) for start in range(0, array.size, _PIECE))


def _places(array: np.ndarray, byte: int) -> Iterator[np.ndarray]:
    return (np.flatnonzero(piece == byte) + start for start, piece in _pieces(array))


def _concatenate(places: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *places])


def _quoted(field: bytes) -> bytes:
    return b'"' + field.replace(b'"', b'""') + b'"' if b'"' in field and not field.startswith(b'"') else field


def _unquoted(field: bytes) -> bytes:
    return field[1:-1].replace(b'""', b'"') if field.startswith(b'"') else field
