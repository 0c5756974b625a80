"""Saving and loading of checkpoints. A checkpoint that is not the one saved is refused with one sentence."""

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

from .files_blossomrec import read_json
from .manifest_blossomrec import (
    CONFIG_NAMES,
    FINDING,
    LENIENT,
    WEIGHTS,
    ManifestMixin,
    check_manifest,
    code_files,
    inside,
    update_manifest,
)
from .streams_blossomrec import load_streams, stream_names


class CheckpointMixin(ManifestMixin):
    """`save_pretrained` and `from_pretrained` of the models."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; also writes the hashes of the files to the manifest."""
        paths = [Path(save_directory, name) for name in _weight_names(kwargs.get("variant"))]
        self._earlier_weights = {path: _written(path) for path in paths}
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", args[0] if args else True):
            self._write_manifest(save_directory)
        return result

    def _write_manifest(self, folder: str | os.PathLike) -> None:
        """
        Write the hashes of configuration, weights and code to the manifest of `folder`. Weights of an earlier save are
        removed: `transformers` leaves a single file next to new weights in several parts, and would load the single file.
        """
        stale = [path for path, earlier in self._earlier_weights.items() if _written(path) == earlier]
        if len(stale) < len(self._earlier_weights):  # an adapter is saved without weights of its own
            for path in stale:
                path.unlink(missing_ok=True)
        weights = [path.name for path in Path(folder).glob("model*") if WEIGHTS.fullmatch(path.name)]
        update_manifest(folder, [*CONFIG_NAMES, *weights, *code_files(folder)])

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        check_files: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        As in `transformers`, but the result is always the saved model. With `trust_remote_code=True`, the code of a
        repository runs before its files are compared: pin `revision` to the hash of a commit that you have read.

        Args:
            check_files: whether to compare the files with their saved hashes. `False` loads files that were changed.

        Raises:
            ValueError: if the weights are in pickle files, do not fit the configuration (unless
                `ignore_mismatched_sizes=True`), are of two uploads or of another `time_zone`, or if a file is damaged, has
                another hash than the saved one, or is outside of the folder.
            ImportError: if the code of a stream needs a package that is not installed.
            OSError: if there is no such checkpoint, or the Hub cannot be reached and the cache is incomplete.
        """
        path = pretrained_model_name_or_path
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors` is False; leave it out. BlossomRec reads safetensors only, because opening a pickle runs code."
            )
        from_files = path is not None and kwargs.get("state_dict") is None and kwargs.get("gguf_file") is None
        checking = {"revision": kwargs.get("revision"), **{name: kwargs.get(name) for name in FINDING}}
        wants_info = kwargs.pop("output_loading_info", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            if from_files:
                files = _weight_files(path, **kwargs)
                config = _saved_config(cls.config_class, path, **kwargs) if files else None
                if config is not None and kwargs.get("trust_remote_code"):
                    load_streams(config, path, **_finding(kwargs))
                if config is not None and not any_size:
                    _require_plausible_size(config, path, files)
            kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = super().from_pretrained(path, *model_args, **kwargs)
        except Exception as error:
            if from_files and check_files:  # if a file changed, its name explains the error
                check_manifest(path, **checking)
            if isinstance(error, SafetensorError):
                raise ValueError(
                    f"The weights of {os.fspath(path)} are damaged ({error}); download them with `force_download=True`, "
                    "or save the model again."
                ) from error
            raise
        for name, parameter in model.named_parameters():
            if name in model._frozen:
                parameter.requires_grad_(False)
        if from_files:
            checking["revision"] = getattr(model.config, "_commit_hash", None) or checking["revision"]
            if check_files:
                check_manifest(path, **checking)
            if not any_size:
                _require_agreement(path, info)
            if files:
                _require_saved_zone(model.config, _saved_config(cls.config_class, path, **_finding(kwargs)))
        return (model, info) if wants_info else model


def _weight_names(variant: str | None) -> list[str]:
    """The names of a single file of weights, and of the index of weights in several files."""
    names = [name.rsplit(".", 1) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    return [f"{base}{f'.{variant}' if variant else ''}.{suffix}" for base, suffix in names]


def _written(path: Path) -> tuple[int, int] | None:
    """Time and inode of a file, which change when it is written; `None` if it does not exist."""
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None


def _weight_files(path: str | os.PathLike, **kwargs: Any) -> list[Path]:
    """
    The safetensors files of a checkpoint, downloaded if necessary. Empty for an adapter, whose model is elsewhere.

    Raises:
        ValueError: if the weights are in pickle files only (`transformers` would load a conversion that anyone can upload),
            if there are weights of two uploads, or if an index names other files than safetensors of the same folder.
        OSError: if there are no weights.
    """
    if os.path.isfile(path):
        return []
    finding = _finding(kwargs)
    subfolder = finding.get("subfolder", "")

    def find(name: str, **options: Any) -> Path | None:
        if os.path.isdir(path):
            inside(Path(path, subfolder), name)
        found = cached_file(path, name, **finding, **{"_raise_exceptions_for_missing_entries": False, **options})
        return None if found is None else Path(found)

    single_name, index_name = _weight_names(kwargs.get("variant"))
    single = find(single_name)
    index = find(index_name, **(LENIENT if single is not None else {}))
    if single is not None and index is not None:
        raise ValueError(
            f"{os.fspath(path)} has weights of two uploads: {single_name}, which would be loaded, and {index_name} with its "
            "parts; delete the older of them, or upload with `blossomrec push`, which replaces earlier weights."
        )
    if single is not None:
        return [single]
    if index is not None:
        return [part for name in _indexed_files(index) if (part := find(name)) is not None]
    finding.pop("subfolder", None)
    finding.pop("force_download", None)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if has_file(path, os.path.join(subfolder, name), **finding):
            raise ValueError(
                f"The weights of {os.fspath(path)} are in a pickle ({name}); opening one runs code, so BlossomRec reads "
                "safetensors only. If you trust the file, convert it: "
                "`safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')`."
            )
    if not has_file(path, os.path.join(subfolder, "adapter_config.json"), **finding):
        raise OSError(
            f"{os.fspath(path)} has no {SAFE_WEIGHTS_NAME}: the checkpoint has none or, if the Hub cannot be reached or is not "
            "used, there is none in the cached files."
        )
    return []


def _indexed_files(index: Path) -> list[str]:
    """The names of the files in an index of weights."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"{index} is damaged: its `weight_map` must name a file for each weight; save the model again."
        )
    for name in sorted(set(names.values())):
        inside(index.parent, name)
        if not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}; BlossomRec reads safetensors only, because opening a pickle runs code."
            )
    return sorted(set(names.values()))


def _finding(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to find a file."""
    return {name: kwargs[name] for name in (*FINDING, "revision") if kwargs.get(name) is not None}


def _saved_config(
    config_class: type[PreTrainedConfig], path: str | os.PathLike, config: Any = None, **kwargs: Any
) -> PreTrainedConfig:
    """The configuration of a checkpoint, or the one that is given to `from_pretrained` in its place."""
    if isinstance(config, PreTrainedConfig):
        return config
    return config_class.from_pretrained(path if config is None else config, **_finding(kwargs))


def _require_saved_zone(config: PreTrainedConfig, saved: PreTrainedConfig) -> None:
    """Refuse another time zone than that of the weights, which include its table of offsets."""
    if {"hour", "weekday"} & {*(saved.time_features or ())} and config.time_zone != saved.time_zone:
        raise ValueError(
            f"`time_zone` is {config.time_zone!r}, but the checkpoint was trained with the hours and weekdays of "
            f"{saved.time_zone!r}; omit it, or train a new model."
        )


def _require_plausible_size(config: PreTrainedConfig, path: str | os.PathLike, files: list[Path]) -> None:
    """Refuse a configuration that is far too large for its weights, before memory is allocated."""
    stored = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    width = config.hidden_size // config.num_attention_heads * config.compress_block_size
    compressors = sum("long_term" in stream_names(kind) for kind in config.attention_types)
    fewest = config.vocab_size * config.hidden_size + compressors * width**2
    fewest += config.num_hidden_layers * 2 * config.hidden_size * (config.hidden_size + config.intermediate_size)
    for feature in (config.item_features or {}).values():
        fewest += feature["num_values"] if feature["kind"] == "categories" else config.vocab_size * feature["size"]
    if fewest > 2 * stored + 2**20:
        sizes = ", ".join(
            f"`{name}` {getattr(config, name)}"
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "compress_block_size")
        )
        raise ValueError(
            f"config.json and the weights of {os.fspath(path)} disagree: a model of {sizes} has at least {fewest:,} weights, "
            f"but {stored:,} are stored. Take both from one checkpoint; `ignore_mismatched_sizes=True` loads the weights "
            "that fit and initializes the others."
        )


def _require_agreement(path: str | os.PathLike, info: dict[str, Any]) -> None:
    # A model without a head can load a checkpoint of one with a head.
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
            "checkpoint; `ignore_mismatched_sizes=True` loads the weights that fit and initializes the others."
        )
