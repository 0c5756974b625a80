"""Uploads to the Hub: the files of a checkpoint in one commit, and no other file of its folder."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.manifest_blossomrec import (
    CONFIG_NAMES,
    MANIFEST_NAME,
    TOKENIZER_NAMES,
    WEIGHTS,
    check_manifest,
    code_files,
    require_own,
)
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation
from ..model.modules_blossomrec import items_fingerprint, stored_item_vectors
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import read_json
from .cards import PICTURES, REPO_PLACEHOLDER, short_card, write_card
from .summary import SUMMARY_FILE


_README = "README.md"
_INDEX_NAMES = ("item_index.faiss", "item_index.json")
# The only files of a folder that are uploaded, with the code that the checkpoint needs and the pictures in its card.
_UPLOADED = re.compile(
    "|".join(
        [
            *map(re.escape, (*CONFIG_NAMES, *TOKENIZER_NAMES, *_INDEX_NAMES, *PICTURES)),
            *map(re.escape, (MANIFEST_NAME, SUMMARY_FILE, _README)),
            r"model[\w.-]*\.safetensors(\.index(\.\w+)?\.json)?",
            r"LICENSE(\.\w+)?|NOTICE(\.\w+)?|CITATION\.cff|items\.parquet",
            r"adapter/adapter_(config\.json|model\.safetensors)",
        ]
    )
)
_PICTURE = re.compile(r"[\w-][\w.-]*\.(png|jpe?g|svg|gif|webp)")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = True,
    commit_message: str = "Upload a BlossomRec model",
) -> CommitInfo:
    """
    Upload a saved model with its tokenizer, card, training summary, pictures, titles and item index in one commit.

    The commit also removes the weights and the item index of an earlier upload that `folder` does not replace. After an
    interrupted upload, the same call continues: files that have arrived are not sent again.

    Args:
        folder: a folder with a model and its tokenizer, such as `blossomrec train`, `Trainer` or `save_pretrained` write.
            If it has no README.md, a card is written from `training_summary.json`, if there is one.
        repo_id: `owner/name`, or a name in your own namespace. The repository is created if it does not exist.
        private: whether to create a private repository. Has no effect on an existing one.
        token: the token to authenticate with. Defaults to the one of `hf auth login`, or `HF_TOKEN`.
        revision: the branch to commit to, created if it does not exist. Defaults to `main`.
        create_pr: whether to open a pull request instead.
        exist_ok: whether the repository may exist.
        commit_message: the title of the commit.

    Returns:
        The commit, with its URL and, with `create_pr`, that of the pull request.

    Raises:
        ValueError: if `repo_id` is no valid name, or `folder` lacks the model or the tokenizer, has a tokenizer of
            another size than the vocabulary, an item index of another model, files that changed after they were saved,
            or a symbolic link to a file outside of it.
        PermissionError: if there is no valid token, or the token does not give access.
        FileExistsError: if the repository exists and `exist_ok` is `False`.
        ConnectionError: if the Hub cannot be reached, or the connection breaks.
    """
    folder = Path(folder)
    _check_checkpoint(folder)
    if not (folder / _README).exists() and (folder / SUMMARY_FILE).exists():
        write_card(folder, name=repo_id.split("/")[-1])
    repo_id = ensure_repo(repo_id, private=private, token=token, exist_ok=exist_ok)
    api = HfApi(token=token, library_name="blossomrec_hf")
    with _explained_errors(repo_id, token):
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = _operations(folder, repo_id, set(api.list_repo_files(repo_id, revision=revision)))
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


def ensure_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    exist_ok: bool = True,
    repo_type: str = "model",
) -> str:
    """
    Create a repository if it does not exist, and return its full name. Long work that ends with an upload calls this
    first. Arguments and errors are those of [`push`].
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}; it must be `owner/name` or a name. {error}") from error
    api = HfApi(token=token, library_name="blossomrec_hf")
    with _explained_errors(repo_id, token):
        return api.create_repo(repo_id, private=private, exist_ok=exist_ok, repo_type=repo_type).repo_id


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """
    The files of a folder that `push` uploads, as relative paths: configuration, weights (safetensors), tokenizer, code
    that `auto_map` names and its imports, card, license, training summary, titles, item index, adapter, and pictures that
    the card shows.

    Raises:
        ValueError: if one of them is a symbolic link to a file outside of `folder`.
    """
    folder = Path(folder)
    paths = [path for path in (*folder.glob("*"), *folder.glob("adapter/*")) if path.is_file()]
    readme = folder / _README
    card = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    code = code_files(folder)

    def is_uploaded(name: str) -> bool:
        return name in code or bool(_UPLOADED.fullmatch(name)) or (name in card and bool(_PICTURE.fullmatch(name)))

    names = sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if is_uploaded(name))
    for name in names:
        require_own(folder, folder / name)
    return names


def _check_checkpoint(folder: Path) -> None:
    """Refuse a folder that would not load; see [`push`] for the errors."""
    if not (folder / "config.json").exists() or not list(folder.glob("model*.safetensors")):
        raise ValueError(
            f"`folder` {folder} has no model (config.json, model.safetensors); give a folder that `blossomrec train`, "
            "`Trainer` or `save_pretrained` wrote."
        )
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"`folder` {folder} has no tokenizer; call `tokenizer.save_pretrained({str(folder)!r})`.")
    vocab_size = BlossomRecConfig.from_pretrained(folder).vocab_size
    num_ids = len(BlossomRecTokenizer.from_pretrained(folder))
    if num_ids != vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {num_ids} ids, the model's vocabulary {vocab_size}. Save both of one model; "
            "after `tokenizer.add_items(...)`, call `model.resize_token_embeddings(len(tokenizer))`."
        )
    check_manifest(folder)
    about = folder / "item_index.json"
    if about.exists():
        vectors = stored_item_vectors(BlossomRecForSequentialRecommendation.from_pretrained(folder))
        if read_json(about).get("embedding") != items_fingerprint(vectors):
            raise ValueError(
                f"The item index in {folder} is stale: it was built from other item embeddings than the model has. Build "
                "it again with `ItemIndex.build(model).save(folder)`, or delete item_index.faiss and item_index.json."
            )


def _operations(folder: Path, repo_id: str, existing: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The additions and deletions of the commit, for a repository with the files `existing`."""
    names = files_to_push(folder)
    content: dict[str, Path | bytes] = {name: folder / name for name in names}
    if _README in names:
        content[_README] = (folder / _README).read_text("utf-8").replace(REPO_PLACEHOLDER, repo_id).encode()
    elif _README not in existing:
        content[_README] = short_card(repo_id).encode()
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in content.items()]
    return additions + [CommitOperationDelete(name) for name in _stale(existing.difference(names))]


def _stale(names: Iterable[str]) -> list[str]:
    """Files of an earlier upload that would be loaded in place of the new ones, or next to them."""
    return sorted(name for name in names if WEIGHTS.fullmatch(name) or name in _INDEX_NAMES)


@contextmanager
def _explained_errors(repo_id: str, token: bool | str | None) -> Iterator[None]:
    """Raise errors of the Hub's client as one sentence with a remedy. Errors whose own message is enough pass."""
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in reversed(causes):
            if (explained := _explain(cause, repo_id, token)) is not None:
                raise explained from error
        raise


def _explain(cause: BaseException, repo_id: str, token: bool | str | None) -> OSError | None:
    if isinstance(cause, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set; unset it to push.")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401 or isinstance(cause, LocalTokenNotFoundError):
        was_sent = isinstance(token, str) or (token is not False and get_token() is not None)
        return PermissionError(
            f"Cannot push to {repo_id}: no valid token was found{' (the Hub rejected `token`)' if was_sent else ''}; log in "
            "with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens."
        )
    if status == 403:
        return PermissionError(
            f"This token may not write to {repo_id}: {cause.server_message or cause}. Use a token with write access to a "
            "repository of your own or of your organization; `create_pr=True` proposes a change to others."
        )
    if status == 409:
        return FileExistsError(
            f"{repo_id} already exists; choose another name, or pass `exist_ok=True` to add a commit to it."
        )
    if (status is not None and status >= 500) or _is_network_error(cause):
        return ConnectionError(
            f"The Hub could not be reached, or the connection broke ({cause}). Nothing was committed; the same call again "
            "continues with what has arrived."
        )
    return None


def _is_network_error(error: BaseException) -> bool:
    """Whether `httpx`, under any of the names that the Hub's client imports it by, got no answer."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("httpx")}
    return "TransportError" in names
