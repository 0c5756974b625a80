"""build_sequences: a log of interactions -> one row a user, on disk or in memory, in bounded memory."""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from datasets import Dataset
from tqdm import tqdm

from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_folder, make_scratch
from . import partitions
from .filters import FilterReport
from .ingest import ingest
from .metadata import item_metadata, write_item_metadata
from .readers import open_log
from .storage import check_output_dir, load_folder, to_dataset, user_rows, write_dataset


logger = logging.getLogger(__name__)

NUM_SPECIAL = 2  # [PAD] and [UNK] come before the items


def build_sequences(
    source: Any,
    *,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    rating: str | None = None,
    format: str | None = None,
    min_rating: float | None = None,
    deduplicate: Literal["none", "first", "last"] = "none",
    k_core: int | tuple[int, int] = 1,
    min_history: int = 1,
    max_history: int | None = None,
    on_bad_rows: Literal["fail", "skip"] = "fail",
    time_format: str | None = None,
    keep_na_ids: bool = False,
    tokenizer: BlossomRecTokenizer | None = None,
    titles: Any = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    partition_rows: int = partitions.PARTITION_ROWS,
) -> tuple[Dataset, BlossomRecTokenizer]:
    """
    Builds item-id sequences from a log of interactions.

    The steps, in this order: rows below `min_rating` go; of a user's repeats of an item the first or last in time stays
    (`deduplicate`); users and items with fewer than `k_core` interactions go, until all left have as many; users with
    fewer than `min_history` go; of each history the latest `max_history` stay; items are numbered by frequency. Events
    of a user are ordered by time; **ties stay in file order**, and so does a log without times. Users stand in the
    order in which the log first shows them, and so do items of equal frequency.

    The log is read once, in batches, and kept on disk as codes, so that memory is bounded by `partition_rows` and the
    number of users and items, not by the log.

    Args:
        source: a path, folder or glob, the name of a public set, a Polars or pandas frame, or a `Dataset`; see
            [`~data.readers.open_log`], which also takes `user`, `item`, `timestamp`, `rating`, `format`, `time_format` and
            `keep_na_ids`.
        min_rating (`float`, *optional*): rows with a lower rating are no interactions.
        deduplicate (`"none"`, `"first"` or `"last"`): which of a user's interactions with one item stays.
        k_core (`int` or `(int, int)`): least interactions a user and an item may have, as one number or (user, item).
        min_history, max_history (`int`): bounds on the events of a user.
        on_bad_rows (`"fail"` or `"skip"`): what to do at a row with too many or too few fields or without a usable user,
            item, rating or time.
        tokenizer ([`BlossomRecTokenizer`], *optional*): encode with this vocabulary (serving, a later log) instead of
            making one; items it lacks become `[UNK]`.
        titles (*optional*): a file or frame of item titles; see [`~data.metadata.item_metadata`].
        output_dir (`str` or `Path`, *optional*): where Dataset, tokenizer, `item_metadata.parquet` and
            `filters.json` go; without it nothing stays on disk. It appears complete or not at all.
        overwrite (`bool`): replace `output_dir` if it is there.
        partition_rows (`int`): interactions held in memory at once.

    Returns:
        (`Dataset`, `BlossomRecTokenizer`): a row a user with `user_id` (int64 or string), `input_ids` (list of int32),
        `timestamps` (list of int64, or float64 if the log has fractions; dates are microseconds since 1970), where
        known, and `train_end`, `validation_end`, `test_end` (int32), here those of leave-one-out: n − 2, n − 1 and n,
        never below 0.

    Raises:
        `ValueError`: see [`~data.readers.open_log`]; bad rows; a filter that leaves nothing.
        `FileExistsError`: `output_dir` is there, and `overwrite` is not given.
        `OSError`: a file that can not be read to its end, or no room on the disk.
    """
    user_core, item_core = (k_core, k_core) if isinstance(k_core, int) else k_core
    check_arguments(deduplicate, on_bad_rows, user_core, item_core, min_history, max_history)
    output_dir = None if output_dir is None else Path(output_dir)
    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite)
    if isinstance(titles, (str, Path)) and not Path(titles).is_file():
        raise FileNotFoundError(f"titles {str(titles)!r} is no file; give the path of one, or a frame.")
    log = open_log(
        source, format=format, user=user, item=item, timestamp=timestamp, rating=rating,
        time_format=time_format, keep_na_ids=keep_na_ids,
    )  # fmt: skip
    if min_rating is not None:
        log.require_rating(f"min_rating is {min_rating}")
    scratch = make_scratch(output_dir)
    try:
        report = FilterReport(log.name, log.format, licence=log.licence)
        report.note(log.notes)
        interactions = ingest(log, scratch, min_rating=min_rating, on_bad_rows=on_bad_rows)
        report.time_unit = interactions.time_unit
        report.read(interactions.rows + interactions.below_rating, interactions.bad.reasons)
        known_items = tokenizer.get_vocab() if tokenizer is not None and tokenizer.item_type == "str" else ()
        report.note(interactions.read_floats_as_integers(known_items))
        num_users, num_items = interactions.users.size, interactions.items.size
        if min_rating is not None:
            report.add(f"rating >= {min_rating:g}", interactions.rows, num_users, num_items)

        parts = partitions.partition(interactions, partition_rows)
        for part in tqdm(parts, "sort", disable=None):
            partitions.sort(part)
            if deduplicate != "none":
                partitions.deduplicate(part, deduplicate)
        if deduplicate != "none":
            report.add(f"deduplicate, {deduplicate} stays", *_totals(parts, num_items))
        if (user_core, item_core) != (1, 1):
            bar = tqdm(desc="k-core rounds", disable=None)
            partitions.k_core(parts, num_users, num_items, user_core, item_core, lambda _: bar.update())
            report.add(f"k-core {user_core}, {item_core}", *_totals(parts, num_items))
        if min_history > 1 or max_history is not None:
            for part in parts:
                partitions.bound_histories(part, min_history, max_history)
            report.add(f"history {min_history} to {max_history or 'any'}", *_totals(parts, num_items))
        users, counts = partitions.count(parts, num_items)
        report.add("kept", counts.sum(), users, np.count_nonzero(counts))

        item_ids = interactions.items.ids()
        if tokenizer is None:
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            vocabulary = np.zeros(num_items, np.int32)
            vocabulary[order] = np.arange(NUM_SPECIAL, NUM_SPECIAL + order.size, dtype=np.int32)
            item_type = "int" if item_ids.dtype.is_integer() else "str"
            tokenizer = BlossomRecTokenizer.from_items(item_ids[order].to_list(), item_type=item_type)
        else:
            vocabulary = _known_vocabulary(item_ids, tokenizer)
        titles = log.titles if titles is None else titles
        metadata = None if titles is None else item_metadata(titles, tokenizer)
        user_ids = interactions.users.ids()
        if output_dir is None:
            return to_dataset(user_rows(parts, user_ids, vocabulary), report), tokenizer
        with atomic_folder(output_dir) as built:
            write_dataset(built, user_rows(parts, user_ids, vocabulary), report)
            tokenizer.save_pretrained(built)
            write_item_metadata(built, metadata)
            report.measure_repeats(Dataset.load_from_disk(str(built)))
            report.save(built)
        return load_folder(output_dir), tokenizer
    except OSError as error:
        # numpy reports a write that the disk cut short by these words and without a number.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "requested and" in str(error):
            raise OSError(
                errno.ENOSPC,
                f"no room to write under {scratch.parent} ({error}; {shutil.disk_usage(scratch.parent).free / 2**30:.1f} GiB "
                "free); a build needs about three times the size of its result. Nothing is left behind.",
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_arguments(
    deduplicate: str, on_bad_rows: str, user_core: int, item_core: int, shortest: int, longest: int | None
) -> None:
    """Refuses, before any work, what `build_sequences` can not do."""
    if deduplicate not in ("none", "first", "last"):
        raise ValueError(f'deduplicate is {deduplicate!r}; it may be "none", "first" or "last".')
    if on_bad_rows not in ("fail", "skip"):
        raise ValueError(f'on_bad_rows is {on_bad_rows!r}; it may be "fail" or "skip".')
    for name, value in (("k_core", user_core), ("k_core", item_core), ("min_history", shortest)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it may be 1 (keep all) or more.")
    if longest is not None and longest < shortest:
        raise ValueError(f"max_history is {longest}; it may be None (no bound) or min_history ({shortest}) or more.")


def _totals(parts: list[partitions.Partition], num_items: int) -> tuple[int, int, int]:
    users, items = partitions.count(parts, num_items)
    return int(items.sum()), users, int(np.count_nonzero(items))


def _known_vocabulary(item_ids: pl.Series, tokenizer: BlossomRecTokenizer) -> np.ndarray:
    """int32 [items]: the ids that `tokenizer` gives to raw ids, `[UNK]` where it knows none."""
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
