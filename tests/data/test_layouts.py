"""Every published layout: rows of its published columns are read as plain Python reads them, and public sets name theirs."""

import csv
import io
import json

import numpy as np
import polars as pl
import pytest

from blossomrec_hf.data import build_sequences, known_sets
from blossomrec_hf.data.formats import FORMATS
from blossomrec_hf.data.layouts import LAYOUTS
from blossomrec_hf.data.readers import open_log


# layout: the columns of users, items and times, and how these write numbers (time: seconds since 1970)
READ = {
    "rees46": ("user_id", "product_id", "event_time"),
    "otto": ("session", "aid", "ts"),
    "mind": ("user_id", "impressions", "time"),
    "h-and-m": ("customer_id", "article_id", "t_dat"),
    "yoochoose": ("session_id", "item_id", "timestamp"),
    "yoochoose-buys": ("session_id", "item_id", "timestamp"),
    "taobao": ("user_id", "item_id", "timestamp"),
    "diginetica": ("sessionId", "itemId", "timeframe"),
    "retailrocket": ("visitorid", "itemid", "timestamp"),
    "tenrec": ("user_id", "item_id", None),
    "kuairand": ("user_id", "video_id", "time_ms"),
    "kuairec": ("user_id", "video_id", "timestamp"),
    "yambda": ("uid", "item_id", "timestamp"),
    "amazon-2014": ("user", "item", "timestamp"),
    "amazon-2018": ("user", "item", "timestamp"),
    "amazon-json": ("reviewerID", "asin", "unixReviewTime"),
    "amazon-2023": ("user_id", "parent_asin", "timestamp"),
    "ml-10m": ("UserID", "MovieID", "Timestamp"),
    "ml-csv": ("userId", "movieId", "timestamp"),
    "steam": ("username", "product_id", "date"),
    "yelp": ("user_id", "business_id", "date"),
    "foursquare-global": ("user_id", "venue_id", "utc_time"),
    "lastfm-1k": ("user_id", "artist_name", "timestamp"),
}  # fmt: skip

_DAY, _START = 86_400, 1_300_000_000


def written(layout: str, name: str, number: int) -> str:
    """How a layout writes the user, item or time of a number."""
    role = READ[layout].index(name)
    if role == 2:
        dated = np.datetime64(_START // _DAY * _DAY + number * _DAY, "s").item()
        form = {
            "rees46": "%Y-%m-%d %H:%M:%S UTC", "mind": "%m/%d/%Y %I:%M:%S %p", "h-and-m": "%Y-%m-%d", "steam": "%Y-%m-%d",
            "yoochoose": "%Y-%m-%dT%H:%M:%S.000Z", "yoochoose-buys": "%Y-%m-%dT%H:%M:%S.000Z", "yelp": "%Y-%m-%d %H:%M:%S",
            "foursquare-global": "%a %b %d %H:%M:%S +0000 %Y", "lastfm-1k": "%Y-%m-%dT%H:%M:%SZ",
        }.get(layout)  # fmt: skip
        return dated.strftime(form) if form else str(_START + number * _DAY)
    if role == 0 and layout in ("amazon-2014", "amazon-2018"):
        return f"A{number:013d}"
    if layout == "mind":
        return f"U{number}" if role == 0 else f"N{number}"
    if layout == "lastfm-1k":
        return f"user_{number:06d}" if role == 0 else f"The {number}s"
    return str(number)


def other(layout: str, name: str) -> str:
    """A value of a column that is not read."""
    return {"behavior_type": "pv", "rating": "5.0", "timezone_offset": "-240", "overall": "5.0"}.get(name, "7")


def write(layout: str, events: list[tuple[int, int, int]], path) -> None:
    columns = LAYOUTS[layout].columns
    if columns.startswith("{"):
        rows = []
        for user, item, time in events:
            user, item, time = (written(layout, name, n) for name, n in zip(READ[layout], (user, item, time)))
            if layout == "otto":
                rows.append({"session": int(user), "events": [{"aid": int(item), "ts": int(time), "type": "clicks"}]})
            else:
                rows.append(dict(zip(READ[layout], (user, item, time))) | {"text": "it's"})
        text = "".join(f"{row!r}\n" if layout == "steam" else json.dumps(row) + "\n" for row in rows)
        return path.write_text(text)
    separator = next(mark for mark in ("::", ";", ",") if mark in columns)
    names = columns.split(separator)
    separator = "\t" if LAYOUTS[layout].format in ("tsv", "impressions") else separator
    rows = []
    for user, item, time in events:
        numbers = dict(zip(READ[layout], (user, item, time)))
        rows.append(
            [written(layout, name, numbers[name]) if name in numbers else other(layout, name) for name in names]
        )
        if layout == "mind":
            rows[-1][4] = f"N999-0 {rows[-1][4]}-1 N998-0"
    if LAYOUTS[layout].format == "parquet":
        return (
            pl.DataFrame(rows, names, orient="row")
            .with_columns(pl.exclude("event_type").cast(int))
            .write_parquet(path)
        )
    buffer = io.StringIO()
    if len(separator) == 1:
        csv.writer(buffer, delimiter=separator, lineterminator="\n").writerows(rows)
    else:
        buffer.write("".join(separator.join(row) + "\n" for row in rows))
    has_header = not LAYOUTS[layout].options.get("columns") and layout not in (
        "mind",
        "amazon-2014",
        "amazon-2018",
        "ml-10m",
    )
    path.write_text((columns + "\n" if has_header else "") + buffer.getvalue())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_read_as_plain_python_reads_it(tmp_path, layout):
    assert LAYOUTS[layout].source.startswith("http") and READ[layout]
    rng = np.random.default_rng(len(layout))
    events = [(int(u), int(i), int(t)) for u, i, t in zip(*rng.integers(1, 9, (3, 60)))]
    path = tmp_path / f"log.{ {'parquet': 'parquet', 'ml-1m': 'dat'}.get(LAYOUTS[layout].format, 'csv') }"
    write(layout, events, path)
    timed = READ[layout][2] is not None
    expected: dict[str, list] = {}
    for user, item, time in sorted(events, key=lambda event: event[2] if timed else 0):
        expected.setdefault(str(user), []).append(item)
    for format in (layout, None) if LAYOUTS[layout].pattern or LAYOUTS[layout].format != "impressions" else (layout,):
        dataset, tokenizer = build_sequences(path, format=format)
        found = {}
        for row in dataset:
            key = (
                str(row["user_id"]).lstrip("AU0")
                if not str(row["user_id"]).startswith("user_")
                else str(int(row["user_id"][5:]))
            )
            items = map(str, tokenizer.decode_items(row["input_ids"]))
            found[key] = [int(item.strip("NThe s")) for item in items]
            if timed:
                assert row["timestamps"] == sorted(row["timestamps"])
        assert found == expected
        assert ("timestamps" in dataset.column_names) == timed


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.pattern])
def test_a_layout_with_a_pattern_is_recognized(tmp_path, layout):
    write(layout, [(1, 2, 3), (4, 5, 6)], tmp_path / "log.txt")
    assert open_log(tmp_path / "log.txt").format == layout


def test_every_known_set_is_read_by_a_format():
    assert len(known_sets.KNOWN) >= 30
    for name, known in known_sets.KNOWN.items():
        assert known.url.startswith("http") and known.license and known.format in FORMATS, name
        assert known.download or known.md5 is None


def test_a_set_that_may_not_be_downloaded_names_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOSSOMREC_CACHE", str(tmp_path))
    folder = tmp_path / "taobao"
    with pytest.raises(FileNotFoundError, match=f"get UserBehavior.csv from https://.* and put it into {folder}"):
        build_sequences("taobao")
    folder.mkdir()
    write("taobao", [(1, 2, 3), (1, 5, 6)], folder / "UserBehavior.csv")
    dataset, tokenizer = build_sequences("taobao")
    assert tokenizer.decode_items(dataset["input_ids"][0]) == [2, 5]
