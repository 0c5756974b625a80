"""New events of cached histories: where in a `BlossomRecCache` they go, and how they attend to all that is there."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import nn

from .cache_blossomrec import BlossomRecCache, BlossomRecCacheLayer, roomy
from .modules_blossomrec import WeightsFingerprint, has_plain_compressor
from .ops_reference import Selection, locate, rotate
from .ops_torch import _gather, _in_slices, best_blocks, is_half_on_cpu, short_places
from .ops_triton_append import attend_events, block_windows, store_events
from .ops_triton_launch import Sizes, why_unsupported


# New events of one history that meet its blocks (or in `full` layers its keys) together.
TILE = 64


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
        self,
        cache: BlossomRecCache,
        cu_seqlens: torch.Tensor,
        item_ids: torch.Tensor | None,
        num_tokens: int,
        weights: WeightsFingerprint,
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
        self.cache, self.config, self.weights = cache, cache.config, weights
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
        self.capacity = roomy(self.max_seqlen, cache.capacity, limit)
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
    def short_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the flat states that the short-term stream attends to, and which of them there are: `[T, G or 1, J·B]`."""
        config = self.config
        place = short_places(
            self.position,
            self.max_seqlen,
            block_size=config.short_term_block_size,
            window=config.short_term_window,
            base=config.power_law_base,
        )
        return self._at(place[:, None])

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
            mean = self._compressed(layer, module.compressor).mean(1, dtype=wide)  # [n, G, d]
            row, index = self.blocks.unbind(1)
            layer.block_keys[row, :, index] = mean.detach()

    def _compressed(self, layer: BlossomRecCacheLayer, compressor: nn.Module) -> torch.Tensor:
        """The compressed keys `[n, b / s, G, d]` of the new blocks."""
        block, stride = self.config.selection_block_size, self.config.compress_stride
        if self.fused:
            windows = block_windows(layer.states, compressor.position, self.blocks, block=block, stride=stride)
            return compressor.mlp(windows.flatten(3))
        groups, length, width = compressor.position.shape
        end = torch.arange(stride, block + stride, stride, device=self.device)[:, None, None]
        inside = torch.arange(-length, 0, device=self.device)
        row, index = self.blocks[:, :, None].unbind(1)
        place = (index * block)[..., None, None] + end + inside  # [n, b / s, 1, l]
        group = torch.arange(groups, device=self.device)
        first = (row * groups + group) * self.capacity  # [n, G]
        slot = first[:, None, :, None] + place.clamp(min=0)
        keys = _gather(layer.states.view(-1, 2 * width), slot)[..., :width]
        return compressor(keys.masked_fill((place < 0)[..., None], 0))

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
                sizes=Sizes.of(self.config),
                scaling=module.scaling,
                threshold=self.config.importance_threshold,
                short=module.attention_type != "long_term",
            )
        q = rotate(q, *position_embeddings)[0].transpose(0, 1)
        selection, streams, dtype = None, [], q.dtype
        if module.attention_type in ("blossom", "long_term"):
            selection = self._select(layer, q, module.scaling)
        wide = is_half_on_cpu(q)  # as the whole history is computed
        q = q.float() if wide else q
        with torch.autocast("cpu", enabled=False) if wide else nullcontext():
            if module.attention_type == "full":
                streams.append(self._attend_full(layer, q, module.scaling))
            if selection is not None:
                streams.append(self._attend_selected(layer, q, selection.block_indices, module.scaling))
            if module.attention_type in ("blossom", "short_term"):
                streams.append(self._attend_at(layer, q, *self.short_slots, module.scaling))
        if gates is None:
            return streams[0][None].to(dtype), selection
        long_gate, short_gate = gates[0].to(q.dtype)[..., None].unbind(2)  # [T, H, 1] each
        return (streams[0] * long_gate + streams[1] * short_gate)[None].to(dtype), selection

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
            keys, values = _gather(states, index).to(q.dtype).chunk(2, -1)
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
            keys, values = states.to(q.dtype).chunk(2, -1)
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
        cache.layers, cache.lengths, cache.weights = self.layers, self.lengths, self.weights
        cache._items, cache._last, cache._last_length = items, last, last_length


def _has_kernels(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `ops_triton_append.py` serves the layer: where `x` is on a GPU and its sizes fit, if they may be chosen."""
    config = module.config
    implementation = config._attn_implementation
    if implementation != "blossom_triton" and not (implementation == "blossom" and x.is_cuda):
        return False
    if not has_plain_compressor(module):
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
