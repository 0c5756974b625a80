"""Item-id sequences from a log of events, in bounded memory."""

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from datasets import Dataset
from tqdm import tqdm

from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_folder, make_scratch
from . import partitions
from .filters import FilterReport
from .ingest import Interactions, ingest
from .metadata import ItemTable, write_item_metadata
from .options import EventOptions, FilterOptions, ItemOptions, LogOptions, parse_options
from .readers import Log, open_log
from .rows import EventColumns, user_rows
from .storage import check_output_dir, load_folder, to_dataset, write_dataset


logger = logging.getLogger(__name__)


def build_sequences(
    source: Any,
    *,
    tokenizer: BlossomRecTokenizer | None = None,
    items: Any = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    partition_rows: int = partitions.PARTITION_ROWS,
    **options: Any,
) -> tuple[Dataset, BlossomRecTokenizer]:
    """
    Builds item-id sequences, one row per user, from a log of events.

    The events of a user are ordered by time. **Events with the same time stay in file order**, and so does a log without
    times. Filters apply in this order: `min_rating`, `event_types`, `collapse_repeats`, `deduplicate`, `k_core`,
    `min_history`, `max_history`. Items are numbered by descending frequency. Users, and items of equal frequency, are in the order of their first event in the
    log.

    The log is read once, in batches, and stored on disk as codes. Memory is bounded by `partition_rows` and by the
    numbers of users and items, not by the length of the log.

    Args:
        source: a path, a folder, a glob pattern, the name of a public data set, a Polars or pandas frame, or a `Dataset`;
            see [`~data.readers.open_log`]. If it is a mapping of `train`, `validation` and `test` to one of these each, this is
            the split; a user's events are in the order of the parts.
        tokenizer ([`BlossomRecTokenizer`], *optional*): an existing vocabulary to encode with; items that it lacks become
            `[UNK]`. By default, a vocabulary of the log's items is made.
        items (*optional*): a file or frame of item titles and features; see [`~data.metadata.item_metadata`]. By default,
            the one that comes with a public data set, or the `.item` file next to an `.inter` file of RecBole if it has titles.
        output_dir (`str` or `Path`, *optional*): folder for the Dataset, the tokenizer, `items.parquet` and
            `filters.json`. It is written completely or not at all. By default, the Dataset is in memory.
        overwrite (`bool`): replace an existing `output_dir`.
        partition_rows (`int`): number of events in memory at once.
        options: fields of [`~data.options.LogOptions`] (`user`, `item`, `timestamp`, `format`, …),
            [`~data.options.EventOptions`] (`event_types`, `targets`, `session_gap`, …), [`~data.options.FilterOptions`]
            (`k_core`, `min_history`, …) and [`~data.options.ItemOptions`] (`item_categories`, …).

    Returns:
        (`Dataset`, [`BlossomRecTokenizer`]). The columns are

        - `user_id` (int64 or string) and `input_ids` (list of int32);
        - `timestamps` (list of int64, in seconds, rounded down) if the log has times; dates are seconds since 1970;
        - `event_type_ids` (list of `ClassLabel`) with `event_type`; `weights` (list of float32, 0 for an event that is read
          and not predicted) with `targets`, `type_weights` or `weight`; `session_starts` (list of bool) with
          `session_gap`; `basket_starts` (list of bool) with `group`;
        - `train_end`, `validation_end`, `test_end` (int32), the ends of
          [leave-one-out][`~blossomrec_hf.data.split_by_leave_one_out`] or of the given split.

    Raises:
        ValueError: if an option has a value that it cannot have, the log cannot be read (see
            [`~data.readers.open_log`]), a row cannot be read, or a filter drops every event.
        FileExistsError: if `output_dir` exists and `overwrite` is not set.
        OSError: if a file cannot be read to its end, or the disk is full.
    """
    reading, events, filters, features = parse_options(options, LogOptions, EventOptions, FilterOptions, ItemOptions)
    output_dir = None if output_dir is None else Path(output_dir)
    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite)
    log = open_log(source, reading)
    _check_columns(log, events, filters)
    table = open_items(log.titles if items is None else items, features, reading.item)
    report = FilterReport(log.name, log.format, license=log.license)
    report.note(log.notes)
    with _scratch_folder(output_dir) as scratch:
        interactions = ingest(log, scratch, filters, events)
        _report_ingest(interactions, filters, events, tokenizer, report)
        columns = EventColumns(events, interactions.time_unit, interactions.types.names())
        parts = _select(interactions, filters, events, partition_rows, report)
        tokenizer, vocabulary = _number_items(interactions, parts, tokenizer, report)
        metadata = None if table is None else table.align(tokenizer)
        report.note([] if metadata is None else table.notes(metadata))
        rows = user_rows(parts, interactions.users.ids(), vocabulary, columns, report)
        if output_dir is None:
            return to_dataset(rows, report), tokenizer
        with atomic_folder(output_dir) as folder:
            write_dataset(folder, rows, report)
            tokenizer.save_pretrained(folder)
            write_item_metadata(folder, metadata)
            report.measure_repeats(Dataset.load_from_disk(str(folder)))
            report.save(folder)
    return load_folder(output_dir), tokenizer


def open_items(items: Any, features: ItemOptions, item: str | None) -> ItemTable | None:
    """
    The item table, if there is one. `item` is the log's column of item ids, see [`~data.metadata.item_metadata`].

    Raises:
        FileNotFoundError: if its file does not exist.
        ValueError: if it cannot be read, or features are chosen without a table.
    """
    if isinstance(items, (str, Path)) and not Path(items).is_file():
        raise FileNotFoundError(f"items {str(items)!r} is no file; give the path of one, or a frame.")
    if items is None and any(features.columns.values()):
        names = ", ".join(f"{option} {list(columns)}" for option, columns in features.columns.items() if columns)
        raise ValueError(
            f"{names} are columns of an item table, but none is given; give its file with items=… (--items)."
        )
    return None if items is None else ItemTable(items, features, item=item)


def _check_columns(log: Log, events: EventOptions, filters: FilterOptions) -> None:
    """
    Checks that the log has the columns that the options need.

    Raises:
        ValueError: if it does not.
    """
    if filters.min_rating is not None:
        log.require("rating", f"min_rating is {filters.min_rating}")
    if events.needs_types is not None:
        log.require("event_type", f"{events.needs_types} is {getattr(events, events.needs_types)}")
    for role in ("event_type", "weight"):
        if getattr(log.options, role) is not None:
            log.require(role, f"{role} is {getattr(log.options, role)}")
    if events.needs_times is not None and not log.has_timestamp:
        name = events.needs_times
        raise ValueError(
            f"{name} is {getattr(events, name)}, but the log is read without times; name their column with timestamp=…"
        )


def _report_ingest(
    interactions: Interactions,
    filters: FilterOptions,
    events: EventOptions,
    tokenizer: BlossomRecTokenizer | None,
    report: FilterReport,
) -> None:
    """Reports what was read, and merges ids that are written both as integers and as floats."""
    report.time_unit = interactions.time_unit
    report.read(interactions.rows + interactions.dropped, interactions.bad.reasons)
    known_items = tokenizer.get_vocab() if tokenizer is not None and tokenizer.item_type == "str" else ()
    report.note(interactions.read_floats_as_integers(known_items))
    if name := row_filters(filters, events):
        report.add(name, interactions.rows, interactions.users.size, interactions.items.size)


def row_filters(filters: FilterOptions, events: EventOptions) -> str:
    """The name of the filters that apply to rows as they are read, for the report."""
    names = [] if filters.min_rating is None else [f"rating >= {filters.min_rating:g}"]
    return " and ".join(
        [*names, *([] if events.type_list is None else [f"event types {', '.join(events.type_list)}"])]
    )


def _select(
    interactions: Interactions,
    filters: FilterOptions,
    events: EventOptions,
    partition_rows: int,
    report: FilterReport,
) -> list[partitions.Partition]:
    """Orders the events by user and time, and applies the filters."""
    num_users, num_items = interactions.users.size, interactions.items.size
    parts = partitions.partition(interactions, partition_rows)
    for part in tqdm(parts, "sort", disable=None):
        partitions.sort(part)
        if events.collapse_repeats:
            partitions.collapse_repeats(part)
    if events.collapse_repeats:
        report.add("collapse repeats", *_totals(parts, num_items))
    if filters.deduplicate != "none":
        for part in parts:
            partitions.deduplicate(part, filters.deduplicate)
        report.add(f"deduplicate, {filters.deduplicate} stays", *_totals(parts, num_items))
    if filters.k_core != [1, 1]:
        user_core, item_core = filters.k_core
        bar = tqdm(desc="k-core rounds", disable=None)
        partitions.k_core(parts, num_users, num_items, user_core, item_core, lambda _: bar.update())
        report.add(f"k-core {user_core}, {item_core}", *_totals(parts, num_items))
    if filters.min_history > 1 or filters.max_history is not None:
        for part in parts:
            partitions.bound_histories(part, filters.min_history, filters.max_history)
        report.add(f"history {filters.min_history} to {filters.max_history or 'any'}", *_totals(parts, num_items))
    return parts


def _totals(parts: list[partitions.Partition], num_items: int) -> tuple[int, int, int]:
    users, items = partitions.count(parts, num_items)
    return int(items.sum()), users, int(np.count_nonzero(items))


def _number_items(
    interactions: Interactions,
    parts: list[partitions.Partition],
    tokenizer: BlossomRecTokenizer | None,
    report: FilterReport,
) -> tuple[BlossomRecTokenizer, np.ndarray]:
    """The vocabulary, made or given, and the vocabulary id of each item code (int32 [items])."""
    users, counts = partitions.count(parts, interactions.items.size)
    report.add("all filters", counts.sum(), users, np.count_nonzero(counts))
    item_ids = interactions.items.ids()
    if tokenizer is not None:
        return tokenizer, _known_vocabulary(item_ids, tokenizer)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    vocabulary = np.zeros(counts.size, np.int32)
    vocabulary[order] = np.arange(NUM_SPECIAL_IDS, NUM_SPECIAL_IDS + order.size, dtype=np.int32)
    item_type = "int" if item_ids.dtype.is_integer() else "str"
    return BlossomRecTokenizer.from_items(item_ids[order].to_list(), item_type=item_type), vocabulary


def _known_vocabulary(item_ids: pl.Series, tokenizer: BlossomRecTokenizer) -> np.ndarray:
    """int32 [items]: the vocabulary ids of raw ids in `tokenizer`, `[UNK]` for items that it lacks."""
    if tokenizer.item_type == "int" and item_ids.dtype == pl.String:
        texts = item_ids.str.replace(r"\.0+$", "")
        numbers = texts.cast(pl.Int64, strict=False)
        item_ids = numbers.set((numbers.cast(pl.String) != texts).fill_null(False), None)  # "007" is not 7
    ids = item_ids.cast(pl.Int64 if tokenizer.item_type == "int" else pl.String)
    vocabulary = np.full(len(ids), tokenizer.unk_token_id, np.int32)
    vocabulary[ids.is_not_null().to_numpy()] = tokenizer.encode_items(ids.drop_nulls().to_list())
    unknown = int((vocabulary == tokenizer.unk_token_id).sum())
    if unknown:
        logger.warning("%d of %d items of the log are not in the tokenizer's vocabulary: [UNK]", unknown, len(ids))
    return vocabulary


@contextmanager
def _scratch_folder(output_dir: Path | None) -> Iterator[Path]:
    """
    Yields a folder for intermediate files and removes it at the end of the block.

    Raises:
        OSError: if the disk is full, with a sentence on where and how much is needed.
    """
    scratch = make_scratch(output_dir)
    try:
        yield scratch
    except OSError as error:
        # numpy reports a write that the disk cut short with these words and without a number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "requested and" in str(error):
            free = shutil.disk_usage(scratch.parent).free / 2**30
            raise OSError(
                errno.ENOSPC,
                f"no room to write under {scratch.parent} ({error}; {free:.1f} GiB free); a build needs about three times "
                "the size of its result. Nothing is left behind.",
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
