"""Files of caches: what `BlossomRecCache.save` writes and `load` reads."""

import json
import os
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .configuration_blossomrec import BlossomRecConfig
from .files_blossomrec import atomic_write
from .modules_blossomrec import WeightsFingerprint, digest
from .streams_blossomrec import build_streams


# What a cached history depends on; a cache serves models that agree in these.
FINGERPRINT = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size hidden_act "
    "attention_types compress_block_size compress_stride selection_block_size num_selected_blocks importance_threshold "
    "short_term_block_size short_term_window power_law_base attention_bias rope_parameters max_position_embeddings "
    "layer_norm_eps time_features time_zone event_types"
).split()

# Version of the files that `save` writes.
FILE_VERSION = "4"


class CacheFilesMixin:
    """`save` and `load` of a `BlossomRecCache`."""

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the histories to a safetensors file (without free room), with what they depend on: the configuration
        and a fingerprint of the weights. The file appears when it is complete.

        Raises:
            ValueError: before the first append, when there is nothing to save.
        """
        if self.lengths is None:
            raise ValueError("The cache has no histories yet; append some before it is saved.")
        tensors = self.select(torch.arange(self.batch_size))._tensors()
        shapes = self._file_shapes(self.batch_size, self.get_seq_length())
        # Free room is dropped, which lies along dimension 1.
        cut = {name: x if x.dim() == 1 else x[:, : shapes[name][1]].contiguous() for name, x in tensors.items()}
        metadata = {
            "format": "pt",
            "blossomrec_cache": FILE_VERSION,
            "config": json.dumps(config_fingerprint(self.config)),
        }
        metadata["weights"] = json.dumps(self.weights)
        metadata["digest"] = _file_digest(cut, metadata)
        with atomic_write(path) as partial:
            save_file(cut, partial, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
    ) -> Self:
        """
        Reads what `save` wrote.

        Args:
            model: the model that will continue the histories, on any device. Its weights must be those that filled the
                cache; only its vocabulary may have grown.
            device: device of the states.
            max_length: as in the class.

        Raises:
            ValueError: for a file that is no such cache or is damaged, one of another configuration (the message says
                what differs) or of other weights, and histories longer than `max_length`.
        """
        while model.base_model is not model:  # below an adapter's wrapper, and a head
            model = model.base_model
        out = cls(model.config, max_length=max_length)
        tensors, weights = out._read(path)
        out.weights = weights
        out.check_model(model)
        out.lengths, out._last_length = tensors["lengths"], tensors["last_length"]
        if max_length is not None and out.get_seq_length() > max_length:
            raise ValueError(
                f"`max_length` is {max_length}; {path} has a history of {out.get_seq_length()} events. Load it "
                "without a limit, or rebuild the histories from their latest items."
            )
        out._columns = {name: tensors[name] for name in column_dtypes(model.config)}
        out._last = tensors["last_hidden_state"]
        for i, layer in enumerate(out.layers):
            layer.states, prefix = tensors[f"layers.{i}.states"], f"layers.{i}.blocks."
            layer.blocks = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        return out.to(device)

    def _read(self, path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], WeightsFingerprint]:
        """The tensors of a file and the fingerprint of the weights that made them, both checked before they are used."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("blossomrec_cache") != FILE_VERSION:
                    raise ValueError(f"{path} was not written by `BlossomRecCache.save` of this version.")
                config = _from_json(metadata, "config", dict)
                if config is not None:
                    self.check_config(config)
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                batch, length, *_ = (*shapes.get("item_ids", ()), -1, -1)
                sound = config is not None and shapes == self._file_shapes(batch, length)
                tensors = {name: file.get_tensor(name) for name in shapes} if sound else {}
        except (SafetensorError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}.") from error
        weights = _from_json(metadata, "weights", list)
        sound = sound and weights is not None and len(weights) == len(WeightsFingerprint._fields)
        if not sound or metadata.get("digest") != _file_digest(tensors, metadata) or not self._is_sound(tensors):
            raise ValueError(
                f"{path} is damaged: it does not hold what `BlossomRecCache.save` wrote; build the histories anew."
            )
        return tensors, WeightsFingerprint(*weights)

    def _file_shapes(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in a file of `batch` histories, the longest of `length` events."""
        config = self.config
        groups, width = config.num_key_value_heads, config.head_dim
        shapes = {"lengths": (batch,), "last_length": (batch,)}
        shapes |= dict.fromkeys(column_dtypes(config), (batch, length))
        shapes["last_hidden_state"] = (batch, config.hidden_size)
        for i, sizes in enumerate(block_sizes(config)):
            shapes[f"layers.{i}.states"] = (batch, length, groups, 2 * width)
            for name, (block_size, block_width) in sizes.items():
                shapes[f"layers.{i}.blocks.{name}"] = (batch, length // block_size, groups, block_width)
        return shapes

    def _is_sound(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether tensors of the right shapes have dtypes and values that a cache may have."""
        tensors = dict(tensors)
        lengths, last_length = tensors.pop("lengths"), tensors.pop("last_length")
        dtypes = column_dtypes(self.config)
        columns = {name: tensors.pop(name) for name in dtypes}
        if {lengths.dtype, last_length.dtype} != {torch.int64} or any(columns[x].dtype != dtypes[x] for x in dtypes):
            return False
        items = columns["item_ids"]
        longest = int(lengths.max()) if len(lengths) else 0
        if longest != items.shape[1] or bool((lengths < 0).any()) or bool((last_length < 0).any()):
            return False
        if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < self.config.vocab_size:
            return False
        dtype = tensors["layers.0.states"].dtype
        wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else None
        return wide is not None and all(
            x.dtype == (dtype if name.endswith(".states") else wide) and bool(x.isfinite().all())
            for name, x in tensors.items()
        )


def column_dtypes(config: BlossomRecConfig) -> dict[str, torch.dtype]:
    """The columns of the events that a cache keeps, as they enter the model, and their dtypes."""
    dtypes = {"item_ids": torch.int32}
    if config.time_features:
        dtypes["timestamps"] = torch.int64
    if config.event_types:
        dtypes["event_type_ids"] = torch.int32
    return dtypes


def config_fingerprint(config: BlossomRecConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FINGERPRINT}


def block_sizes(config: BlossomRecConfig) -> list[dict[str, tuple[int, int]]]:
    """For each layer, the `block_size` and `block_width` of the streams that summarize blocks, by name."""
    layers = [build_streams(config, i) for i in range(config.num_hidden_layers)]
    return [{x.name: (x.block_size, x.block_width) for x in streams if x.block_size is not None} for streams in layers]


def _from_json(metadata: dict[str, str], name: str, kind: type) -> Any:
    """A value of the metadata of a file; `None` where it is missing or of another kind."""
    try:
        value = json.loads(metadata.get(name, "null"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def _file_digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Digest of all that a file says of its histories."""
    named = [(f"{name} {tensor.dtype}", tensor) for name, tensor in sorted(tensors.items())]
    return digest([*named, *((name, metadata[name]) for name in ("config", "weights"))])
