"""The item table, titles and features: `items.parquet` next to a prepared data set and next to a checkpoint."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from transformers.utils import cached_file

from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_write
from .event_table import METADATA_FILE
from .intervals import are_intervals, interval_name, interval_ranks
from .lines import find_separator
from .options import ItemOptions, LogOptions
from .parts import reading
from .text_files import LogFile, read_blocks
from .text_vectors import as_texts, load_text_model, text_vectors
from .times import as_numbers


logger = logging.getLogger(__name__)

_ITEM = ("item_id", "itemid", "movieid", "item", "parent_asin", "asin", "video_id", "business_id", "app_id", "id")
_RESERVED = ("item", "title", "input_id")
_TITLE = ("title", "movie_title", "name", "app_name", "item_name", "caption")
_YEAR = r"\((\d{4})\)\s*$"  # of "Toy Story (1995)"


def item_metadata(
    source: Any, tokenizer: BlossomRecTokenizer, options: ItemOptions = ItemOptions(), *, item: str | None = None
) -> pl.DataFrame:
    """
    The item table of a vocabulary: titles and features.

    Args:
        source: a Polars or pandas frame, or a file: MovieLens `movies.dat` (`::`) or `u.item` (`|`), RecBole `.item`,
            CSV, TSV, JSON lines or Parquet with a header. The columns of item ids and titles go by their usual names.
        tokenizer: the vocabulary.
        options ([`ItemOptions`]): which columns are features. If there is no column `year`, it is the year and the decade of
            titles such as "Toy Story (1995)".
        item: name of the log's column of item ids, which is read if the table has it, too. Otherwise, and by default, the
            column goes by a usual name.

    Returns:
        `polars.DataFrame` in vocabulary order: `item` (the raw id), `title`, `input_id` (int32, the vocabulary id) and the other
        columns. Without features, it has the items with titles. With features, it has a row for every item of the
        vocabulary: categories are lists of an `Enum` whose names are in descending frequency, numbers are lists of one
        interval, an `Enum` in ascending order, and vectors are arrays of float32; missing ones are null. The vectors of the
        texts of a column NAME are in the column NAME_vector.

    Raises:
        ValueError: if no column is known to be the item id or the title, a feature is no column, vectors have
            different lengths, the text model cannot be loaded, or the file is damaged.
    """
    return ItemTable(source, options, item=item).align(tokenizer)


class ItemTable:
    """
    An item table that is read and checked before the vocabulary is known.

    Args:
        source, options, item: see [`item_metadata`].

    Raises:
        ValueError: see [`item_metadata`].
    """

    def __init__(self, source: Any, options: ItemOptions, *, item: str | None = None) -> None:
        frame = source if isinstance(source, pl.DataFrame) else _read(source)
        columns, kinds = frame.columns, options.columns
        chosen = [name for names in kinds.values() for name in names]
        plain = {name.lower().split(":")[0]: name for name in reversed(columns)}
        named_item = [] if item is None else [item.lower().split(":")[0]]
        item = next((plain[name] for name in (*named_item, *_ITEM) if name in plain), None)
        title = next((plain[name] for name in _TITLE if name in plain), None)
        if item is None:
            raise ValueError(
                f"items has the columns {', '.join(map(repr, columns))}; the one of item ids has to be called as in the log "
                f"(item=…), or {' or '.join(_ITEM)}."
            )
        if title is None and not chosen:
            raise ValueError(
                f"items has the columns {', '.join(map(repr, columns))}; the one of titles has to be called "
                f"{' or '.join(_TITLE)}, unless features are chosen."
            )
        if "year" in chosen and "year" not in plain and title is not None:
            frame, columns = _add_year(frame, title), [*columns, "year"]
        # RecBole's "genre:token_seq" is the column genre.
        named = {name: name if name in columns else plain.get(name.lower(), name) for name in chosen}
        if missing := [name for name, column in named.items() if column not in columns]:
            raise ValueError(f"{missing[0]!r} is no column of items; it has {', '.join(map(repr, columns))}.")
        lists = [column for name in kinds["categories"] if (column := named[name]) != title]
        frame = frame.with_columns(_split_tokens(frame[column]) for column in lists)
        texts = {_vector_name(name): as_texts(frame[named[name]]) for name in kinds["texts"]}
        if taken := [name for name in texts if name in columns]:
            raise ValueError(f"items has a column {taken[0]!r} already, the name of a text's vectors; rename it.")
        features = {named[name]: name for kind, names in kinds.items() if kind != "texts" for name in names}
        names = {column: name for name, column in named.items()} | {item: "item"}
        names |= {title: "title"} if title is not None and title not in features else {}
        others = [name for name in columns if name in names or name not in _RESERVED]
        frame = frame.select(pl.col(name).alias(names.get(name, name)) for name in others)
        if "title" not in frame.columns:
            frame = frame.with_columns(title=pl.lit(None, pl.String) if title is None else pl.col(features[title]))
        self.frame, self.options, self.has_features = frame.with_columns(**texts), options, bool(chosen)
        self.is_stored = "input_id" in columns  # an `items.parquet`, whose features were chosen before
        self.text_model = load_text_model(options.text_model) if texts else None

    def align(self, tokenizer: BlossomRecTokenizer) -> pl.DataFrame:
        """The table in the order of a vocabulary, see [`item_metadata`]."""
        raw = pl.col("item").cast(pl.String, strict=False)
        if tokenizer.item_type == "int":
            raw = raw.str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)
        described = pl.lit(self.has_features or self.is_stored) | pl.col("title").is_not_null()
        usable = pl.col("item").is_not_null() & described
        frame = self.frame.with_columns(item=raw).filter(usable).unique("item", keep="first")
        ids = pl.Series("input_id", tokenizer.encode_items(frame["item"].to_list()), pl.Int32)
        frame = frame.with_columns(ids).filter(pl.col("input_id") != tokenizer.unk_token_id).sort("input_id")
        logger.info("the item table has %d of %d items", frame.height, tokenizer.num_items)
        frame = frame.select(*_RESERVED, pl.exclude(_RESERVED))
        if not self.has_features:
            return frame
        first = len(tokenizer) - tokenizer.num_items
        every = pl.DataFrame({"input_id": pl.int_range(first, len(tokenizer), dtype=pl.Int32, eager=True)})
        every = every.with_columns(
            item=pl.Series(tokenizer.decode_items(every["input_id"].to_list()), dtype=frame["item"].dtype)
        )
        kinds = self.options.columns
        features = {name: convert(frame[name]) for kind, convert in _FEATURES.items() for name in kinds[kind]}
        for name in map(_vector_name, kinds["texts"]):
            features[name] = text_vectors(frame[name], self.text_model)
        aligned = every.join(
            frame.with_columns(**features).drop("item"), on="input_id", how="left", maintain_order="left"
        )
        return aligned.select(*_RESERVED, pl.exclude(_RESERVED))

    def notes(self, aligned: pl.DataFrame) -> list[str]:
        """Sentences on the features of the aligned table: the text model, the items that lack one, and numbers that are all alike."""
        kinds = self.options.columns
        stored = {name: name for kind in _FEATURES for name in kinds[kind]}
        stored |= {name: _vector_name(name) for name in kinds["texts"]}
        counts = {name: aligned[column].null_count() for name, column in stored.items()}
        sentences = [
            f"{count:,} of {aligned.height:,} items have no {name}" for name, count in counts.items() if count
        ]
        for name in kinds["numbers"]:
            found = aligned[name].drop_nulls().explode().unique().to_list()
            if len(found) == 1:
                sentences.append(
                    f"all numbers of {name} lie in the interval {found[0]}; item_categories=… keeps each number apart"
                )
        for name in kinds["texts"]:
            size = aligned.schema[stored[name]].size
            sentences.append(f"{stored[name]} has {size} numbers per item, of {name} by {self.options.text_model}")
        return sentences


def _add_year(frame: pl.DataFrame, title: str) -> pl.DataFrame:
    """A column `year` of the years in parentheses at the end of titles, and of their decades: `1995|1990s`."""
    year = pl.col(title).cast(pl.String).str.extract(_YEAR)
    frame = frame.with_columns(year=pl.concat_str(year, pl.lit("|"), year.str.head(3), pl.lit("0s")))
    if frame["year"].null_count() == frame.height:
        raise ValueError(
            "'year' is no column of items, and no title ends with a year, as in \"Toy Story (1995)\"; omit it, or add the column."
        )
    return frame


def _vector_name(text: str) -> str:
    return f"{text}_vector"


def _split_tokens(column: pl.Series) -> pl.Series:
    """A column of RecBole's kind `token_seq` as lists: the values of an item are separated by spaces, unless by |."""
    if (
        not column.name.endswith(":token_seq")
        or column.dtype != pl.String
        or column.str.contains("|", literal=True).any()
    ):
        return column
    return column.str.split(" ")


def as_categories(column: pl.Series) -> pl.Series:
    """One or several categories per item, as a list of an `Enum`; null without one."""
    if not isinstance(column.dtype, (pl.List, pl.Array)):
        column = column.cast(pl.String).str.split("|")
    lists = (
        column.cast(pl.List(pl.String))
        .to_frame("values")
        .select(
            pl.col("values").list.eval(pl.element().str.strip_chars().filter(pl.element().str.strip_chars() != ""))
        )["values"]
        .list.unique(maintain_order=True)
    )
    lists = lists.set(lists.list.len() == 0, None)
    counts = lists.explode().drop_nulls().value_counts(sort=False, name="count")
    names = counts.sort("count", counts.columns[0], descending=[True, False])[counts.columns[0]]
    return lists.cast(pl.List(pl.Enum(names))).alias(column.name)


def as_intervals(column: pl.Series) -> pl.Series:
    """Numbers as lists of one interval, of which there are two per power of 2; null for what is no finite number."""
    ranks = interval_ranks(as_numbers(column).cast(pl.Float64).to_numpy().astype(float))
    names = {rank: interval_name(rank) for rank in np.unique(ranks[np.isfinite(ranks)]).tolist()}
    texts = pl.Series(column.name, [names.get(rank) for rank in ranks.tolist()], pl.Enum(list(names.values())))
    return texts.to_frame("name").select(
        pl.when(pl.col("name").is_not_null()).then(pl.concat_list("name")).alias(column.name)
    )[column.name]


def category_reader(names: Sequence[str]) -> Callable[[pl.Series], pl.Series]:
    """The function that reads a column of which these categories are known: intervals of numbers, or categories."""
    return as_intervals if are_intervals(names) else as_categories


def as_vectors(column: pl.Series) -> pl.Series:
    """
    Vectors as arrays of float32; null for missing ones.

    Raises:
        ValueError: if they have different lengths, or values that are no numbers.
    """
    if not isinstance(column.dtype, (pl.List, pl.Array)):
        column = column.cast(pl.String).str.extract_all(r"[^\s,;|\[\]]+")
    lists = column.cast(pl.List(pl.Float32), strict=False)
    lists = lists.set(lists.list.len() == 0, None)
    lengths = lists.drop_nulls().list.len().unique().sort().to_list()
    if len(lengths) != 1:
        raise ValueError(
            f"{column.name} has vectors of {' and '.join(map(str, lengths[:5])) or 'no'} numbers; all need one length."
        )
    if not lists.drop_nulls().explode().is_finite().fill_null(False).all():
        raise ValueError(f"{column.name} has vectors with values that are no finite numbers; correct them.")
    return lists.cast(pl.Array(pl.Float32, lengths[0]))


_FEATURES = {"categories": as_categories, "numbers": as_intervals, "vectors": as_vectors}


def has_titles(path: Path) -> bool:
    """Whether the header of a RecBole `.item` file has columns of item ids and titles."""
    with open(path, encoding="utf-8", errors="replace") as file:
        names = {name.split(":")[0].strip().lower() for name in file.readline().split("\t")}
    return not names.isdisjoint(_ITEM) and not names.isdisjoint(_TITLE)


def _read(source: Any) -> pl.DataFrame:
    if not isinstance(source, (str, Path)):
        try:
            return pl.from_pandas(source)
        except TypeError as error:
            raise ValueError(
                f"items is a {type(source).__name__}; it may be a path, or a Polars or pandas frame."
            ) from error
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
            names = ["item_id", "title", *(["genres"] if suffix == "dat" else [])]
            return lines.select(fields.field(f"field_{place}").alias(name) for place, name in enumerate(names))
        header = text.split(b"\n", 1)[0].decode(errors="replace")
        separator = find_separator(header, LogOptions()) if suffix == "csv" else "\t"
        quote = None if separator == "\t" else '"'
        return pl.read_csv(text, separator=separator, quote_char=quote, infer_schema=False, encoding="utf8-lossy")


def write_item_metadata(folder: str | Path, metadata: pl.DataFrame | None) -> None:
    """Writes `items.parquet` to a folder, if there is an item table."""
    if metadata is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / METADATA_FILE) as partial:
            metadata.write_parquet(partial)


def read_item_metadata(folder: str | Path) -> pl.DataFrame | None:
    """The `items.parquet` of a folder, or of a repository of the Hub; `None` if it has none."""
    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(folder, METADATA_FILE, **lenient)
    if path is None:
        return None
    with reading(str(path)):
        return pl.read_parquet(path, glob=False)


def _is_feature(dtype: pl.DataType) -> bool:
    """Whether a column of an item table has categories or vectors for a model."""
    return isinstance(dtype, pl.Array) or (isinstance(dtype, pl.List) and isinstance(dtype.inner, pl.Enum))


def join_item_metadata(parts: Sequence[pl.DataFrame | None]) -> pl.DataFrame | None:
    """
    Merges frames of [`item_metadata`] for one vocabulary; of an item in several of them, the first row with a
    value stays. The categories of a column are those of the first frame, then those that the others add. A column that
    is a feature in one frame is read as one in the others, as from a new file of items.

    Raises:
        ValueError: if vectors of one name have different lengths.
    """
    known = [part for part in parts if part is not None]
    if not known:
        return None
    readers = {
        name: category_reader(dtype.inner.categories) if isinstance(dtype, pl.List) else as_vectors
        for part in known
        for name, dtype in part.schema.items()
        if _is_feature(dtype)
    }
    known = [
        part.with_columns(
            read(part[name]).alias(name)
            for name, read in readers.items()
            if name in part.columns and not _is_feature(part.schema[name])
        )
        for part in known
    ]
    names, widths = {}, {}
    for part in known:
        for column, dtype in part.schema.items():
            if isinstance(dtype, pl.List) and _is_feature(dtype):
                names.setdefault(column, {}).update(dict.fromkeys(dtype.inner.categories))
            if isinstance(dtype, pl.Array) and (width := widths.setdefault(column, dtype.size)) != dtype.size:
                raise ValueError(
                    f"{column} has vectors of {width} and {dtype.size} numbers in two item tables; all need one length."
                )
    described = pl.any_horizontal(pl.exclude("item", "input_id").is_not_null())
    texts = [
        part.filter(described).cast({name: pl.List(pl.String) for name in names if name in part.columns})
        for part in known
    ]
    joined = pl.concat(texts, how="diagonal_relaxed").unique("item", keep="first").sort("input_id")
    return joined.cast({column: pl.List(pl.Enum(list(values))) for column, values in names.items()})
