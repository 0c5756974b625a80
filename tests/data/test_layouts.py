"""Every published layout: rows of its published columns are read as plain Python reads them, and public sets name theirs."""

import csv
import io
import json
import re

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

# layout: the header line or the names of the columns in order, as the page that it names publishes them
PUBLISHED = {
    "rees46": (
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session",
        "https://www.kaggle.com/datasets/mkechinov/ecommerce-behavior-data-from-multi-category-store",
    ),
    "otto": ("session events(aid ts type)", "https://github.com/otto-de/recsys-dataset#data-format"),
    "mind": (
        "impression_id,user_id,time,history,impressions",
        "https://learn.microsoft.com/azure/open-datasets/dataset-microsoft-news",
    ),
    "h-and-m": (
        "t_dat,customer_id,article_id,price,sales_channel_id",
        "https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations/data",
    ),
    "yoochoose": ("session_id,timestamp,item_id,category", "https://www.kaggle.com/datasets/chadgostopp/recsys-challenge-2015"),
    "yoochoose-buys": (
        "session_id,timestamp,item_id,price,quantity",
        "https://www.kaggle.com/datasets/chadgostopp/recsys-challenge-2015",
    ),
    "taobao": ("user_id,item_id,category_id,behavior_type,timestamp", "https://tianchi.aliyun.com/dataset/649"),
    "diginetica": (
        "sessionId;userId;itemId;timeframe;eventdate", "https://competitions.codalab.org/competitions/11161"
    ),
    "retailrocket": (
        "timestamp,visitorid,event,itemid,transactionid", "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset"
    ),
    "tenrec": (
        "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age",
        "https://github.com/yuangh-x/2022-NIPS-Tenrec",
    ),
    "kuairand": (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab",
        "https://github.com/chongminggao/KuaiRand#data-descriptions",
    ),
    "kuairec": ("user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio", "https://kuairec.com/"),
    "yambda": (
        "uid,item_id,timestamp,is_organic,played_ratio_pct,track_length_seconds,event_type",
        "https://huggingface.co/datasets/yandex/yambda",
    ),
    "amazon-2014": ("user,item,rating,timestamp", "https://jmcauley.ucsd.edu/data/amazon/"),
    "amazon-2018": ("item,user,rating,timestamp", "https://nijianmo.github.io/amazon/"),
    "amazon-json": ("reviewerID asin overall unixReviewTime", "https://nijianmo.github.io/amazon/"),
    "amazon-2023": ("user_id,parent_asin,rating,timestamp", "https://amazon-reviews-2023.github.io/"),
    "ml-10m": (
        "UserID::MovieID::Rating::Timestamp", "https://files.grouplens.org/datasets/movielens/ml-10m-README.html"
    ),
    "ml-csv": (
        "userId,movieId,rating,timestamp", "https://files.grouplens.org/datasets/movielens/ml-25m-README.html"
    ),
    "steam": ("username product_id date", "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data"),
    "yelp": ("review_id user_id business_id stars date", "https://www.yelp.com/dataset/documentation/main"),
    "foursquare-global": (
        "user_id,venue_id,utc_time,timezone_offset", "https://sites.google.com/site/yangdingqi/home/foursquare-dataset"
    ),
    "lastfm-1k": (
        "user_id,timestamp,artist_id,artist_name,track_id,track_name",
        "http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
    ),
}  # fmt: skip

# Lines as published: the layout, the lines, and their users, items and seconds.
_AMAZON = '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J. McDonald", "helpful": [2, 3], '
_YELP = '{"review_id": "zdSx_SD6obEhz9VrW9uAWA", "user_id": "Ha3iJu77CxlrFm-vQRs_8g", "business_id": '
LINES = [
    ("otto", [
        '{"session": 42, "events": [{ "aid": 0, "ts": 1661200010000, "type": "clicks" }, { "aid": 2, "ts": 1661200040000, '
        '"type": "carts"  }, { "aid": 3, "ts": 1661200080000, "type": "orders" }]}'
    ], [(42, 0, 1661200010), (42, 2, 1661200040), (42, 3, 1661200080)]),
    ("taobao", ["1,2268318,2520377,pv,1511544070", "1,2333346,2520771,pv,1511561733"],
        [(1, 2268318, 1511544070), (1, 2333346, 1511561733)]),
    ("retailrocket", [PUBLISHED["retailrocket"][0], "1433221332117,257597,view,355908,", "1433224214164,992329,view,248676,"],
        [(257597, 355908, 1433221332), (992329, 248676, 1433224214)]),
    ("kuairand", [PUBLISHED["kuairand"][0], "17387,1123453,20220421,400,1650485801301,1,0,0,0,0,0,1,151024,104400,0,0,0,0,1"],
        [(17387, 1123453, 1650485801)]),
    ("kuairec", [
        PUBLISHED["kuairec"][0], "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.2733965215790926"
    ], [(0, 3649, 1593878903)]),
    ("h-and-m", [
        PUBLISHED["h-and-m"][0],
        "2018-09-20,000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091e318,0663713001,0.050830508474576264,2",
    ], [("000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091e318", "0663713001", 1537401600)]),
    ("amazon-2014", ["AGY6K0DDK7KV1,B00LIBEPDS,5.0,1405900800", "AQ9PX85HXR9PU,B00LIBEPDS,5.0,1405468800"],
        [("AGY6K0DDK7KV1", "B00LIBEPDS", 1405900800), ("AQ9PX85HXR9PU", "B00LIBEPDS", 1405468800)]),
    ("amazon-json", [
        _AMAZON + '"reviewText": "Great purchase though!", "overall": 5.0, "summary": "Heavenly Highway Hymns", '
        '"unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"}'
    ], [("A2SUAM1J3GNN3B", "0000013714", 1252800000)]),
    ("ml-10m", ["1::1193::5::978300760"], [(1, 1193, 978300760)]),
    ("yelp", [_YELP + '"tnhfDv5Il8EaGSXZGiuQGg", "stars": 4, "date": "2016-03-09", "text": "Great place"}'],
        [("Ha3iJu77CxlrFm-vQRs_8g", "tnhfDv5Il8EaGSXZGiuQGg", 1457481600)]),
    ("yoochoose", ["1,2014-04-07T10:51:09.277Z,214536502,0"], [(1, 214536502, 1396867869)]),
    ("lastfm-1k", ["user_000001\t2009-05-04T23:08:57Z\tmbid-1\tDeerhunter\tmbid-2\tNothing Ever Happened"],
        [("user_000001", "Deerhunter", 1241478537)]),
]  # fmt: skip


@pytest.mark.parametrize("layout, lines, events", LINES, ids=[layout for layout, *_ in LINES])
def test_published_lines_are_read(tmp_path, layout, lines, events):
    path = tmp_path / ("ratings.dat" if layout == "ml-10m" else "log.txt")
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    dataset, tokenizer = build_sequences(path, format=layout)
    found = []
    for row in dataset:
        for item, second in zip(tokenizer.decode_items(row["input_ids"]), row["timestamps"]):
            found.append((row["user_id"], item, second))
    assert found == events


def test_every_layout_is_as_published():
    """The columns of the layout are those that its page names."""
    assert PUBLISHED.keys() == LAYOUTS.keys() == READ.keys()
    for name, (columns, page) in PUBLISHED.items():
        layout = LAYOUTS[name]
        assert page.split("#")[0].rstrip("/") == layout.source.split("#")[0].rstrip("/"), name
        if layout.columns.startswith("{"):
            assert set(re.findall(r"\'?\"?(\w+)\'?\"?: ", layout.columns)) == set(re.findall(r"\w+", columns)), name
        else:
            assert layout.columns == columns, name


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
        assert known.page.startswith("http"), name
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
