"""Text files, read in blocks of whole rows: memory is bounded, and no row is shifted, cut or merged without a word."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import polars as pl


BLOCK_BYTES = 1 << 25
LONGEST_ROW = 1 << 24  # bytes
LARGEST_EXPANSION = 200  # of a gzip file; logs reach about 20
EXPANSION_CHECKED_FROM = 1 << 26  # bytes
BOM = b"\xef\xbb\xbf"


@dataclass
class BadRows:
    """What happens to rows that cannot be used: the first one is an error, or, with `skip`, all are dropped and counted."""

    skip: bool = False
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, reason: str, count: int, first: str) -> None:
        """
        Adds `count` rows that are bad for one `reason`.

        Args:
            reason (`str`): for the report, such as "no user id".
            first (`str`): where the first one is and what is wrong with it, for the error.

        Raises:
            `ValueError`: bad rows are not skipped.
        """
        if not self.skip:
            raise ValueError(f'{first}. Correct the log, or pass on_bad_rows="skip" to drop and count such rows.')
        self.reasons[reason] += count


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed with gzip, by its name or its first bytes."""
    with open(path, "rb") as file:
        return path.suffix == ".gz" or file.read(2) == b"\x1f\x8b"


def open_text(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if is_gzip(path) else open(path, "rb")


def incomplete_gzip(path: Path, error: Exception) -> OSError:
    return OSError(f"{path} can not be read to its end: it is no complete gzip file ({error}); fetch it again.")


GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


def first_lines(path: Path, count: int) -> list[str]:
    """
    The first lines of a text file, gzip or not, without blank ones.

    Raises:
        `OSError`: a gzip file that is none or is cut off.
    """
    with open_text(path) as file:
        try:
            lines = [file.readline(1 << 20).decode("utf-8", "replace").rstrip("\r\n") for _ in range(count)]
        except GZIP_ERRORS as error:
            raise incomplete_gzip(path, error) from error
    return [line.lstrip("\ufeff") for line in lines if line.strip()] or [""]


def read_blocks(path: Path, start: int = 0) -> Iterator[bytes]:
    """The bytes of a file from `start` on, decompressed, in blocks of `BLOCK_BYTES`."""
    largest = max(path.stat().st_size * LARGEST_EXPANSION, EXPANSION_CHECKED_FROM) if is_gzip(path) else None
    total = 0
    with open_text(path) as file:
        try:
            file.seek(start)
            while block := file.read(BLOCK_BYTES):
                total += len(block)
                if largest is not None and total > largest:
                    raise ValueError(
                        f"{path} expands to more than {LARGEST_EXPANSION} times its size, as no log does; unpack it "
                        "with gunzip if it is one."
                    )
                yield block
        except GZIP_ERRORS as error:
            raise incomplete_gzip(path, error) from error


def read_lines(path: Path) -> Iterator[pl.DataFrame]:
    """
    The lines of a text file in blocks, without blank ones.

    Yields:
        `polars.DataFrame`: `row` (int64, the number of the line, from 1) and `line` (string, without its end).

    Raises:
        `ValueError`: a line that is no UTF-8 or longer than 16 MiB.
    """
    rest, line = b"", 1
    for block in with_end(read_blocks(path)):
        block = block.removeprefix(BOM) if line == 1 and not rest else block
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if len(rest) > LONGEST_ROW:
            raise too_long(path, line + block.count(b"\n", 0, end))
        if not end:
            continue
        try:
            text = str(memoryview(block)[: end - 1], "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, line + block.count(b"\n", 0, error.start)) from error
        lines = pl.Series("line", [text]).str.split("\n").explode().str.strip_suffix("\r")
        frame = pl.DataFrame({"row": pl.int_range(line, line + len(lines), eager=True), "line": lines})
        line += len(lines)
        yield frame.filter(pl.col("line").str.strip_chars() != "")


def with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """`blocks`, and the end of a last line that has none."""
    last = b"\n"
    for last in blocks:
        yield last
    if not last.endswith(b"\n"):
        yield b"\n"


def too_long(path: Path, line: int) -> ValueError:
    return ValueError(f"{path}, line {line}: longer than {LONGEST_ROW >> 20} MiB; is this a log, a row a line?")


def not_utf8(path: Path, line: int) -> ValueError:
    return ValueError(f"{path} can not be read to its end: line {line} is not UTF-8; convert the file to UTF-8.")
