"""Item titles, for people to read: `item_metadata.parquet` beside a built Dataset and beside a checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from transformers.utils import cached_file

from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_write
from .event_table import METADATA_FILE
from .parts import reading
from .text_files import LogFile, read_blocks


logger = logging.getLogger(__name__)

_ITEM = ("item_id", "itemid", "movieid", "item", "parent_asin", "asin", "video_id", "business_id", "app_id", "id")
_TITLE = ("title", "movie_title", "name", "app_name", "item_name", "caption")


def item_metadata(source: Any, tokenizer: BlossomRecTokenizer) -> pl.DataFrame:
    """
    The titles of a vocabulary's items.

    Args:
        source: a Polars or pandas frame, or a file: MovieLens `movies.dat` (`::`) or `u.item` (`|`), RecBole `.item`,
            CSV, TSV, JSON lines or Parquet with a header. The columns of item id and title go by their usual names;
            other columns are kept as they are.
        tokenizer: whose items to keep.

    Returns:
        `polars.DataFrame`: `item` (the raw id), `title`, `input_id` (int32, the vocabulary id) and the other columns, in
        vocabulary order; items without a title have none here, either.

    Raises:
        `ValueError`: no column known to hold the item id or the title; a damaged file.
    """
    frame = source if isinstance(source, pl.DataFrame) else _read(source)
    plain = {name.lower().split(":")[0]: name for name in reversed(frame.columns)}
    item = next((plain[name] for name in _ITEM if name in plain), None)
    title = next((plain[name] for name in _TITLE if name in plain), None)
    if item is None or title is None:
        raise ValueError(
            f"titles has the columns {', '.join(map(repr, frame.columns))}; one has to be called {' or '.join(_ITEM)}, and "
            f"one {' or '.join(_TITLE)}."
        )
    frame = frame.rename({item: "item", title: "title"}).with_columns(
        pl.col("item").cast(pl.String).str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)
        if tokenizer.item_type == "int"
        else pl.col("item").cast(pl.String, strict=False)
    )
    frame = frame.filter(pl.col("item").is_not_null() & pl.col("title").is_not_null()).unique("item", keep="first")
    ids = pl.Series("input_id", tokenizer.encode_items(frame["item"].to_list()), pl.Int32)
    frame = frame.with_columns(ids).filter(pl.col("input_id") != tokenizer.unk_token_id).sort("input_id")
    logger.info("titles for %d of %d items", frame.height, tokenizer.num_items)
    return frame.select("item", "title", "input_id", pl.exclude("item", "title", "input_id"))


def _read(source: Any) -> pl.DataFrame:
    if not isinstance(source, (str, Path)):
        return pl.from_pandas(source)
    path = Path(source)
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    with reading(str(path)):
        if suffix == "parquet":
            return pl.read_parquet(path, glob=False)
        text = b"".join(read_blocks(LogFile(str(path))))
        if suffix in ("json", "jsonl", "ndjson"):
            return pl.read_ndjson(text, infer_schema_length=1000)
        if suffix == "dat" or path.name == "u.item":
            lines = pl.DataFrame({"line": text.decode().splitlines()})
            fields = pl.col("line").str.splitn("|" if path.name == "u.item" else "::", 3).struct
            return lines.select(fields.field("field_0").alias("item_id"), fields.field("field_1").alias("title"))
        separator = "," if suffix == "csv" else "\t"
        quote = '"' if separator == "," else None
        return pl.read_csv(text, separator=separator, quote_char=quote, infer_schema=False, encoding="utf8-lossy")


def write_item_metadata(folder: str | Path, metadata: pl.DataFrame | None) -> None:
    """Writes `item_metadata.parquet` to a folder, made if need be, where there is anything to write."""
    if metadata is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / METADATA_FILE) as partial:
            metadata.write_parquet(partial)


def read_item_metadata(folder: str | Path) -> pl.DataFrame | None:
    """The `item_metadata.parquet` of a folder, or of a repository of the Hub; `None` where it has none."""
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(folder, METADATA_FILE, **lenient)
    if path is None:
        return None
    with reading(str(path)):
        return pl.read_parquet(path, glob=False)


def join_item_metadata(parts: Sequence[pl.DataFrame | None]) -> pl.DataFrame | None:
    """Frames of [`item_metadata`] for one vocabulary as one; of an item in several of them, the first row stays."""
    known = [part for part in parts if part is not None]
    return pl.concat(known, how="diagonal_relaxed").unique("item", keep="first").sort("input_id") if known else None
