"""
The short-term stream as an attention function for any decoder of `transformers`: `"power_law"`, registered in
`AttentionInterface` and `AttentionMaskInterface` when this file is imported.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from .ops_reference import Keys, Queries, every_position
from .ops_torch import TORCH_OPS, short_places


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
    sizes = {
        "block_size": getattr(config, "short_term_block_size", 8),
        "window": getattr(config, "short_term_window", 1),
        "base": getattr(config, "power_law_base", 2),
    }
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    real = attention_mask > 0
    if query.shape[2] < key.shape[2]:
        return _attend_cached(query, key, value, real, sizes, scaling), None
    row, place = real.nonzero(as_tuple=True)
    number = attention_mask[row, place]
    new = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    if position_ids is not None:
        given = position_ids.expand(real.shape)[row, place]
        new = new | (given[1:] != given[:-1] + 1)
    new = nn.functional.pad(new, (1, 0), value=True)
    cu_seqlens = nn.functional.pad(new[: row.shape[0]].nonzero().flatten(), (0, 1), value=row.shape[0])
    max_length = int(cu_seqlens.diff().max()) if row.shape[0] else 0
    q, k, v = (x.transpose(1, 2)[row, place] for x in (query, key, value))
    queries = every_position(cu_seqlens, row.shape[0], max_length)
    out = TORCH_OPS.attend_short(q, Keys(k, v, cu_seqlens[:-1]), queries, **sizes, scaling=scaling)
    return query.new_zeros(query.transpose(1, 2).shape).index_put((row, place), out), None


def _attend_cached(query, key, value, real, sizes, scaling):
    """
    The same behind a cache, where the few queries gather their keys from the slots that are no padding (`real`
    `[batch, kv_length]`). Each key/value head counts as a history of its own, so that nothing is copied.
    """
    (batch, groups, length, _), number = key.shape, query.shape[2]
    slots = real.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices  # of the real keys in order
    position = (real.cumsum(1) - 1).clamp(min=0)[:, -number:]  # [batch, q_length]
    place = short_places(position, length, **sizes)  # [batch, q_length, J·B]
    seen = (place >= 0) & (place <= position[..., None])
    slot = slots[:, None].expand(-1, number, -1).gather(2, place.clamp(0, length - 1)).masked_fill(~seen, -1)
    slot = slot[:, None].expand(-1, groups, -1, -1).flatten(0, 2)[:, None]
    first = torch.arange(batch * groups, device=key.device) * length
    keys = Keys(key.reshape(-1, 1, key.shape[3]), value.reshape(-1, 1, value.shape[3]), first)
    history = torch.arange(batch * groups, device=key.device).repeat_interleave(number)
    queries = Queries(history, torch.full_like(history, length - 1), length, number)
    q = query.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)  # [batch · G · q_length, H/G, d]
    out = TORCH_OPS.attend_places(q, keys, queries, slot, scaling=scaling)
    return out.unflatten(0, (batch, groups, number)).transpose(1, 2).flatten(2, 3)


AttentionInterface.register("power_law", power_law_attention_forward)
AttentionMaskInterface.register("power_law", power_law_mask)
