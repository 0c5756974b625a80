"""
BlossomRec's attention layer, and the attention functions that it is registered under in `transformers`:

- `"blossom"`, the default, uses the fastest of the others for the input,
- `"blossom_triton"` is `ops_triton.py`, fused GPU kernels,
- `"blossom_torch"` is `ops_torch.py`,
- `"eager"` is `ops_reference.py`; it is never registered, which would change every other model in the process.
"""

import torch
from torch import nn
from transformers import AttentionInterface

from .append_blossomrec import Append
from .configuration_blossomrec import BlossomRecConfig
from .modules_blossomrec import has_plain_compressor, project
from .ops_reference import REFERENCE_OPS, Keys, Ops, Selection, every_position, last_positions, rotate
from .ops_torch import TORCH_OPS
from .ops_triton import blossom_attention
from .ops_triton_last import last_attention
from .ops_triton_launch import Sizes, why_unsupported
from .streams_blossomrec import FUSED, attend_streams, build_streams, generic_ops, packed_blocks


def attend_packed(
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
    query_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Selection | None]:
    """
    The streams of a layer on packed histories, computed by the functions of one ops file.

    Args:
        query: `[1, H, T, d]`; `key` and `value`: `[1, G, T, d]`; rotary embeddings not yet applied.
        cu_seqlens: offsets of the packed histories, `[S + 1]`.
        gates: gate values, `[1, T, H, number of streams]`; `None` for a single stream.
        query_embeddings: rotary embeddings of the queries `[1, S, d]`, if these are the histories' last positions alone.

    Returns:
        the head outputs `[1, T, H, d]` and what was selected.
    """
    k = rotate(key, *position_embeddings)[0].transpose(0, 1)
    keys = Keys(k, value[0].transpose(0, 1), cu_seqlens[:-1])
    if query_embeddings is None:
        queries = every_position(cu_seqlens, k.shape[0], max_seqlen)
    else:
        queries = last_positions(cu_seqlens, max_seqlen)
    q = rotate(query, *(query_embeddings or position_embeddings))[0].transpose(0, 1)
    blocks = packed_blocks(ops, module, keys, cu_seqlens)
    out, selection = attend_streams(ops, module, q, keys, queries, blocks, None if gates is None else gates[0])
    return out[None], selection


def attention_probabilities(module: "BlossomAttention", query, key, **kwargs) -> torch.Tensor:
    """
    The gated probabilities `[H, T, T]` of all pairs of packed positions, by `ops_reference.py`: what attention makes of
    values that are one-hot. Arguments as in `attend_packed`.

    Raises:
        ValueError: for a stream that attends to something else than positions.
    """
    for stream in module.streams:
        if not stream.has_probabilities:
            raise ValueError(
                f"`output_attentions=True` needs probabilities of positions, which the stream {stream.name!r} does not "
                "have; leave it out."
            )
    _, groups, tokens, _ = key.shape
    one_hot = torch.eye(tokens, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
    out, _ = attend_packed(REFERENCE_OPS, module, query, key, one_hot.expand(1, groups, -1, -1), **kwargs)
    return out[0].transpose(0, 1)


def eager_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """`ops_reference.py` behind the contract of `BlossomAttention`'s attention functions."""
    return attend_packed(REFERENCE_OPS, module, query, key, value, **kwargs)


def blossom_torch_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """`ops_torch.py` behind the contract of `BlossomAttention`'s attention functions."""
    return attend_packed(TORCH_OPS, module, query, key, value, **kwargs)


def _why_no_triton(module: "BlossomAttention", query: torch.Tensor) -> str | None:
    """Why the kernels cannot compute this layer; `None` if they can."""
    config = module.config
    if module.stream_names not in FUSED:
        return f"there are no kernels for the streams {' + '.join(module.stream_names)}"
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


def _require_plain_compressor(module: "BlossomAttention", query: torch.Tensor) -> None:
    """Raise `ValueError` for a compressor whose weights the kernels cannot read."""
    if not has_plain_compressor(module):
        raise ValueError(
            f"`blossom_triton` cannot compute this layer: {_why_no_triton(module, query)}; use `blossom`."
        )


def blossom_triton_attention_forward(
    module, query, key, value, attention_mask=None, *, gates, position_embeddings, cu_seqlens, max_seqlen
):
    """
    `ops_triton.py` behind the contract of `BlossomAttention`'s attention functions: one operation per layer. Streams
    without fused kernels, such as `full`, are computed as in `blossom_torch`.

    Raises:
        ValueError: if there are no kernels for the device, the dtype or a size, and for weights that are offloaded,
            quantized or adapted.
    """
    if module.stream_names not in FUSED or query.shape[2] == 0:
        where = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        where |= {"gates": gates, "position_embeddings": position_embeddings}
        return blossom_torch_attention_forward(module, query, key, value, **where)
    config = module.config
    _require_plain_compressor(module, query)
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
        scaling=module.scaling,
        threshold=config.importance_threshold,
        gates=None if gates is None else gates.squeeze(0),
        position=None if compressor is None else compressor.position,
        mlp=None if compressor is None else compressor.mlp,
        factor=config.selection_gradient == "straight_through",
        short="short_term" in module.stream_names,
    )
    return out[None], selection


def blossom_attention_forward(module, query, key, value, attention_mask=None, **kwargs):
    """The fastest implementation of the same function: the kernels on a GPU that they support, else `ops_torch.py`."""
    if query.is_cuda and _why_no_triton(module, query) is None:
        return blossom_triton_attention_forward(module, query, key, value, **kwargs)
    return blossom_torch_attention_forward(module, query, key, value, **kwargs)


def _answers_queries(module: "BlossomAttention", hidden_states: torch.Tensor) -> bool:
    """
    Whether the layer is computed by functions that answer a part of the queries alone. The kernels that do have no
    gradients.
    """
    if _has_kernels(module, hidden_states):
        return not torch.is_grad_enabled()
    return module.config._attn_implementation in ("blossom", "blossom_triton", "blossom_torch", "eager")


def _has_kernels(module: "BlossomAttention", x: torch.Tensor) -> bool:
    """Whether the kernels compute the layer; the dtype and device are those of `x`."""
    implementation = module.config._attn_implementation
    if implementation == "blossom":
        return x.is_cuda and _why_no_triton(module, x) is None
    return implementation == "blossom_triton" and module.stream_names in FUSED


def attend_last_positions(
    module: "BlossomAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_embeddings: tuple[torch.Tensor, torch.Tensor],
    **where,
) -> tuple[torch.Tensor, Selection | None]:
    """
    `attend_packed` of the histories' last positions alone, by the kernels if the layer has them.

    Args:
        query: of the last positions, `[1, H, S, d]`.
        key, value: of all positions, `[1, G, T, d]`.
        query_embeddings: cosines and sines of the last positions, `[1, S, d]` each.
        where: the other arguments of `attend_packed`; gates are those of the last positions.

    Raises:
        ValueError: as `blossom_triton_attention_forward`, whose kernels these are.
    """
    if not _has_kernels(module, query):
        ops = generic_ops(module.config)
        return attend_packed(ops, module, query, key, value, **where, query_embeddings=query_embeddings)
    _require_plain_compressor(module, query)
    compressor = getattr(module, "compressor", None)
    return last_attention(
        query,
        key,
        value,
        **where,
        query_embeddings=query_embeddings,
        sizes=Sizes.of(module.config),
        scaling=module.scaling,
        threshold=module.config.importance_threshold,
        position=None if compressor is None else compressor.position,
        mlp=None if compressor is None else compressor.mlp,
        short="short_term" in module.stream_names,
    )


class BlossomGate(nn.Linear):
    """
    Logits of the gates of a layer's streams, `[..., number of streams · H]`: all heads of the first stream, then of the
    next one. Weights start at zero, biases at `initial_biases`.
    """

    def __init__(self, config: BlossomRecConfig, initial_biases: list[float]) -> None:
        super().__init__(config.hidden_size, len(initial_biases) * config.num_attention_heads)
        self.initial_biases = initial_biases


class BlossomAttention(nn.Module):
    """
    The projections, the streams' modules and the gates of one layer; how queries meet keys is computed by the attention
    function that `config._attn_implementation` names. An attention function gets
    `(module, q, k, v, attention_mask=None, *, cu_seqlens, max_seqlen, gates, position_embeddings)` and returns the
    gated head outputs `[1, T, H, d]` and a `Selection` (or `None`).

    Attributes:
        streams: the `Stream` objects of the layer, in the order of the gates.
        stream_names: their names.
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
        self.streams = build_streams(config, layer_idx)
        self.stream_names = tuple(stream.name for stream in self.streams)
        for stream in self.streams:
            for name, part in stream.modules().items():
                if hasattr(self, name):
                    raise ValueError(
                        f"The stream {stream.name!r} adds a module {name!r}, which the layer already has; rename it."
                    )
                self.add_module(name, part)
        if len(self.streams) > 1:
            self.gate = BlossomGate(config, [stream.gate_bias for stream in self.streams])

    def gate_values(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The gates `[..., H, number of streams]` at hidden states `[..., hidden_size]`; `None` for a single stream."""
        return None if len(self.streams) == 1 else self._gate_values(self.gate(hidden_states))

    def _gate_values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.unflatten(-1, (len(self.streams), -1)).transpose(-1, -2).sigmoid()

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
            append: with a cache, whose new events the packed histories are.
            keep: the last position of each history, `[S]`, if the output is needed there alone; a slice for a single
                history.

        Returns:
            the output `[1, T, hidden_size]` (or `[1, S, hidden_size]` at `keep`), the `Selection` (of a stream that
            selects), the gates `[1, T, H, number of streams]` (if there are several), and with `output_attentions` the
            gated probabilities `[H, T, T]`. With `keep`, selection and gates may be those of its positions, too.
        """

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        device = hidden_states.device.type
        if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
            # Once, where each of the projections would make and keep a copy of its own.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        last_alone = keep is not None and not output_attentions and _answers_queries(self, hidden_states)
        of_queries, of_keys = [self.q_proj], [self.k_proj, self.v_proj]
        if len(self.streams) > 1:
            of_queries.append(self.gate)
        # One product saves .1 ms of a training step per layer (65,536 items, width 128, one H100, 2026-11-27). With
        # full attention, the gradients of its parts have to be copied, which takes longer than what it saves.
        joined = self.stream_names in FUSED or not torch.is_grad_enabled()
        if last_alone:
            parts = project(of_queries, hidden_states[:, keep], joined=joined)
            parts += project(of_keys, hidden_states, joined=joined)
        else:
            parts = project(of_queries + of_keys, hidden_states, joined=joined)
        q, *gate_logits, k, v = parts
        q, k, v = heads(q), heads(k), heads(v)
        gates = self._gate_values(gate_logits[0]) if gate_logits else None
        kwargs = {
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "gates": gates,
            "position_embeddings": position_embeddings,
        }
        if append is not None:
            append.store(self, k, v, position_embeddings)
        if append is not None and not append.from_start:
            out, selection = append.attend(self, q, gates, position_embeddings)
        elif last_alone:
            at_keep = tuple(x[:, keep] for x in position_embeddings)
            out, selection = attend_last_positions(self, q, k, v, **kwargs, query_embeddings=at_keep)
        else:
            implementation = self.config._attn_implementation
            attend = AttentionInterface().get_interface(implementation, eager_attention_forward)
            out, selection = attend(self, q, k, v, None, **kwargs)
        probs = attention_probabilities(self, q, k, **kwargs) if output_attentions else None
        if keep is not None and not last_alone:
            out = out[:, keep]
        return self.o_proj(out.flatten(2)), selection, gates, probs


AttentionInterface.register("blossom", blossom_attention_forward)
AttentionInterface.register("blossom_triton", blossom_triton_attention_forward)
AttentionInterface.register("blossom_torch", blossom_torch_attention_forward)
