"""The published layouts of public logs: one table, whose entries are options of the general formats."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """
    The layout of a public log.

    Args:
        source (`str`): the page that publishes it and describes its columns.
        columns (`str`): the header line, or, for a file without one, the names of its columns in order.
        format (`str`): the general format that reads it, one of [`~data.formats.FORMATS`].
        options (`dict`): fields of [`~data.options.LogOptions`] for this layout; options that the user gives take precedence.
        pattern (`str`): a regular expression of every line, or of a header that the usual names would not read right. A
            file of such lines is recognized. Empty if the general format reads the file without options.
    """

    source: str
    columns: str
    format: str = "csv"
    options: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""


_KAGGLE = "https://www.kaggle.com/"
_ID = r"-?\d+"

LAYOUTS: dict[str, Layout] = {
    "rees46": Layout(
        _KAGGLE + "datasets/mkechinov/ecommerce-behavior-data-from-multi-category-store",
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session",
    ),
    "otto": Layout(
        "https://github.com/otto-de/recsys-dataset",
        '{"session": 1, "events": [{"aid": 1, "ts": 1661724000278, "type": "clicks"}]}',
        "jsonl",
        {"user": "session", "item": "aid", "timestamp": "ts"},
        r'\{"session":\s*\d+,\s*"events":\s*\[.*',
    ),
    "mind": Layout(
        "https://learn.microsoft.com/azure/open-datasets/dataset-microsoft-news",
        "impression_id,user_id,time,history,impressions",
        "impressions",
        {"time_format": "%m/%d/%Y %I:%M:%S %p"},
        r"\d+\tU\d+\t\d+/\d+/\d{4} \d+:\d\d:\d\d [AP]M\t[^\t]*\tN\d+(-[01])?( N\d+(-[01])?)*",
    ),
    "h-and-m": Layout(
        _KAGGLE + "competitions/h-and-m-personalized-fashion-recommendations/data",
        "t_dat,customer_id,article_id,price,sales_channel_id",
    ),
    "yoochoose": Layout(
        _KAGGLE + "datasets/chadgostopp/recsys-challenge-2015",
        "session_id,timestamp,item_id,category",
        options={"columns": "session_id,timestamp,item_id,category", "separator": ",", "user": "session_id"},
        pattern=r"\d+,\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z,\d+,\w*",
    ),
    "yoochoose-buys": Layout(
        _KAGGLE + "datasets/chadgostopp/recsys-challenge-2015",
        "session_id,timestamp,item_id,price,quantity",
        options={"columns": "session_id,timestamp,item_id,price,quantity", "separator": ",", "user": "session_id"},
        pattern=r"\d+,\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z,\d+,\d+,\d+",
    ),
    "taobao": Layout(
        "https://tianchi.aliyun.com/dataset/649",
        "user_id,item_id,category_id,behavior_type,timestamp",
        options={"columns": "user_id,item_id,category_id,behavior_type,timestamp", "separator": ","},
        pattern=rf"{_ID},{_ID},{_ID},(pv|buy|cart|fav),{_ID}",
    ),
    "diginetica": Layout(
        "https://competitions.codalab.org/competitions/11161",
        "sessionId;userId;itemId;timeframe;eventdate",
        options={"user": "sessionId", "item": "itemId", "timestamp": "timeframe", "separator": ";"},
        pattern=r"sessionId;userId;itemId;timeframe;eventdate",
    ),
    "retailrocket": Layout(
        _KAGGLE + "datasets/retailrocket/ecommerce-dataset", "timestamp,visitorid,event,itemid,transactionid"
    ),
    "tenrec": Layout(
        "https://github.com/yuangh-x/2022-NIPS-Tenrec",
        "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age",
    ),
    "kuairand": Layout(
        "https://github.com/chongminggao/KuaiRand",
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab",
        options={"timestamp": "time_ms"},
    ),
    "kuairec": Layout(
        "https://kuairec.com/",
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio",
        options={"timestamp": "timestamp"},
    ),
    "yambda": Layout(
        "https://huggingface.co/datasets/yandex/yambda",
        "uid,item_id,timestamp,is_organic,played_ratio_pct,track_length_seconds,event_type",
        "parquet",
    ),
    "amazon-2014": Layout(
        "https://jmcauley.ucsd.edu/data/amazon/", "user,item,rating,timestamp", "amazon-csv"
    ),
    "amazon-2018": Layout(
        "https://nijianmo.github.io/amazon/", "item,user,rating,timestamp", "amazon-csv"
    ),
    "amazon-json": Layout(
        "https://nijianmo.github.io/amazon/",
        '{"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1300000000}',
        "jsonl",
    ),
    "amazon-2023": Layout("https://amazon-reviews-2023.github.io/", "user_id,parent_asin,rating,timestamp"),
    "ml-10m": Layout(
        "https://files.grouplens.org/datasets/movielens/ml-10m-README.html", "UserID::MovieID::Rating::Timestamp", "ml-1m"
    ),
    "ml-csv": Layout(
        "https://files.grouplens.org/datasets/movielens/ml-25m-README.html", "userId,movieId,rating,timestamp"
    ),
    "steam": Layout(
        "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
        "{u'username': u'a', u'product_id': u'725280', u'date': u'2017-12-17'}",
        "python-lines",
    ),
    "yelp": Layout(
        "https://www.yelp.com/dataset/documentation/main",
        '{"review_id": "r", "user_id": "u", "business_id": "b", "stars": 4, "date": "2016-03-09 00:00:00"}',
        "jsonl",
    ),
    "foursquare-global": Layout(
        "https://sites.google.com/site/yangdingqi/home/foursquare-dataset",
        "user_id,venue_id,utc_time,timezone_offset",
        "tsv",
        {
            "columns": "user_id,venue_id,utc_time,timezone_offset",
            "separator": "\t",
            "time_format": "%a %b %d %H:%M:%S %z %Y",
        },
        r"\d+\t\w+\t\w{3} \w{3} \d\d \d\d:\d\d:\d\d [+-]\d{4} \d{4}\t-?\d+",
    ),
    "lastfm-1k": Layout(
        "http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html",
        "user_id,timestamp,artist_id,artist_name,track_id,track_name",
        "tsv",
        {
            "columns": "user_id,timestamp,artist_id,artist_name,track_id,track_name",
            "separator": "\t",
            "item": "artist_name",
            "timestamp": "timestamp",
        },
        r"user_\d{6}\t\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\t[^\t]*\t[^\t]*\t[^\t]*\t[^\t]*",
    ),
}  # fmt: skip
