"""
Export of models: a module that `torch.export` and ONNX can trace, for any batch size and length.

Histories are padded to one length here, and attention is dense under masks, so that no shape depends on the data. Memory
grows with batch × length². The scores are those of the model.
"""

import copy
import logging
import os
import warnings

import torch
from torch import nn

from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.events_blossomrec import read_moments
from ..model.ids_blossomrec import NUM_SPECIAL_IDS, UNKNOWN_TIME
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation, BlossomRecLayer
from ..model.modules_blossomrec import has_plain_compressor, is_plain
from ..model.ops_reference import REFERENCE_OPS, Keys, Queries, rotate
from ..model.packing_blossomrec import PackedHistories
from ..model.streams_blossomrec import attend_streams, packed_blocks


logger = logging.getLogger(__name__)

MAX_LENGTH = 2**31 - 1  # longer than any history, of which a graph does not know the length


class HistoryScorer(nn.Module):
    """
    `(input_ids [B, L] int64, attention_mask [B, L]) -> scores [B, vocab_size]` float32 of the next item. The mask is 1 at
    items and 0 at padding, on any side. [PAD] and [UNK] are dropped from the input, and their scores are −inf. The scores of
    a row without items are the training frequencies, as in `recommend`. Seen items are not excluded.

    A model with `time_features` also takes `timestamps` `[B, L]` and `prediction_time` `[B]` (int64 seconds, `UNKNOWN_TIME`,
    which is −2⁶³, if unknown), one with `event_types` also takes `event_type_ids` `[B, L]` and `target_event_type` `[B]` (int64,
    −1 if unknown). Their values are not checked.

    Args:
        model: the model, which is put in evaluation mode. Its weights are shared.

    Raises:
        ValueError: if the model is offloaded, quantized or has adapters.
    """

    def __init__(self, model: BlossomRecForSequentialRecommendation) -> None:
        super().__init__()
        attentions = [layer.self_attn for layer in model.model.layers]
        table = model.model.item_embedding if model.lm_head is None else model.lm_head
        if not is_plain(table) or not all(map(has_plain_compressor, attentions)):
            raise ValueError(
                "`model` is offloaded, quantized or adapted; load the checkpoint without that to export it."
            )
        self.model = model.eval()
        # Computed here, and not by the graph for every request.
        input_vectors = score_vectors = None
        with torch.no_grad():
            if model.model.item_features is not None:
                input_vectors = model.model.item_vectors().clone()
            if model.lm_head is None or model.config.scoring != "dot":
                score_vectors = model.item_vectors().clone()
        self.register_buffer("input_vectors", input_vectors)
        self.register_buffer("score_vectors", score_vectors)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        timestamps: torch.Tensor | None = None,
        prediction_time: torch.Tensor | None = None,
        event_type_ids: torch.Tensor | None = None,
        target_event_type: torch.Tensor | None = None,
    ) -> torch.Tensor:
        config, base = self.model.config, self.model.model
        length, size = input_ids.shape[1], config.selection_block_size
        real = (attention_mask != 0) & (input_ids >= NUM_SPECIAL_IDS)
        # Items to the left, in their order, in rows of whole blocks. What follows them has no effect, because everything
        # below is causal. At least two blocks, because a graph specializes on a size of one.
        place = torch.arange(length, device=input_ids.device)
        order = torch.where(real, place, place + length).argsort(dim=1)
        position = torch.arange((length // size + 2) * size, device=input_ids.device)

        def in_order(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else column.gather(1, order)[:, position.clamp(max=length - 1)]

        ids, count = in_order(input_ids), real.sum(1)
        x = base.item_embedding(ids) if self.input_vectors is None else base.item_embedding(ids, self.input_vectors)
        rows = PackedHistories(
            token=None,
            position=position.repeat(ids.shape[0]),
            cu_seqlens=torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1],
            max_seqlen=MAX_LENGTH,
            shape=tuple(ids.shape),
            lengths=count,
            timestamps=in_order(timestamps),
            event_type_ids=in_order(event_type_ids),
            prediction_time=prediction_time,
            target_event_type=target_event_type,
        )
        moments = read_moments(rows, config)
        if base.event_vectors is not None:
            x = x + base.event_vectors(moments).view(x.shape)
        x = base.embedding_norm(x)
        cos_sin = base.rotary_embedding(position, x.dtype)
        for layer in base.layers:
            x = self._layer(layer, x, position, cos_sin)
        end = (count - 1).clamp(min=0)[:, None]
        last = x.gather(1, end[..., None].expand(-1, -1, x.shape[2]))[:, 0]
        moments = moments.map(lambda m: m.view(ids.shape).gather(1, end)[:, 0])
        states = base.prediction_states(last, moments.time, moments.next_time, moments.next_type)
        vectors = self.model.item_vectors() if self.score_vectors is None else self.score_vectors
        scores = states.float() @ vectors.float().T
        scores = torch.where(count[:, None] > 0, scores, base.item_counts.float())
        special = torch.arange(scores.shape[1], device=scores.device) < NUM_SPECIAL_IDS
        return scores.masked_fill(special, -torch.inf)

    def _layer(self, layer: BlossomRecLayer, x: torch.Tensor, position: torch.Tensor, cos_sin: tuple) -> torch.Tensor:
        """Compute one layer on rows `[B, L, hidden_size]`, a history each."""
        attention = layer.self_attn
        q, k, v = (
            projection(x).unflatten(2, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (rotate(heads.transpose(1, 2), *cos_sin).transpose(1, 2) for heads in (q, k))
        history = torch.zeros_like(position)
        keys, queries = Keys(k, v, history[:1]), Queries(history, position, MAX_LENGTH, MAX_LENGTH)
        offsets = torch.stack([position[0], position[-1] + 1])
        blocks = packed_blocks(REFERENCE_OPS, attention, keys, offsets)
        out, _ = attend_streams(REFERENCE_OPS, attention, q, keys, queries, blocks, attention.gate_values(x))
        x = layer.attention_norm(x + attention.o_proj(out.flatten(2)))
        return layer.feed_forward_norm(x + layer.down_proj(layer.act_fn(layer.up_proj(x))))


def _example(model: BlossomRecForSequentialRecommendation) -> dict[str, torch.Tensor]:
    """Inputs of `HistoryScorer(model)` by name, `[2, length]` or `[2]`."""
    config: BlossomRecConfig = model.config
    ids = torch.full((2, 3 * config.selection_block_size + 1), NUM_SPECIAL_IDS, device=model.device)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.time_features:
        example |= {"timestamps": torch.zeros_like(ids), "prediction_time": torch.full_like(ids[:, 0], UNKNOWN_TIME)}
    if config.event_types:
        example |= {"event_type_ids": torch.zeros_like(ids), "target_event_type": torch.zeros_like(ids[:, 0])}
    return example


def export_program(model: BlossomRecForSequentialRecommendation) -> torch.export.ExportedProgram:
    """
    Export `HistoryScorer(model)` as an `ExportedProgram`, for `torch.export.save` or AOTInductor, for any batch size and
    length. Inputs after the first two are given by name.
    """
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    example = _example(model)
    shapes = {name: {i: dims[i] for i in range(x.dim())} for name, x in example.items()}
    positional = (example.pop("input_ids"), example.pop("attention_mask"))
    with torch.no_grad():
        return torch.export.export(
            HistoryScorer(model),
            positional,
            example,
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def export_onnx(model: BlossomRecForSequentialRecommendation, path: str | os.PathLike) -> None:
    """
    Write `HistoryScorer(model)` as ONNX (extra `onnx`): inputs `input_ids` and `attention_mask` `[batch, length]` int64, and
    those of the times and types that the model reads, output `scores` `[batch, vocab_size]` float32. Weights in bfloat16 and
    float64, for which ONNX Runtime lacks operators on a CPU, are written in float32. Weights of more than 2 GiB are written to a
    file next to it.

    Raises:
        ImportError: if `onnxscript` is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Writing ONNX needs `pip install blossomrec-hf[onnx]`.") from error
    if model.dtype not in (torch.float32, torch.float16):
        logger.warning("The weights are in %s and are written in float32, which ONNX Runtime can run.", model.dtype)
        model = copy.deepcopy(model).float()
    example = _example(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # that all inputs share
        torch.onnx.export(
            export_program(model),
            f=str(path),
            input_names=list(example),
            # Names alone: the dimensions of a program are called s36, s24.
            dynamic_shapes={name: dict(enumerate(("batch", "length")[: x.dim()])) for name, x in example.items()},
            output_names=["scores"],
            verbose=False,
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) >= 2**31 - 2**24,
        )
