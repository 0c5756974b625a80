"""What lets a checkpoint be trusted: its files are those that were saved, and all of them reach the Hub at once or none."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

from .files_blossomrec import atomic_write


MANIFEST_NAME = "checkpoint_manifest.json"
REPO_PLACEHOLDER = "OWNER/NAME"  # what a README.md says before it is known where it goes
# What says how to find a file, of the arguments of `from_pretrained`.
_FINDING = ("cache_dir", "force_download", "local_files_only", "token", "subfolder")
_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
# What a training run needs and nobody else does, and pickles, which run code when they are opened.
_LEFT_AT_HOME = re.compile(
    r"(checkpoint|best)-\d+(/.*)?|.*\.(partial|lock|bin|pt|pth|pkl|ckpt)|_.*|\..*|.*/[._].*|logs?/.*|runs/.*"
)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | os.PathLike) -> Path:
    """Writes the hashes of the weights and of the code in `folder`, against which `from_pretrained` reads them."""
    folder = Path(folder)
    files = sorted({*folder.glob("model*.safetensors"), *folder.glob("*_blossomrec.py"), *folder.glob("ops_*.py")})
    path = folder / MANIFEST_NAME
    with atomic_write(path) as partial:
        partial.write_text(
            json.dumps({"sha256": {file.name: sha256(file) for file in files}}, indent=2) + "\n", "utf-8"
        )
    return path


def check_manifest(path: str | os.PathLike, *, revision: str | None = None, **finding: Any) -> None:
    """
    Compares the weights and the code of a checkpoint with the hashes that were saved with them. Of a repository of the
    Hub, only what was downloaded is looked at; a checkpoint without a manifest is taken as it is.

    Args:
        path: a folder, or the name of a repository.
        revision: of the repository; the others are arguments of `from_pretrained`.

    Raises:
        ValueError: for a file that is not the one saved; gives both hashes.
    """
    finding = {name: value for name, value in finding.items() if name in _FINDING and value is not None}
    lenient = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    manifest = cached_file(path, MANIFEST_NAME, revision=revision, **finding, **lenient)
    if manifest is None:
        return
    finding |= {"force_download": False, "local_files_only": True}
    for name, saved in json.loads(Path(manifest).read_text("utf-8"))["sha256"].items():
        file = cached_file(path, name, revision=revision, **finding, **lenient)
        if file is not None and (found := sha256(file)) != saved:
            raise ValueError(
                f"{name} of {os.fspath(path)} is not the file that was saved: its SHA-256 is {found}, the checkpoint "
                f"({MANIFEST_NAME}) has {saved}. A damaged download is fetched anew with `force_download=True`; code that "
                "somebody changed should be read before it is run. Whoever changed it on purpose saves the model again."
            )


def require_loadable(saved: type) -> None:
    """
    Refuses to save what nobody could load: a checkpoint names the class of its parts, which must be found in a module.

    Raises:
        ValueError: for a class that is defined in a script, a notebook or a function.
    """
    if saved.__module__ == "__main__" or "<locals>" in saved.__qualname__:
        raise ValueError(
            f"`{saved.__qualname__}` is defined in a script, a notebook or a function, where a saved checkpoint cannot "
            "find it; move the class to a module of its own (a .py file) and import it from there."
        )


class CheckpointMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of the models."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; also writes the hashes of the weights and of the code."""
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", args[0] if args else True):
            write_manifest(save_directory)
        return result

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """
        As in `transformers`, but never a model that is not the one saved.

        Raises:
            ValueError: for weights in pickle files, for weights that are not those of the configuration (unless
                `ignore_mismatched_sizes=True`), and for a file that does not have the hash that was saved with it.
            OSError: where there is no such checkpoint, and where the Hub cannot be reached and the cache is incomplete.
        """
        path = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors` is False; BlossomRec reads safetensors only: opening a pickle runs code."
            )
        from_files = path is not None and kwargs.get("state_dict") is None and kwargs.get("gguf_file") is None
        if from_files:
            _require_safetensors(path, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        checking = {"revision": kwargs.get("revision"), **{name: kwargs.get(name) for name in _FINDING}}
        try:
            model, info = super().from_pretrained(path, *model_args, **kwargs)
        except Exception:
            if from_files:  # a damaged file is told as such, whatever came of it
                check_manifest(path, **checking)
            raise
        if from_files:
            checking["revision"] = getattr(model.config, "_commit_hash", None) or checking["revision"]
            check_manifest(path, **checking)
            if not any_size:
                _require_agreement(path, info)
        return (model, info) if wants_info else model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        index: Any = None,
        beside: str | os.PathLike | None = None,
        card: Any = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        exist_ok: bool = True,
        commit_message: str = "Upload a BlossomRec model",
        commit_description: str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """
        Puts the model and what belongs to it into a repository of the Hub, in one commit. What arrived of a push that
        broke off is not sent again.

        Args:
            repo_id: `owner/name`, or a name of one's own; made if it is not there.
            tokenizer: goes along; it must be of the size of the model's vocabulary.
            index: an item index of this model (`blossomrec_hf.index.ItemIndex`), which goes along.
            beside: a folder, such as that of a run: what lies in it and is not the model's goes along too (card,
                summary of the training, plots, titles, an item index; no checkpoints to resume from, no pickles).
            card: the text of README.md, in place of one in `beside`; where there is neither, and none in the
                repository, a few lines.
            private: whether a new repository is private.
            revision: the branch; made if it is not there.
            create_pr: opens a pull request instead.
            exist_ok: `False` refuses a repository that is there already.
            tags: for the few lines.

        Returns:
            `CommitInfo`, with the address of the commit and, with `create_pr`, of the pull request.

        Raises:
            ValueError: for a name that cannot be one, a tokenizer of another size, and an index of another model.
            PermissionError: for a missing token and one that may not do this.
            FileExistsError: with `exist_ok=False`.
            ConnectionError: where the Hub cannot be reached or breaks off.
        """
        if tokenizer is not None and len(tokenizer) != self.config.vocab_size:
            raise ValueError(
                f"`tokenizer` has {len(tokenizer)} ids, the model's vocabulary {self.config.vocab_size}; after "
                "`tokenizer.add_items(...)`, call `model.resize_token_embeddings(len(tokenizer))`."
            )
        with tempfile.TemporaryDirectory() as folder:
            if beside is not None:
                for name in files_to_push(beside):
                    if not _WEIGHTS.fullmatch(name):
                        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(Path(beside) / name, Path(folder) / name)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if index is not None:
                index.check(self.get_output_embeddings().weight)
                index.save(folder)
            readme = Path(folder) / "README.md"
            if card is not None:
                readme.write_text(str(card), "utf-8")
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                exist_ok=exist_ok,
                commit_message=commit_message,
                commit_description=commit_description,
                default_card=None if readme.exists() else _short_card(repo_id, tags),
            )


def _require_safetensors(path: str | os.PathLike, **kwargs: Any) -> None:
    """Says so where the weights lie in pickle files only; `transformers` would have them converted by a stranger."""
    if os.path.isfile(path):
        return
    finding = {name: kwargs[name] for name in (*_FINDING, "revision") if kwargs.get(name) is not None}
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        base, suffix = name.split(".", 1)
        name = f"{base}{variant}.{suffix}"
        if cached_file(path, name, **finding, _raise_exceptions_for_missing_entries=False) is not None:
            return
    subfolder = finding.pop("subfolder", "")
    finding.pop("force_download", None)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if has_file(path, os.path.join(subfolder, name), **finding):
            raise ValueError(
                f"{os.fspath(path)} has its weights in a pickle ({name}); opening one runs code, so BlossomRec reads "
                "safetensors only. Whoever trusts the file converts it: "
                "`safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')`."
            )
    if not has_file(path, os.path.join(subfolder, "adapter_config.json"), **finding):  # whose model is elsewhere
        raise OSError(
            f"No {SAFE_WEIGHTS_NAME} of {os.fspath(path)}: the checkpoint has none or, where the Hub is not asked or cannot "
            "be reached, there is none in the cached files."
        )


def _require_agreement(path: str | os.PathLike, info: dict[str, Any]) -> None:
    # A model without its head reads a checkpoint that has one.
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("lm_head.")]
    sizes = [f"{key} is {list(there)} there, {list(here)} here" for key, there, here in info["mismatched_keys"]]
    problems = [
        f"{what} {', '.join(sorted(keys)[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (
            ("the weights lack", info["missing_keys"]),
            ("the weights alone have", unexpected),
            ("of another size:", sizes),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"config.json and the weights of {os.fspath(path)} disagree: {'; '.join(problems)}. Take both from one "
            "checkpoint; `ignore_mismatched_sizes=True` takes what fits and draws the rest at random."
        )


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """The files of a folder that belong on the Hub, as paths inside it: no checkpoints to resume from, no pickles."""
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not _LEFT_AT_HOME.fullmatch(name))


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
        if any(_WEIGHTS.fullmatch(name) for name in names):
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
    return sorted(name for name in set(there) - set(names) if _WEIGHTS.fullmatch(name))


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


def _short_card(repo_id: str, tags: list[str] | None) -> str:
    lines = ["---", "library_name: transformers", "tags:"]
    lines += [f"- {tag}" for tag in ("sequential-recommendation", "blossomrec", *(tags or []))]
    lines += ["---", "", f"# {repo_id.split('/')[-1]}", "", "A BlossomRec model (arXiv 2512.13368).", "", "```python"]
    lines += ["from transformers import pipeline", ""]
    lines += [f'recommender = pipeline("sequential-recommendation", model="{repo_id}", trust_remote_code=True)', "```"]
    return "\n".join(lines) + "\n"
