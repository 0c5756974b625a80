"""
BlossomRec's attention layer, and the attention functions it is registered under in `transformers`:

- `"blossom"` (what a model uses when nothing is asked) takes the fastest of the others for the input at hand,
- `"blossom_triton"` is `ops_triton.py`, fused GPU kernels,
- `"blossom_torch"` is `ops_torch.py`,
- `"eager"` is `ops_reference.py`; it is never registered, which would change every other model in the process,
- `"power_law"` is the short-term stream alone, for the decoders of `transformers`.
"""

from contextlib import nullcontext

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from .append_blossomrec import Append
from .configuration_blossomrec import BlossomRecConfig
from .modules_blossomrec import has_plain_compressor
from .ops_reference import REFERENCE_OPS, Ops, Selection, rotate, straight_through
from .ops_torch import DENSE_MAX_LENGTH, LAST_OPS, ONE_OPS, TORCH_OPS, is_half_on_cpu, short_places
from .ops_triton import blossom_attention
from .ops_triton_launch import Sizes, why_unsupported


def _attention(
    ops: Ops,
    module: "BlossomAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    gates: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    query_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **probs_kwargs,
) -> tuple[torch.Tensor, Selection | None, torch.Tensor | None]:
    """
    The streams of `module.attention_type`, computed by the functions of one ops file.

    Args:
        query: `[1, H, T, d]`; `key` and `value`: `[1, G, T, d]`; rotary embeddings not yet applied.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.
        gates: gate values of the long-term and the short-term stream, `[1, T, H, 2]`; `None` without gates.
        query_embeddings: those of the queries, where they do not stand at the positions of the keys.
        probs_kwargs: `return_probs=True`, which `ops_reference` alone understands.

    Returns:
        the head outputs `[1, T, H, d]`, the selection of the long-term stream, and the probabilities `[H, T, T]`.
    """
    config = module.config
    q = rotate(query, *(query_embeddings or position_embeddings))[0].transpose(0, 1)
    k, v = rotate(key, *position_embeddings)[0].transpose(0, 1), value[0].transpose(0, 1)
    where = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "scaling": scaling}
    selection, streams, dtype = None, [], v.dtype
    if module.attention_type in ("blossom", "long_term"):
        compressed = ops.compress(k, module.compressor, cu_seqlens, stride=config.compress_stride)
        selection = ops.select(
            q,
            compressed,
            num_selected_blocks=config.num_selected_blocks,
            block_size=config.selection_block_size,
            stride=config.compress_stride,
            threshold=config.importance_threshold,
            **where,
        )
    # On a CPU, sums in half precision depend on the shape of the batch, and so would the selection of the next layer.
    wide = ops is not REFERENCE_OPS and is_half_on_cpu(v)
    if module.training and torch.is_grad_enabled() and max_seqlen <= DENSE_MAX_LENGTH:  # where it would take longer
        wide = False
    if wide:
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        if module.attention_type == "full":
            streams.append(ops.attend_full(q, k, v, **where, **probs_kwargs))
        if selection is not None:
            factor = None  # one in value
            if config.selection_gradient == "straight_through" and torch.is_grad_enabled():
                factor = straight_through(selection.importance)
            blocks = {"block_size": config.selection_block_size}
            streams.append(
                ops.attend_selected(q, k, v, selection.block_indices, factor, **blocks, **where, **probs_kwargs)
            )
        if module.attention_type in ("blossom", "short_term"):
            blocks = {"block_size": config.short_term_block_size, "window": config.short_term_window}
            blocks["base"] = config.power_law_base
            streams.append(ops.attend_short(q, k, v, **blocks, **where, **probs_kwargs))
    outs, probs = zip(*streams) if probs_kwargs else (streams, None)
    if gates is None:
        return outs[0][None].to(dtype), selection, probs and probs[0]
    long_gate, short_gate = gates[0].to(v.dtype).unbind(-1)  # [T, H] each
    out = outs[0] * long_gate[..., None] + outs[1] * short_gate[..., None]
    if probs is not None:
        probs = probs[0] * long_gate.T[..., None] + probs[1] * short_gate.T[..., None]
    return out[None].to(dtype), selection, probs


def eager_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """`ops_reference.py` behind the contract of `BlossomAttention`'s attention functions."""
    return _attention(REFERENCE_OPS, module, query, key, value, **kwargs)[:2]


def blossom_torch_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """`ops_torch.py` behind the contract of `BlossomAttention`'s attention functions."""
    return _attention(TORCH_OPS, module, query, key, value, **kwargs)[:2]


def _why_no_triton(module: "BlossomAttention", query: torch.Tensor) -> str | None:
    """Why the kernels cannot compute this layer; `None` where they can."""
    config = module.config
    if not has_plain_compressor(module):
        return "the compressor is offloaded, quantized or adapted, and the kernels read its weights themselves"
    return why_unsupported(
        query.device.type,
        query.dtype,
        module.head_dim,
        block_size=config.selection_block_size,
        num_selected_blocks=config.num_selected_blocks,
        short_block_size=config.short_term_block_size,
        heads_per_group=config.num_attention_heads // config.num_key_value_heads,
    )


def blossom_triton_attention_forward(
    module, query, key, value, attention_mask=None, *, gates, position_embeddings, cu_seqlens, max_seqlen, scaling
):
    """
    `ops_triton.py` behind the contract of `BlossomAttention`'s attention functions: one operation a layer. `full`
    layers are PyTorch's own fused attention, as in `blossom_torch`.

    Raises:
        ValueError: where there are no kernels for the device, the dtype or a size, or for weights that are offloaded,
            quantized or adapted.
    """
    config = module.config
    if not has_plain_compressor(module):
        raise ValueError(
            f"`blossom_triton` cannot compute this layer: {_why_no_triton(module, query)}; use `blossom`."
        )
    if module.attention_type == "full" or query.shape[2] == 0:
        where = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "scaling": scaling}
        where |= {"gates": gates, "position_embeddings": position_embeddings}
        return _attention(TORCH_OPS, module, query, key, value, **where)[:2]
    compressor = getattr(module, "compressor", None)
    cos, sin = position_embeddings
    out, selection = blossom_attention(
        # `squeeze`, whose gradient is a view, where that of `[0]` would be a copy.
        *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
        cos=cos[0],
        sin=sin[0],
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        sizes=Sizes.of(config),
        scaling=scaling,
        threshold=config.importance_threshold,
        gates=None if gates is None else gates.squeeze(0),
        position=None if compressor is None else compressor.position,
        mlp=None if compressor is None else compressor.mlp,
        factor=config.selection_gradient == "straight_through",
        short=module.attention_type != "long_term",
    )
    return out[None], selection


def blossom_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """The fastest implementation of the same function: the kernels on a GPU that they support, else `ops_torch.py`."""
    if query.is_cuda and _why_no_triton(module, query) is None:
        return blossom_triton_attention_forward(module, query, key, value, **kwargs)
    return blossom_torch_attention_forward(module, query, key, value, **kwargs)


def _last_alone(module: "BlossomAttention", key: torch.Tensor) -> bool:
    """
    Whether the queries of last positions are answered alone, by `LAST_OPS` or `ONE_OPS`. Neither in the reference nor
    where there may be gradients; and the kernels answer all queries in less time than so many small operations take to
    be launched.
    """
    implementation = module.config._attn_implementation
    if torch.is_grad_enabled() or implementation not in ("blossom", "blossom_torch", "blossom_triton"):
        return False
    if module.attention_type == "full" or implementation == "blossom_torch":
        return True
    return implementation == "blossom" and not (key.is_cuda and _why_no_triton(module, key) is None)


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


class BlossomGate(nn.Linear):
    """Logits of the gates of both streams, `[..., 2H]`: all heads of the long-term one, then of the short-term one."""

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config.hidden_size, 2 * config.num_attention_heads)


class BlossomAttention(nn.Module):
    """
    The projections, the compressor and the gates of one layer; how queries meet keys is the attention function's that
    `config._attn_implementation` names. An attention function gets
    `(module, q, k, v, attention_mask=None, *, cu_seqlens, max_seqlen, gates, position_embeddings, scaling)` and
    returns the gated head outputs `[1, T, H, d]` and a `Selection` (or `None`).
    """

    def __init__(self, config: BlossomRecConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_type = config.attention_types[layer_idx]
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        inner, inner_kv = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, inner_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        if self.attention_type in ("blossom", "long_term"):
            self.compressor = BlossomCompressor(config)
            # Without a gradient the compressor cannot learn; frozen, it does not wait for one under DDP either.
            self.compressor.requires_grad_(config.selection_gradient != "none")
        if self.attention_type == "blossom":
            self.gate = BlossomGate(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        output_attentions: bool = False,
        append: Append | None = None,
        keep: torch.Tensor | slice | None = None,
    ) -> tuple[torch.Tensor, Selection | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: packed histories, `[1, T, hidden_size]`.
            position_embeddings: cosines and sines of the rotary embedding, `[1, T, d]` each.
            cu_seqlens: `[S + 1]` offsets of the histories.
            max_seqlen: length of the longest one.
            append: with a cache: what the packed histories are the new events of.
            keep: the last position of each history, `[S]`, where the output is wanted there alone; a slice, where
                there is one history.

        Returns:
            the output `[1, T, hidden_size]` (or `[1, S, hidden_size]` at `keep`), the `Selection` (long-term stream),
            the gates `[1, T, H, 2]` (`blossom` layers), and with `output_attentions` the gated probabilities
            `[H, T, T]`. With `keep`, selection and gates may be those of its positions, too.
        """

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        device = hidden_states.device.type
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            # Once, where each of the projections would make and keep a copy of its own.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        k, v = heads(self.k_proj(hidden_states)), heads(self.v_proj(hidden_states))
        last_alone = keep is not None and _last_alone(self, k)
        asking = hidden_states[:, keep] if last_alone else hidden_states
        q = heads(self.q_proj(asking))
        gates = None
        if self.attention_type == "blossom":
            gates = self.gate(asking).unflatten(-1, (2, -1)).transpose(-1, -2).sigmoid()
        kwargs = {
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "gates": gates,
            "position_embeddings": position_embeddings,
            "scaling": self.scaling,
        }
        probs = None
        if append is not None:
            append.store(self, k, v, position_embeddings)
        if append is not None and not append.from_start:
            out, selection = append.attend(self, q, gates, position_embeddings)
        elif output_attentions:
            out, selection, probs = _attention(REFERENCE_OPS, self, q, k, v, **kwargs, return_probs=True)
        elif last_alone:
            at_keep = tuple(x[:, keep] for x in position_embeddings)
            ops = LAST_OPS
            if isinstance(keep, slice) and device == "cpu":  # its lists would keep a GPU waiting
                ops, kwargs["max_seqlen"] = ONE_OPS, k.shape[2]
            out, selection, _ = _attention(ops, self, q, k, v, **kwargs, query_embeddings=at_keep)
        else:
            implementation = self.config._attn_implementation
            attend = AttentionInterface().get_interface(implementation, eager_attention_forward)
            out, selection = attend(self, q, k, v, None, **kwargs)
        if keep is not None and not last_alone:
            out = out[:, keep]
        return self.o_proj(out.flatten(2)), selection, gates, probs


def power_law_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor:
    """
    What `power_law_attention_forward` needs to know of padding and packing: the number of its history for each key,
    `[batch, kv_length]`, 0 for padding. Never `None`, so that a decoder that makes no mask is noticed.
    """
    if local_size is not None or kv_offset != 0:
        raise ValueError(
            "`power_law` cannot be combined with sliding or chunked attention; use a full-attention model."
        )
    if q_offset + q_length != kv_length:
        raise ValueError(
            f"`power_law` got {kv_length} keys for {q_offset + q_length} positions; it works with caches that hold "
            "just what was seen, such as `DynamicCache`, not with static ones."
        )
    history = torch.ones(batch_size, kv_length, dtype=torch.long, device=device)
    if q_length == kv_length and kv_length > 1:
        # Packed histories show in the mask alone: a token that does not see the one before it begins a history.
        token = torch.arange(1, kv_length, device=device)
        sees = mask_function(torch.arange(batch_size, device=device)[:, None], 0, token, token - 1)
        history[:, 1:] += (~sees).long().expand(batch_size, -1).cumsum(1)
    if attention_mask is not None:
        history = history * attention_mask.to(torch.long)
    return history


def power_law_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The short-term stream as an attention function for any decoder of `transformers`
    (`attn_implementation="power_law"`). Its three numbers are read from the model's config where it has them
    (`short_term_block_size`, `short_term_window`, `power_law_base`; 8, 1 and 2 elsewhere).

    Args:
        query: `[batch, H, q_length, d]`; `key`, `value`: `[batch, G, kv_length, d]`.
        attention_mask: what `power_law_mask` returned.
        position_ids: `[batch, q_length]`, where the decoder passes them on; packed sequences show in them even where
            a mask made for a cache does not tell them apart.

    Returns:
        `[batch, q_length, H, d]` and `None`.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        raise ValueError(
            "`power_law` cannot see which positions are padding: this model passes "
            f"{'no mask' if attention_mask is None else 'a mask of its own'} instead of the one registered as "
            "`power_law` in `AttentionMaskInterface`."
        )
    if dropout:
        raise ValueError(
            f"`power_law` has no dropout on attention probabilities; set `attention_dropout` ({dropout}) to 0."
        )
    for name in ("softcap", "s_aux"):  # capped logits, attention sinks
        if kwargs.get(name) is not None:
            raise ValueError(f"`power_law` has no `{name}`, which this model asks for; use a model without it.")
    config = module.config
    block_size = getattr(config, "short_term_block_size", 8)
    window = getattr(config, "short_term_window", 1)
    base = getattr(config, "power_law_base", 2)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    real = attention_mask > 0
    if query.shape[2] == key.shape[2]:
        row, place = real.nonzero(as_tuple=True)
        number = attention_mask[row, place]
        new = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
        if position_ids is not None:
            given = position_ids.expand(real.shape)[row, place]
            new = new | (given[1:] != given[:-1] + 1)
        new = nn.functional.pad(new, (1, 0), value=True)
        cu_seqlens = nn.functional.pad(new[: row.shape[0]].nonzero().flatten(), (0, 1), value=row.shape[0])
        packed = (x.transpose(1, 2)[row, place] for x in (query, key, value))
        max_seqlen = int(cu_seqlens.diff().max()) if row.shape[0] else 0
        out = TORCH_OPS.attend_short(
            *packed,
            cu_seqlens,
            max_seqlen=max_seqlen,
            block_size=block_size,
            window=window,
            base=base,
            scaling=scaling,
        )
        return query.new_zeros(query.transpose(1, 2).shape).index_put((row, place), out), None

    # Behind a cache, each of the few queries gathers its own keys: slots of the real keys in order, then places.
    slot = real.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    position = (real.cumsum(1) - 1).clamp(min=0)[:, -query.shape[2] :]  # [batch, q_length]
    place = short_places(position, key.shape[2], block_size=block_size, window=window, base=base)
    mask = (place >= 0) & (place <= position[..., None])  # [batch, q_length, J·B]
    slot = slot[:, None].expand(-1, place.shape[1], -1).gather(2, place.clamp(0, key.shape[2] - 1))
    row = torch.arange(query.shape[0], device=query.device)[:, None, None]
    keys, values = (x.transpose(1, 2)[row, slot].transpose(2, 3) for x in (key, value))  # [batch, q, G, J·B, d]
    grouped = query.transpose(1, 2).unflatten(2, (key.shape[1], -1))  # [batch, q, G, H/G, d]
    out = nn.functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask[:, :, None, None], scale=scaling
    )
    return out.flatten(2, 3), None


AttentionInterface.register("blossom", blossom_attention_forward)
AttentionInterface.register("blossom_triton", blossom_triton_attention_forward)
AttentionInterface.register("blossom_torch", blossom_torch_attention_forward)
AttentionInterface.register("power_law", power_law_attention_forward)
AttentionMaskInterface.register("power_law", power_law_mask)
