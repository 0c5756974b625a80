"""Atomic writes of files, for the code that travels with a checkpoint; `utils/files.py` adds folders."""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


PARTIAL = ".partial"
LEFTOVER_SECONDS = 24 * 3600  # a partial file that nobody has written to for so long is the leftover of a kill


def partial_path(path: Path) -> Path:
    """A new hidden name next to `path`, on the same file system, for what is being written."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk (`fsync`)."""
    posix = os.name == "posix"
    if path.is_dir() and not posix:  # Windows opens no folders
        return
    file = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_leftovers(path: Path) -> None:
    """Removes what killed writes of `path` left more than a day ago. A younger one may still be written to."""
    if not path.parent.is_dir():
        return

    def is_old(file: Path) -> bool:
        return file.stat().st_mtime < time.time() - LEFTOVER_SECONDS

    for child in partials(path.parent, path.name):
        with suppress(FileNotFoundError):  # another process was faster
            if is_old(child) and all(map(is_old, child.rglob("*"))):
                remove(child)


def partials(folder: Path, name: str | None = None) -> list[Path]:
    """What is being written to `folder`, or was when a process was killed; with `name`, in the place of that alone."""
    found = [(child, _name_of_partial(child.name)) for child in folder.iterdir()]
    return [child for child, of in found if of is not None and name in (None, of)]


def _name_of_partial(partial: str) -> str | None:
    """What a hidden name of `partial_path` stands for, also if that was hidden itself; `None` for other names."""
    name = None
    while match := re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(PARTIAL)}", name or partial, re.DOTALL):
        name = match[1]
    return name


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a path to write a file to, and renames it to `path` at the end of the block.

    Whenever the process is killed, `path` is the old file or the new one, whole. If the block raises, nothing of the new
    one remains. Processes that write one path at a time do not disturb each other: the last one wins.

    Args:
        path: the file; a symbolic link is followed. Its folder must exist.

    Raises:
        ValueError: if `path` is a folder.
        OSError: if the disk is full, or the file cannot be written for another reason.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"`path` {path} is a folder; give the name of a file.")
    if not path.parent.is_dir():  # some libraries have errors of their own for this
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    remove_leftovers(path)
    partial = partial_path(path)
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)
