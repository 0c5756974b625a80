"""Atomic writes of files. They travel with a checkpoint; `utils/files.py` adds atomic writes of folders."""

import errno
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


PARTIAL = ".partial"
LEFTOVER_SECONDS = 24 * 3600  # a partial file of this age was left by a killed process


def partial_path(path: Path) -> Path:
    """A new hidden path next to `path`, on the same file system, for an unfinished write."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (`fsync`)."""
    posix = os.name == "posix"
    if path.is_dir() and not posix:  # Windows cannot open folders
        return
    file = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def usual_mode(path: Path) -> int:
    """The permissions of a new file under the process's umask; a file `path` is created and removed for that."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def remove_leftovers(path: Path) -> None:
    """Remove partial files and folders of killed writes of `path`, if they are older than a day."""
    if not path.parent.is_dir():
        return

    def is_old(file: Path) -> bool:
        return file.stat().st_mtime < time.time() - LEFTOVER_SECONDS

    for child in partials(path.parent, path.name):
        with suppress(FileNotFoundError):  # another process removed it
            if is_old(child) and all(map(is_old, child.rglob("*"))):
                remove(child)


def partials(folder: Path, name: str | None = None) -> list[Path]:
    """The partial files and folders of unfinished writes to `folder`, or of the entry `name` alone."""
    found = [(child, _name_of_partial(child.name)) for child in folder.iterdir()]
    return [child for child, of in found if of is not None and name in (None, of)]


def _name_of_partial(partial: str) -> str | None:
    """The name for which `partial_path` made the name `partial`, itself hidden or not; `None` for other names."""
    name = None
    while match := re.fullmatch(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(PARTIAL)}", name or partial, re.DOTALL):
        name = match[1]
    return name


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a path to write a file to, and rename it to `path` at the end of the block. It gets the usual permissions of new
    files, where safetensors 0.8 writes files that other users cannot read.

    If the process is killed, `path` is the complete old or new file. If the block raises an error, the new file is
    removed. Several processes may write the same path; the last rename wins.

    Args:
        path: the file. Symbolic links are followed. Its folder must exist.

    Raises:
        ValueError: if `path` is a folder.
        OSError: if the disk is full, or the file cannot be written for another reason.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"`path` {path} is a folder; give the name of a file.")
    if not path.parent.is_dir():  # some libraries raise their own errors for this
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    remove_leftovers(path)
    partial = partial_path(path)
    try:
        mode = usual_mode(partial)
        yield partial
        partial.chmod(mode)
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """
    Read a JSON file with an object (`dict`) or a `list`.

    Raises:
        ValueError: if the file is no JSON, or has a value of another type.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        problem = f"it has a {type(content).__name__} instead of a {kind.__name__}"
    except (ValueError, RecursionError) as error:
        content, problem = None, f"it is no JSON file ({error})"
    if not isinstance(content, kind):
        raise ValueError(
            f"{path} is damaged: {problem}; save it again, download it again (`force_download=True`), or give another file."
        )
    return content
