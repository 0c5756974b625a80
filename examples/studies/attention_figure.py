"""The figure of the study `attention.py`. It needs matplotlib (extra `report`), which is imported when it is drawn."""

from pathlib import Path
from typing import Any

from blossomrec_hf.utils.files import atomic_write


COLORS = {
    **{"long_term": "#d1495b", "short_term": "#edae49", "both": "#7b2d8b"},
    **{"full, same queries and keys": "#66a182", "full, trained": "#2e4057", "all keys equally": "0.6"},
}
ITEMS = ["0", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512"]
TIMES = ["< 1 min", "1 min", "10 min", "1 h", "1 day", "1 week", "1 month", "1 year"]
BLOCKS = ["1", "2", "4", "8", "16", "32"]
SELECTIONS = {
    **{"no selected block": "0.8", "random": "#a8c5da", "latest": "#5b8fb0", "selected": "#d1495b", "best": "0.35"},
}


def draw(results: dict[str, Any], path: str | Path) -> None:
    """
    Draw the results of the study.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    layers = results["layers"]
    figure = Figure(figsize=(17, 8), layout="constrained")
    panels = figure.subplots(2, 4).flat
    _draw_training(panels[0], results["records"]["blossom"]["gates"], len(layers))
    _draw_gates(panels[1], layers)
    _draw_block_distances(panels[2], layers)
    _draw_diversity(panels[3], layers)
    _draw_mass(panels[4], layers, "mass by items", ITEMS, "items back, at least")
    _draw_mass(panels[5], layers, "mass by seconds", TIMES, "time back, at least")
    _draw_agreement(panels[6], layers, "full, trained", "weight of a trained full-attention model")
    _draw_agreement(panels[7], layers, "full, same queries and keys", "weight of the same model with full attention")
    for panel in figure.axes:
        panel.tick_params(labelsize=7)
        panel.title.set_fontsize(9)
    histories = results["histories"]
    figure.suptitle(
        f"What the streams attend to: {histories['number']} histories of at least {histories['min_events']} events, "
        f"{results['data']['file'].removesuffix('.safetensors')}, {results['device']}",
        fontsize=10,
    )
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=80, metadata={"Software": None})


def _draw_training(panel: Any, lines: list[dict[str, float]], num_layers: int) -> None:
    steps = [line["step"] for line in lines]
    for stream, style in (("long", "-"), ("short", "--")):
        for layer in range(num_layers):
            prefix = f"layer_{layer}/gate_{stream}_"
            heads = [[value for name, value in line.items() if name.startswith(prefix)] for line in lines]
            means = [sum(values) / len(values) for values in heads]
            panel.plot(steps, means, style, color=f"C{layer}", label=f"{stream}-term, layer {layer + 1}")
            panel.fill_between(steps, [*map(min, heads)], [*map(max, heads)], color=f"C{layer}", alpha=0.12)
    panel.set(title="gates over the training (band: heads)", xlabel="step", ylim=(0, 1))
    panel.legend(fontsize=6, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.63))


def _draw_gates(panel: Any, layers: list[dict[str, Any]]) -> None:
    for layer, measures in enumerate(layers):
        means = {name: entry["mean"] for name, entry in measures["gates"].items()}
        (long, long_deviation), (short, short_deviation) = means["long_term"], means["short_term"]
        panel.errorbar(
            long, short, xerr=long_deviation, yerr=short_deviation, fmt="o", elinewidth=0.5, label=f"layer {layer + 1}"
        )
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    panel.set(title="gates of the heads (bars: deviation over positions)", xlabel="long-term", ylabel="short-term")
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.legend(fontsize=7)


def _draw_block_distances(panel: Any, layers: list[dict[str, Any]]) -> None:
    places = range(len(BLOCKS))
    for layer, measures in enumerate(layers):
        entry = measures["block distances"]["selected"]
        panel.errorbar(places, entry["mean"], yerr=entry["half"], marker="o", markersize=4, label=f"layer {layer + 1}")
    uniform = layers[0]["block distances"]["uniform"]["mean"]
    panel.plot(places, uniform, color="0.6", linestyle=":", label="all candidates equally")
    panel.set_xticks(places, BLOCKS)
    panel.set(title="selected blocks", xlabel="blocks back, at least", ylabel="share")
    panel.legend(fontsize=7)


def _draw_diversity(panel: Any, layers: list[dict[str, Any]]) -> None:
    labels = {
        "entropy of π\n(uniform: 1)": lambda m, of: m["importance"]["entropy over that of uniform"],
        "ever selected\nby a head": lambda m, of: m["diversity"][of][
            "share of a history's blocks that a head ever selects"
        ],
        "distinct among\nthe heads": lambda m, of: m["diversity"][of][
            "distinct blocks of all heads at a query, of those selected"
        ],
        "kept from the\nprevious query": lambda m, of: m["diversity"][of][
            "share of the blocks that the previous query selected"
        ],
    }
    width = 0.8 / (len(layers) + 1)
    for place, (_, read) in enumerate(labels.items()):
        for layer, measures in enumerate(layers):
            panel.bar(place + width * layer, read(measures, "selected")["mean"], width, color=f"C{layer}")
        if place:
            panel.bar(place + width * len(layers), read(layers[0], "random")["mean"], width, color="0.75")
    panel.set_xticks([place + width * len(layers) / 2 for place in range(len(labels))], labels, fontsize=7)
    panel.set(title="diversity of the selection (grey: random blocks)", ylim=(0, 1.05))


def _draw_mass(panel: Any, layers: list[dict[str, Any]], part: str, labels: list[str], unit: str) -> None:
    """The mean over the layers."""
    for name in layers[0][part]:
        rows = [layer[part][name]["mean"] for layer in layers]
        means = [sum(values) / len(rows) for values in zip(*rows)]
        style = ":" if name == "all keys equally" else "-"
        panel.plot(range(len(labels)), means, style, marker="o", markersize=3, color=COLORS[name], label=name)
    panel.set_xticks(range(len(labels)), labels, rotation=30)
    panel.set(title="attention, mean of the layers", xlabel=unit, ylabel="share", yscale="log")
    panel.legend(fontsize=6)


def _draw_agreement(panel: Any, layers: list[dict[str, Any]], target: str, title: str) -> None:
    width = 0.8 / len(SELECTIONS)
    for place, (name, color) in enumerate(SELECTIONS.items()):
        entries = [layer["agreement"][target][name] for layer in layers]
        panel.bar(
            [layer + place * width for layer in range(len(layers))],
            [entry["mean"] for entry in entries],
            width,
            yerr=[entry["half"] for entry in entries],
            color=color,
            label=name,
        )
    panel.set_xticks(
        [layer + 0.4 - width / 2 for layer in range(len(layers))], [f"layer {i + 1}" for i in range(len(layers))]
    )
    panel.set(title=f"{title}\non the keys that the streams see", ylim=(0, 1.25))
    panel.legend(fontsize=6, ncols=3, loc="upper center")
