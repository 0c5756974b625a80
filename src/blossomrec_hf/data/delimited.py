"""Values between separators. Every row is checked before Polars reads it, because Polars would shift rows that are too long."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import polars as pl

from .text_files import BOM, LONGEST_ROW, BadRows, LogFile, not_utf8, read_blocks, too_long, with_end


_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_PIECE = 1 << 18  # bytes per step: they and what is derived from them fit into the cache of a processor


class DelimitedFile:
    """
    A text file of rows with a separator between fields.

    If `quoting` is set, a field that begins with a quote ends with one; any other quote is a character of its field.

    Args:
        file ([`LogFile`]): the file.
        separator (`str`): one ASCII character.
        quoting (`bool`): whether fields may be in double quotes.
        columns (*optional*): names of the columns of a file without a header; by default, the first row names them.

    Attributes:
        columns (`list[str]`): the names of the columns.

    Raises:
        ValueError: if the header is missing.
        OSError: if a compressed file is damaged.
    """

    def __init__(self, file: LogFile, separator: str, *, quoting: bool, columns: Sequence[str] | None = None) -> None:
        self.file, self.separator, self.quoting = file, separator, quoting
        self._syntax = _Syntax(separator.encode(), quoting)
        with file.open() as text, file.damage_named():
            block = text.read(1 << 20) + b"\n"
        self._start, self._first_line = len(BOM) if block.startswith(BOM) else 0, 1
        self._has_header = columns is None
        if columns is not None:
            self.columns = list(columns)
            return
        start = self._start
        while (header := self._syntax.row.match(block, start)) and not header[0].strip():
            start = header.end()
        if header is None or separator.encode() not in header[0]:
            line = block[start : start + 80].decode("utf-8", "replace").splitlines()[:1]
            raise ValueError(
                f"{file} has no header of names separated by {separator!r} (first line {''.join(line)!r}); name its separator "
                "with separator=…, or, if its first row is an event, its columns with columns=…"
            )
        self.columns = [_unquoted(name).decode("utf-8", "replace") for name in self._syntax.fields(header[0])]
        self._start, self._first_line = header.end(), 1 + block.count(b"\n", 0, header.end())

    def read(self, wanted: Sequence[int], bad: BadRows) -> Iterator[pl.DataFrame]:
        """
        Yields the rows in blocks, without blank ones. Rows with more or fewer fields than columns go to `bad`.

        Args:
            wanted: the positions of the columns to read.

        Yields:
            `polars.DataFrame`: `row` (int64, from 1), the line on which a row begins, and for each of `wanted` a column
            of strings, named "0", "1" … by position.

        Raises:
            ValueError: see [`BadRows`]; also if a text is not of the file's encoding, or a row is longer than 16 MiB.
            OSError: if a compressed file is damaged.
        """
        rest, line, wanted = b"", self._first_line, sorted(set(wanted))
        for block in chain(with_end(read_blocks(self.file, self._start)), [b""]):
            data = rest + block
            rows = self._syntax.split(data, last=not block)
            if rows is None:
                raise too_long(self.file, line)
            yield from self._frames(rows, line, wanted, bad)
            rest, line = data[rows.used :], line + data.count(b"\n", 0, rows.used)

    def _frames(self, rows: "_Rows", line: int, wanted: Sequence[int], bad: BadRows) -> Iterator[pl.DataFrame]:
        """One frame of the good rows, or none."""
        expected = "the header has" if self._has_header else "columns= names"
        width, data, lines = len(self.columns), rows.data, line + rows.lines
        good = rows.fields == width
        if not good.all():
            starts = np.append(0, rows.ends[:-1])
            faulty = [n for n in np.flatnonzero(~good) if data[starts[n] : rows.ends[n]].strip()]
            fields = rows.fields[faulty]
            for problem, chosen in (
                (f"more fields than {expected}", fields > width),
                (f"fewer fields than {expected}", (fields < width) & (fields > 0)),
                ("quotes that do not enclose a field", fields == 0),
            ):
                if chosen.any():
                    first = faulty[int(np.argmax(chosen))]
                    counted = f" ({rows.fields[first]}, not {width})" if rows.fields[first] else ""
                    bad.add(problem, int(chosen.sum()), f"{self.file}, line {lines[first]}: {problem}{counted}")
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
                raise not_utf8(self.file, lines[number]) from error
            raise
        if frame.height != good.sum():
            raise ValueError(
                f"{self.file}, after line {line}: {frame.height} rows where {good.sum()} were counted; is this a text "
                f"file of values separated by {self.separator!r}?"
            )
        frame.columns = list(map(str, wanted))
        yield frame.with_columns(row=pl.Series(lines[good], dtype=pl.Int64))


@dataclass
class _Rows:
    """
    The complete rows at the start of a block.

    Args:
        data (`bytes`): the bytes of the rows.
        ends (int64 [rows]): where each row ends in `data`.
        fields (int64 [rows]): the number of fields of each row; 0 if it is malformed.
        lines (int64 [rows]): the line on which each row begins, from 0.
        used (`int`): the number of bytes of the block that the rows are made of.
    """

    data: bytes
    ends: np.ndarray
    fields: np.ndarray
    lines: np.ndarray
    used: int


class _Syntax:
    """The syntax of rows and fields."""

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
        """The fields of a well-formed row, including their quotes."""
        row, fields, place = row.removesuffix(b"\n").removesuffix(b"\r"), [], 0
        while True:
            field = self._field.match(row, place)
            fields.append(field[0])
            if field.end() == len(row):
                return fields
            place = field.end() + 1

    def split(self, block: bytes, *, last: bool) -> _Rows | None:
        """The rows of a block that begins with a row; `None` if a row is longer than `LONGEST_ROW`."""
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
        """The positions of separators and row ends outside of quotes."""
        inside = False
        for start, piece in _pieces(array):
            mark = (piece == _NEWLINE) | (piece == ord(self.separator))
            if quoted:
                within = np.logical_xor.accumulate(piece == _QUOTE) ^ inside
                mark &= ~within
                inside = within[-1]
            yield np.flatnonzero(mark) + start

    def _quotes_are_irregular(self, array: np.ndarray) -> bool:
        """Whether a quote is neither at the start or end of a field nor one of two."""
        quotes = _concatenate(_places(array, _QUOTE))
        opening, closing = quotes[0::2], quotes[1::2]
        limits = np.frombuffer(self.separator + b'\n"', np.uint8)
        after = closing[closing + 1 < array.size] + 1
        after = after[~np.isin(array[after], limits)]  # the remaining bytes may be the \r of \r\n
        next_to_last = after + 1 < array.size
        ends = (array[after] == _RETURN) & (
            array[np.where(next_to_last, after + 1, after)] == _NEWLINE
        ) | ~next_to_last
        return not (np.isin(array[opening[opening > 0] - 1], limits).all() and ends.all())

    def _split_one_by_one(self, block: bytes, last: bool) -> _Rows | None:
        """`split` for blocks with quotes inside of fields: slower, and each quote in a plain field is doubled."""
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
