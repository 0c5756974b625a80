"""
Atomic writes of files and folders: a reader finds the old one or the new one, complete, whenever a writer is killed.

A file is replaced by one rename. A folder needs two, because a rename does not replace a folder with files in it: the
old one gets a hidden name, then the new one gets its place. After a kill in between, `recover_folder` gives the old one its
name back; whatever opens such a folder calls it first.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The cache and the checkpoint write files too. They travel with a checkpoint and cannot import this package, so what they
# need is in a file that travels; it imports nothing but the standard library.
from ..model.files_blossomrec import atomic_write, flush_to_disk, partial_path, partials, remove, remove_leftovers


logger = logging.getLogger(__name__)

_FORMER = ".former"


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a new folder to write into, and puts it in the place of `path` at the end of the block.

    If the block raises, nothing of the new folder remains and the old one is untouched.

    Args:
        path: the folder, which may exist; a symbolic link to one is followed. Missing parents are made.

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
        _flush_folder(partial)
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
    Yields a new folder to write files into, and moves each into `folder` at the end of the block; other files there stay.

    If the block raises, nothing has changed in `folder`. A kill at the end leaves some of the new files, each complete. They
    are moved in the order of their names: the manifest of a checkpoint before its configuration, tokenizer and weights, so
    that a mixture of two checkpoints is refused.

    Raises:
        ValueError: if `folder` is a file.
        OSError: if the disk is full, or a file cannot be written for another reason.
    """
    folder = Path(os.path.realpath(folder))
    require_folder(folder)
    recover_folder(folder)
    is_new = not folder.exists()
    files = (
        folder / "files"
    )  # inside, because `folder` may be a file system of its own, such as a volume of a container
    partial = partial_path(files)
    partial.mkdir(parents=True)
    remove_leftovers(files)
    try:
        yield partial
        _flush_folder(partial)
        for path in sorted(partial.iterdir()):
            os.replace(path, folder / path.name)
        flush_to_disk(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # another process has written to it
                folder.rmdir()
        raise
    partial.rmdir()


def _flush_folder(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            flush_to_disk(Path(parent, name))
        flush_to_disk(Path(parent))


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}{_FORMER}")


def _replace_folder(partial: Path, path: Path) -> None:
    while True:
        try:
            if path.exists():
                remove_folder(_former(path))  # of a write that was killed after its second rename
                os.rename(path, _former(path))
            os.rename(partial, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not partial.exists():
                raise
            # Another writer, or `recover_folder`, renamed one of the folders in between; so once more.


def recover_folder(path: str | os.PathLike) -> None:
    """Gives the folder that was `path` its name back, if a writer was killed between the two renames."""
    path = Path(os.path.realpath(path))
    if not path.exists() and _former(path).is_dir():
        with suppress(FileNotFoundError):  # another reader was faster
            os.rename(_former(path), path)


def recover_writes(parent: str | os.PathLike) -> None:
    """Recovers every folder in `parent` and removes what killed writes left; nobody else may be writing there."""
    parent = Path(parent)
    if not parent.is_dir():
        return
    for former in sorted(parent.glob(f".*{_FORMER}")):
        recover_folder(parent / former.name[1:].removesuffix(_FORMER))
        remove_folder(former)
    for partial in partials(parent):
        remove(partial)


def remove_folder(path: Path) -> None:
    """Removes a folder, if it exists. After a kill the whole of it has its name, or nothing has."""
    with suppress(FileNotFoundError):
        partial = partial_path(path)
        os.rename(path, partial)
        shutil.rmtree(partial, ignore_errors=True)


def require_folder(path: str | os.PathLike) -> None:
    """
    Refuses an output folder that cannot be one, before any work.

    Raises:
        ValueError: if `path`, or one of its parents, is a file.
    """
    path = Path(path)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"The output folder {path} cannot be made because {place} is a file; give another path.")


def report_leftovers(path: str | os.PathLike) -> None:
    """Removes what writes of `path` left that were killed more than a day ago, and logs what is younger."""
    path = Path(os.path.realpath(path))
    remove_leftovers(path)
    for partial in partials(path.parent, path.name) if path.parent.is_dir() else ():
        logger.warning(
            "%s is from another write of %s that is running or was killed. If none is running, you can remove it; a write "
            "after a day does.",
            *(partial, path),
        )


def make_scratch(path: str | os.PathLike | None) -> Path:
    """
    Makes a hidden folder next to `path`, on the same disk, for what a write of `path` needs meanwhile. The caller removes
    it; after a kill, `report_leftovers` does. `None` is for the system's folder of temporary files.
    """
    if path is None:
        return Path(tempfile.mkdtemp(prefix="blossomrec-"))
    scratch = partial_path(Path(os.path.realpath(path)))
    scratch.mkdir(parents=True)
    return scratch


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """
    The content of a JSON file, a `dict` or a `list`.

    Raises:
        ValueError: for a file that is no JSON, or has something else.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); write it again, or give another.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} has a {type(content).__name__} where a {kind.__name__} must be; give another file.")
    return content


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file atomically. What JSON lacks becomes its `str`."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


__all__ = [
    "atomic_files",
    "atomic_folder",
    "atomic_write",
    "make_scratch",
    "read_json",
    "recover_folder",
    "recover_writes",
    "remove_folder",
    "report_leftovers",
    "require_folder",
    "write_json",
]
