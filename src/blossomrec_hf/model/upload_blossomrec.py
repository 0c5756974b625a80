"""Uploads to the Hub: what belongs to a checkpoint, in one commit, and nothing else."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .manifest_blossomrec import CONFIG_NAMES, MANIFEST_NAME, TOKENIZER_NAMES, code_files, require_own


REPO_PLACEHOLDER = "OWNER/NAME"  # what a README.md says before it is known where it goes
WEIGHTS = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index(\.\w+)?\.json)?")
# What a checkpoint is made of, and what is written to go with it. Whatever else is in the folder stays there.
_PUBLIC = re.compile(
    "|".join(
        [
            *map(re.escape, (*CONFIG_NAMES, *TOKENIZER_NAMES, MANIFEST_NAME)),
            r"model[\w.-]*\.safetensors(\.index(\.\w+)?\.json)?",
            r"README\.md|LICENSE(\.\w+)?|NOTICE(\.\w+)?|CITATION\.cff",
            r"training_summary\.json|selection\.png|item_metadata\.parquet|item_index\.(faiss|json)",
            r"adapter/adapter_(config\.json|model\.safetensors)",
        ]
    )
)
_PICTURE = re.compile(r"[\w-][\w.-]*\.(png|jpe?g|svg|gif|webp)")


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """
    The files of a folder that go to the Hub, as paths inside it: configuration, weights (safetensors), tokenizer, the
    code that `auto_map` names and what that imports, card, license, summary of the training, titles, item index, adapter,
    and the pictures that the card shows. Nothing else goes.

    Raises:
        ValueError: if one of them is a symbolic link to a place outside of `folder`.
    """
    folder = Path(folder)
    found = sorted(path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("adapter/*")))
    readme = folder / "README.md"
    card = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    shown = [name for name in found if _PICTURE.fullmatch(name) and name in card]
    code = code_files(folder)
    names = [name for name in found if _PUBLIC.fullmatch(name) or name in shown or name in code]
    names = [name for name in names if (folder / name).is_file()]
    for name in names:
        require_own(folder, folder / name)
    return names


def ensure_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    exist_ok: bool = True,
    repo_type: str = "model",
) -> str:
    """
    Makes a repository where it is not there, and returns its full name; arguments and errors as in
    `CheckpointMixin.push_to_hub`. Long work that ends in a push does this first.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}; it must be `owner/name` or a name. {error}") from error
    try:
        api = HfApi(token=token, library_name="blossomrec_hf")
        return api.create_repo(repo_id, private=private, exist_ok=exist_ok, repo_type=repo_type).repo_id
    except Exception as error:
        told = _in_words(error, repo_id, token)
        if told is None:
            raise
        raise told from error


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = True,
    commit_message: str = "Upload a BlossomRec model",
    commit_description: str | None = None,
    default_card: str | None = None,
    repo_type: str = "model",
) -> CommitInfo:
    """
    Puts a folder into a repository in one commit, which is there as a whole or not at all; weights there that the
    folder does not have are removed in it. Arguments and errors as in `CheckpointMixin.push_to_hub`.
    """
    repo_id = ensure_repo(repo_id, private=private, token=token, exist_ok=exist_ok, repo_type=repo_type)
    api = HfApi(token=token, library_name="blossomrec_hf")
    try:
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        there = set(api.list_repo_files(repo_id, revision=revision, repo_type=repo_type))
        names = files_to_push(folder)
        content: dict[str, Path | bytes] = {name: Path(folder) / name for name in names}
        if "README.md" in names:
            text = (Path(folder) / "README.md").read_text("utf-8")
            content["README.md"] = text.replace(REPO_PLACEHOLDER, repo_id).encode()
        elif default_card is not None and "README.md" not in there:
            content["README.md"] = default_card.encode()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in content.items()
        ]
        if any(WEIGHTS.fullmatch(name) for name in names):
            operations += [CommitOperationDelete(name) for name in _stale_weights(there, names)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            repo_type=repo_type,
        )
    except Exception as error:
        told = _in_words(error, repo_id, token)
        if told is None:
            raise
        raise told from error


def _stale_weights(there: Iterable[str], names: Iterable[str]) -> list[str]:
    """Weights of an earlier push: a single old file would be read in place of new ones in several parts."""
    return sorted(name for name in set(there) - set(names) if WEIGHTS.fullmatch(name))


def _in_words(error: BaseException, repo_id: str, token: bool | str | None) -> OSError | None:
    """What an error of the Hub's client means for who pushes; `None` where it says it itself."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    again = "Nothing of this push can be seen there; the same call again goes on with what has arrived."
    no_token = (
        f"Cannot push to {repo_id}: no valid token was found{{}}; log in with `hf auth login`, or set HF_TOKEN to one of "
        "https://huggingface.co/settings/tokens."
    )
    for cause in reversed(causes):
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if isinstance(cause, LocalTokenNotFoundError) or (
            status == 401 and (token is False or (token in (None, True) and get_token() is None))
        ):
            return PermissionError(no_token.format(""))
        if status == 401:
            return PermissionError(no_token.format(" (the Hub does not know this `token`)"))
        if status == 403:
            return PermissionError(
                f"This token may not write to {repo_id}: {cause.server_message or cause}. It needs the right to write, "
                "and the owner to be you or an organization of yours; `create_pr=True` proposes a change to others."
            )
        if status == 409:
            return FileExistsError(
                f"{repo_id} is there already. Take another name, or `exist_ok=True` to add a commit to it."
            )
        if isinstance(cause, OfflineModeIsEnabled):
            return ConnectionError("HF_HUB_OFFLINE is set; unset it to push.")
        if (status is not None and status >= 500) or _is_of_the_network(cause):
            return ConnectionError(f"The Hub could not be reached or broke off ({cause}). {again}")
    return None


def _is_of_the_network(error: BaseException) -> bool:
    """Whether `httpx` (by whichever name the Hub's client knows it) got no answer."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}
    return "TransportError" in names


def short_card(repo_id: str, tags: list[str] | None) -> str:
    """The README.md of a model of which nothing else is known."""
    lines = ["---", "library_name: transformers", "tags:"]
    lines += [f"- {tag}" for tag in ("sequential-recommendation", "blossomrec", *(tags or []))]
    lines += ["---", "", f"# {repo_id.split('/')[-1]}", "", "A BlossomRec model (arXiv 2512.13368).", "", "```python"]
    lines += ["from transformers import pipeline", ""]
    lines += [f'recommender = pipeline("sequential-recommendation", model="{repo_id}", trust_remote_code=True)', "```"]
    return "\n".join(lines) + "\n"
