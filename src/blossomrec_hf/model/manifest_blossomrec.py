"""
The manifest of a checkpoint: the SHA-256 of each saved file, compared when the checkpoint is loaded.

It detects accidents: damaged downloads, files of two checkpoints in one folder, files that a tool rewrote. It does not
protect from an attacker, who can change the manifest as well. With `trust_remote_code=True`, the code of a repository runs
before its hash is compared; only `revision=` with the hash of a commit that you have read protects from that.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

from .files_blossomrec import atomic_write, read_json


MANIFEST_NAME = "checkpoint_manifest.json"
CONFIG_NAMES = ("config.json", "generation_config.json")
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index(\.\w+)?\.json)?")
REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # without them, `transformers` would guess
# The arguments of `from_pretrained` that locate a file.
FINDING = ("cache_dir", "force_download", "local_files_only", "token", "subfolder")
LENIENT = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: str | os.PathLike, name: str) -> Path:
    """
    The path of a file that a checkpoint names.

    Raises:
        ValueError: if the name has a folder in it, or is a symbolic link to a file outside of `folder`. The links of the
            cache of the Hub are followed.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"The checkpoint in {os.fspath(folder)} names the file {name!r}; it may only name files of its own folder."
        )
    path = Path(folder) / name
    require_own(Path(folder), path)
    return path


def require_own(folder: Path, path: Path) -> None:
    """Raise a `ValueError` if `path` is a symbolic link to a file outside of `folder`."""
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in homes):
        raise ValueError(
            f"{path} is a symbolic link to {target}, outside of its folder; replace the link by a copy of the file."
        )


def code_files(folder: str | os.PathLike) -> list[str]:
    """The names of the Python files of a checkpoint: those in `auto_map`, and their relative imports."""
    folder = Path(folder)
    wanted: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        pipelines = content.get("custom_pipelines")
        pipelines = pipelines.values() if isinstance(pipelines, dict) else ()
        auto_map = content.get("auto_map")
        auto_map = auto_map.values() if isinstance(auto_map, dict) else ()
        found = [pipeline.get("impl") for pipeline in pipelines if isinstance(pipeline, dict)]
        for value in auto_map:
            found += value if isinstance(value, list) else [value]
        wanted |= {value.rsplit(".", 1)[0] for value in found if isinstance(value, str)}
    files: set[str] = set()
    while wanted:
        name = f"{wanted.pop()}.py"
        if name in files or not _PLAIN_NAME.fullmatch(name) or not (folder / name).is_file():
            continue  # code of another repository ("owner/name--module") is not in the folder
        files.add(name)
        wanted |= set(get_relative_imports(folder / name))
    return sorted(files)


def update_manifest(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Write the hashes of the files `names`, which were just saved to `folder`. Hashes of other files are kept."""
    folder = Path(folder)
    try:
        hashes = _hashes(folder / MANIFEST_NAME)
    except (ValueError, FileNotFoundError):
        hashes = {}
    hashes = {name: digest for name, digest in hashes.items() if (folder / name).is_file()}
    hashes |= {name: sha256(folder / name) for name in names if (folder / name).is_file()}
    with atomic_write(folder / MANIFEST_NAME) as partial:
        partial.write_text(json.dumps({"sha256": dict(sorted(hashes.items()))}, indent=2) + "\n", "utf-8")


def _hashes(path: Path) -> dict[str, str]:
    hashes = read_json(path).get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise ValueError(f"{path} is damaged: it has no hashes; save the checkpoint again.")
    for name in hashes:
        inside(path.parent, name)
    return hashes


def check_manifest(
    path: str | os.PathLike, *, names: Iterable[str] | None = None, revision: str | None = None, **finding: Any
) -> None:
    """
    Compare the files of a checkpoint with the hashes that were saved with them. Of a repository on the Hub, only
    downloaded files are compared. A checkpoint without a manifest is not checked.

    Args:
        path: a folder, or the name of a repository.
        names: the files to compare. If given, those that are required for loading must exist. Defaults to all files.
        revision: the revision of the repository.
        finding: other arguments of `from_pretrained` that locate a file (`FINDING`).

    Raises:
        ValueError: if a file is not the one that was saved, with both hashes, or is missing. A damaged download is removed
            from the cache.
    """
    finding = {name: value for name, value in finding.items() if name in FINDING and value is not None}
    manifest = cached_file(path, MANIFEST_NAME, revision=revision, **finding, **LENIENT)
    if manifest is None:
        return
    finding |= {"force_download": False, "local_files_only": True}
    for name, saved in _hashes(Path(manifest)).items():
        if names is not None and name not in names:
            continue
        file = cached_file(path, name, revision=revision, **finding, **LENIENT)
        if file is None and names is not None and name in REQUIRED:
            raise ValueError(
                f"{os.fspath(path)} has no {name}, which was saved with its other files; copy or download all of them, or "
                "save them again."
            )
        if file is None or (found := sha256(file)) == saved:
            continue
        message = f"{name} of {os.fspath(path)} is not the file that was saved: its SHA-256 is {found}, but "
        message += f"{MANIFEST_NAME} has {saved}. "
        if _remove_damaged_download(Path(file), found):
            raise ValueError(f"{message}The damaged download was removed from the cache; load it again.")
        raise ValueError(
            f"{message}If it was downloaded, load it with `force_download=True`. If you or a tool changed it on purpose "
            "(an editor, or `accelerator.save_model`), load it with `check_files=False` and call `save_pretrained`, which "
            "writes a new manifest."
        )


def _remove_damaged_download(file: Path, digest: str) -> bool:
    """Remove a file from the cache of the Hub if its hash is not the one on the Hub, which is the name of its blob."""
    blob = Path(os.path.realpath(file))
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.name == digest:
        return False
    file.unlink()
    blob.unlink()
    return True


class ManifestMixin:
    """
    Write the manifest before `transformers` uploads a folder: `save_pretrained(push_to_hub=True)` of a configuration, model
    or tokenizer uploads before it returns.
    """

    def _write_manifest(self, folder: str | os.PathLike) -> None:
        """Write the hashes of the files that `save_pretrained` saves to the manifest of `folder`."""
        raise NotImplementedError

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self._write_manifest(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def require_loadable(saved: type) -> None:
    """
    Refuse to save an object of a class that cannot be imported, because a checkpoint could not name it.

    Raises:
        ValueError: if the class is defined in a script, a notebook or a function, or its module is not an imported file.
    """
    if saved.__module__ == "__main__" or "<locals>" in saved.__qualname__:
        place = "a script, a notebook or a function"
    elif getattr(sys.modules.get(saved.__module__), "__file__", None) is None:
        place = f"{saved.__module__!r}, which is not an imported file"
    else:
        return
    raise ValueError(
        f"`{saved.__qualname__}` is defined in {place}, so a checkpoint could not be loaded; move the class to a module of "
        "its own (a .py file) and import it from there."
    )
