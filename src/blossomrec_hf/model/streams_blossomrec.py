"""
Streams: the ways in which a layer attends to a history, and their registry.

A layer computes one or more streams from the same queries, keys and values, and adds their outputs up, each multiplied
by a gate of its own per head. `config.attention_types` names the streams of each layer, joined by `+`
(`"long_term+short_term"`; `"blossom"` is short for it). A stream that is registered with `register_stream` is trained,
cached, exported and saved like those of this file.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils import cached_file

from .configuration_blossomrec import BlossomRecConfig
from .manifest_blossomrec import LENIENT, require_loadable
from .ops_reference import (
    REFERENCE_OPS,
    Blocks,
    Keys,
    Ops,
    Queries,
    Selection,
    complete_blocks,
    full_mask,
    power_law_distances,
    selected_mask,
    short_mask,
    straight_through,
)
from .ops_torch import TORCH_OPS, is_half_on_cpu
from .ops_torch_dense import attend_dense, has_short_histories


# The layer types of the package: a combination of two streams, and three streams.
ATTENTION_TYPES = ("blossom", "long_term", "short_term", "full")
COMBINATIONS = {"blossom": ("long_term", "short_term")}

# Combinations that fused kernels compute (`ops_triton.py`, `ops_triton_append.py`); others take the generic path.
FUSED = (("long_term", "short_term"), ("long_term",), ("short_term",))


class Stream:
    """
    One way of attending. Subclasses override `attend` and, if necessary, `modules`, `summarize` and `mask`. One instance
    serves one layer. Every method gets that layer, which has the stream's modules as attributes.

    All functions of `ops` (see `ops_reference.Ops`) accept leading batch dimensions in the reference and in exported
    graphs, so a stream indexes tensors from the right: `x[..., n, :, :]`, never `x[n]`.

    Attributes:
        name: the name under which the layer has it.
        gate_bias: starting bias of its gate, before the sigmoid, in a layer of several streams.
        block_size: positions of a block that `summarize` computes one row for; `None` without blocks.
        block_width: width of that row, per key/value head.
        has_probabilities: whether its output is a mean of the values of the history's positions, as attention to the
            positions themselves is. Only then `output_attentions=True` works.

    Args:
        config: configuration of the model.
    """

    name: str = ""
    gate_bias: float = 0.0
    block_size: int | None = None
    block_width: int = 0
    has_probabilities: bool = True

    def __init__(self, config: BlossomRecConfig) -> None:
        self.config = config

    def modules(self) -> dict[str, nn.Module]:
        """New modules with the parameters of the stream, by the attribute of the layer that each becomes."""
        return {}

    def summarize(self, ops: Ops, layer: nn.Module, keys: Keys, blocks: Queries) -> torch.Tensor:
        """
        One row for each complete block, from the keys and values up to its end. They are computed once: a cache keeps
        them, in float32 or better.

        Args:
            blocks: the histories and last positions of `M` blocks.

        Returns:
            `[M, G, block_width]`
        """
        raise NotImplementedError

    def attend(
        self, ops: Ops, layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: Blocks | None
    ) -> tuple[torch.Tensor, Selection | None]:
        """
        Attention of the queries to their histories up to their own positions.

        Args:
            q: `[Q, H, d]`, rotary embedding applied.
            blocks: the rows of `summarize`, those behind the queries included; `None` without `block_size`.

        Returns:
            the head outputs `[Q, H, d]`, and what was selected (or `None`).
        """
        raise NotImplementedError

    def mask(self, queries: Queries, position: torch.Tensor, selection: Selection | None) -> torch.Tensor:
        """
        The places that each query sees, `[Q, G or 1, N]` bool of the places `position` `[N]` of its history: for
        pictures.

        Args:
            selection: what `attend` selected for these queries.
        """
        raise NotImplementedError


STREAMS: dict[str, type[Stream]] = {}


def register_stream(name: str, stream: type[Stream]) -> None:
    """
    Register a stream, so that `config.attention_types` can name it.

    Args:
        name (`str`): a name of your own; registering it again replaces the class, for models that are built from then
            on. The streams of the package cannot be replaced.
        stream (`type[Stream]`): its class.

    Raises:
        ValueError: for a name that is no identifier or that the package uses, and for a `stream` that is no `Stream`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`name` is {name!r}; it must be an identifier: `register_stream('recent', RecentStream)`.")
    if not isinstance(stream, type) or not hasattr(stream, "attend"):
        raise ValueError(f"`stream` is {stream!r}; it must be a subclass of `Stream`.")
    if name in ATTENTION_TYPES and stream.__module__ != __name__:
        raise ValueError(f"`name` is {name!r}, which the package uses; register the class under another name.")
    STREAMS[name] = stream


def stream_names(attention_type: str) -> tuple[str, ...]:
    """The streams of a layer type, in the order of their gates."""
    parts = (COMBINATIONS.get(part, (part,)) for part in attention_type.split("+"))
    return tuple(name for part in parts for name in part)


def build_streams(config: BlossomRecConfig, layer_idx: int) -> tuple[Stream, ...]:
    """
    The streams of one layer.

    Raises:
        ValueError: for a name that is not registered, and for a stream that is named twice.
    """
    attention_type = config.attention_types[layer_idx]
    names = stream_names(attention_type)
    for name in names:
        if name not in STREAMS:
            raise ValueError(
                f"`attention_types` names {attention_type!r}, but no stream is registered as {name!r} (only "
                f"{', '.join(map(repr, (*COMBINATIONS, *STREAMS)))}); import the code that calls "
                f"`register_stream({name!r}, ...)`, or load a checkpoint that has it with `trust_remote_code=True`."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"`attention_types` names {attention_type!r}; a layer has each stream once at most.")
    streams = tuple(STREAMS[name](config) for name in names)
    for name, stream in zip(names, streams, strict=True):
        stream.name = name  # of the object: a class may have several
    return streams


def save_streams(
    streams: Iterable[Stream], config: BlossomRecConfig, folder: str | os.PathLike, *, write: bool = True
) -> None:
    """
    Copy the code of streams from outside of the package to a checkpoint, with the files that it imports relatively, and
    name their classes in `config.auto_map`.

    Args:
        streams: those of the model. Others may be registered under their names since it was built.
        write: whether this process writes files.

    Raises:
        ValueError: if a class is defined in a script, a notebook or a function, or its module is not an imported file, and
            for a file that is named like one of the model's or of another stream.
    """
    classes = {stream.name: type(stream) for stream in streams if stream.name not in ATTENTION_TYPES}
    sources: dict[str, Path] = {}
    for name, stream in sorted(classes.items()):
        require_loadable(stream)
        file = Path(sys.modules[stream.__module__].__file__)
        for source in (file, *map(Path, get_relative_import_files(file))):
            own = Path(__file__).parent / source.name
            other = own if own.exists() else sources.setdefault(source.name, source)
            if not other.samefile(source):
                raise ValueError(
                    f"The code of the stream {name!r} has the file {source}, but {other} has its name in the checkpoint; "
                    "rename it."
                )
            sources[source.name] = source
        config.auto_map = {
            **(getattr(config, "auto_map", None) or {}),
            _auto_map_key(name): f"{file.stem}.{stream.__name__}",
        }
    if write and sources:
        os.makedirs(folder, exist_ok=True)
        for source in sources.values():
            if source.parent.resolve() != Path(folder).resolve():
                shutil.copyfile(source, Path(folder) / source.name)


def load_streams(config: BlossomRecConfig, path: str | os.PathLike, **finding: Any) -> None:
    """
    Register the streams of a checkpoint that are not registered yet, which runs their code.

    Args:
        path: a folder, or the name of a repository.
        finding: arguments of `from_pretrained` that say where to find a file.

    Raises:
        ImportError: if the code needs a package that is not installed.
        ValueError: if other code is registered under the name of such a stream.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    names = {name for attention_type in config.attention_types for name in stream_names(attention_type)}
    for name in sorted(names.difference(ATTENTION_TYPES)):
        reference = auto_map.get(_auto_map_key(name))
        if reference is None:
            continue
        if name in STREAMS:
            _require_same_code(name, reference, path, **finding)
            continue
        try:
            stream = get_class_from_dynamic_module(reference, path, **finding)
        except ImportError as error:
            if "blossomrec_hf" not in str(error):
                raise
            raise ImportError(
                f"{os.fspath(path)} attends with the stream {name!r}, whose code needs the package blossomrec-hf: "
                "`pip install blossomrec-hf`."
            ) from error
        register_stream(name, stream)


def _require_same_code(
    name: str, reference: str, path: str | os.PathLike, revision: str | None = None, **finding: Any
) -> None:
    """Raise a `ValueError` if the registered stream of this name has other code than the checkpoint's, a `reference`."""
    repository, _, reference = reference.rpartition("--")
    if repository in ("", os.fspath(path)):
        repository, finding = path, {"revision": revision, **finding}
    saved = cached_file(repository, f"{reference.partition('.')[0]}.py", **finding, **LENIENT)
    if saved is None:  # the manifest names missing files
        return
    registered = STREAMS[name]
    file = getattr(sys.modules.get(registered.__module__), "__file__", None)
    if file is None or Path(file).read_bytes() != Path(saved).read_bytes():
        raise ValueError(
            f"{os.fspath(path)} has other code of the stream {name!r} than {file or registered!r}, where it is registered "
            "from; load it in another process, or without `trust_remote_code` to use the registered one."
        )


def _auto_map_key(name: str) -> str:
    return f"BlossomRecStream.{name}"


def generic_ops(config: BlossomRecConfig) -> Ops:
    """The functions in PyTorch that compute streams without a fused kernel."""
    return REFERENCE_OPS if config._attn_implementation == "eager" else TORCH_OPS


def packed_blocks(ops: Ops, layer: nn.Module, keys: Keys, cu_seqlens: torch.Tensor) -> list[Blocks | None]:
    """What the streams of a layer compute of the complete blocks of packed histories."""
    found: list[Blocks | None] = []
    for stream in layer.streams:
        blocks = None
        if stream.block_size is not None:
            complete, first = complete_blocks(cu_seqlens, keys.k.shape[-3], stream.block_size)
            blocks = Blocks(stream.summarize(ops, layer, keys, complete), first)
        found.append(blocks)
    return found


def attend_streams(
    ops: Ops,
    layer: nn.Module,
    q: torch.Tensor,
    keys: Keys,
    queries: Queries,
    blocks: list[Blocks | None],
    gates: torch.Tensor | None,
) -> tuple[torch.Tensor, Selection | None]:
    """
    The gated sum of a layer's streams.

    Args:
        q: `[Q, H, d]`, rotary embedding applied.
        blocks: of each stream.
        gates: gate values, `[Q, H, number of streams]`; `None` for a single stream.

    Returns:
        the head outputs `[Q, H, d]`, and what was selected.
    """
    dtype = q.dtype
    # On a CPU, sums in half precision depend on the shape of the batch, and so would the selection of the next layer.
    wide = ops is not REFERENCE_OPS and is_half_on_cpu(q)
    if wide:
        q = q.float()
        keys = keys if keys.states is not None else keys._replace(k=keys.k.float(), v=keys.v.float())
    if ops is TORCH_OPS and layer.stream_names == COMBINATIONS["blossom"] and has_short_histories(keys, queries):
        out, selection = _attend_short_histories(layer, q, keys, queries, blocks[0], gates)
        return out.to(dtype), selection
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        parts = [
            stream.attend(ops, layer, q, keys, queries, rows)
            for stream, rows in zip(layer.streams, blocks, strict=True)
        ]
    selection = next((selected for _, selected in parts if selected is not None), None)
    outs = [out for out, _ in parts]
    if gates is not None:
        outs = [out * gate[..., None] for out, gate in zip(outs, gates.to(q.dtype).unbind(-1), strict=True)]
    return sum(outs[1:], outs[0]).to(dtype), selection


def _attend_short_histories(
    layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: Blocks, gates: torch.Tensor
) -> tuple[torch.Tensor, Selection]:
    """`attend_streams` of the long-term and the short-term stream, in one operation."""
    long, short = layer.streams
    selection = long.select(TORCH_OPS, layer, q, queries, blocks)
    size, window, base = short.sizes["block_size"], short.sizes["window"], short.sizes["base"]
    out = attend_dense(
        q,
        keys,
        queries,
        gates,
        selection,
        block_size=long.block_size,
        distances=power_law_distances(-(-queries.max_length // size), window, base),
        short_block_size=size,
        scaling=layer.scaling,
        with_gradient=long.learns_selection,
    )
    return out, selection


class BlossomCompressor(nn.Module):
    """Compresses a window of l keys into one: a learned position per key/value head, then a shared MLP."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__()
        length, width = config.compress_block_size, config.head_dim
        self.position = nn.Parameter(torch.empty(config.num_key_value_heads, length, width))
        self.mlp = nn.Sequential(
            nn.Linear(length * width, length * width), nn.ReLU(), nn.Linear(length * width, width, bias=False)
        )

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of keys `[..., G, l, d]` → compressed keys `[..., G, d]`."""
        return self.mlp((windows + self.position).flatten(-2))


class LongTermStream(Stream):
    """Long-term interest selection (arXiv 2512.13368): attention to the past blocks of the highest importance."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        self.gate_bias = config.gate_initial_bias[0]
        self.block_size = config.selection_block_size
        self.block_width = config.head_dim

    def modules(self) -> dict[str, nn.Module]:
        compressor = BlossomCompressor(self.config)
        # Without a gradient the compressor cannot learn; frozen, it does not wait for one under DDP either.
        compressor.requires_grad_(self.config.selection_gradient != "none")
        return {"compressor": compressor}

    def summarize(self, ops: Ops, layer: nn.Module, keys: Keys, blocks: Queries) -> torch.Tensor:
        """The mean of each block's compressed keys."""
        stride = self.config.compress_stride
        per_block = self.block_size // stride
        windows = blocks
        if per_block > 1:
            back = torch.arange(1 - per_block, 1, device=blocks.position.device) * stride
            windows = blocks._replace(
                history=blocks.history[:, None].expand(-1, per_block).flatten(),
                position=(blocks.position[:, None] + back).flatten(),
            )
        compressed = ops.compress(keys.k, layer.compressor, windows, keys.first)
        wide = torch.promote_types(keys.k.dtype, torch.float32)
        return compressed.unflatten(-3, (-1, per_block)).mean(-3, dtype=wide)

    def select(self, ops: Ops, layer: nn.Module, q: torch.Tensor, queries: Queries, blocks: Blocks) -> Selection:
        """The selected blocks of queries `[Q, H, d]`."""
        return ops.select(
            q,
            blocks,
            queries,
            num_selected_blocks=self.config.num_selected_blocks,
            block_size=self.block_size,
            threshold=self.config.importance_threshold,
            scaling=layer.scaling,
        )

    @property
    def learns_selection(self) -> bool:
        """Whether the importance of blocks gets a gradient now."""
        return self.config.selection_gradient == "straight_through" and torch.is_grad_enabled()

    def attend(
        self, ops: Ops, layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: Blocks
    ) -> tuple[torch.Tensor, Selection]:
        selection = self.select(ops, layer, q, queries, blocks)
        factor = straight_through(selection.importance) if self.learns_selection else None
        out = ops.attend_selected(
            q, keys, queries, selection.block_indices, factor, block_size=self.block_size, scaling=layer.scaling
        )
        return out, selection

    def mask(self, queries: Queries, position: torch.Tensor, selection: Selection) -> torch.Tensor:
        return selected_mask(selection.block_indices, queries, position, block_size=self.block_size)


class ShortTermStream(Stream):
    """Short-term interest selection (arXiv 2512.13368): attention to blocks at power-law distances."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        self.gate_bias = config.gate_initial_bias[1]
        self.sizes = {
            "block_size": config.short_term_block_size,
            "window": config.short_term_window,
            "base": config.power_law_base,
        }

    def attend(
        self, ops: Ops, layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: None
    ) -> tuple[torch.Tensor, None]:
        return ops.attend_short(q, keys, queries, **self.sizes, scaling=layer.scaling), None

    def mask(self, queries: Queries, position: torch.Tensor, selection: None) -> torch.Tensor:
        return short_mask(queries, position, **self.sizes)


class FullStream(Stream):
    """Causal attention to the whole history."""

    def attend(
        self, ops: Ops, layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: None
    ) -> tuple[torch.Tensor, None]:
        return ops.attend_full(q, keys, queries, scaling=layer.scaling), None

    def mask(self, queries: Queries, position: torch.Tensor, selection: None) -> torch.Tensor:
        return full_mask(queries, position)


register_stream("long_term", LongTermStream)
register_stream("short_term", ShortTermStream)
register_stream("full", FullStream)
