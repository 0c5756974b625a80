"""
What an online user's history keeps between two events, so that a new event costs O(n/b + k·b + w + log n) and not the
whole history again:

    out = model(histories, use_cache=True)                                   # [B, L], padded: the whole histories
    out = model(events, past_key_values=out.past_key_values)                 # [B, m], padded: only what is new

Of every layer the cache keeps the keys (rotary embedding applied) and values of all positions, and of the long-term
stream the mean of each complete block's compressed keys: the importance of a block is linear in them. Nothing is kept
of a block that is not complete; when it is, the positions that its windows cover are all among the keys.

Histories lie in rows of one capacity, `[B, …, C, …]`, each with a length of its own; C doubles when it is exceeded. New
events are written behind the lengths, and the lengths are raised when all layers are done: an append that fails, or is
not meant to stay (`use_cache=False`), leaves the cache as it was.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Cache

from .configuration_blossomrec import BlossomRecConfig
from .ops_reference import Selection, locate, power_law_distances
from .ops_torch import _gather, _in_slices, best_blocks
from .ops_triton_append import attend_events, block_windows, store_events
from .ops_triton_launch import Sizes, why_unsupported


# What a cached history depends on; a cache serves models that agree in these.
FINGERPRINT = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size hidden_act "
    "attention_types compress_block_size compress_stride selection_block_size num_selected_blocks importance_threshold "
    "short_term_block_size short_term_window power_law_base attention_bias rope_parameters max_position_embeddings "
    "layer_norm_eps"
).split()

# New events of one history that meet its blocks (or in `full` layers its keys) together.
TILE = 64


class BlossomRecCacheLayer:
    """
    The state of one layer; `None` before the first append.

    Attributes:
        states (`torch.Tensor` `[B, G, C, 2·d]`): keys, rotary embedding applied, and values of every position.
        block_keys (`torch.Tensor` `[B, G, C // b, d]`): mean compressed key of every complete block, in float32 or
            better; `None` without a long-term stream.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, states: torch.Tensor | None = None, block_keys: torch.Tensor | None = None) -> None:
        self.states = states
        self.block_keys = block_keys

    @property
    def keys(self) -> torch.Tensor | None:
        """`[B, G, C, d]`"""
        return None if self.states is None else self.states.chunk(2, -1)[0]

    @property
    def values(self) -> torch.Tensor | None:
        """`[B, G, C, d]`"""
        return None if self.states is None else self.states.chunk(2, -1)[1]


class BlossomRecCache(Cache):
    """
    The cache of a BlossomRec model (see the top of this file); `model(..., use_cache=True)` makes one.

    - Rows of new events are padded on any side, by `attention_mask` or [PAD]; a history may have none. Their logits
      come back in the shape of the input, and are those of the whole history computed at once (up to rounding).
    - It works in evaluation mode and carries no gradients.
    - Events cannot be dropped from the *beginning* of a history: positions, windows and blocks are counted from there.
      Cut `item_ids` and begin a new cache.
    - It belongs to the weights that filled it: begin a new one after training goes on.

    Args:
        config: the model's configuration.
        max_length: the longest history it may hold; more is a `ValueError`. Unlimited where it is `None`.

    Attributes:
        lengths (`torch.LongTensor` `[B]`): length of each history, on the CPU; `None` before the first append.
    """

    def __init__(self, config: BlossomRecConfig, *, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; it must be at least 1, or `None` for no limit.")
        super().__init__(layers=[BlossomRecCacheLayer() for _ in range(config.num_hidden_layers)])
        self.config = config
        self.max_length = max_length
        self.lengths: torch.Tensor | None = None
        self._items: torch.Tensor | None = None  # [B, C] int32
        self._last: torch.Tensor | None = None  # [B, hidden_size]
        self._last_length: torch.Tensor | None = None  # [B]: how long each history was when `_last` was computed

    # What it holds

    @property
    def batch_size(self) -> int:
        """Number of histories; −1 before the first append."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """C, the events that a row has room for."""
        return 0 if self._items is None else self._items.shape[1]

    @property
    def device(self) -> torch.device | None:
        """Where the states lie; `None` before the first append."""
        return None if self._items is None else self._items.device

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def item_ids(self) -> torch.Tensor:
        """
        The items of every history, `[B, length of the longest]` int32, 0 behind the end of a shorter one (and for
        events that were given as `inputs_embeds`).
        """
        if self._items is None:
            return torch.zeros(0, 0, dtype=torch.int32)
        items = self._items[:, : self.get_seq_length()]
        place = torch.arange(items.shape[1], device=items.device)
        return items.masked_fill(place >= self.lengths.to(items.device)[:, None], 0)

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """
        The hidden state of each history's last position, `[B, hidden_size]`; zero for an empty one.

        Raises:
            ValueError: where a history was cropped and nothing was appended since; it is not known there.
        """
        if self._last is None:
            return torch.zeros(0, self.config.hidden_size)
        stale = (self.lengths > 0) & (self._last_length != self.lengths)
        if stale.any():
            row = int(stale.nonzero()[0])
            raise ValueError(
                f"The last hidden state of history {row} is not known since `crop`; append an event, or crop one event "
                f"more and append it again (`item_ids[{row}, {int(self.lengths[row]) - 1}]`)."
            )
        return self._last.masked_fill((self.lengths == 0).to(self._last.device)[:, None], 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the longest history; `lengths` has each."""
        return 0 if self.lengths is None or not len(self.lengths) else int(self.lengths.max())

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_length`, −1 for no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        raise ValueError("Histories of a BlossomRecCache have lengths of their own; there is no one mask for them.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("A BlossomRecCache is filled by a BlossomRec model; pass it as `past_key_values`.")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; `size_in_bytes` is the formula."""
        return sum(x.nbytes for x in self._tensors().values())

    @staticmethod
    def size_in_bytes(
        config: BlossomRecConfig, batch_size: int, capacity: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """
        Bytes of a cache of B histories with room for C events each: with e bytes a number (E = max(e, 4)), G key/value
        heads of width d, blocks of b,

            B · (4·C + hidden_size·E + 16 + layers · G·C·2·d·e + long-term layers · G·(C // b)·d·E)

        which in float32 at the defaults (two layers) is 532 bytes an event and 528 a history: 2.1 MiB for 4,096 events.
        """
        size = torch.finfo(dtype).bits // 8
        wide = max(size, 4)
        inner = config.num_key_value_heads * config.head_dim
        layers = 0
        for attention_type in config.attention_types:
            layers += inner * capacity * 2 * size
            if attention_type in ("blossom", "long_term"):
                layers += inner * (capacity // config.selection_block_size) * wide
        return batch_size * (4 * capacity + config.hidden_size * wide + 16 + layers)

    # Changing which histories it holds, and how much of each

    def select(self, histories: torch.Tensor | Sequence[int]) -> "BlossomRecCache":
        """
        A new cache with copies of the histories of these numbers, in this order (a number may repeat), and no more room
        than they need.
        """
        out = BlossomRecCache(self.config, max_length=self.max_length)
        if self.lengths is None:
            return out
        index = torch.as_tensor(histories, dtype=torch.long).cpu().flatten()
        if len(index) and not -self.batch_size <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"`histories` is {index.tolist()}; the cache holds {self.batch_size} histories.")
        index = index % max(self.batch_size, 1)
        out.lengths, out._last_length = self.lengths[index], self._last_length[index]
        room = min(self.capacity, _roomy(out.get_seq_length(), 0, self.max_length))
        index = index.to(self.device)
        out._items, out._last = self._items[:, :room][index], self._last[index]
        for layer, new in zip(self.layers, out.layers):
            new.states = layer.states[:, :, :room][index]
            if layer.block_keys is not None:
                new.block_keys = layer.block_keys[:, :, : room // self.config.selection_block_size][index]
        return out

    @classmethod
    def cat(cls, caches: Sequence["BlossomRecCache"]) -> "BlossomRecCache":
        """
        One new cache with the histories of several; `select` takes them apart again. Its `max_length` is the first
        one's.
        """
        if not caches or any(cache.lengths is None for cache in caches):
            raise ValueError("`caches` must be one or more caches that hold histories.")
        first = caches[0]
        for cache in caches[1:]:
            first.check_config(cache.config)
        out = cls(first.config, max_length=first.max_length)
        out.lengths = torch.cat([cache.lengths for cache in caches])
        out._last_length = torch.cat([cache._last_length for cache in caches])
        out._last = torch.cat([cache._last for cache in caches])
        room = _roomy(out.get_seq_length(), 0, first.max_length)
        out._items = _stack([cache._items for cache in caches], 1, room)
        for i, layer in enumerate(out.layers):
            layer.states = _stack([cache.layers[i].states for cache in caches], 2, room)
            if first.layers[i].block_keys is not None:
                blocks = room // first.config.selection_block_size
                layer.block_keys = _stack([cache.layers[i].block_keys for cache in caches], 2, blocks)
        return out

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is appended inside stays only if nothing fails there."""
        before = copy(self)
        try:
            yield
        except BaseException:
            self._take(before)
            raise

    def _take(self, other: "BlossomRecCache") -> None:
        self.layers, self.lengths = other.layers, other.lengths
        self._items, self._last, self._last_length = other._items, other._last, other._last_length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the histories of these numbers, in this order; `select` makes a new cache of them."""
        self._take(self.select(indices))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As `batch_select_indices`."""
        self._take(self.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every history `repeats` times."""
        self._take(self.select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats)))

    def evict(self, histories: torch.Tensor | Sequence[int]) -> None:
        """Drops the histories of these numbers, and frees what they took; the others keep their order."""
        gone = torch.as_tensor(histories, dtype=torch.long).cpu().flatten()
        if len(gone) and not 0 <= int(gone.min()) <= int(gone.max()) < self.batch_size:
            raise ValueError(f"`histories` is {gone.tolist()}; the cache holds {max(self.batch_size, 0)} histories.")
        number = torch.arange(max(self.batch_size, 0))
        self._take(self.select(number[~torch.isin(number, gone)]))

    def crop(self, max_length: int | torch.Tensor | Sequence[int]) -> None:
        """
        Takes back the latest events: every history keeps at most its first `max_length` (one number, or one for each
        history), or loses the latest −`max_length` where that is negative. The room stays.
        """
        if self.lengths is None:
            return
        limit = torch.as_tensor(max_length, dtype=torch.long).cpu()
        if limit.dim() and limit.shape != self.lengths.shape:
            raise ValueError(f"`max_length` has shape {tuple(limit.shape)}; give one number, or {self.batch_size}.")
        self.lengths = torch.where(limit < 0, (self.lengths + limit).clamp(min=0), torch.minimum(self.lengths, limit))

    def reset(self) -> None:
        """As before the first append; any number of histories may follow."""
        self._take(BlossomRecCache(self.config))

    def to(self, device: torch.device | str) -> "BlossomRecCache":
        """Moves the states, in place."""
        if self.lengths is not None:
            self._items, self._last = self._items.to(device), self._last.to(device)
            for layer in self.layers:
                layer.states = layer.states.to(device)
                layer.block_keys = None if layer.block_keys is None else layer.block_keys.to(device)
        return self

    # On disk

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self.lengths is None:
            return {}
        tensors = {"lengths": self.lengths, "item_ids": self._items, "last_hidden_state": self._last}
        tensors["last_length"] = self._last_length
        for i, layer in enumerate(self.layers):
            tensors[f"layers.{i}.states"] = layer.states
            if layer.block_keys is not None:
                tensors[f"layers.{i}.block_keys"] = layer.block_keys
        return tensors

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the histories to a safetensors file (free room left out), with what of the configuration they depend on.
        The file appears when it is complete.

        Raises:
            ValueError: before the first append, when there is nothing to save.
        """
        if self.lengths is None:
            raise ValueError("The cache holds no histories yet; there is nothing to save.")
        cut = self.select(torch.arange(self.batch_size))._tensors()
        length = self.get_seq_length()
        for name, tensor in cut.items():
            if name == "item_ids":
                cut[name] = tensor[:, :length].contiguous()
            elif name.endswith(".states"):
                cut[name] = tensor[:, :, :length].contiguous()
            elif name.endswith(".block_keys"):
                cut[name] = tensor[:, :, : length // self.config.selection_block_size].contiguous()
        metadata = {"format": "pt", "blossomrec_cache": "1", "config": json.dumps(_fingerprint(self.config))}
        part = Path(f"{path}.part")
        save_file(cut, part, metadata)
        os.replace(part, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: BlossomRecConfig,
        *,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
    ) -> "BlossomRecCache":
        """
        Reads what `save` wrote.

        Raises:
            ValueError: for a file that is no such cache or was cut, one of another configuration (the message says what
                differs), and histories longer than `max_length`.
        """
        out = cls(config, max_length=max_length)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}.") from error
        if metadata.get("blossomrec_cache") != "1":
            raise ValueError(f"{path} was not written by `BlossomRecCache.save` of this version.")
        out.check_config(json.loads(metadata["config"]))
        out.lengths, out._last_length = tensors["lengths"].cpu(), tensors["last_length"].cpu()
        if max_length is not None and out.get_seq_length() > max_length:
            raise ValueError(
                f"`max_length` is {max_length}; {path} holds a history of {out.get_seq_length()} events. Load it "
                "without a limit, or rebuild the histories from their latest items."
            )
        out._items, out._last = tensors["item_ids"], tensors["last_hidden_state"]
        for i, layer in enumerate(out.layers):
            layer.states, layer.block_keys = tensors[f"layers.{i}.states"], tensors.get(f"layers.{i}.block_keys")
        return out

    def check_config(self, config: BlossomRecConfig | dict[str, Any]) -> None:
        """A `ValueError` that says what differs where `config` is not one that this cache can serve."""
        if config is self.config:
            return
        mine = json.loads(json.dumps(_fingerprint(self.config)))
        other = config if isinstance(config, dict) else json.loads(json.dumps(_fingerprint(config)))
        differ = [
            f"`{name}` is {mine[name]!r} and {other.get(name)!r}" for name in mine if mine[name] != other.get(name)
        ]
        if differ:
            raise ValueError(f"The cached histories belong to another configuration: {'; '.join(differ)}.")


def _fingerprint(config: BlossomRecConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FINGERPRINT}


def _roomy(length: int, capacity: int, max_length: int | None) -> int:
    """The capacity for `length` events where there is now one for `capacity`: doubled, as far as `max_length` lets."""
    if length <= capacity:
        return capacity
    # A little room at the start, so that the first append after the first histories need not copy them.
    room = max(length + 1, 2 * capacity)
    room = -(-room // TILE) * TILE
    return room if max_length is None else max(length, min(room, max_length))


def _stack(tensors: list[torch.Tensor], dim: int, size: int) -> torch.Tensor:
    """The tensors end to end along dimension 0, cut or filled up with zeros to `size` along `dim`."""
    shape = list(tensors[0].shape)
    shape[0], shape[dim] = sum(x.shape[0] for x in tensors), size
    out = tensors[0].new_zeros(shape)
    row = 0
    for x in tensors:
        kept = min(x.shape[dim], size)
        out[row : row + x.shape[0]].narrow(dim, 0, kept).copy_(x.narrow(dim, 0, kept))
        row += x.shape[0]
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[1, heads, T, d]` by `cos` and `sin` `[1, T, d]`, in float32 or better."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


class Append:
    """
    New events of every history on their way into a cache: where they go, computed once for all layers, and the attention
    of their queries to everything that is cached. Nothing of the cache changes before `commit`.

    Where the kernels of `ops_triton_append.py` can do it they do; what the same in PyTorch needs to know of the events is
    made when it is asked for. The device is waited for once, for the offsets of the events.

    Attributes:
        position (`torch.LongTensor` `[T]`): place of each event in its whole history.
        max_seqlen (`int`): length of the longest history, with its new events.
        from_start (`bool`): whether the events are all there is; then the model's usual attention does.
    """

    def __init__(
        self, cache: BlossomRecCache, cu_seqlens: torch.Tensor, item_ids: torch.Tensor | None, num_tokens: int
    ) -> None:
        self.device = cu_seqlens.device
        self.offsets = cu_seqlens.cpu()
        counts = self.offsets.diff()
        if cache.lengths is None:
            lengths = torch.zeros_like(counts)
        elif cache.batch_size != len(counts):
            raise ValueError(
                f"The input has {len(counts)} rows, the cache {cache.batch_size} histories; give every history a row "
                "(padding alone where it has no new event), or `select` the histories that have some."
            )
        elif cache.device != self.device:
            raise ValueError(
                f"The cache lies on {cache.device}, the input on {self.device}; move it: `cache.to(...)`."
            )
        else:
            lengths = cache.lengths
        self.cache, self.config = cache, cache.config
        self.lengths = lengths + counts
        self.max_seqlen = int(self.lengths.max()) if len(counts) else 0
        limit = cache.max_length
        if limit is not None and self.max_seqlen > limit:
            row = int(self.lengths.argmax())
            raise ValueError(
                f"History {row} would have {self.max_seqlen} events, the cache was built for `max_length={limit}`. "
                "Begin a new cache with the history's latest items (a part of `item_ids`), or one with a larger "
                "`max_length`. Nothing was appended."
            )
        self.item_ids, self.num_tokens = item_ids, num_tokens
        self.from_start = num_tokens == 0 or not lengths.any()
        self.counts, self.cu_seqlens = counts, cu_seqlens
        self.capacity = _roomy(self.max_seqlen, cache.capacity, limit)
        self.layers = [BlossomRecCacheLayer(x.states, x.block_keys) for x in cache.layers]
        self.fused = False

        if self.from_start:
            self.events = torch.stack(locate(cu_seqlens, num_tokens), 1)
        else:  # few: a copy to the device costs less than what would compute them there
            row = torch.repeat_interleave(counts)
            self.events = self._to_device(row, torch.arange(num_tokens) + (lengths - self.offsets[:-1])[row])
        self.row, self.position = self.events.unbind(1)
        self._plan_blocks(lengths)

    def _to_device(self, *numbers: torch.Tensor) -> torch.Tensor:
        """The tensors `[n]` side by side `[n, …]`, in one copy that nothing waits for."""
        return torch.stack(numbers, 1).to(self.device, non_blocking=self.device.type == "cuda")

    def _plan_blocks(self, lengths: torch.Tensor) -> None:
        """The blocks that these events complete: of which history each is, and its number there, `[n, 2]`."""
        block = self.config.selection_block_size
        first = lengths // block
        number = self.lengths // block - first
        long = not set(self.config.attention_types).isdisjoint(("blossom", "long_term"))
        self.num_blocks = int(number.sum()) if long else 0
        if self.num_blocks:
            row = torch.repeat_interleave(number)
            before = number.cumsum(0) - number
            self.blocks = self._to_device(row, torch.arange(self.num_blocks) + (first - before)[row])

    @cached_property
    def sizes(self) -> Sizes:
        config = self.config
        return Sizes(
            stride=config.compress_stride,
            length=config.compress_block_size,
            block=config.selection_block_size,
            selected=config.num_selected_blocks,
            short_block=config.short_term_block_size,
            window=config.short_term_window,
            base=config.power_law_base,
        )

    # What PyTorch's operations need beyond that

    @cached_property
    def first_slot(self) -> torch.Tensor:
        """`[T, G]`: the row of the flat states where each event's history begins."""
        group = torch.arange(self.config.num_key_value_heads, device=self.device)
        return (self.row[:, None] * len(group) + group) * self.capacity

    @cached_property
    def slot(self) -> torch.Tensor:
        """`[T·G]`: the rows of the flat states that these events get."""
        return (self.first_slot + self.position[:, None]).flatten()

    @cached_property
    def tiles(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """
        Up to `TILE` events of one history make a row of a tile: the history `[N]` of each tile (`None` where the histories
        are the tiles), the events `[N, size]` in it, and the place `[T]` of each event in the flattened tiles.
        """
        most = int(self.counts.max())
        size = min(most, TILE)
        number = (self.counts + size - 1) // size
        row = torch.repeat_interleave(number)
        first = number.cumsum(0) - number
        start = (torch.arange(len(row)) - first[row]) * size
        # Where every history has its one tile, the cache itself has the rows.
        alone = len(row) == len(number) and most <= size and bool(self.counts.all())
        begin, end, row = self._to_device(self.offsets[row] + start, self.offsets[row + 1] - 1, row).unbind(1)
        token = begin[:, None] + torch.arange(size, device=self.device)
        token = torch.minimum(token, end[:, None])
        place = self._to_device(first * size - self.offsets[:-1])[self.row, 0]
        place = place + torch.arange(self.num_tokens, device=self.device)
        return None if alone else row, token, place

    @cached_property
    def own_block(self) -> torch.Tensor:
        """`[T]`: the selection block that each event lies in."""
        return torch.div(self.position, self.config.selection_block_size, rounding_mode="floor")

    @cached_property
    def short_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the flat states that the short-term stream attends to, and which of them there are: `[T, G or 1, J·B]`."""
        block = self.config.short_term_block_size
        window, base = self.config.short_term_window, self.config.power_law_base
        distances = power_law_distances(-(-self.max_seqlen // block), window, base)
        blocks = torch.div(self.position, block, rounding_mode="floor")[:, None] - torch.tensor(
            distances, device=self.device
        )
        place = (blocks[..., None] * block + torch.arange(block, device=self.device)).flatten(1)[:, None]
        return self._at(place)

    def _at(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rows of the flat states `[T, G, K]` at the places `[T, G or 1, K]` of each event's history, and which of them
        are neither before its start nor behind the event.
        """
        position = self.position[:, None, None]
        mask = (place >= 0) & (place <= position)
        return self.first_slot[..., None] + torch.minimum(place.clamp(min=0), position), mask

    # What each layer does

    def store(
        self,
        module: nn.Module,
        keys: torch.Tensor,
        values: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """
        Writes the events' keys (rotary embedding not yet applied) and values, `[1, G, T, d]`, of a `BlossomAttention`, and
        compresses the blocks that are complete now.
        """
        layer = self.layers[module.layer_idx]
        _, groups, _, width = keys.shape
        if layer.states is not None and layer.states.dtype != keys.dtype:
            raise ValueError(
                f"The cache holds {layer.states.dtype}, the new events are {keys.dtype}; append under the same autocast "
                "and in the same dtype as before, or begin a new cache."
            )
        self.fused = _has_kernels(module, keys)
        rows = len(self.lengths)
        layer.states = _grown(layer.states, (rows, groups, self.capacity, 2 * width), keys.dtype, self.device)
        if self.fused:
            store_events(keys, values, *position_embeddings, self.events, layer.states)
        else:
            new = torch.cat([rotate(keys, *position_embeddings), values], -1)[0].transpose(0, 1).flatten(0, 1)
            layer.states.view(-1, 2 * width).index_copy_(0, self.slot, new.detach())
        if module.attention_type not in ("blossom", "long_term"):
            return
        wide = torch.promote_types(keys.dtype, torch.float32)
        shape = (rows, groups, self.capacity // self.config.selection_block_size, width)
        layer.block_keys = _grown(layer.block_keys, shape, wide, self.device)
        if self.num_blocks:
            windows = self._windows(layer, module.compressor.position)
            mean = module.compressor.mlp(windows.flatten(3)).mean(1, dtype=wide)  # [n, G, d]
            row, index = self.blocks.unbind(1)
            layer.block_keys[row, :, index] = mean.detach()

    def _windows(self, layer: BlossomRecCacheLayer, learned: torch.Tensor) -> torch.Tensor:
        """The windows `[n, b / s, G, l, d]` of the new blocks, with their learned positions."""
        block, stride = self.config.selection_block_size, self.config.compress_stride
        if self.fused:
            return block_windows(layer.states, learned, self.blocks, block=block, stride=stride)
        groups, length, width = learned.shape
        end = torch.arange(stride, block + stride, stride, device=self.device)[:, None, None]
        inside = torch.arange(-length, 0, device=self.device)
        row, index = self.blocks[:, :, None].unbind(1)
        place = (index * block)[..., None, None] + end + inside  # [n, b / s, 1, l]
        group = torch.arange(groups, device=self.device)
        first = (row * groups + group) * self.capacity  # [n, G]
        slot = first[:, None, :, None] + place.clamp(min=0)
        keys = _gather(layer.states.view(-1, 2 * width), slot)[..., :width]
        return keys.masked_fill((place < 0)[..., None], 0) + learned

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        gates: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, Selection | None]:
        """
        Attention of the events to everything that is cached, after `store`. No gradients, and so no factor.

        Args:
            module: the `BlossomAttention`.
            q: `[1, H, T, d]`, rotary embedding not yet applied.
            gates: `[1, T, H, 2]`; `None` without gates.

        Returns:
            the head outputs `[1, T, H, d]` and the selection of the long-term stream.
        """
        layer = self.layers[module.layer_idx]
        if self.fused and module.attention_type != "full":
            return attend_events(
                q,
                *position_embeddings,
                gates,
                self.events,
                layer.states,
                layer.block_keys,
                sizes=self.sizes,
                scaling=module.scaling,
                threshold=self.config.importance_threshold,
                short=module.attention_type != "long_term",
            )
        q = rotate(q, *position_embeddings)[0].transpose(0, 1)
        if module.attention_type == "full":
            return self._attend_full(layer, q, module.scaling)[None], None
        selection, streams = None, []
        if module.attention_type != "short_term":
            selection = self._select(layer, q, module.scaling)
            streams.append(self._attend_selected(layer, q, selection.block_indices, module.scaling))
        if module.attention_type != "long_term":
            streams.append(self._attend_at(layer, q, *self.short_places, module.scaling))
        if gates is None:
            return streams[0][None], selection
        long_gate, short_gate = gates[0].to(q.dtype)[..., None].unbind(2)  # [T, H, 1] each
        return (streams[0] * long_gate + streams[1] * short_gate)[None], selection

    def _select(self, layer: BlossomRecCacheLayer, q: torch.Tensor, scaling: float) -> Selection:
        c = layer.block_keys
        groups, dtype, number = c.shape[1], c.dtype, self.config.num_selected_blocks
        num_blocks = (self.max_seqlen - 1) // self.config.selection_block_size
        missing = max(number - num_blocks, 0)
        block = torch.arange(num_blocks + missing, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            queries = q.to(dtype).unflatten(1, (groups, -1)).mean(2) * scaling

            def rank(token, keys):
                scores = _gather(queries, token).transpose(1, 2) @ keys.transpose(2, 3)  # [N, G, size, M]
                candidate = (block < self.own_block[token][..., None])[:, None]
                pi, chosen = best_blocks(nn.functional.pad(scores, (0, missing)), candidate, number)
                return torch.stack([pi, chosen.to(dtype)], -1).transpose(1, 2)

            ranked = self._in_tiles(rank, c[:, :, :num_blocks], groups * (num_blocks + missing))
        pi, blocks = ranked.unbind(-1)  # [T, G, k]
        kept = pi > self.config.importance_threshold
        return Selection(torch.where(kept, blocks.long(), -1), torch.where(kept, pi, 0.0))

    def _attend_selected(
        self, layer: BlossomRecCacheLayer, q: torch.Tensor, block_indices: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        block_size = self.config.selection_block_size
        own = self.own_block[:, None, None].expand(-1, block_indices.shape[1], 1)
        blocks = torch.cat([block_indices, own], -1)[..., None]  # block −1 lies before the start
        place = (blocks * block_size + torch.arange(block_size, device=self.device)).flatten(2)
        return self._attend_at(layer, q, *self._at(place), scaling)

    def _attend_at(
        self, layer: BlossomRecCacheLayer, q: torch.Tensor, index: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of each event to the rows `index` `[T, G, K]` of the flat states where `mask` `[T, G or 1, K]` is set."""
        states = layer.states.view(-1, layer.states.shape[-1])

        def attend(q, index, mask):
            keys, values = _gather(states, index).chunk(2, -1)
            return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)

        groups = index.shape[1]
        row_elements = groups * index.shape[2] * states.shape[1]
        return _in_slices(attend, row_elements, q.unflatten(1, (groups, -1)), index, mask[:, :, None]).flatten(1, 2)

    def _attend_full(self, layer: BlossomRecCacheLayer, q: torch.Tensor, scaling: float) -> torch.Tensor:
        states = layer.states[:, :, : self.max_seqlen]
        groups = states.shape[1]
        place = torch.arange(self.max_seqlen, device=self.device)

        def attend(token, states):
            # All heads of a group and all events of the tile are queries to the same keys.
            queries = _gather(q, token).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [N, G, H/G, size, d]
            mask = (place <= self.position[token][..., None])[:, None, None]
            mask = mask.expand(-1, 1, queries.shape[2], -1, -1).flatten(2, 3)
            keys, values = states.chunk(2, -1)
            out = nn.functional.scaled_dot_product_attention(
                queries.flatten(2, 3), keys, values, attn_mask=mask, scale=scaling
            )
            return out.unflatten(2, (-1, token.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)

        return self._in_tiles(attend, states, q.shape[1] * self.max_seqlen)

    def _in_tiles(
        self, function: Callable[..., torch.Tensor], states: torch.Tensor, event_elements: int
    ) -> torch.Tensor:
        """
        `function` of the events of tiles `[N, size]` and the states `[N, …]` of each tile's history, in slices that lay
        out `event_elements` an event; its results `[N, size, …]` as `[T, …]`.
        """
        row, token, place = self.tiles
        elements = token.shape[1] * event_elements + states[:1].numel()
        if row is None:
            out = _in_slices(function, elements, token, states)
        else:

            def of_rows(token, row):
                return function(token, states[row])

            out = _in_slices(of_rows, elements, token, row)
        return _gather(out.flatten(0, 1), place)

    def commit(self, hidden_states: torch.Tensor) -> None:
        """Makes the events part of the cache; `hidden_states` `[T, hidden_size]` are the last layer's."""
        cache, rows = self.cache, len(self.lengths)
        items = _grown(cache._items, (rows, self.capacity), torch.int32, self.device, dim=1)
        if self.item_ids is not None:
            items[self.row, self.position] = self.item_ids.to(torch.int32)
        else:
            items[self.row, self.position] = 0
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        last, last_length = cache._last, cache._last_length
        if last is None:
            last = hidden_states.new_zeros(rows, hidden_states.shape[1], dtype=wide)
            last_length = torch.zeros_like(self.lengths)
        if self.num_tokens:
            new = hidden_states.detach()[self.cu_seqlens[1:] - 1].to(last.dtype)  # −1 before the first event: any
            if self.counts.all():
                last, last_length = new, self.lengths
            else:
                last = torch.where((self.cu_seqlens.diff() > 0)[:, None], new, last)
                last_length = torch.where(self.counts > 0, self.lengths, last_length)
        cache.layers, cache.lengths = self.layers, self.lengths
        cache._items, cache._last, cache._last_length = items, last, last_length


def _has_kernels(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `ops_triton_append.py` serves the layer: where `x` is on a GPU and its sizes fit, if they may be chosen."""
    config = module.config
    implementation = config._attn_implementation
    if implementation != "blossom_triton" and not (implementation == "blossom" and x.is_cuda):
        return False
    reason = why_unsupported(
        x.device.type,
        x.dtype,
        module.head_dim,
        num_selected_blocks=config.num_selected_blocks,
        heads_per_group=config.num_attention_heads // config.num_key_value_heads,
    )
    return reason is None


def _grown(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dim: int = 2
) -> torch.Tensor:
    """`tensor`, or a larger one of `shape` that begins with it along `dim` and ends with zeros."""
    if tensor is not None and tensor.shape == shape:
        return tensor.contiguous()  # as it is; kernels count on it
    out = torch.zeros(shape, dtype=dtype, device=device)
    if tensor is not None:
        out.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return out


__all__ = ["BlossomRecCache"]
