"""Public data sets by name: downloaded from their publisher once, checked, and stored in a cache."""

import hashlib
import logging
import os
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from ..utils.files import atomic_write
from .formats import FORMATS
from .layouts import LAYOUTS
from .options import LogOptions
from .text_files import BadRows, LogFile, read_blocks


logger = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_DAMAGED = (ValueError, OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class KnownSet:
    """
    A public data set.

    Args:
        url (`str`): the file to download, or, with `download=False`, the page to get it from.
        log (`str`): the log's file, or a glob pattern of several, in the unpacked folder.
        format (`str`): its format, one of [`~data.formats.FORMATS`].
        license (`str`): terms of use.
        page (`str`): the page that describes its columns.
        md5 (`str`, *optional*): the checksum that the publisher states. Without one, the checksum of the first download is
            stored, and later downloads are compared with it.
        titles (`str`, *optional*): the file of item titles in the unpacked folder.
        download (`bool`): whether the license permits this package to download it.
    """

    url: str
    log: str
    format: str
    license: str
    page: str
    md5: str | None = None
    titles: str | None = None
    download: bool = True


def _by_hand(log: str, format: str, license: str, url: str | None = None, titles: str | None = None) -> KnownSet:
    """A data set that users have to get themselves, by default from the page of its layout."""
    page = url or LAYOUTS[format].source
    return KnownSet(page, log, format, license, page, titles=titles, download=False)


def _movielens(name: str, folder: str, md5: str, log: str, format: str, titles: str, readme: str) -> KnownSet:
    """A MovieLens data set with its README, next to the archive."""
    log, titles, page = f"{folder}/{log}", f"{folder}/{titles}", f"{_GROUPLENS}{name}-README.{readme}"
    return KnownSet(f"{_GROUPLENS}{name}.zip", log, format, _GROUPLENS_LICENSE, page, md5, titles)


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_GROUPLENS_LICENSE = (
    "MovieLens, GroupLens Research: for research; redistribution and commercial use need permission. See its README; cite "
    "Harper and Konstan, doi:10.1145/2827872."
)
_SNAP = "https://snap.stanford.edu/data/"
_AMAZON = _SNAP + "amazon/productGraph/categoryFiles/"
_AMAZON_LICENSE = "Amazon reviews, J. McAuley, UCSD: for research; cite He and McAuley, doi:10.1145/2872427.2883037."

KNOWN = {
    "ml-100k": _movielens(
        "ml-100k", "ml-100k", "0e33842e24a9c977be4e0107933c0723", "u.data", "ml-100k", "u.item", "txt"
    ),
    "ml-1m": _movielens(
        "ml-1m", "ml-1m", "c4d9eecfca2ab87c1945afe126590906", "ratings.dat", "ml-1m", "movies.dat", "txt"
    ),
    "ml-10m": _movielens(
        "ml-10m", "ml-10M100K", "ce571fd55effeba0271552578f2648bd", "ratings.dat", "ml-10m", "movies.dat", "html"
    ),
    "ml-20m": _movielens(
        "ml-20m", "ml-20m", "cd245b17a1ae2cc31bb14903e1204af3", "ratings.csv", "csv", "movies.csv", "html"
    ),
    "ml-25m": _movielens(
        "ml-25m", "ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada", "ratings.csv", "csv", "movies.csv", "html"
    ),
    "ml-32m": _movielens(
        "ml-32m", "ml-32m", "d472be332d4daa821edc399621853b57", "ratings.csv", "csv", "movies.csv", "html"
    ),
    "ml-latest-small": _by_hand(  # its content changes, so that there is no checksum
        "ratings.csv", "ml-csv", _GROUPLENS_LICENSE, "https://grouplens.org/datasets/movielens/latest/", "movies.csv"
    ),
    "ml-latest": _by_hand(
        "ratings.csv", "ml-csv", _GROUPLENS_LICENSE, "https://grouplens.org/datasets/movielens/latest/", "movies.csv"
    ),
    "rees46": _by_hand("*.csv*", "rees46", "REES46 Marketing Platform; see its page."),
    "otto": _by_hand("*.jsonl", "otto", "CC BY 4.0, OTTO; see its page."),
    "mind-small": _by_hand("behaviors.tsv", "mind", "Microsoft Research License; see its page."),
    "mind-large": _by_hand("behaviors.tsv", "mind", "Microsoft Research License; see its page."),
    "h-and-m": _by_hand("transactions_train.csv", "h-and-m", "H&M Group, for the competition; see its page."),
    "yoochoose": _by_hand("yoochoose-clicks.dat", "yoochoose", "YOOCHOOSE; see its page."),
    "taobao": _by_hand("UserBehavior.csv", "taobao", "Alibaba, for research; see its page."),
    "diginetica": _by_hand("train-item-views.csv", "diginetica", "DIGINETICA; see its page."),
    "retailrocket": _by_hand("events.csv", "retailrocket", "CC BY-NC-SA 4.0, Retailrocket; see its page."),
    "tenrec": _by_hand("QB-video.csv", "tenrec", "CC BY-NC 4.0, Tencent; see its page."),
    "kuairand-pure": _by_hand("log_standard_*_pure.csv", "kuairand", "CC BY-SA 4.0; see its page.", "https://kuairand.com/"),
    "kuairand-1k": _by_hand("log_standard_*_1k.csv", "kuairand", "CC BY-SA 4.0; see its page.", "https://kuairand.com/"),
    "kuairand-27k": _by_hand("log_standard_*_27k*.csv", "kuairand", "CC BY-SA 4.0; see its page.", "https://kuairand.com/"),
    "kuairec": _by_hand("big_matrix.csv", "kuairec", "CC BY-SA 4.0; see its page."),
    "yambda-50m": _by_hand("multi_event.parquet", "yambda", "Apache-2.0, Yandex; see its page (flat/50m)."),
    "yambda-500m": _by_hand("multi_event.parquet", "yambda", "Apache-2.0, Yandex; see its page (flat/500m)."),
    "yambda-5b": _by_hand("multi_event.parquet", "yambda", "Apache-2.0, Yandex; see its page (flat/5b)."),
    "yelp": _by_hand("yelp_academic_dataset_review.json", "yelp", "Yelp Dataset Terms of Use; see its page."),
    "foursquare-nyc": _by_hand(
        "dataset_TSMC2014_NYC.txt", "foursquare", "For research; cite Yang et al., doi:10.1109/TSMC.2014.2327053.",
        LAYOUTS["foursquare-global"].source,
    ),
    "foursquare-tokyo": _by_hand(
        "dataset_TSMC2014_TKY.txt", "foursquare", "For research; cite Yang et al., doi:10.1109/TSMC.2014.2327053.",
        LAYOUTS["foursquare-global"].source,
    ),
    "foursquare-global": _by_hand(
        "dataset_TIST2015_Checkins.txt", "foursquare-global", "For research; see its page."
    ),
    "lastfm-1k": _by_hand(
        "userid-timestamp-artid-artname-traid-traname.tsv", "lastfm-1k", "Last.fm, for non-commercial use; see its page."
    ),
    "amazon-beauty": KnownSet(
        _AMAZON + "ratings_Beauty.csv", "ratings_Beauty.csv", "amazon-csv", _AMAZON_LICENSE, LAYOUTS["amazon-2014"].source
    ),
    "amazon-video-games": KnownSet(
        _AMAZON + "ratings_Video_Games.csv", "ratings_Video_Games.csv", "amazon-csv", _AMAZON_LICENSE,
        LAYOUTS["amazon-2014"].source,
    ),
    "gowalla": KnownSet(
        _SNAP + "loc-gowalla_totalCheckins.txt.gz", "loc-gowalla_totalCheckins.txt.gz", "gowalla",
        "Gowalla check-ins, SNAP, Stanford: for research; cite Cho, Myers and Leskovec, doi:10.1145/2020408.2020579.",
        _SNAP + "loc-Gowalla.html",
    ),
    "steam": KnownSet(
        "https://mcauleylab.ucsd.edu/public_datasets/data/steam/steam_reviews.json.gz", "steam_reviews.json.gz",
        "python-lines", "Steam reviews, J. McAuley, UCSD: for research; cite Kang and McAuley, doi:10.1109/ICDM.2018.00035.",
        LAYOUTS["steam"].source,
    ),
}  # fmt: skip


def cache_folder() -> Path:
    """`$BLOSSOMREC_CACHE`, or `~/.cache/blossomrec_hf`."""
    return Path(os.environ.get("BLOSSOMREC_CACHE", Path.home() / ".cache" / "blossomrec_hf"))


def fetch(name: str) -> Path:
    """
    The folder of a known set, which is downloaded, checked and unpacked the first time. The license is logged once.

    A download that is already in `$BLOSSOMREC_CACHE/<name>/` is used as it is.

    Raises:
        FileNotFoundError: if it cannot be downloaded; the message says where to put which file.
        ValueError: if its checksum is wrong or it is damaged; it is removed.
    """
    known = KNOWN[name]
    folder = cache_folder() / name
    if (folder / ".complete").is_file():
        return folder
    if not known.download:
        if not list(folder.glob(known.log)):
            raise FileNotFoundError(
                f"{name} is not downloaded by this package (license: {known.license.rstrip('.')}); get {known.log} from "
                f"{known.url} and put it into {folder}."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    download = folder / known.url.rsplit("/", 1)[-1]
    if not download.is_file():
        try:
            with atomic_write(download) as partial:
                _download(known.url, partial)
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            raise FileNotFoundError(
                f"{name} could not be fetched from {known.url} ({error}). Fetch it by other means, put it at {download}, and "
                "run this again."
            ) from error
    try:
        _check_digest(download, known.md5)
        if download.suffix == ".zip":
            with zipfile.ZipFile(download) as archive:
                for member in filter(None, (known.log, known.titles)):
                    archive.extract(member, folder)  # `.complete`, written last, says that all of it is here
        if known.md5 is None:
            _check_content(folder / known.log, known.format)
            _noted(download).write_text(_digest(download, "sha256"))
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine, such as a full disk
            raise
        for path in (download, *(folder / part for part in (known.log, known.titles) if part)):
            path.unlink(missing_ok=True)
        raise ValueError(
            f"{download} is damaged or another edition ({error}); it was removed. Run this again to fetch it from {known.url}, "
            "or put it there by hand."
        ) from error
    logger.warning("%s: %s", name, known.license)
    (folder / ".complete").touch()
    return folder


def _download(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(target, "wb") as file:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=target.stem, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if size and file.tell() != size:
            raise OSError(f"{file.tell()} of {size} bytes came")


def _noted(download: Path) -> Path:
    return download.with_name(download.name + ".sha256")


def _check_digest(download: Path, md5: str | None) -> None:
    """Compares with the publisher's checksum, or with that of the first download."""
    if md5 is None and not _noted(download).is_file():
        return
    found, wanted = (
        (_digest(download, "md5"), md5) if md5 else (_digest(download, "sha256"), _noted(download).read_text())
    )
    if found != wanted:
        raise ValueError(f"it has the checksum {found}, not {wanted}")


def _check_content(log: Path, format: str) -> None:
    """Reads a log without a known checksum: to its end if it is compressed, otherwise its first rows."""
    file = LogFile(str(log))
    next(
        FORMATS[format].open(file, FORMATS[format].complete(LogOptions()), []).read(("user", "item"), BadRows()), None
    )
    if file.compression:
        for _ in read_blocks(file):
            pass


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
