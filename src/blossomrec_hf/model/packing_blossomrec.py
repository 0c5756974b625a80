"""Packed histories: any input of the model, end to end without padding."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .ids_blossomrec import IGNORE_INDEX, NUM_SPECIAL_IDS
from .ops_reference import locate


logger = logging.get_logger(__name__)

# Keywords that `transformers` may pass to any model and that change nothing here, as long as they have this value.
_HARMLESS_KEYWORDS = {"is_causal": True, "output_router_logits": False}
_PACKING_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class PackedHistories(NamedTuple):
    """
    The histories of a batch, end to end, with the columns of their events: the input of `BlossomRecModel.encode`.

    Attributes:
        token: places of the packed positions in the flattened `[B·L]` input, `[T]`; `None` if the input has no padding.
        position: place of each position inside its history, `[T]`.
        cu_seqlens: offsets, `[S + 1]`.
        max_seqlen: length of the longest history.
        shape: `(B, L)` of the input.
        lengths: items of each history `[S]`, if padding follows them in the history itself: a compiled graph has no
            shapes that depend on values. All attention is causal, so that no item sees the padding.
        item_ids: vocabulary ids `[B, L]`; `None` if embeddings were given. A column has the shape of the input, and
            `pack` lays it out.
        inputs_embeds: embeddings `[B, L, hidden_size]` in place of `item_ids`.
        timestamps: times of the events in seconds, int64 `[B, L]`.
        event_type_ids: types of the events, int64 `[B, L]`; −1 if unknown.
        prediction_time: time of each history's next event ("now"), int64 `[S]`; `UNKNOWN_TIME` if unknown.
        target_event_type: type of each history's next event, int64 `[S]`; −1 if unknown.
        previous_time: time of the event before each history's first, int64 `[S]`; `UNKNOWN_TIME` if there is none.
    """

    token: torch.Tensor | None
    position: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    shape: tuple[int, int]
    lengths: torch.Tensor | None = None
    item_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    timestamps: torch.Tensor | None = None
    event_type_ids: torch.Tensor | None = None
    prediction_time: torch.Tensor | None = None
    target_event_type: torch.Tensor | None = None
    previous_time: torch.Tensor | None = None

    def pack(self, x: torch.Tensor, padding: float | None = None) -> torch.Tensor:
        """`[B, L, …]` → `[T, …]`, with the value `padding` (if given) where padding remains."""
        x = x.flatten(0, 1)
        x = x if self.token is None else x.index_select(0, self.token)
        return x if padding is None else self._fill(x, padding)

    def _fill(self, x: torch.Tensor, value: float) -> torch.Tensor:
        if self.lengths is None:
            return x
        padding = self.position >= self.lengths.repeat_interleave(self.shape[1], output_size=self.position.shape[0])
        return x.masked_fill(padding.view(-1, *[1] * (x.dim() - 1)), value)

    @property
    def rows(self) -> torch.Tensor:
        """The history of each packed position, `[T]`."""
        if self.lengths is None:
            return locate(self.cu_seqlens[:-1], self.position.shape[0])[0]
        return torch.arange(self.position.shape[0], device=self.position.device) // self.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """The number of items of each history, `[S]`."""
        return self.cu_seqlens.diff() if self.lengths is None else self.lengths

    @property
    def ends(self) -> torch.Tensor:
        """The place behind the last item of each history, `[S]`."""
        return self.cu_seqlens[1:] if self.lengths is None else self.cu_seqlens[:-1] + self.lengths

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, …]` → `[B, L, …]` on the device of the input, zero at padding."""
        x = self._fill(x.to(self.cu_seqlens.device), 0)
        if self.token is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.token, x)
        return x.unflatten(0, self.shape)

    def unpack_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """`[H, T, T]` → `[B, H, L, L]`."""
        batch, length = self.shape
        token = torch.arange(batch * length, device=x.device) if self.token is None else self.token
        row, column = token // length, token % length
        query, key = (row[:, None] == row).nonzero(as_tuple=True)
        x = self._fill(x.transpose(0, 1), 0).transpose(0, 1)
        x = self._fill(x.permute(2, 0, 1), 0).permute(1, 2, 0)
        out = x.new_zeros(batch, length, length, x.shape[0])
        out = out.index_put((row[query], column[query], column[key]), x[:, query, key].T)
        return out.permute(0, 3, 1, 2)

    def last(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """The last `n` positions of each history of `x` `[T, …]`: `[S, n, …]`, zero before its first position."""
        x = x.to(self.cu_seqlens.device)
        place = self.ends[:, None] + torch.arange(-n, 0, device=x.device)
        outside = place < self.cu_seqlens[:-1, None]
        if not x.shape[0]:
            return x.new_zeros(*place.shape, *x.shape[1:])
        return x[place.clamp(min=0)].masked_fill(outside.view(*place.shape, *[1] * (x.dim() - 1)), 0)


def pack_histories(
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    *,
    vocab_size: int,
    labels: torch.Tensor | None = None,
    basket_starts: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    labels_are_counted: bool = False,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    timestamps: torch.Tensor | None = None,
    event_type_ids: torch.Tensor | None = None,
    prediction_time: torch.Tensor | int | None = None,
    target_event_type: torch.Tensor | int | None = None,
    drop_padding: bool = False,
) -> PackedHistories:
    """
    Lay out any input that the model accepts as packed histories.

    Args:
        input_ids: vocabulary ids `[B, L]`, padded on any side, or packed `[1, T]`.
        attention_mask: `[B, L]`, 0 at padding. By default, [PAD] ids are padding.
        position_ids: `[B, L]`, counting 0 … n − 1 in each history; in a single row they may restart (packed input).
        inputs_embeds: embeddings `[B, L, hidden_size]` in place of `input_ids`.
        vocab_size: ids must be below it.
        labels: `[B, L]`, checked for ids outside the vocabulary.
        basket_starts, weights: bool and float `[B, L]`, of the events in the loss, checked.
        labels_are_counted: warn of labels that `Trainer` counts as targets and the model does not.
        cu_seq_lens_q, max_length_q: offsets `[S + 1]` of packed input `[1, T]`, and the longest history there.
        cu_seq_lens_k, max_length_k: the same again, as collators pass them.
        timestamps: times of the events in seconds, integers `[B, L]`.
        event_type_ids: types of the events, integers `[B, L]`, −1 for an unknown one.
        prediction_time: time of the event to be predicted ("now") in seconds, integers `[S]` (`[B]` unless packed), or one
            for all histories; `UNKNOWN_TIME` where unknown.
        target_event_type: type of the event to be predicted, as `prediction_time`; −1 where unknown.
        drop_padding: drop the padding inside a compiled graph too, which then has a break here.

    Raises:
        ValueError: for ids outside the vocabulary or not `[B, L]`, for columns of another shape or of floats, and for
            offsets or positions that do not describe the input. Values are not checked inside a compiled graph, nor while
            a CUDA graph is captured.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    check_tensors(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        labels=labels,
        basket_starts=basket_starts,
        weights=weights,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
    )
    _check_ids("input_ids", input_ids)
    _check_ids("labels", labels)
    shape, device = tuple(inputs.shape[:2]), inputs.device
    batch, length = shape
    if labels is not None and labels.shape != shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, the input {shape}; they must be the same.")
    for name, values, wanted in (("basket_starts", basket_starts, "bool"), ("weights", weights, "float")):
        if values is None:
            continue
        if values.shape != shape or not (
            values.is_floating_point() if wanted == "float" else values.dtype == torch.bool
        ):
            raise ValueError(
                f"`{name}` has shape {tuple(values.shape)} and dtype {values.dtype}; it must be {wanted}, and have the shape "
                f"{shape} of the input."
            )
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}; it must have the shape {shape} of the input."
        )
    if cu_seq_lens_k is not None and (cu_seq_lens_q is None or cu_seq_lens_k.shape != cu_seq_lens_q.shape):
        raise ValueError(
            "`cu_seq_lens_k` differs from `cu_seq_lens_q`; give the same offsets, or `cu_seq_lens_q` alone."
        )
    if max_length_k is not None and max_length_k != max_length_q:
        raise ValueError(
            f"`max_length_k` is {max_length_k}, `max_length_q` is {max_length_q}; give the same number, or "
            "`max_length_q` alone."
        )
    is_packed = cu_seq_lens_q is not None or (batch == 1 and attention_mask is None and position_ids is not None)
    if is_packed:
        real, max_seqlen = None, max_length_q
        cu_seqlens = _offsets(cu_seq_lens_q, position_ids, shape, device)
    else:
        real, max_seqlen = _real_positions(inputs, attention_mask), None
        cu_seqlens = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))

    num_histories = cu_seqlens.shape[0] - 1
    columns = {
        "timestamps": int64_column("timestamps", timestamps, shape, device),
        "event_type_ids": int64_column("event_type_ids", event_type_ids, shape, device),
        "prediction_time": int64_column("prediction_time", prediction_time, (num_histories,), device),
        "target_event_type": int64_column("target_event_type", target_event_type, (num_histories,), device),
    }

    values_known = values_are_known(inputs)
    if values_known:
        max_seqlen, num_tokens = _check_values(
            input_ids,
            labels,
            attention_mask if is_packed else None,
            cu_seqlens,
            length,
            max_seqlen,
            vocab_size,
            cu_seq_lens_k=cu_seq_lens_k,
            real=real,
            basket_starts=basket_starts,
            weights=weights,
            labels_are_counted=labels_are_counted,
        )
    else:
        max_seqlen, num_tokens = length if max_seqlen is None else max_seqlen, None
        if not is_packed and not drop_padding:
            return _items_before_padding(real, input_ids, inputs_embeds)._replace(**columns)

    token = None
    if is_packed:
        position = locate(cu_seqlens[:-1], length)[1]
    elif num_tokens == batch * length:
        position = torch.arange(length, device=device).repeat(batch)
    else:
        token = real.flatten().nonzero().flatten()
        place = torch.arange(token.shape[0], device=device)
        position = place - cu_seqlens[token // max(length, 1)]  # a running sum over long rows would be slow on a GPU
    if values_known and position_ids is not None:
        given = position_ids.expand(shape).flatten()
        if not torch.equal(given if token is None else given[token], position.to(position_ids.dtype)):
            raise ValueError(
                "`position_ids` must count 0, 1, 2 … inside each history, without the padding; omit them for their default."
            )
    return PackedHistories(token, position, cu_seqlens, max_seqlen, shape, None, input_ids, inputs_embeds, **columns)


def values_are_known(x: torch.Tensor) -> bool:
    """Whether Python may read values: not inside a compiled graph, nor while a CUDA graph is captured."""
    return not (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def int64_column(
    name: str, values: torch.Tensor | int | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """A column of the events `[B, L]` or of the histories `[S]` as int64; a number is the value of all histories."""
    unit = ", seconds" if "time" in name else ""
    if isinstance(values, int) and not isinstance(values, bool) and len(shape) == 1:
        if not -(2**63) <= values < 2**63:
            raise ValueError(f"`{name}` is {values}; it must be an int64 number{unit}.")
        return torch.full(shape, values, device=device)
    if values is None:
        return None
    whole = isinstance(values, torch.Tensor) and not values.is_floating_point() and values.dtype != torch.bool
    if not whole or values.is_complex():
        kind = values.dtype if isinstance(values, torch.Tensor) else _kind(values)
        raise ValueError(
            f"`{name}` is of {kind}; it must be an int64 tensor{unit}, such as `torch.tensor(values, dtype=torch.int64)`."
        )
    if values.dim() == 0 and len(shape) == 1:
        values = values.expand(shape)
    if tuple(values.shape) != shape:
        raise ValueError(
            f"`{name}` has shape {list(values.shape)}; it must be {list(shape)}, one value per "
            f"{'event' if len(shape) == 2 else 'history'}."
        )
    return values.to(device=device, dtype=torch.long)


def _offsets(
    cu_seq_lens: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """The offsets of packed input, given or from positions that restart at 0, as int64 `[S + 1]`."""
    if shape[0] != 1:
        raise ValueError(f"`cu_seq_lens_q` describes packed input `[1, T]`; the input has {shape[0]} rows.")
    if cu_seq_lens is None:
        cu_seq_lens = nn.functional.pad((position_ids[0] == 0).nonzero().flatten(), (0, 1), value=shape[1])
    return cu_seq_lens.to(device=device, dtype=torch.long)


def _real_positions(inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which positions of padded input are no padding, `[B, L]` bool."""
    if attention_mask is None:
        return inputs != 0 if inputs.dim() == 2 else inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
    if attention_mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, the input {tuple(inputs.shape[:2])}; it must be "
            "2-D, 1 at items and 0 at padding."
        )
    return attention_mask.to(inputs.device) != 0


def _items_before_padding(
    real: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> PackedHistories:
    """Rows as histories of one length, each with its padding at the end: no shape depends on values."""
    batch, length = real.shape
    order = (~real).to(torch.uint8).sort(dim=1, stable=True).indices  # items first
    first = torch.arange(batch + 1, device=real.device) * length
    token, position = (order + first[:-1, None]).flatten(), torch.arange(length, device=real.device).repeat(batch)
    return PackedHistories(token, position, first, length, (batch, length), real.sum(1), input_ids, inputs_embeds)


def _kind(values: Any) -> str:
    return f"{type(values).__module__}.{type(values).__name__}".removeprefix("builtins.")


def check_tensors(**inputs: Any) -> None:
    """Raise `ValueError` for inputs, by name, that are neither tensors nor `None`."""
    for name, values in inputs.items():
        if values is not None and not isinstance(values, torch.Tensor):
            raise ValueError(f"`{name}` is of {_kind(values)}; it must be a tensor, such as `torch.tensor(values)`.")


def _check_ids(name: str, ids: torch.Tensor | None) -> None:
    if ids is not None and (ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(
            f"`{name}` has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be `[B, L]`, vocabulary ids as int64."
        )


def _check_values(
    ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    length: int,
    max_seqlen: int | None,
    vocab_size: int,
    *,
    cu_seq_lens_k: torch.Tensor | None,
    real: torch.Tensor | None,
    basket_starts: torch.Tensor | None,
    weights: torch.Tensor | None,
    labels_are_counted: bool,
) -> tuple[int, int]:
    """
    The checks of `pack_histories` that depend on values, which are read from the device all at once. Returns the length
    of the longest history, and the number of tokens.
    """
    zero = cu_seqlens.new_zeros(())
    lengths = cu_seqlens.diff()
    facts = [
        *((zero, zero) if ids is None or ids.numel() == 0 else ids.aminmax()),
        *(
            (zero, zero)
            if labels is None or labels.numel() == 0
            else labels.masked_fill(labels == IGNORE_INDEX, 0).aminmax()
        ),
        _num_counted_in_vain(labels, real, basket_starts, cu_seqlens)
        if labels is not None and labels_are_counted
        else zero,
        zero if cu_seq_lens_k is None else (cu_seq_lens_k.to(cu_seqlens.device) != cu_seqlens).sum(),
        zero if packed_mask is None else (packed_mask == 0).sum(),
        zero if weights is None else (~((weights >= 0) & weights.isfinite())).sum(),
        cu_seqlens[0],
        cu_seqlens[-1],
        *((zero, zero) if lengths.numel() == 0 else lengths.aminmax()),
    ]
    (
        low,
        high,
        low_label,
        high_label,
        num_in_vain,
        num_other,
        num_padding,
        num_bad_weights,
        first,
        last,
        shortest,
        longest,
    ) = torch.stack(facts).tolist()
    remedy = (
        "For new items, grow the vocabulary: `tokenizer.add_items(...)`, then `model.resize_token_embeddings(...)`."
    )
    if low < 0 or high >= vocab_size:
        raise ValueError(f"`input_ids` contains {low if low < 0 else high}; ids lie in 0 … {vocab_size - 1}. {remedy}")
    if low_label < 0 or high_label >= vocab_size:
        label = low_label if low_label < 0 else high_label
        raise ValueError(f"`labels` contains {label}; ids lie in 0 … {vocab_size - 1}, or are −100. {remedy}")
    if num_other:
        raise ValueError(
            "`cu_seq_lens_k` differs from `cu_seq_lens_q`; give the same offsets, or `cu_seq_lens_q` alone."
        )
    if num_in_vain:
        logger.warning_once(
            "`labels` has ids that are no targets but that `Trainer` counts in `num_items_in_batch`, which makes the loss "
            "too small: set the label of a history's first item or basket, of [PAD] and of [UNK] to −100, or pad on the right."
        )
    if num_bad_weights:
        raise ValueError(f"`weights` has {num_bad_weights} values below 0 or not finite; they may be 0 or more.")
    if num_padding:
        raise ValueError("`attention_mask` marks padding in packed input; omit the padding, or make it a history.")
    if real is None and (first != 0 or last != length or shortest < 0):
        offsets = cu_seqlens.tolist()
        raise ValueError(
            "The offsets of packed histories (`cu_seq_lens_q`, or `position_ids` that are 0) must start at 0, never "
            f"fall, and end at {length}, the length of the input; they are {_short(offsets)}."
        )
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"`max_length_q` is {max_seqlen}, the longest history has {longest} items.")
    return longest if max_seqlen is None else max_seqlen, last


def _num_counted_in_vain(
    labels: torch.Tensor, real: torch.Tensor | None, basket_starts: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """
    Number of labels that `Trainer` counts (all but −100 and the first column) at positions without a target. `real` marks
    the items of padded rows, and is `None` for packed input, which has offsets.
    """
    if real is None:
        first = torch.zeros(1, labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        first = first.index_fill_(1, cu_seqlens.clamp(0, labels.shape[1]), True)[:, :-1]
        no_target = first if basket_starts is None else first[:, basket_begins(first[0] | basket_starts[0])]
    else:
        starts = real if basket_starts is None else real & (basket_starts | (real.cumsum(1) == 1))
        no_target = ~real | (starts.cumsum(1) == 1)
    return ((no_target | (labels < NUM_SPECIAL_IDS)) & (labels != IGNORE_INDEX))[:, 1:].sum()


def basket_begins(basket_starts: torch.Tensor) -> torch.Tensor:
    """The place of the first event of each event's basket `[T]`; `basket_starts` is bool `[T]`, and true at place 0."""
    basket = basket_starts.cumsum(0)
    return torch.searchsorted(basket, basket)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, …, {values[-2]}, {values[-1]}]"


def pop_packing(keywords: dict[str, Any]) -> dict[str, Any]:
    """Remove the offsets and lengths of packed histories from the keywords of a call."""
    return {name: keywords.pop(name, None) for name in _PACKING_KEYWORDS}


def check_keywords(keywords: dict[str, Any], position_ids: Any, packing: dict[str, Any]) -> None:
    """Refuse unknown keywords by name, so that none is ignored."""
    for name, value in keywords.items():
        if name == "past_key_values" and value is not None:  # its name before transformers 5.24
            raise ValueError("`past_key_values` is not an input of BlossomRec; pass the `BlossomRecCache` as `cache`.")
        harmless = value is None or (name in _HARMLESS_KEYWORDS and value is _HARMLESS_KEYWORDS[name])
        if name == "seq_idx":  # the number of each token's history, which some collators send next to these
            harmless = harmless or position_ids is not None or packing["cu_seq_lens_q"] is not None
        if not harmless:
            raise ValueError(f"`{name}` is not an input of BlossomRec; omit it from the call or the batch.")
