"""A look at a built data set: its figures, and one self-contained page or picture of them."""

import base64
import html
import io
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_write
from .filters import FilterReport
from .metadata import read_item_metadata
from .splits import count_unseen_targets, event_batches
from .storage import load_folder


_SECONDS_1990 = 631_152_000
MIN_TIES = 20  # pairs of events by which an order of ties is recognized; by chance, 20 are in one order once in 2^19


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """The figures of the data set that `build_sequences` saved in a folder, see [`describe`]."""
    return describe(load_folder(folder), BlossomRecTokenizer.from_pretrained(folder))


def describe(dataset: Dataset, tokenizer: BlossomRecTokenizer | None = None) -> dict[str, Any]:
    """
    The figures of a built data set, in one pass over each column of events.

    Args:
        dataset: from [`build_sequences`].
        tokenizer ([`BlossomRecTokenizer`], *optional*): its vocabulary, for `ordered_ties`.

    Returns:
        `dict`: `users`, `items`, `interactions`; `density` (interactions by users × items); `repeated_share` (events
        whose item their user had before); `history_lengths` (int64 [users]) and `item_frequencies` (int64 [items],
        falling); `covering_length`: for each of 50, 90 and 99, the least number of latest items a user that holds so
        many percent of the interactions; `unseen_targets` (test targets whose item never occurs in training, all test
        targets); with event types, `event_types` (number of events by type). With times, also `time_span` (first and last
        second), `baskets` (whether the events of a second are a basket), `tied_share` (events in the same second as the
        one before them in the history), `months` (for each month with events, in order, its name, the number of events
        and the number of cold items, which occur in no earlier month) and, with `tokenizer`, `ordered_ties` (of the pairs of successive events in one second with different items,
        those in the order of their item ids, all of them).
    """
    lengths, frequencies, repeated = [], np.zeros(1, np.int64), 0
    for ids, batch_lengths in event_batches(dataset):
        lengths.append(batch_lengths)
        user = np.repeat(np.arange(batch_lengths.size), batch_lengths)
        pairs = np.sort(user << np.int64(32) | ids)  # `np.unique` hashes them, which takes 20 times as long
        repeated += int((pairs[1:] == pairs[:-1]).sum())
        counts = np.bincount(ids, minlength=frequencies.size)
        counts[: frequencies.size] += frequencies
        frequencies = counts
    history_lengths, vocab_size = np.concatenate(lengths), frequencies.size
    frequencies = np.sort(frequencies[NUM_SPECIAL_IDS:])[::-1]
    frequencies = frequencies[frequencies > 0]
    total = int(history_lengths.sum())
    figures = {
        "users": len(dataset),
        "items": int(frequencies.size),
        "interactions": total,
        "density": total / max(len(dataset) * frequencies.size, 1),
        "repeated_share": repeated / max(total, 1),
        "history_lengths": history_lengths,
        "item_frequencies": frequencies,
    }
    covered = np.cumsum(_longer_than(history_lengths))  # covered[L - 1]: interactions among the latest L of each user
    figures["covering_length"] = {
        percent: int(np.searchsorted(covered, total * percent / 100) + 1) for percent in (50, 90, 99)
    }
    figures["unseen_targets"] = count_unseen_targets(dataset, vocab_size)
    if "timestamps" in dataset.column_names:
        figures |= _describe_times(dataset, total, vocab_size, tokenizer)
    if "event_type_ids" in dataset.column_names:
        names = dataset.features["event_type_ids"].feature.names
        counts = sum(np.bincount(types, minlength=len(names)) for types, _ in event_batches(dataset, "event_type_ids"))
        figures["event_types"] = dict(zip(names, counts.tolist()))
    return figures


def _describe_times(
    dataset: Dataset, total: int, vocab_size: int, tokenizer: BlossomRecTokenizer | None
) -> dict[str, Any]:
    """The figures of [`describe`] that need times."""
    spans, ties, ordered, compared = [], 0, 0, 0
    never = np.iinfo(np.int64).max
    first_month, by_month = np.full(vocab_size, never), Counter()
    place = None if tokenizer is None else _places_by_id(tokenizer)
    for (ids, lengths), (times, _) in zip(event_batches(dataset), event_batches(dataset, "timestamps")):
        if not times.size:
            continue
        spans.append((times.min(), times.max()))
        user = np.repeat(np.arange(lengths.size), lengths)
        tied = (times[1:] == times[:-1]) & (user[1:] == user[:-1])
        ties += int(tied.sum())
        if place is not None:
            before, after = place[ids[:-1][tied]], place[ids[1:][tied]]
            differ = (before != after) & (before > 0) & (after > 0)
            ordered += int((differ & (before < after)).sum())
            compared += int(differ.sum())
        months = times.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
        counts = np.bincount(months - months.min())
        by_month.update({int(months.min() + later): int(counts[later]) for later in np.flatnonzero(counts)})
        np.minimum.at(first_month, ids, months)
    first_month = first_month[NUM_SPECIAL_IDS:]
    cold = Counter(first_month[first_month < never].tolist())
    figures = {
        "time_span": (min(first for first, _ in spans), max(last for _, last in spans)),
        "baskets": "basket_starts" in dataset.column_names,
        "tied_share": ties / max(total, 1),
        "months": [(str(np.datetime64(month, "M")), by_month[month], cold[month]) for month in sorted(by_month)],
    }
    return figures if place is None else figures | {"ordered_ties": (ordered, compared)}


def _places_by_id(tokenizer: BlossomRecTokenizer) -> np.ndarray:
    """int64 [vocab_size]: the place of each vocabulary id in the order of raw item ids, by number if all are numbers."""
    items = tokenizer.decode_items(list(range(NUM_SPECIAL_IDS, len(tokenizer))))
    if all(isinstance(item, str) and item.isascii() and item.isdigit() for item in items):
        items = [int(item) for item in items]
    order = sorted(range(len(items)), key=items.__getitem__)
    places = np.zeros(len(tokenizer), np.int64)
    places[NUM_SPECIAL_IDS + np.array(order, np.int64)] = np.arange(1, len(items) + 1)
    return places


def warnings(figures: dict[str, Any]) -> list[str]:
    """Sentences on what may make a data set unfit for its use, from the figures of [`describe`]."""
    found, longest = [], int(figures["history_lengths"].max(initial=0))
    if "time_span" not in figures:
        found.append("the order of time is unknown: every history is in the order of the rows of the log")
    elif figures["time_span"][1] < _SECONDS_1990:
        found.append(
            f"the latest time is {_date(figures['time_span'][1])}: the times may be no dates but counters or relative times, "
            "which order the events, but whose gaps are read as seconds"
        )
    if figures["users"] > 1 and longest > 0.2 * figures["interactions"]:
        found.append(f"one user has {longest / figures['interactions']:.0%} of the events")
    ties_have_an_order = not figures.get("baskets", False)  # the items of a basket are predicted together
    if ties_have_an_order and figures.get("tied_share", 0) > 0.2:
        found.append(
            f"{figures['tied_share']:.0%} of the events are in the second of the one before them, so that the order of the rows "
            "decides; if they are baskets, group them (--group timestamp)"
        )
    ordered, compared = figures.get("ordered_ties", (0, 0))
    if ties_have_an_order and compared >= MIN_TIES and not 0.05 < ordered / compared < 0.95:
        found.append(
            f"{max(ordered, compared - ordered) / compared:.0%} of the {compared:,} ties are sorted by item id, so that the order "
            "within a second is that of the ids and not that of the events; a model can learn it, and its figures are too good"
        )
    unseen, targets = figures["unseen_targets"]
    if unseen > 0.01 * targets:
        found.append(
            f"{unseen:,} of {targets:,} test targets ({unseen / targets:.0%}) are items that never occur in training, which "
            "a model of item ids cannot rank well; `blossomrec evaluate --known_targets` drops and counts them"
        )
    return found


def _longer_than(lengths: np.ndarray) -> np.ndarray:
    """int64 [longest]: how many users have more than 0, 1, 2 … events."""
    return lengths.size - np.cumsum(np.bincount(lengths))[:-1]


def write_report(path: str | Path, folder: str | Path) -> dict[str, Any]:
    """
    Writes a page (`.html`, self-contained) or a picture (`.png`) about the data set that `build_sequences` saved.

    Returns:
        what [`describe`] found.

    Raises:
        `ValueError`: another suffix. `ImportError`: matplotlib is missing.
    """
    path, folder = Path(path), Path(folder)
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"path is {str(path)!r}; a report is an .html page or a .png picture.")
    filters = FilterReport.load(folder)
    figures = describe_folder(folder)
    picture = _picture(figures)
    with atomic_write(path) as partial:
        if path.suffix == ".png":
            partial.write_bytes(picture)
        else:
            partial.write_text(_page(figures, filters, picture, _favorites(folder)), encoding="utf-8")
    return figures


def _picture(figures: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    months = figures.get("months", [])
    figure = Figure(figsize=(17 if months else 13, 3.8), layout="constrained")
    history, popularity, coverage, *over_time = figure.subplots(1, 4 if months else 3)
    lengths = np.sort(figures["history_lengths"])
    history.plot(lengths, 1 - np.arange(lengths.size) / lengths.size)
    history.set(xscale="log", xlabel="history length", ylabel="share of users with as many", title="Histories")
    frequencies = figures["item_frequencies"]
    popularity.plot(np.arange(1, frequencies.size + 1), frequencies)
    popularity.set(xscale="log", yscale="log", xlabel="item, by rank", ylabel="interactions", title="Popularity")
    covered = np.cumsum(_longer_than(lengths)) / max(figures["interactions"], 1)
    coverage.plot(np.arange(1, covered.size + 1), covered)
    for percent, length in figures["covering_length"].items():
        coverage.axvline(length, color="gray", linewidth=0.8, linestyle=":")
        point = (length, percent / 100)
        coverage.annotate(f"{percent} %: {length}", point, (-4, 2), textcoords="offset points", ha="right", fontsize=8)
    coverage.set(xscale="log", xlabel="latest items kept a user", ylabel="share of interactions", title="Coverage")
    for axes in (history, popularity, coverage):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is history else (1,)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in over_time:
        names = [month for month, _, _ in months]
        place, step = np.array(names, "datetime64[M]").astype(int), -(-len(months) // 5)
        axes.plot(place, [events for _, events, _ in months], label="interactions", marker=".")
        axes.plot(place, [cold for _, _, cold in months], label="cold items", marker=".")
        axes.set_xticks(place[::step], names[::step])
        axes.set(yscale="symlog", ylim=(0, None), xlabel="month", title="Time")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def summary(figures: dict[str, Any], filters: FilterReport | None) -> list[tuple[str, str]]:
    """The figures as (name, value) for people to read."""
    lengths = figures["history_lengths"]
    rows = [
        ("Users", f"{figures['users']:,}"),
        ("Items", f"{figures['items']:,}"),
        ("Interactions", f"{figures['interactions']:,}"),
        ("Density", f"{figures['density']:.3%}"),
        ("History length", f"mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max():,}"),
        ("Events that repeat an item of their user", f"{figures['repeated_share']:.1%}"),
    ]
    if filters and filters.repeat_share is not None:
        rows.append(("Test targets that already occur in their user's history", f"{filters.repeat_share:.1%}"))
    for percent, length in figures["covering_length"].items():
        rows.append((f"Latest items per user that cover {percent} % of the interactions", f"{length:,}"))
    if "time_span" in figures:
        rows.append(("Time span", " to ".join(_date(time) for time in figures["time_span"])))
        rows.append(("Events in the same second as the one before", f"{figures['tied_share']:.1%}"))
        for name, column in (("Interactions per month", 1), ("Cold items per month", 2)):
            counts = np.array([month[column] for month in figures["months"]])
            (first, *_), (last, *_) = figures["months"][0], figures["months"][-1]
            text = f"{counts[0]:,} in {first}"
            if len(counts) > 1:
                most = figures["months"][counts.argmax()][0]
                text = f"first {text}, last {counts[-1]:,} in {last}, median {np.median(counts):,.0f}, "
                text += f"most {counts.max():,} in {most}"
            rows.append((name, text))
    rows.append(("Test targets that never occur in training", "{:,} of {:,}".format(*figures["unseen_targets"])))
    if "event_types" in figures:
        rows.append(("Event types", ", ".join(f"{name} {count:,}" for name, count in figures["event_types"].items())))
    rows += [("Warning", warning) for warning in warnings(figures)]
    return rows


def _date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M")


def _favorites(folder: Path) -> list[str]:
    """The titles of the ten most frequent items, if there are titles. Lower vocabulary ids are more frequent."""
    titles = read_item_metadata(folder)
    return (
        []
        if titles is None
        else titles.filter(titles["input_id"] < NUM_SPECIAL_IDS + 10)["title"].drop_nulls().to_list()
    )


def _table(rows: list[tuple], header: tuple[str, ...] = ()) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"] if header else []
    lines += ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _page(figures: dict[str, Any], filters: FilterReport | None, picture: bytes, favorites: list[str]) -> str:
    source = html.escape(filters.source) if filters else "a data set"
    parts = [f"<h1>{source}</h1>", _table(summary(figures, filters))]
    image = base64.b64encode(picture).decode()
    parts.append(f'<img alt="Histories, popularity, coverage, time" src="data:image/png;base64,{image}">')
    if "months" in figures:
        parts += ["<h2>Months</h2>", "<p>Cold items occur in no earlier month.</p>"]
        months = [(month, f"{events:,}", f"{cold:,}") for month, events, cold in figures["months"]]
        parts.append(_table(months, ("month", "interactions", "cold items")))
    if filters:
        before = filters.interactions_read
        rows: list[tuple] = [("read", f"{before:,}", "", "", "")]
        for name, interactions, users, items in filters.steps:
            rows.append((name, f"{interactions:,}", f"{before - interactions:,}", f"{users:,}", f"{items:,}"))
            before = interactions
        if filters.notes:
            parts += ["<h2>Notes</h2>", "<ul>", *(f"<li>{html.escape(note)}</li>" for note in filters.notes), "</ul>"]
        reasons = "".join(f", {count:,} with {html.escape(name)}" for name, count in filters.bad_row_reasons.items())
        parts += ["<h2>What each filter removed</h2>", f"<p>Bad rows skipped: {filters.bad_rows:,}{reasons}</p>"]
        parts.append(_table(rows, ("filter", "interactions left", "removed", "users left", "items left")))
    if favorites:
        parts += ["<h2>Most frequent items</h2>", "<ol>", *(f"<li>{html.escape(t)}</li>" for t in favorites), "</ol>"]
    style = (
        "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.2em 1em;text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{source}</title><style>{style}</style>'
        + "\n".join(parts)
        + "</html>\n"
    )
