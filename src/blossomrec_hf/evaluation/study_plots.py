"""Figures of studies. They need matplotlib (extra `report`), which is imported when one is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.files import atomic_write
from .study_tables import MARGIN, METRIC, comparison_title


def draw(path: str | Path, title: str, tables: Mapping[str, Any]) -> None:
    """
    Draw the tables of a study: NDCG@10 over a setting if there are slopes, else the relative differences of the comparisons,
    else NDCG@10 of each configuration; with 95 % intervals. One panel per data set and group of users.

    Args:
        path: the PNG file to write.
        title: title of the figure.
        tables: the result of [`StudyTables.build`].

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    kind = next(name for name in ("slopes", "comparisons", "means") if tables[name])
    draw_entries = {"slopes": _draw_slopes, "comparisons": _draw_comparisons, "means": _draw_means}[kind]
    entries = [entry for entry in tables[kind] if entry["num_users"]]
    places = list(dict.fromkeys((entry["data"], entry["users"]) for entry in entries))
    bars = max(sum((entry["data"], entry["users"]) == place for entry in entries) for place in places)
    height = 3.2 if kind == "slopes" else 0.9 + 0.17 * bars
    columns = min(2, len(places)) if kind == "slopes" else 1  # names of configurations are long
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(13 if columns == 2 else 9, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel in list(panels)[len(places) :]:
        panel.remove()
    for place, panel in zip(places, figure.axes):
        chosen = [entry for entry in entries if (entry["data"], entry["users"]) == place]
        panel.set_title(f"{place[0]}, {place[1]} ({chosen[0]['num_users']:,})", fontsize=9)
        draw_entries(panel, chosen)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=90, metadata={"Software": None})


def _draw_slopes(panel: Any, entries: list[Mapping[str, Any]]) -> None:
    for entry in entries:
        values, metrics = zip(*entry["points"])
        label = f"{entry.get('configurations', '*').strip('*, ')}, {entry['slope']:+.4f} per doubling"
        panel.plot(values, metrics, marker="o", label=label)
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.set(xlabel=entries[0]["over"], ylabel="NDCG@10")
    panel.legend(fontsize=7)


def _draw_comparisons(panel: Any, entries: list[Mapping[str, Any]]) -> None:
    relative = [[100 * entry[name] / entry["other"] for name in ("difference", "low", "high")] for entry in entries]
    names = [comparison_title(entry) for entry in entries]
    _draw_bars(panel, names, [row[0] for row in relative], [(row[2] - row[1]) / 2 for row in relative])
    panel.axvline(0, color="0.5", linewidth=0.8)
    panel.axvline(-100 * MARGIN, color="0.5", linewidth=0.8, linestyle=":")
    panel.set_xlabel("difference in NDCG@10, % (dotted: −2 %)", fontsize=8)


def _draw_means(panel: Any, entries: list[Mapping[str, Any]]) -> None:
    several = len({entry["evaluation"] for entry in entries}) > 1
    names = [f"{e['configuration']}{', ' + e['evaluation'] if several else ''}" for e in entries]
    half = [entry[f"{METRIC} half interval"] for entry in entries]
    _draw_bars(panel, names, [entry[METRIC] for entry in entries], half)
    panel.set_xlabel("NDCG@10")


def _draw_bars(panel: Any, names: list[str], values: list[float], half: list[float]) -> None:
    places = range(len(names), 0, -1)
    panel.errorbar(values, places, xerr=half, fmt="o", capsize=2, markersize=4)
    panel.set_yticks(places, names, fontsize=7)
