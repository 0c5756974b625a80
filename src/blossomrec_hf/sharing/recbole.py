"""
Read the weights in a `.pth` file of RecBole without running its code.

A pickle names classes and functions, and unpickling calls them. Here, each name is replaced by an inert record of the
arguments of the call. The records of tensors, numbers and the configuration are interpreted after unpickling.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_SHARING = 16  # tensors that share storage may be this many times larger than the file
_SETTINGS = {name: name for name in ("hidden_act", "layer_norm_eps", "hidden_dropout_prob")}
_SETTINGS["n_heads"] = "num_attention_heads"


class _Record:
    """A call in a pickle, with its arguments. Nothing is called during unpickling."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state, record.items = args, None, {}
        return record

    def __call__(self, *args: Any, **kwargs: Any) -> "_Record":
        return _Record(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Ignored: no list of a checkpoint is needed."""

    extend = add = append


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        return type("Record", (_Record,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Record:
        return _Record(pid)


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Read the weights of a `.pth` file and the settings of RecBole that define the model. No code in the file is run.

    Args:
        path: a checkpoint of RecBole, or a `state_dict` that PyTorch 1.6 or later saved.

    Returns:
        The `state_dict`, and arguments of `BlossomRecConfig`.

    Raises:
        ValueError: if the file is damaged, has another format or has no weights.
        OSError: if the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if any(entry.filename.endswith("/byteorder") for entry in archive.infolist()):
                    if _read(archive, "byteorder") != b"little":
                        raise ValueError("it was written on a big-endian machine")
                content = _plain(_Reader(io.BytesIO(_read(archive, "data.pkl"))).load())
                content = content if isinstance(content, Mapping) else {}
                state = _tensors(_plain(content.get("state_dict", content)), archive)
        except Exception as error:  # a damaged or hostile file can cause any error
            raise ValueError(
                f"{path} is damaged or was not written by `torch.save` of PyTorch 1.6 or later ({error}); save it again."
            ) from error
    if not state:
        raise ValueError(f"{path} has no weights; give a checkpoint of RecBole or a saved `state_dict`.")
    return state, _settings(content.get("config"))


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of the entry `name`, which `torch.save` stores uncompressed in a single folder."""
    entries = [entry for entry in archive.infolist() if entry.filename.partition("/")[2] == name]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is missing, or not stored as it is")
    return archive.read(entries[0])


def _plain(value: Any) -> Any:
    """The dictionary or number that a record represents; any other value unchanged."""
    if not isinstance(value, _Record):
        return value
    if value.name == "collections.OrderedDict":
        return value.items
    if value.name.removeprefix("numpy.") in ("core.multiarray.scalar", "_core.multiarray.scalar"):
        dtype, data = value.args
        if isinstance(data, _Record) and data.name == "_codecs.encode":  # bytes, in protocol 2
            data = data.args[0].encode("latin1")
        code = dtype.args[0]
        if isinstance(code, str) and code[:1] in ("f", "i", "u", "b") and isinstance(data, bytes):
            return np.frombuffer(data, f"<{code}").item()
    return value


def _tensors(state: Any, archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in state.items() if isinstance(state, Mapping) else ():
        tensor = _tensor(value, archive) if isinstance(value, _Record) else None
        if tensor is not None and isinstance(name, str):
            tensors[name] = tensor
            size += tensor.nbytes
        if size > _MAX_SHARING * sum(entry.file_size for entry in archive.infolist()):
            raise ValueError("its tensors are many times larger than the file")
    return tensors


def _tensor(record: _Record, archive: zipfile.ZipFile) -> torch.Tensor | None:
    """The tensor that a record represents; `None` for other records."""
    if record.name == "torch._utils._rebuild_parameter":
        return _tensor(record.args[0], archive)
    if record.name != "torch._utils._rebuild_tensor_v2":
        return None
    storage, offset, size, stride = record.args[:4]
    _, kind, key, _, _ = storage.args[0]
    dtype = _DTYPES[kind.name.removeprefix("torch.")]
    data = bytearray(_read(archive, f"data/{key}"))
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min(offset, *size, *stride, 0) < 0 or (count and last >= len(values)) or count > len(values):
        raise ValueError(f"a tensor of {list(size)} does not fit into its {len(values)} values")
    return values.as_strided(size, stride, offset).clone()


def _settings(config: Any) -> dict[str, Any]:
    """The settings of RecBole that the weights do not show, as arguments of `BlossomRecConfig`."""
    state = _plain(config.state) if isinstance(config, _Record) else config
    state = state if isinstance(state, Mapping) else {}
    settings = _plain(state.get("final_config_dict", state))
    settings = settings if isinstance(settings, Mapping) else {}
    found = {ours: _plain(settings[theirs]) for theirs, ours in _SETTINGS.items() if theirs in settings}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}
