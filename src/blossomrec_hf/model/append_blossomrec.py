"""New events of cached histories: where in a `BlossomRecCache` they go, and how they attend to all that is there."""

import torch
from torch import nn

from .cache_blossomrec import BlossomRecCache, BlossomRecCacheLayer, column_dtypes, roomy, value_before
from .events_blossomrec import Moments
from .ids_blossomrec import UNKNOWN_TIME
from .modules_blossomrec import WeightsFingerprint, has_plain_compressor
from .ops_reference import Blocks, Keys, Queries, Selection, locate, rotate
from .ops_triton_append import attend_events, compress, store_events
from .ops_triton_launch import Sizes, why_unsupported
from .packing_blossomrec import PackedHistories
from .streams_blossomrec import FUSED, attend_streams, generic_ops


class Append:
    """
    New events of every history on their way into a cache: where they go, computed once for all layers, and the attention
    of their queries to everything that is cached. Nothing of the cache changes before `commit`.

    The kernels of `ops_triton_append.py` compute it if they can, otherwise PyTorch does. The device is waited for once,
    for the offsets of the events.

    If the latest event of a cached history is open (see `cache_blossomrec.py`), it comes before the new ones and is computed
    again.

    Attributes:
        events (`PackedHistories`): the events that the layers compute, the open ones included.
        position (`torch.LongTensor` `[T]`): place of each event in its whole history.
        max_seqlen (`int`): length of the longest history, with its new events.
        from_start (`bool`): whether the events are all there is; then the model's usual attention does.
    """

    def __init__(self, cache: BlossomRecCache, histories: PackedHistories, weights: WeightsFingerprint) -> None:
        self.device = histories.cu_seqlens.device
        self.offsets = histories.cu_seqlens.cpu()
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
        self.capacity = roomy(self.max_seqlen, cache.capacity, limit)
        self.layers = [BlossomRecCacheLayer(x.states, dict(x.blocks)) for x in cache.layers]

        self.new: torch.Tensor | None = None
        self.events = histories
        if "next_gap_input" in (self.config.time_features or ()):
            if histories.inputs_embeds is not None:
                raise ValueError(
                    "`inputs_embeds` cannot be combined with a cache of a model with the time feature 'next_gap_input', which "
                    "computes the latest item again; give `input_ids`."
                )
            lengths, counts = self._reopen(histories, lengths, counts)
        num_tokens = self.events.position.shape[0]
        self.num_tokens, self.counts, self.cu_seqlens = num_tokens, counts, self.events.cu_seqlens
        self.from_start = num_tokens == 0 or not lengths.any()
        if self.from_start:
            places = torch.stack(locate(self.cu_seqlens[:-1], num_tokens), 1)
        else:  # few: a copy to the device costs less than what would compute them there
            row = torch.repeat_interleave(counts)
            position = torch.arange(num_tokens) + (lengths - self.offsets[:-1])[row]
            places = self._to_device(torch.stack([row, position], 1))
        self.places = places
        self.row, self.position = places.unbind(1)
        self.lengths_before = lengths
        self._places: dict[torch.device, _Places] = {}
        self.columns = self._stored_columns()
        if "timestamps" in self.columns:
            before = value_before(self.columns["timestamps"], self._to_device(lengths))
            self.events = self.events._replace(previous_time=before)

    def _reopen(
        self, histories: PackedHistories, lengths: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Put the open events of the cached histories before the new ones. Returns how many events of each history are closed,
        and how many are computed.
        """
        is_open = lengths.clamp(max=1)
        if not is_open.any():
            return lengths, counts
        opened = is_open.cumsum(0)
        new = torch.arange(int(self.offsets[-1])) + opened.repeat_interleave(counts)
        rows = is_open.nonzero()[:, 0]
        order = torch.empty(len(new) + len(rows), dtype=torch.long)
        order[new] = torch.arange(len(new))
        order[(self.offsets[:-1] + opened - is_open)[rows]] = torch.arange(len(new), len(order))
        self.offsets = self.offsets + nn.functional.pad(opened, (1, 0))
        order, self.new, offsets = map(self._to_device, (order, new, self.offsets))
        rows, last = map(self._to_device, (rows, lengths[rows] - 1))
        columns = {}
        for name, cached in self.cache._columns.items():
            column = torch.cat([histories.pack(_given(histories, name)), cached[rows, last].long()])
            columns[name] = column[order][None]
        self.events = PackedHistories(
            token=None,
            position=locate(offsets[:-1], len(order))[1],
            cu_seqlens=offsets,
            max_seqlen=histories.max_seqlen + 1,
            shape=(1, len(order)),
            prediction_time=histories.prediction_time,
            target_event_type=histories.target_event_type,
            **columns,
        )
        return lengths - is_open, counts + is_open

    def _stored_columns(self) -> dict[str, torch.Tensor]:
        """The columns of the cache with the events behind the lengths, `[B, C]` each."""
        shape, columns = (len(self.lengths), self.capacity), {}
        for name, dtype in column_dtypes(self.config).items():
            columns[name] = _grown(self.cache._columns.get(name), shape, dtype, self.device)
            given = _given(self.events, name)
            columns[name][self.row, self.position] = 0 if given is None else self.events.pack(given).to(dtype)
        return columns

    def of_new(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of the new events alone, of `x` with a row for each computed event."""
        return x if self.new is None else x.index_select(0, self.new)

    def last_moments(self) -> Moments:
        """The moments `[B]` of the last event of each history, old or new."""
        time = next_time = next_type = None
        if "timestamps" in self.columns:
            time = value_before(self.columns["timestamps"], self._to_device(self.lengths))
            next_time = self.events.prediction_time
            next_time = torch.full_like(time, UNKNOWN_TIME) if next_time is None else next_time
        if "event_type_ids" in self.columns:
            next_type = self.events.target_event_type
            if next_type is None:
                next_type = torch.full_like(self.cu_seqlens[1:], self.config.default_target_type)
        return Moments(time=time, next_time=next_time, next_type=next_type)

    def _to_device(self, numbers: torch.Tensor) -> torch.Tensor:
        """`numbers` in a copy that nothing waits for."""
        return numbers.to(self.device, non_blocking=self.device.type == "cuda")

    def _places_on(self, device: torch.device) -> "_Places":
        """The places of the events on the device of a layer."""
        if device not in self._places:
            self._places[device] = _Places(self, device)
        return self._places[device]

    def store(
        self,
        module: nn.Module,
        keys: torch.Tensor,
        values: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """
        Writes the events' keys (rotary embedding not yet applied) and values, `[1, G, T, d]`, of a `BlossomAttention`,
        and what its streams compute of the blocks that are complete now.
        """
        layer = self.layers[module.layer_idx]
        _, groups, _, width = keys.shape
        if layer.states is not None and layer.states.dtype != keys.dtype:
            raise ValueError(
                f"The cache is in {layer.states.dtype} and the new events in {keys.dtype}; append under the same autocast "
                "and in the same dtype as before, or begin a new cache."
            )
        has_kernels, rows = _has_kernels(module, keys), len(self.lengths)
        places = self._places_on(keys.device)
        layer.states = _grown(layer.states, (rows, self.capacity, groups, 2 * width), keys.dtype, keys.device)
        if has_kernels:
            store_events(keys, values, *position_embeddings, places.events, layer.states)
        else:
            new = torch.cat([rotate(keys, *position_embeddings), values], -1)[0].transpose(0, 1)
            layer.states.flatten(0, 1).index_copy_(0, places.slot, new.detach())
        ops = generic_ops(self.config)
        if has_kernels and module.stream_names in FUSED:
            ops = ops._replace(compress=compress)
        wide = torch.promote_types(keys.dtype, torch.float32)
        for stream in module.streams:
            if stream.block_size is None:
                continue
            shape = (rows, self.capacity // stream.block_size, groups, stream.block_width)
            kept = layer.blocks[stream.name] = _grown(layer.blocks.get(stream.name), shape, wide, keys.device)
            if (completed := places.completed_blocks(stream.block_size)) is not None:
                blocks, index = completed
                new = stream.summarize(ops, module, places.keys(layer), blocks)
                kept[blocks.history, index] = new.detach().to(wide)

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        gates: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, Selection | None]:
        """
        Attention of the events to everything that is cached, after `store`. Without gradients.

        Args:
            module: the `BlossomAttention`.
            q: `[1, H, T, d]`, rotary embedding not yet applied.
            gates: `[1, T, H, number of streams]`; `None` for a single stream.

        Returns:
            the head outputs `[1, T, H, d]` and what was selected.
        """
        layer, places = self.layers[module.layer_idx], self._places_on(q.device)
        if module.stream_names in FUSED and _has_kernels(module, q):
            return attend_events(
                q,
                *position_embeddings,
                gates,
                places.events,
                *layer.states.chunk(2, -1),
                layer.blocks.get("long_term"),
                num_rows=layer.states.shape[1],
                sizes=Sizes.of(self.config),
                scaling=module.scaling,
                threshold=self.config.importance_threshold,
                short="short_term" in module.stream_names,
            )
        q = rotate(q, *position_embeddings)[0].transpose(0, 1)
        kept = [layer.blocks.get(name) for name in module.stream_names]
        blocks = [None if rows is None else places.blocks(rows) for rows in kept]
        ops, gates = generic_ops(self.config), None if gates is None else gates[0]
        out, selection = attend_streams(ops, module, q, places.keys(layer), places.queries, blocks, gates)
        return out[None], selection

    def last_states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The last layer's state of each history's last event, old or new, `[B, hidden_size]` in float32 or better, and the
        length `[B]` that the history had when it was computed.

        Args:
            hidden_states: those of the computed events, `[T, hidden_size]`.
        """
        last, last_length = self.cache._last, self.cache._last_length
        if last is None:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            last = hidden_states.new_zeros(len(self.lengths), hidden_states.shape[1], dtype=wide)
            last_length = torch.zeros_like(self.lengths)
        if not self.num_tokens:
            return last, last_length
        new = hidden_states.detach()[self.cu_seqlens[1:] - 1].to(last.dtype)  # −1 before the first event: any
        if self.counts.all():
            return new, self.lengths
        last = torch.where((self.cu_seqlens.diff() > 0)[:, None], new, last)
        return last, torch.where(self.counts > 0, self.lengths, last_length)

    def commit(self, last: torch.Tensor, last_length: torch.Tensor) -> None:
        """Makes the events part of the cache, with what `last_states` returned."""
        cache = self.cache
        cache.layers, cache.lengths, cache.weights = self.layers, self.lengths, self.weights
        cache._columns, cache._last, cache._last_length = self.columns, last, last_length


class _Places:
    """
    Where the events of an `Append` go, on one device, computed once for all layers there.

    Attributes:
        events (`torch.LongTensor` `[T, 2]`): history and place of each event.
        queries (`Queries`): the events as queries to their whole histories.
        slot (`torch.LongTensor` `[T]`): the rows of the states that the events get.
    """

    def __init__(self, append: Append, device: torch.device) -> None:
        self.device, self.append = device, append
        self.events = append.places.to(device)
        row, position = self.events.T.contiguous()
        self.queries = Queries(row, position, append.max_seqlen, int(append.counts.max()))
        self.slot = row * append.capacity + position
        self._history = torch.arange(len(append.lengths), device=device)
        self._first: dict[int, torch.Tensor] = {}
        self._completed: dict[int, tuple[Queries, torch.Tensor] | None] = {}

    def first(self, capacity: int) -> torch.Tensor:
        """`[S]`: where each history begins in rows of which every history has `capacity`."""
        if capacity not in self._first:
            self._first[capacity] = self._history * capacity
        return self._first[capacity]

    def keys(self, layer: BlossomRecCacheLayer) -> Keys:
        states = layer.states.flatten(0, 1)
        return Keys(*states.chunk(2, -1), self.first(layer.states.shape[1]), states)

    def blocks(self, rows: torch.Tensor) -> Blocks:
        return Blocks(rows.flatten(0, 1), self.first(rows.shape[1]))

    def completed_blocks(self, size: int) -> tuple[Queries, torch.Tensor] | None:
        """The blocks of `size` positions that the events complete, and the number of each in its history."""
        if size not in self._completed:
            first = self.append.lengths_before // size
            number = self.append.lengths // size - first
            row = torch.repeat_interleave(number)
            before = number.cumsum(0) - number
            index = torch.arange(len(row)) + (first - before)[row]
            found = None
            if len(row):
                places = torch.stack([row, index, (index + 1) * size - 1])
                row, index, end = places.to(self.device, non_blocking=self.device.type == "cuda").unbind()
                found = Queries(row, end, self.append.max_seqlen, int(number.max())), index
            self._completed[size] = found
        return self._completed[size]


def _given(histories: PackedHistories, name: str) -> torch.Tensor | None:
    """A column of the input `[B, L]`, which the model requires; items may be given as embeddings."""
    column = getattr(histories, name)
    if column is None and name != "item_ids":
        raise ValueError(f"`{name}` is None, but the model reads it; give one value per event.")
    return column


def _has_kernels(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the kernels of `ops_triton_append.py` may be used and support the device, dtype and sizes of a layer."""
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
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`tensor`, or a larger one of `shape` that begins with it along dimension 1 and ends with zeros."""
    if tensor is not None and tensor.shape == shape:
        tensor = tensor.to(device)
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensor = tensor.clone()  # PyTorch refuses to write to it outside of `torch.inference_mode`
        return tensor.contiguous()  # as it is; kernels count on it
    out = torch.zeros(shape, dtype=dtype, device=device)
    if tensor is not None:
        out[:, : tensor.shape[1]].copy_(tensor)
    return out
