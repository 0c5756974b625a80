"""Files of a log on any file system, and text files in blocks of whole rows: memory is bounded, and no row is altered silently."""

import codecs
import glob
import gzip
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote

import fsspec
import polars as pl
import pyarrow as pa


BLOCK_BYTES = 1 << 25
LONGEST_ROW = 1 << 24  # bytes
LARGEST_EXPANSION = 200  # of a compressed file; logs reach about 20
EXPANSION_CHECKED_FROM = 1 << 26  # bytes
BOM = codecs.BOM_UTF8

_NO_KEY = "__HIVE_DEFAULT_PARTITION__"  # what Hive and Spark write for a missing value
_SAMPLE_BYTES = 1 << 18  # by which an encoding is recognized
_COMPRESSION_MARKS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSION_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_READ_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


@dataclass
class BadRows:
    """The treatment of rows that cannot be read: the first one is an error, or, with `skip`, all are dropped and counted."""

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
            first (`str`): location and problem of the first one, for the error.

        Raises:
            ValueError: if bad rows are not skipped.
        """
        if not self.skip:
            raise ValueError(f'{first}. Correct the log, or pass on_bad_rows="skip" to drop and count such rows.')
        self.reasons[reason] += count


@dataclass(frozen=True)
class LogFile:
    """
    A file of a log, on this machine or on a file system of `fsspec`.

    Args:
        path (`str`): a path, or a URL such as `s3://bucket/log.csv` or `zip://member.csv::archive.zip`.
        encoding (`str`, *optional*): encoding of the text; by default, recognized from the first bytes.
        partition (`dict`): keys and values of its Hive partition, from folders such as `date=2024-01-01`.
    """

    path: str
    encoding: str | None = None
    partition: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return PurePosixPath(self.path.split("::")[0]).name

    @property
    def suffix(self) -> str:
        """The last suffix in lowercase, without its dot and before one of compression."""
        name = self.name.lower()
        for suffix in _COMPRESSION_SUFFIXES:
            name = name.removesuffix(suffix)
        return name.rsplit(".", 1)[-1]

    @cached_property
    def size(self) -> int:
        """Bytes of the file as it is stored."""
        if self.path.startswith("zip://"):
            return next(member.compress_size for name, member in members(self.path).items() if name == self.path)
        if "://" not in self.path:
            return Path(self.path).stat().st_size
        system, path = fsspec.core.url_to_fs(self.path)
        return int(system.info(path)["size"])

    @cached_property
    def compression(self) -> str | None:
        for suffix, compression in _COMPRESSION_SUFFIXES.items():
            if self.name.endswith(suffix):
                return compression
        if self.path.startswith("zip://"):
            return "zip"
        with self.open_stored() as file:
            start = file.read(4)
        return next((kind for mark, kind in _COMPRESSION_MARKS.items() if start.startswith(mark)), None)

    def open_stored(self) -> BinaryIO:
        """Opens the bytes of the file as they are stored."""
        if self.path.startswith("zip://"):
            member, archive = self.path.removeprefix("zip://").split("::", 1)
            return zipfile.ZipFile(LogFile(archive).open_stored()).open(member)
        return open(self.path, "rb") if "://" not in self.path else fsspec.open(self.path, "rb").open()

    def _open_bytes(self) -> BinaryIO:
        """Opens the decompressed bytes."""
        if self.compression == "gzip":
            return gzip.open(self.open_stored(), "rb")
        if self.compression == "zstd":
            return io.BufferedReader(pa.CompressedInputStream(self.open_stored(), "zstd"))
        return self.open_stored()

    @cached_property
    def text_encoding(self) -> str:
        """
        The encoding of the text: the given one, that of a byte order mark, UTF-8, UTF-16 with ASCII characters, or Latin-1
        if the file is a text of letters outside of ASCII that is no UTF-8.

        Raises:
            OSError: if a compressed file is damaged.
        """
        with self._open_bytes() as file, self.damage_named():
            sample = file.read(_SAMPLE_BYTES)
        if self.encoding is not None:
            return self.encoding
        if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        if len(sample) > 8 and not any(sample[1:200:2]) and all(sample[0:200:2]):
            return "utf-16-le"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(sample)
        except UnicodeDecodeError:
            strange = re.search(rb"[\x00-\x08\x0e-\x1f\x7f-\x9f]", sample)
            return "utf-8" if strange else "latin-1"
        return "utf-8"

    def open(self) -> BinaryIO:
        """
        Opens the text of the file, decompressed and in UTF-8.

        Raises:
            ValueError: if the text is not of the given encoding, while it is read.
        """
        encoding = codecs.lookup(self.text_encoding).name
        file = self._open_bytes()
        return file if encoding in ("utf-8", "utf-8-sig") else io.BufferedReader(_Recoded(file, encoding))

    @contextmanager
    def damage_named(self) -> Iterator[None]:
        """Turns the errors of a file that is damaged, or of another encoding, into a sentence that names it."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self} can not be read to its end: it is not {self.text_encoding} ({error.reason}); name its encoding with "
                "encoding=…"
            ) from error
        except (*_READ_ERRORS, OSError) as error:
            # Arrow reports a damaged file as an OSError without a number.
            if not isinstance(error, _READ_ERRORS) and (error.errno is not None or self.compression != "zstd"):
                raise
            raise OSError(
                f"{self} can not be read to its end: it is no complete {self.compression} file ({error}); fetch it again."
            ) from error


class _Recoded(io.RawIOBase):
    """The text of a file in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding=encoding, newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._rest:
            self._rest = self._text.read(max(len(buffer) // 2, 1)).removeprefix("\ufeff").encode()
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._text.close()
        super().close()


def find_files(source: str, encoding: str | None = None) -> list[LogFile]:
    """
    The files of a path, a folder, a glob pattern (`**` stands for any folders) or a URL of `fsspec`, in the order of their
    names. Of a folder, files in folders such as `date=2024-01-01` count as well; names that begin with `.` or `_` do not.

    Raises:
        ValueError: if a zip archive has several members.
    """
    if source.startswith("zip://"):
        return [LogFile(member, encoding) for member in members(source)]
    is_url, is_pattern = "://" in source, re.search(r"[*?\[]", source) is not None
    if is_url:
        system, root = fsspec.core.url_to_fs(source)
        is_folder = not is_pattern and system.isdir(root)
        paths = system.glob(root) if is_pattern else system.find(root) if is_folder else [root]
        paths = [path for path in paths if system.isfile(path)]
    else:
        root, is_folder = source, Path(source).is_dir()
        is_pattern = is_pattern and not Path(source).exists()
        paths = glob.glob(source, recursive=True) if is_pattern else Path(source).rglob("*") if is_folder else [source]
        paths = [str(path) for path in paths if Path(path).is_file()]
    files = []
    for path in sorted(paths):
        below = PurePosixPath(path).relative_to(root).parts if is_folder else ()
        if any("=" not in folder for folder in below[:-1]) or below[-1:] and below[-1].startswith((".", "_")):
            continue
        folders = (re.fullmatch(r"([A-Za-z_]\w*)=(.*)", folder) for folder in PurePosixPath(path).parts[:-1])
        keys = {key[1]: None if key[2] == _NO_KEY else unquote(key[2]) for key in folders if key}
        path = f"{source.split('://')[0]}://{path.lstrip('/')}" if is_url else path
        files.append(LogFile(_only_member(path) if path.endswith(".zip") else path, encoding, keys))
    return files


def members(url: str) -> dict[str, zipfile.ZipInfo]:
    """
    The members of a zip archive, by their URLs.

    Args:
        url (`str`): `zip://PATTERN::ARCHIVE`, with the name of a member or a glob pattern.

    Raises:
        OSError: if the archive is damaged.
    """
    pattern, archive = url.removeprefix("zip://").split("::", 1)
    try:
        with LogFile(archive).open_stored() as file, zipfile.ZipFile(file) as stored:
            found = [member for member in stored.infolist() if not member.is_dir()]
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive} can not be read: it is no complete zip file ({error}); fetch it again.") from error
    found = [member for member in found if pattern in ("", member.filename) or fnmatch(member.filename, pattern)]
    return {f"zip://{member.filename}::{archive}": member for member in sorted(found, key=lambda x: x.filename)}


def _only_member(archive: str) -> str:
    """
    The URL of the member of a zip archive.

    Raises:
        ValueError: if it has several, with their names.
        OSError: if the archive is damaged.
    """
    found = members(f"zip://::{archive}")
    if len(found) != 1:
        names = [member.filename for member in found.values()]
        raise ValueError(
            f"{archive} has {len(names)} members ({', '.join(names[:20])}); name one of them, such as "
            f"zip://{names[0] if names else 'log.csv'}::{archive}."
        )
    return next(iter(found))


def first_lines(file: LogFile, count: int) -> list[str]:
    """
    The first lines of a text file, without blank ones; one empty line if there is none.

    Raises:
        OSError: if a compressed file is damaged or incomplete.
    """
    with file.open() as text, file.damage_named():
        lines = [text.readline(1 << 20).decode("utf-8", "replace").rstrip("\r\n") for _ in range(count)]
    return [line.lstrip("\ufeff") for line in lines if line.strip()] or [""]


def read_blocks(file: LogFile, start: int = 0) -> Iterator[bytes]:
    """The text of a file in UTF-8 from byte `start` on, in blocks of at most `BLOCK_BYTES`."""
    largest = max(file.size * LARGEST_EXPANSION, EXPANSION_CHECKED_FROM) if file.compression else None
    total = 0
    with file.open() as text, file.damage_named():
        text.read(start)
        while block := text.read(BLOCK_BYTES):
            total += len(block)
            if largest is not None and total > largest:
                raise ValueError(
                    f"{file} expands to more than {LARGEST_EXPANSION} times its size, as no log does; unpack it "
                    "if it is one."
                )
            yield block


def read_lines(file: LogFile) -> Iterator[pl.DataFrame]:
    """
    The lines of a text file in blocks, without blank ones.

    Yields:
        `polars.DataFrame`: `row` (int64, the number of the line, from 1) and `line` (string, without its end).

    Raises:
        ValueError: if a line is not of the file's encoding or is longer than 16 MiB.
    """
    rest, line = b"", 1
    for block in with_end(read_blocks(file)):
        block = block.removeprefix(BOM) if line == 1 and not rest else block
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if len(rest) > LONGEST_ROW:
            raise too_long(file, line + block.count(b"\n", 0, end))
        if not end:
            continue
        try:
            text = str(memoryview(block)[: end - 1], "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(file, line + block.count(b"\n", 0, error.start)) from error
        lines = pl.Series("line", [text]).str.split("\n").explode().str.strip_suffix("\r")
        frame = pl.DataFrame({"row": pl.int_range(line, line + len(lines), eager=True), "line": lines})
        line += len(lines)
        yield frame.filter(pl.col("line").str.strip_chars() != "")


def with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """`blocks`, and a line end if the last line has none."""
    last = b"\n"
    for last in blocks:
        yield last
    if not last.endswith(b"\n"):
        yield b"\n"


def too_long(file: LogFile, line: int) -> ValueError:
    return ValueError(f"{file}, line {line}: longer than {LONGEST_ROW >> 20} MiB; is this a log with a row per line?")


def not_utf8(file: LogFile, line: int) -> ValueError:
    return ValueError(
        f"{file} can not be read to its end: line {line} is not UTF-8; name the encoding of the file, such as "
        'encoding="latin-1", or convert it to UTF-8.'
    )
