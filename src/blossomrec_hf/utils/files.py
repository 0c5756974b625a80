"""
Atomic writes of files and folders: if a writer is killed, readers find the complete old or new version.

A file is replaced by one rename. A folder needs two renames, because a rename cannot replace a folder that is not empty:
the old folder is hidden, then the new one is renamed. After a kill between the two, `recover_folder` restores the old
folder. Readers of a folder that `atomic_folder` writes call it first.
"""

import errno
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The code that travels with a checkpoint writes files too, and cannot import this module. The shared part is in a file that
# travels and imports only the standard library.
from ..model.files_blossomrec import (
    atomic_write,
    flush_to_disk,
    partial_path,
    partials,
    read_json,
    remove,
    remove_leftovers,
    usual_mode,
)


logger = logging.getLogger(__name__)

_FORMER = ".former"


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a new folder to write to, and replace `path` by it at the end of the block.

    If the block raises an error, the new folder is removed and the old one is unchanged.

    Args:
        path: the folder, which may exist. Symbolic links are followed. Missing parents are created.

    Raises:
        ValueError: if `path` is a file.
        OSError: if the disk is full, or the folder cannot be written for another reason.
    """
    path = Path(os.path.realpath(path))
    require_folder(path)
    recover_folder(path)
    remove_leftovers(path)
    partial = partial_path(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        _finish_files(partial)
        _replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        recover_folder(path)
        raise
    flush_to_disk(path.parent)
    remove_folder(_former(path))


@contextmanager
def atomic_files(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a new folder to write files to, and move each file to `folder` at the end of the block. Other files there stay.

    If the block raises an error, `folder` is unchanged. A kill at the end can leave only some of the new files, each
    complete. Files are moved in the order of their names: the manifest of a checkpoint before its configuration, tokenizer
    and weights, so a mixture of two checkpoints does not load.

    Args:
        folder: the folder, which may exist. Symbolic links are followed.

    Raises:
        ValueError: if `folder` is a file.
        OSError: if the disk is full, or a file cannot be written for another reason.
    """
    folder = Path(os.path.realpath(folder))
    require_folder(folder)
    recover_folder(folder)
    is_new = not folder.exists()
    files = folder / "files"  # inside, because `folder` may be the root of a file system, such as a container's volume
    partial = partial_path(files)
    partial.mkdir(parents=True)
    remove_leftovers(files)
    try:
        yield partial
        _finish_files(partial)
        for path in sorted(partial.iterdir()):
            os.replace(path, folder / path.name)
        flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # another process wrote to it
                folder.rmdir()
        raise
    partial.rmdir()


def _finish_files(folder: Path) -> None:
    """Give all files below a folder the usual permissions, and flush everything to the disk."""
    mode = usual_mode(folder / ".mode")
    for parent, _, names in os.walk(folder):
        for name in names:
            Path(parent, name).chmod(mode)
            flush_to_disk(Path(parent, name))
        flush_to_disk(Path(parent))


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}{_FORMER}")


def _replace_folder(partial: Path, path: Path) -> None:
    while True:
        try:
            if path.exists():
                remove_folder(_former(path))  # left by a write that was killed after its second rename
                os.rename(path, _former(path))
            os.rename(partial, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not partial.exists():
                raise
            # Another writer, or `recover_folder`, renamed one of the folders in the meantime; try again.


def recover_folder(path: str | os.PathLike) -> None:
    """Restore the folder `path`, if a writer was killed between its two renames."""
    path = Path(os.path.realpath(path))
    if not path.exists() and _former(path).is_dir():
        with suppress(FileNotFoundError):  # another reader restored it
            os.rename(_former(path), path)


def recover_writes(parent: str | os.PathLike) -> None:
    """Restore all folders in `parent` and remove partial files of killed writes. No other process may write there."""
    parent = Path(parent)
    if not parent.is_dir():
        return
    for former in sorted(parent.glob(f".*{_FORMER}")):
        recover_folder(parent / former.name[1:].removesuffix(_FORMER))
        remove_folder(former)
    for partial in partials(parent):
        remove(partial)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists. If the process is killed, the folder is either complete or gone."""
    with suppress(FileNotFoundError):
        partial = partial_path(path)
        os.rename(path, partial)
        shutil.rmtree(partial, ignore_errors=True)


def require_folder(path: str | os.PathLike) -> None:
    """
    Check that an output folder can be created, before any work.

    Raises:
        ValueError: if `path`, or one of its parents, is a file.
    """
    path = Path(path)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"The output folder {path} cannot be created because {place} is a file; give another path."
            )


def report_leftovers(path: str | os.PathLike) -> None:
    """Remove partial files of writes of `path` that were killed more than a day ago, and log the others."""
    path = Path(os.path.realpath(path))
    remove_leftovers(path)
    for partial in partials(path.parent, path.name) if path.parent.is_dir() else ():
        logger.warning(
            "%s belongs to another write of %s, which is running or was killed. If none is running, you can remove it; a "
            "write that starts after a day removes it.",
            *(partial, path),
        )


def make_scratch(path: str | os.PathLike | None) -> Path:
    """
    Create a hidden folder next to `path`, on the same disk, for temporary files of a write of `path`. The caller removes it;
    after a kill, `report_leftovers` does. For `None`, the folder is in the system's temporary folder.
    """
    if path is None:
        return Path(tempfile.mkdtemp(prefix="blossomrec-"))
    scratch = partial_path(Path(os.path.realpath(path)))
    scratch.mkdir(parents=True)
    return scratch


def lock_file(path: str | os.PathLike) -> sqlite3.Connection | None:
    """
    Lock a file for this process, until the result is closed or the process ends, also by `kill -9`. The file is created and
    stays. Returns `None` if another process has locked it.

    Raises:
        OSError: if the file cannot be created or locked.
    """
    try:
        lock = sqlite3.connect(path, timeout=0, check_same_thread=False)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return None
        raise OSError(f"{os.fspath(path)} cannot be locked ({error})") from error
    return lock


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file atomically. Values that JSON has no type for are converted by `str`."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


__all__ = [
    "atomic_files",
    "atomic_folder",
    "atomic_write",
    "lock_file",
    "make_scratch",
    "read_json",
    "recover_folder",
    "recover_writes",
    "remove_folder",
    "report_leftovers",
    "require_folder",
    "write_json",
]
