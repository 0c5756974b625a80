"""Public data sets by name: fetched from their publisher once, checked, and kept in a cache."""

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
from .options import LogOptions
from .text_files import BadRows, is_gzip, read_blocks


logger = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_DAMAGED = (ValueError, OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class KnownSet:
    """
    Where a set comes from and what its files are: `log` and `titles` name files in the unpacked folder. `md5` is the
    checksum that the publisher states; where none does, that of the first download is kept and compared from then on.
    """

    url: str
    log: str
    format: str
    licence: str
    md5: str | None = None
    titles: str | None = None


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_GROUPLENS_LICENCE = (
    "MovieLens, GroupLens Research: for research; redistribution and commercial use need permission. See its README; cite "
    "Harper and Konstan, doi:10.1145/2827872."
)
_SNAP = "https://snap.stanford.edu/data/"
_AMAZON = _SNAP + "amazon/productGraph/categoryFiles/"
_AMAZON_LICENCE = "Amazon reviews, J. McAuley, UCSD: for research; cite He and McAuley, doi:10.1145/2872427.2883037."

KNOWN = {
    "ml-100k": KnownSet(
        _GROUPLENS + "ml-100k.zip", "ml-100k/u.data", "ml-100k", _GROUPLENS_LICENCE,
        "0e33842e24a9c977be4e0107933c0723", "ml-100k/u.item",
    ),
    "ml-1m": KnownSet(
        _GROUPLENS + "ml-1m.zip", "ml-1m/ratings.dat", "ml-1m", _GROUPLENS_LICENCE,
        "c4d9eecfca2ab87c1945afe126590906", "ml-1m/movies.dat",
    ),
    "ml-20m": KnownSet(
        _GROUPLENS + "ml-20m.zip", "ml-20m/ratings.csv", "csv", _GROUPLENS_LICENCE,
        "cd245b17a1ae2cc31bb14903e1204af3", "ml-20m/movies.csv",
    ),
    "ml-32m": KnownSet(
        _GROUPLENS + "ml-32m.zip", "ml-32m/ratings.csv", "csv", _GROUPLENS_LICENCE,
        "d472be332d4daa821edc399621853b57", "ml-32m/movies.csv",
    ),
    "amazon-beauty": KnownSet(
        _AMAZON + "ratings_Beauty.csv", "ratings_Beauty.csv", "amazon-csv", _AMAZON_LICENCE
    ),
    "amazon-video-games": KnownSet(
        _AMAZON + "ratings_Video_Games.csv", "ratings_Video_Games.csv", "amazon-csv", _AMAZON_LICENCE
    ),
    "gowalla": KnownSet(
        _SNAP + "loc-gowalla_totalCheckins.txt.gz", "loc-gowalla_totalCheckins.txt.gz", "gowalla",
        "Gowalla check-ins, SNAP, Stanford: for research; cite Cho, Myers and Leskovec, doi:10.1145/2020408.2020579.",
    ),
    "steam": KnownSet(
        "https://mcauleylab.ucsd.edu/public_datasets/data/steam/steam_reviews.json.gz", "steam_reviews.json.gz",
        "python-lines", "Steam reviews, J. McAuley, UCSD: for research; cite Kang and McAuley, doi:10.1109/ICDM.2018.00035.",
    ),
}  # fmt: skip


def cache_folder() -> Path:
    """`$BLOSSOMREC_CACHE`, or `~/.cache/blossomrec_hf`."""
    return Path(os.environ.get("BLOSSOMREC_CACHE", Path.home() / ".cache" / "blossomrec_hf"))


def fetch(name: str) -> Path:
    """
    The folder that holds a known set; downloads, checks and unpacks it the first time. The licence is logged once, then.

    A download put by hand into `$BLOSSOMREC_CACHE/<name>/` is taken instead of fetching.

    Raises:
        `FileNotFoundError`: it is not there and can not be fetched; the message says where to put it.
        `ValueError`: a wrong checksum or a damaged file; it is not kept.
    """
    known = KNOWN[name]
    folder = cache_folder() / name
    if (folder / ".complete").is_file():
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
    logger.warning("%s: %s", name, known.licence)
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
    """Compares with the publisher's checksum, or with the one noted at the first download."""
    if md5 is None and not _noted(download).is_file():
        return
    found, wanted = (
        (_digest(download, "md5"), md5) if md5 else (_digest(download, "sha256"), _noted(download).read_text())
    )
    if found != wanted:
        raise ValueError(f"it has the checksum {found}, not {wanted}")


def _check_content(log: Path, format: str) -> None:
    """Reads a log without a known checksum: to its end if it is compressed, else its first rows."""
    next(FORMATS[format].open(log, LogOptions(), []).read(("user", "item"), BadRows()), None)
    if is_gzip(log):
        for _ in read_blocks(log):
            pass


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
