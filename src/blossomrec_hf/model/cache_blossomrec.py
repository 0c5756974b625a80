"""
What an online user's history keeps between two events, so that a new event costs O(n/b + k·b + w + log n) and not the
whole history again:

    out = model(histories, use_cache=True)                                   # [B, L], padded: the whole histories
    out = model(events, cache=out.cache)                                     # [B, m], padded: only what is new

Of every layer the cache keeps the keys (rotary embedding applied) and values of all positions, and what each of its
streams computes of complete blocks (`Stream.summarize`): of the long-term stream, the mean of each block's compressed
keys. Nothing is kept of a block that is not complete; when it is, the positions that it depends on are all cached.

Histories lie in rows of one capacity, `[B, C, …]`, each with a length of its own; C doubles when it is exceeded. New
events are written behind the lengths, and the lengths are raised when all layers are done: an append that fails, or is
not meant to stay (`use_cache=False`), leaves the cache as it was. How events get there: `append_blossomrec.py`.

If the time to the next event is part of an event's input (`"next_gap_input"`), the latest event of a history is *open*:
what the layers keep of it is computed again, with the next event or a new `prediction_time`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .cache_files_blossomrec import CacheFilesMixin, block_sizes, column_dtypes, config_fingerprint
from .configuration_blossomrec import BlossomRecConfig
from .ids_blossomrec import UNKNOWN_TIME
from .modules_blossomrec import WeightsFingerprint, weights_fingerprint


# Room for events comes in multiples of this.
ROOM = 64


class BlossomRecCacheLayer:
    """
    The state of one layer, empty before the first append.

    Attributes:
        states (`torch.Tensor` `[B, C, G, 2·d]`): keys, rotary embedding applied, and values of every position.
        blocks (`dict[str, torch.Tensor]`): for each stream that summarizes blocks of `n` positions, by its name, what it
            computed of every complete block, `[B, C // n, G, width]` in float32 or better.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, states: torch.Tensor | None = None, blocks: dict[str, torch.Tensor] | None = None) -> None:
        self.states = states
        self.blocks = {} if blocks is None else blocks

    @property
    def keys(self) -> torch.Tensor | None:
        """`[B, G, C, d]`"""
        return None if self.states is None else self.states.chunk(2, -1)[0].transpose(1, 2)

    @property
    def values(self) -> torch.Tensor | None:
        """`[B, G, C, d]`"""
        return None if self.states is None else self.states.chunk(2, -1)[1].transpose(1, 2)


class BlossomRecCache(CacheFilesMixin, Cache):
    """
    The cache of a BlossomRec model (see the top of this file); `model(..., use_cache=True)` makes one.

    - Rows of new events are padded on any side, by `attention_mask` or [PAD]; a history may have none. Their logits
      come back in the shape of the input, and are those of the whole history computed at once, up to rounding (in
      half precision a block that scores nearly the same as another may be selected in its place; see `recommend`).
    - It works in evaluation mode and carries no gradients.
    - Events cannot be dropped from the *beginning* of a history: positions, windows and blocks are counted from there.
      Cut `item_ids` and begin a new cache.
    - It belongs to the weights that filled it, and is refused by others: begin a new one after training goes on. The
      vocabulary may grow.

    Args:
        config: the model's configuration.
        max_length: the longest history it may hold; more is a `ValueError`. Unlimited where it is `None`.

    Attributes:
        lengths (`torch.LongTensor` `[B]`): length of each history, on the CPU; `None` before the first append.
        weights (`WeightsFingerprint`): fingerprint of the weights that filled it; `None` before the first append.
    """

    def __init__(self, config: BlossomRecConfig, *, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; it must be at least 1, or `None` for no limit.")
        super().__init__(layers=[BlossomRecCacheLayer() for _ in range(config.num_hidden_layers)])
        self.config = config
        self.max_length = max_length
        self.lengths: torch.Tensor | None = None
        self.weights: WeightsFingerprint | None = None
        self._columns: dict[str, torch.Tensor] = {}  # [B, C] each, see `column_dtypes`; empty before the first append
        self._last: torch.Tensor | None = None  # [B, hidden_size]
        self._last_length: torch.Tensor | None = None  # [B]: how long each history was when `_last` was computed

    # Sizes

    @property
    def batch_size(self) -> int:
        """Number of histories; −1 before the first append."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """C, the events that a row has room for."""
        return self._columns["item_ids"].shape[1] if self._columns else 0

    @property
    def device(self) -> torch.device | None:
        """Where the states lie; `None` before the first append."""
        return self._columns["item_ids"].device if self._columns else None

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def item_ids(self) -> torch.Tensor:
        """
        The items of every history, `[B, length of the longest]` int32, 0 behind the end of a shorter one (and for
        events that were given as `inputs_embeds`).
        """
        if not self._columns:
            return torch.zeros(0, 0, dtype=torch.int32)
        items = self._columns["item_ids"][:, : self.get_seq_length()]
        place = torch.arange(items.shape[1], device=items.device)
        return items.masked_fill(place >= self.lengths.to(items.device)[:, None], 0)

    @property
    def last_timestamps(self) -> torch.Tensor | None:
        """
        The time of each history's last event, int64 `[B]`; `UNKNOWN_TIME` for an empty one, `None` for a model without
        `time_features` and before the first append.
        """
        if "timestamps" not in self._columns:
            return None
        return value_before(self._columns["timestamps"], self.lengths.to(self.device))

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """
        The hidden state of each history's last position, `[B, hidden_size]`; zero for an empty one.

        Raises:
            ValueError: where a history was cropped and nothing was appended since; it is not known there.
        """
        if self._last is None:
            return torch.zeros(0, self.config.hidden_size)
        self.check_last(self.lengths, self._last_length)
        return self._last.masked_fill((self.lengths == 0).to(self._last.device)[:, None], 0)

    @staticmethod
    def check_last(lengths: torch.Tensor, last_length: torch.Tensor) -> None:
        """
        Require that last hidden states, which were computed when histories had the lengths `last_length` `[B]`, are those
        of histories of `lengths` `[B]`.

        Raises:
            ValueError: if a history was cropped since.
        """
        stale = (lengths > 0) & (last_length != lengths)
        if stale.any():
            row = int(stale.nonzero()[0])
            raise ValueError(
                f"The last hidden state of history {row} is not known since `crop`; append an event, or crop one event "
                f"more and append it again (`item_ids[{row}, {int(lengths[row]) - 1}]`)."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the longest history; `lengths` has each."""
        return 0 if self.lengths is None or not len(self.lengths) else int(self.lengths.max())

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_length`, −1 for no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        raise ValueError("Histories of a BlossomRecCache have lengths of their own; there is no one mask for them.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("A BlossomRecCache is filled by a BlossomRec model; pass it as `cache`.")

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

        and for the times and the types of events, if the model reads them, 8 and 4 more per event (other streams that summarize blocks count as the long-term one, with their own sizes), which in float32 at the defaults (two layers) is 532 bytes an event and 528 a history: 2.1 MiB for 4,096 events.
        """
        size = torch.finfo(dtype).bits // 8
        wide = max(size, 4)
        inner = config.num_key_value_heads * config.head_dim
        layers = 0
        for kept in block_sizes(config):
            layers += inner * capacity * 2 * size
            for block_size, width in kept.values():
                layers += config.num_key_value_heads * (capacity // block_size) * width * wide
        event = sum(dtype.itemsize for dtype in column_dtypes(config).values())
        return batch_size * (event * capacity + config.hidden_size * wide + 16 + layers)

    # Changing the histories and their lengths

    def select(self, histories: torch.Tensor | Sequence[int]) -> "BlossomRecCache":
        """
        A new cache with copies of the histories of these numbers, in this order (a number may repeat), and no more room
        than they need.
        """
        out = BlossomRecCache(self.config, max_length=self.max_length)
        if self.lengths is None:
            return out
        out.weights = self.weights
        index = torch.as_tensor(histories, dtype=torch.long).cpu().flatten()
        if len(index) and not -self.batch_size <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"`histories` is {index.tolist()}; the cache has {self.batch_size} histories.")
        index = index % max(self.batch_size, 1)
        out.lengths, out._last_length = self.lengths[index], self._last_length[index]
        room = min(self.capacity, roomy(out.get_seq_length(), 0, self.max_length))
        there = index.to(self.device)
        out._columns = {name: x[:, :room][there] for name, x in self._columns.items()}
        out._last = self._last[there]
        for layer, new, sizes in zip(self.layers, out.layers, block_sizes(self.config)):
            there = index.to(layer.states.device)
            new.states = layer.states[:, :room][there]
            new.blocks = {name: rows[:, : room // sizes[name][0]][there] for name, rows in layer.blocks.items()}
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
            if cache.weights != first.weights:
                raise ValueError(
                    "`caches` were filled by models of different weights, which no one model can continue."
                )
        out = cls(first.config, max_length=first.max_length)
        out.weights = first.weights
        out.lengths = torch.cat([cache.lengths for cache in caches])
        out._last_length = torch.cat([cache._last_length for cache in caches])
        out._last = torch.cat([cache._last for cache in caches])
        room = roomy(out.get_seq_length(), 0, first.max_length)
        out._columns = {name: _stack([cache._columns[name] for cache in caches], room) for name in first._columns}
        for i, sizes in enumerate(block_sizes(first.config)):
            layers = [cache.layers[i] for cache in caches]
            out.layers[i].states = _stack([layer.states for layer in layers], room)
            for name, (size, _) in sizes.items():
                out.layers[i].blocks[name] = _stack([layer.blocks[name] for layer in layers], room // size)
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
        self.layers, self.lengths, self.weights = other.layers, other.lengths, other.weights
        self._columns, self._last, self._last_length = other._columns, other._last, other._last_length

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
            raise ValueError(f"`histories` is {gone.tolist()}; the cache has {max(self.batch_size, 0)} histories.")
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
            self._columns = {name: x.to(device) for name, x in self._columns.items()}
            self._last = self._last.to(device)
            for layer in self.layers:
                layer.states = layer.states.to(device)
                layer.blocks = {name: rows.to(device) for name, rows in layer.blocks.items()}
        return self

    # What it depends on, and its tensors in a file

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self.lengths is None:
            return {}
        tensors = {"lengths": self.lengths, "last_length": self._last_length, "last_hidden_state": self._last}
        tensors |= self._columns
        for i, layer in enumerate(self.layers):
            tensors[f"layers.{i}.states"] = layer.states
            tensors |= {f"layers.{i}.blocks.{name}": rows for name, rows in layer.blocks.items()}
        return tensors

    def check_model(self, model: nn.Module) -> WeightsFingerprint:
        """
        The fingerprint of a base model that is to continue these histories.

        Raises:
            ValueError: it has another configuration (the message says what differs) or other weights than the model
                that filled the cache.
        """
        self.check_config(model.config)
        weights = weights_fingerprint(model)
        # The items that the model has learned of since then do not matter.
        if self.weights not in (None, weights) and (
            self.weights.num_items >= weights.num_items
            or weights_fingerprint(model, self.weights.num_items) != self.weights
        ):
            raise ValueError(
                "The cached histories were filled by a model of other weights; build them anew with this model, from "
                "their items."
            )
        return weights

    def check_config(self, config: BlossomRecConfig | dict[str, Any]) -> None:
        """A `ValueError` that says what differs where `config` is not one that this cache can serve."""
        if config is self.config:
            return
        mine = json.loads(json.dumps(config_fingerprint(self.config)))
        other = config if isinstance(config, dict) else json.loads(json.dumps(config_fingerprint(config)))
        differ = [
            f"`{name}` is {mine[name]!r} and {other.get(name)!r}" for name in mine if mine[name] != other.get(name)
        ]
        if differ:
            raise ValueError(f"The cached histories belong to another configuration: {'; '.join(differ)}.")


def value_before(times: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Of times `[B, C]`, the one before `place` `[B]` in each row; `UNKNOWN_TIME` before the first."""
    if not times.shape[1]:
        return torch.full_like(place, UNKNOWN_TIME)
    found = times.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(place > 0, found, UNKNOWN_TIME)


def roomy(length: int, capacity: int, max_length: int | None) -> int:
    """The capacity for `length` events where there is now one for `capacity`: doubled, as far as `max_length` lets."""
    if length <= capacity:
        return capacity
    # A little room at the start, so that the first append after the first histories need not copy them.
    room = max(length + 1, 2 * capacity)
    room = -(-room // ROOM) * ROOM
    return room if max_length is None else max(length, min(room, max_length))


def _stack(tensors: list[torch.Tensor], size: int) -> torch.Tensor:
    """The tensors end to end along dimension 0, cut or filled up with zeros to `size` along dimension 1."""
    out = tensors[0].new_zeros(sum(x.shape[0] for x in tensors), size, *tensors[0].shape[2:])
    row = 0
    for x in tensors:
        kept = min(x.shape[1], size)
        out[row : row + x.shape[0], :kept] = x[:, :kept]
        row += x.shape[0]
    return out


__all__ = ["BlossomRecCache"]
