"""
What the layers of a model attend to in one history, read from the model's own streams and `ops_reference.py`, and the
measures of the study `attention.py`.

Shapes: n items in the history, H query heads, G key/value heads, k selected blocks, M complete blocks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.model.attention_blossomrec import BlossomAttention, eager_attention_forward
from blossomrec_hf.model.ops_reference import REFERENCE_OPS, Keys, Queries, Selection, every_position, rotate
from blossomrec_hf.model.streams_blossomrec import FullStream, Stream, packed_blocks


ITEM_EDGES = tuple(2**i for i in range(10))  # 0, 1, 2 to 3, 4 to 7 … 512 and more items back
SECOND_EDGES = (60, 600, 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400)
BLOCK_EDGES = tuple(2**i for i in range(1, 6))  # 1, 2 to 3, 4 to 7 … 32 and more blocks back


class LayerReading(NamedTuple):
    """
    What one layer makes of a history.

    Attributes:
        streams: its `Stream` objects by name.
        queries: all positions of the history.
        probabilities: of each stream by name, `[n, H, n]`.
        full: those of full attention with the same queries and keys, `[n, H, n]`.
        gates: `[n, H, number of streams]`; `None` for a single stream.
        selection: what the long-term stream selected; `None` without it.
        importance: π of all candidates, the most important first, `[n, G, M]`; `None` without a long-term stream.
    """

    streams: dict[str, Stream]
    queries: Queries
    probabilities: dict[str, torch.Tensor]
    full: torch.Tensor
    gates: torch.Tensor | None
    selection: Selection | None
    importance: torch.Tensor | None


@torch.no_grad()
def read_layers(model: BlossomRecForSequentialRecommendation, input_ids: torch.Tensor) -> list[LayerReading]:
    """What each layer of `model` (in evaluation mode) makes of one history `input_ids` `[1, n]`."""
    readings = []

    def attend(module, query, key, value, attention_mask=None, **kwargs):
        readings.append(_read_layer(module, query, key, **kwargs))
        return eager_attention_forward(module, query, key, value, **kwargs)

    AttentionInterface.register("read_layers", attend)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("read_layers")
    try:
        model.base_model(input_ids)
    finally:
        model.set_attn_implementation(implementation)
    return readings


def _read_layer(
    layer: BlossomAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    gates: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> LayerReading:
    """The arguments are those of an attention function of `BlossomAttention`."""
    q, k = (rotate(x, *position_embeddings)[0].transpose(0, 1) for x in (query, key))
    # Attention makes its probabilities of values that are one-hot.
    one_hot = torch.eye(k.shape[0], device=k.device)[:, None].expand(-1, k.shape[1], -1)
    keys = Keys(k, one_hot, cu_seqlens[:-1])
    queries = every_position(cu_seqlens, k.shape[0], max_seqlen)
    probabilities, selection, importance = {}, None, None
    for stream, blocks in zip(layer.streams, packed_blocks(REFERENCE_OPS, layer, keys, cu_seqlens), strict=True):
        probabilities[stream.name], selected = stream.attend(REFERENCE_OPS, layer, q, keys, queries, blocks)
        if selected is not None:
            selection = selected
            importance = REFERENCE_OPS.select(
                q,
                blocks,
                queries,
                num_selected_blocks=blocks.rows.shape[0],
                block_size=stream.block_size,
                threshold=-1.0,  # all of them
                scaling=layer.scaling,
            ).importance
    full, _ = FullStream(layer.config).attend(REFERENCE_OPS, layer, q, keys, queries, None)
    streams = {stream.name: stream for stream in layer.streams}
    return LayerReading(
        streams, queries, probabilities, full, None if gates is None else gates[0], selection, importance
    )


class Choice:
    """
    The queries of a history that have more candidates than they can select, and other selections of as many blocks.

    Args:
        reading: of a layer of the streams `long_term` and `short_term`.
        generator: of random selections.

    Attributes:
        queries: bool `[n]`, the queries in question.
        candidates: bool `[n, M]`, the blocks before the query's own.
        selected: int64 `[n, G, k]`, the blocks that the model selected, −1 for none.
        random: as many candidates, drawn at random.
        latest: as many candidates, the latest.
    """

    def __init__(self, reading: LayerReading, generator: torch.Generator) -> None:
        self.reading = reading
        self.selected = reading.selection.block_indices
        self.size = reading.streams["long_term"].block_size
        position, (_, _, most) = reading.queries.position, self.selected.shape
        own = position // self.size
        self.queries = own > most
        self.candidates = torch.arange(reading.importance.shape[-1], device=own.device) < own[:, None]
        noise = torch.rand(reading.importance.shape, generator=generator, device=own.device)
        self.random = self._best(noise)
        self.latest = self._as_many((own[:, None] - 1 - torch.arange(most, device=own.device))[:, None])

    def best(self, weights: torch.Tensor) -> torch.Tensor:
        """As many candidates, those with the most of `weights` `[n, G or 1, n]` on keys that the short-term stream lacks."""
        short = self.reading.streams["short_term"].mask(self.reading.queries, self.reading.queries.position, None)
        blocks = self.candidates.shape[-1]
        far = weights.masked_fill(short, 0.0)[..., : blocks * self.size]
        return self._best(far.unflatten(-1, (blocks, self.size)).sum(-1))

    def seen(self, block_indices: torch.Tensor) -> torch.Tensor:
        """The keys of both streams `[n, G, n]` if the long-term one had selected `block_indices`."""
        queries, position, streams = self.reading.queries, self.reading.queries.position, self.reading.streams
        long = streams["long_term"].mask(queries, position, Selection(block_indices, None))
        return long | streams["short_term"].mask(queries, position, None)

    def _best(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.masked_fill(~self.candidates[:, None], -torch.inf)
        most = min(self.selected.shape[-1], scores.shape[-1])
        indices = scores.topk(most).indices
        return self._as_many(nn.functional.pad(indices, (0, self.selected.shape[-1] - most), value=-1))

    def _as_many(self, indices: torch.Tensor) -> torch.Tensor:
        indices = indices.expand_as(self.selected)
        return torch.where(self.selected >= 0, indices, -1)


def measure_gates(reading: LayerReading) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of the gates over the positions, `[H]`, by stream."""
    by_stream = zip(reading.streams, reading.gates.unbind(-1), strict=True)
    return {name: torch.stack([gates.mean(0), gates.std(0)]) for name, gates in by_stream}


def measure_importance(choice: Choice) -> dict[str, torch.Tensor]:
    """The softmax over the candidates: its entropy relative to the uniform one, and its mass on the selected blocks."""
    number = choice.candidates.sum(-1)[choice.queries, None]
    pi = choice.reading.importance[choice.queries]
    return {
        "entropy over that of uniform": (torch.special.entr(pi).sum(-1) / number.log()).mean(),
        "effective number of candidates": torch.special.entr(pi).sum(-1).exp().mean(),
        "candidates": number.float().mean(),
        "mass on the selected": choice.reading.selection.importance[choice.queries].sum(-1).mean(),
        "mass on as many if uniform": ((choice.selected >= 0).sum(-1)[choice.queries] / number).mean(),
    }


def measure_diversity(choice: Choice, block_indices: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much a selection differs between queries and heads; see the tables of the study."""
    blocks = torch.arange(choice.candidates.shape[-1], device=block_indices.device)
    chosen = (block_indices[..., None] == blocks).any(-2)  # [n, G, M]
    last = choice.candidates[-1].sum()
    later = choice.queries[1:]
    per_query = chosen[choice.queries]
    return {
        "selected blocks": per_query.sum(-1).float().mean(),
        "share of a history's blocks that a head ever selects": (chosen.any(0).sum(-1) / last).mean(),
        "share of a history's blocks that any head ever selects": chosen.any(0).any(0).sum() / last,
        "distinct blocks of all heads at a query, of those selected": per_query.any(1).sum() / per_query.sum(),
        "share of the blocks that the previous query selected": (chosen[1:] & chosen[:-1])[later].sum()
        / chosen[1:][later].sum(),
    }


def measure_block_distances(choice: Choice, block_indices: torch.Tensor) -> torch.Tensor:
    """The shares of selected blocks that lie 1, 2 to 3, 4 to 7 … blocks back."""
    own = choice.reading.queries.position // choice.size
    distances = (own[:, None, None] - block_indices)[choice.queries][block_indices[choice.queries] >= 0]
    return _histogram(distances, BLOCK_EDGES)


def measure_candidate_distances(choice: Choice) -> torch.Tensor:
    """The same for a selection that is uniform over the candidates."""
    candidates = choice.candidates[choice.queries].float()
    own = (choice.reading.queries.position // choice.size)[choice.queries, None]
    back = own - torch.arange(candidates.shape[-1], device=own.device)
    return _mass(candidates / candidates.sum(-1, keepdim=True), back, BLOCK_EDGES)


def measure_distances(
    probabilities: torch.Tensor, chosen: torch.Tensor, distance: torch.Tensor, edges: tuple[int, ...]
) -> torch.Tensor:
    """
    Attention mass by distance.

    Args:
        probabilities: `[n, H, n]`; they are scaled to a sum of 1.
        chosen: the queries in question, bool `[n]`.
        distance: `[n, n]`, of query and key.
        edges: the least distance of each class except the first.

    Returns:
        `[len(edges) + 1]`, whose sum is 1.
    """
    mean = (probabilities / probabilities.sum(-1, keepdim=True)).mean(1)
    return _mass(mean[chosen], distance[chosen], edges)


def measure_agreement(choice: Choice, weights: torch.Tensor, *, together: bool = False) -> dict[str, torch.Tensor]:
    """
    The share of the attention weights `[n, G or 1, n]` on the keys that the streams see, with the model's and with other
    selections of as many blocks.

    Args:
        together: for the keys that any of the heads sees.
    """
    nothing = torch.full_like(choice.selected, -1)
    selections = {"no selected block": nothing, "random": choice.random, "latest": choice.latest}
    selections["selected"] = choice.selected
    if not together:  # of equal weights, all heads select the same
        selections["best"] = choice.best(weights)
    shares = {}
    for name, indices in selections.items():
        seen = choice.seen(indices)
        if together:
            seen = seen.any(1, keepdim=True)
        shares[name] = (weights * seen).sum(-1)[choice.queries].mean()
    share = choice.seen(choice.selected).float().mean(1).sum(-1) / (choice.reading.queries.position + 1)
    if together:
        share = choice.seen(choice.selected).any(1).sum(-1) / (choice.reading.queries.position + 1)
    shares["share of the keys, selected"] = share[choice.queries].mean()
    return shares


def measure_history(
    blossom: list[LayerReading], full: list[LayerReading], timestamps: torch.Tensor, generator: torch.Generator
) -> list[dict[str, Any]]:
    """
    All measures of one history, per layer.

    Args:
        blossom: readings of a model whose layers have the streams `long_term` and `short_term`.
        full: readings of a model of full attention with as many layers.
        timestamps: times of the events in seconds, int64 `[n]`.
        generator: of random selections.
    """
    position = blossom[0].queries.position
    distances = {
        "items": (position[:, None] - position, ITEM_EDGES),
        "seconds": (timestamps[:, None] - timestamps, SECOND_EDGES),
    }
    measures = []
    for reading, other in zip(blossom, full, strict=True):
        choice = Choice(reading, generator)
        gated = sum(
            gate[..., None] * of_stream
            for gate, of_stream in zip(reading.gates.unbind(-1), reading.probabilities.values(), strict=True)
        )
        causal = (position <= position[:, None])[:, None].float()
        attentions = {**reading.probabilities, "both": gated, "full, same queries and keys": reading.full}
        attentions |= {"full, trained": other.probabilities["full"], "all keys equally": causal}
        grouped = reading.full.unflatten(1, (choice.selected.shape[1], -1)).mean(2)
        trained = other.probabilities["full"].mean(1, keepdim=True)
        measures.append(
            {
                "gates": measure_gates(reading),
                "importance": measure_importance(choice),
                "diversity": {
                    name: measure_diversity(choice, getattr(choice, name)) for name in ("selected", "random")
                },
                "block distances": {
                    "selected": measure_block_distances(choice, choice.selected),
                    "uniform": measure_candidate_distances(choice),
                },
                **{
                    f"mass by {unit}": {
                        name: measure_distances(probabilities, choice.queries, distance, edges)
                        for name, probabilities in attentions.items()
                    }
                    for unit, (distance, edges) in distances.items()
                },
                "agreement": {
                    "full, same queries and keys": measure_agreement(choice, grouped),
                    "full, trained": measure_agreement(choice, trained),
                    "full, trained; keys of all heads": measure_agreement(choice, trained, together=True),
                },
            }
        )
    return measures


def average(measures: list[Any]) -> Any:
    """
    The means over histories of equal nested dictionaries and lists of tensors, and half the 95 % interval of each mean, as
    `{"mean": …, "half": …}` in the place of the tensors.
    """
    first = measures[0]
    if isinstance(first, Mapping):
        return {name: average([measure[name] for measure in measures]) for name in first}
    if isinstance(first, list):
        return [average(list(parts)) for parts in zip(*measures, strict=True)]
    values = torch.stack(measures).double()
    half = 1.96 * values.std(0) / len(measures) ** 0.5 if len(measures) > 1 else torch.zeros_like(first)
    return {"mean": _rounded(values.mean(0)), "half": _rounded(half)}


def _rounded(values: torch.Tensor) -> Any:
    if values.dim():
        return [_rounded(part) for part in values]
    return round(values.item(), 5)


def _mass(weights: torch.Tensor, distance: torch.Tensor, edges: tuple[int, ...]) -> torch.Tensor:
    """The mean over the rows of `weights` `[rows, N]` of their sum in each class of `distance` `[rows, N]`."""
    kind = torch.bucketize(distance, torch.tensor(edges, device=distance.device), right=True)
    sums = torch.zeros(*weights.shape[:-1], len(edges) + 1, device=weights.device)
    return sums.scatter_add(-1, kind, weights).mean(0)


def _histogram(distances: torch.Tensor, edges: tuple[int, ...]) -> torch.Tensor:
    kind = torch.bucketize(distances, torch.tensor(edges, device=distances.device), right=True)
    return torch.bincount(kind, minlength=len(edges) + 1) / max(len(distances), 1)
