"""What the prediction at the end of a history rests on: read from the model, and drawn as HTML. No Gradio in here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.model.ops_reference import Selection, last_positions
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


Span = tuple[int, int]  # first and last position, counted from 0, both included


@dataclass(frozen=True)
class LayerReading:
    """
    What one layer reads for the prediction after the last item of a history.

    Attributes:
        attention_type: the type of the layer in the configuration; streams from outside of the package are not shown.
        selected: for each key/value head, the past blocks it selected and their importance, the most important first.
        own: the block of the last item, which the long-term stream always reads; all items in a "full" layer.
        short: the blocks that the short-term stream reads, the latest first.
        gates: long-term and short-term gate of each query head; empty where the layer has none.
    """

    attention_type: str
    selected: list[list[tuple[Span, float]]]
    own: Span | None
    short: list[Span]
    gates: list[tuple[float, float]]


@torch.no_grad()
def explain(
    model: BlossomRecForSequentialRecommendation, history: Sequence[int], **columns: torch.Tensor
) -> list[LayerReading]:
    """
    What each layer of `model` (in evaluation mode) reads for the last position of `history`.

    Args:
        history: vocabulary ids, at least one, the latest last.
        columns: the times and types of the events that the model reads, int64 `[1, events]`.
    """
    config, length = model.config, len(history)
    outputs = model.model(torch.tensor([history], device=model.device), output_selection=True, **columns)
    last, position = last_positions(torch.tensor([0, length]), length), torch.arange(length)
    readings = []
    for attention_type, layer, found in zip(config.attention_types, model.model.layers, outputs.selections):
        selection = None
        if found.block_indices is not None:
            selection = Selection(found.block_indices[:, -1].cpu(), found.importance[:, -1].cpu())
        streams = {stream.name: stream for stream in layer.self_attn.streams if stream.name in ATTENTION_TYPES}
        seen = {name: stream.mask(last, position, selection)[0, 0] for name, stream in streams.items()}
        selected: list[list[tuple[Span, float]]] = []
        own, short = None, []
        if "long_term" in seen:
            size = config.selection_block_size
            own = _blocks_seen(seen["long_term"], size)[0]
            for blocks, importance in zip(selection.block_indices[0].tolist(), selection.importance[0].tolist()):
                chosen = [(block, weight) for block, weight in zip(blocks, importance) if block >= 0]
                selected.append([((block * size, (block + 1) * size - 1), weight) for block, weight in chosen])
        if "full" in seen:
            (own,) = _blocks_seen(seen["full"], length)
        if "short_term" in seen:
            short = _blocks_seen(seen["short_term"], config.short_term_block_size)
        gates: list[tuple[float, float]] = []
        if "long_term" in seen and "short_term" in seen:
            of_stream = dict(zip(layer.self_attn.stream_names, found.gates[0, -1].T.tolist()))
            gates = list(zip(of_stream["long_term"], of_stream["short_term"]))
        readings.append(LayerReading(attention_type, selected, own, short, gates))
    return readings


def _blocks_seen(mask: torch.Tensor, size: int) -> list[Span]:
    """The blocks of `size` positions in which `mask` `[length]` is set, the latest first."""
    blocks = (mask.nonzero()[:, 0] // size).unique().flip(0).tolist()
    return [(block * size, min((block + 1) * size, len(mask)) - 1) for block in blocks]


def render_recommendations(heading: str, rows: Iterable[tuple[str, str, str, float]], note: str) -> str:
    """
    The recommended items as an ordered list.

    Args:
        rows: name, raw id ("" where the name says it), score, and the length of the bar from 0 to 1.
        note: what scores and bars are.
    """
    items = [
        f'<li><span class="name">{escape(name)}</span> <span class="id">{escape(raw)}</span> '
        f'<span class="score">{score}</span><span class="bar" style="width:{bar:.1%}"></span></li>'
        for name, raw, score, bar in rows
    ]
    return f'<section class="best"><h2>{escape(heading)}</h2><ol>{"".join(items)}</ol><p class="note">{escape(note)}</p></section>'


def render_explanation(readings: Sequence[LayerReading], names: Sequence[str]) -> str:
    """The readings as timelines over the history, gates, and the items in each block; `names[i]` is item i's name."""
    chosen = _chosen_blocks(readings)
    parts = [f'<section class="why"><h2>Why these</h2><p>{_summary(readings, chosen, names)}</p>{_LEGEND}']
    parts += [_render_layer(number, reading, len(names)) for number, reading in enumerate(readings, start=1)]
    parts.append("<h3>The items that were read</h3>")
    for place, (span, choices) in enumerate(chosen.items()):
        by = "; ".join(f"layer {layer} {heads}, {importance:.0%}" for layer, heads, importance, _ in choices)
        parts.append(_render_items(f"{_say(span)}: long-term, {by}", [span], names, opened=not place))
    if short := next((reading.short for reading in readings if reading.short), None):
        parts.append(_render_items(f"Short-term: {', '.join(map(_numbers, short))}", short, names))
    parts.append(_render_items(f"The whole history: {len(names):,} items", [(0, len(names) - 1)], names))
    parts.append(
        '<p class="note">A block that was selected could be read by these heads; how much of each item went into the '
        "prediction is up to the attention inside it. From the second layer on, a place in the history also carries "
        "what the layers before it read there.</p></section>"
    )
    return "".join(parts)


_LEGEND = (
    '<ul class="legend"><li><span class="chip selected"></span>long-term: selected blocks, the more important the '
    'stronger</li><li><span class="chip own"></span>long-term: the latest block, always read</li>'
    '<li><span class="chip short"></span>short-term: blocks at growing distances</li></ul>'
)


def _chosen_blocks(readings: Sequence[LayerReading]) -> dict[Span, list[tuple[int, str, float, float]]]:
    """Each selected block: (layer, heads, importance, largest long-term gate) of all that chose it; the weightiest first."""
    chosen: dict[Span, list[tuple[int, str, float, float]]] = {}
    for number, reading in enumerate(readings, start=1):
        for group, blocks in enumerate(reading.selected):
            gates = _of_group(reading.gates, group, len(reading.selected))
            gate = max((long for long, _ in gates), default=1.0)
            for span, importance in blocks:
                heads = _heads(reading, group)
                chosen.setdefault(span, []).append((number, heads, importance, gate))
    weight = {span: max(importance * gate for *_, importance, gate in by) for span, by in chosen.items()}
    return dict(sorted(chosen.items(), key=lambda entry: -weight[entry[0]]))


def _summary(readings: Sequence[LayerReading], chosen: dict, names: Sequence[str]) -> str:
    sentences = []
    if chosen:
        span = next(iter(chosen))
        layer, heads, importance, gate = max(chosen[span], key=lambda choice: choice[2] * choice[3])
        gated = f" and a long-term gate of up to {gate:.2f}" if readings[layer - 1].gates else ""
        sentences.append(
            f"Of the blocks of the past, <b>{_say(span).lower()}</b> weigh most ({escape(names[span[0]])} … "
            f"{escape(names[span[1]])}): {heads} of layer {layer} selected them with importance {importance:.0%}{gated}."
        )
    elif any(reading.selected for reading in readings):
        sentences.append("The history is too short for a past block to select from.")
    gates = [gate for reading in readings for gate in reading.gates]
    if gates:
        share = sum(long for long, _ in gates) / max(sum(long + near for long, near in gates), 1e-9)
        sentences.append(f"Over all heads, the gates stand at {share:.0%} long-term and {1 - share:.0%} short-term.")
    if all(reading.attention_type == "full" for reading in readings):
        sentences.append("Every layer of this model reads the whole history; nothing is selected.")
    return " ".join(sentences)


def _render_layer(number: int, reading: LayerReading, length: int) -> str:
    kind = {"blossom": "both streams", "full": "full attention"}.get(reading.attention_type, reading.attention_type)
    parts = [f'<section class="layer"><h3>Layer {number} <small>{kind.replace("_", "-")}</small></h3>']
    if reading.attention_type == "full":
        parts.append(_lane("All heads", "the whole history", [(reading.own, "own", 1.0)], length))
    for group, blocks in enumerate(reading.selected):
        said = ", ".join(f"{_numbers(span)} ({weight:.0%})" for span, weight in blocks) or "no past block"
        said += f"; the latest, {_numbers(reading.own)}"
        shapes = [(span, "selected", 0.25 + 0.75 * weight) for span, weight in blocks] + [(reading.own, "own", 1.0)]
        parts.append(_lane(f"Long-term, {_heads(reading, group)}", said, shapes, length))
    if reading.short:
        said = ", ".join(map(_numbers, reading.short))
        parts.append(_lane("Short-term, all heads", said, [(span, "short", 1.0) for span in reading.short], length))
    parts.append(f'<p class="axis"><span>1, oldest</span><span>latest, {length:,}</span></p>')
    if reading.gates:
        rows = [
            f'<tr><th scope="row">{head}</th>'
            + "".join(
                f'<td><span class="gate"><span class="{kind}" style="width:{gate:.1%}"></span></span> {gate:.2f}</td>'
                for kind, gate in zip(("selected", "short"), gates)
            )
            + "</tr>"
            for head, gates in enumerate(reading.gates, start=1)
        ]
        parts.append(
            f"<table><caption>Gates of layer {number}</caption><thead><tr>"
            + "".join(f'<th scope="col">{name}</th>' for name in ("Head", "Long-term", "Short-term"))
            + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    return "".join([*parts, "</section>"])


def _lane(name: str, said: str, shapes: Iterable[tuple[Span, str, float]], length: int) -> str:
    """One timeline. Its unit is an item, so that it scales to any page; its words, which say it all, stand outside."""
    rects = "".join(
        f'<rect class="{kind}" x="{first}" y="0" width="{last - first + 1}" height="1" fill-opacity="{opacity:.2f}">'
        f"<title>{_say((first, last))}</title></rect>"
        for (first, last), kind, opacity in shapes
    )
    return (
        f'<div class="lane"><p><b>{name}</b> {said}</p><svg viewBox="0 0 {length} 1" preserveAspectRatio="none" '
        f'aria-hidden="true">{rects}</svg></div>'
    )


def _render_items(summary: str, spans: Iterable[Span], names: Sequence[str], opened: bool = False) -> str:
    lists = "".join(
        f'<ol start="{first + 1}">{"".join(f"<li>{escape(name)}</li>" for name in names[first : last + 1])}</ol>'
        for first, last in sorted(spans)
    )
    state = ' open="open"' if opened else ""
    return f"<details{state}><summary>{summary}</summary>{lists}</details>"


def _of_group(per_head: Sequence, group: int, groups: int) -> Sequence:
    """The part of a list over query heads that belongs to one key/value head."""
    size = len(per_head) // groups
    return per_head[group * size : (group + 1) * size]


def _heads(reading: LayerReading, group: int) -> str:
    if not reading.gates:
        return f"head group {group + 1}"
    heads = _of_group(range(1, len(reading.gates) + 1), group, len(reading.selected))
    return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]}–{heads[-1]}"


def _numbers(span: Span) -> str:
    first, last = span
    return f"{first + 1:,}" if first == last else f"{first + 1:,}–{last + 1:,}"


def _say(span: Span) -> str:
    return f"{'Item' if span[0] == span[1] else 'Items'} {_numbers(span)}"
