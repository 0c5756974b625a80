"""build_sequences: a log of interactions -> one row a user, on disk or in memory, in bounded memory."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tokenization_blossomrec import BlossomRecTokenizer
from .ingest import Interactions, ingest
from .readers import open_log


logger = logging.getLogger(__name__)

PARTITION_ROWS = 1 << 23  # interactions sorted at once: about 0.5 GB
NUM_SPECIAL = 2  # [PAD] and [UNK] come before the items


@dataclass
class FilterReport:
    """What each filter removed: `steps` holds (name, interactions, users, items) left after it."""

    source: str
    format: str
    bad_rows: int = 0
    steps: list[tuple[str, int, int, int]] = field(default_factory=list)

    def add(self, name: str, interactions: int, users: int, items: int) -> None:
        self.steps.append((name, int(interactions), int(users), int(items)))
        logger.info("%-24s %12d interactions %10d users %10d items", *self.steps[-1])
        if interactions == 0:
            before = self.steps[-2] if len(self.steps) > 1 else None
            left = f"; before it there were {before[1]} interactions" if before else ""
            raise ValueError(f'{self.source}: nothing is left after the step "{name}"{left}. Loosen that filter.')


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
    tokenizer: BlossomRecTokenizer | None = None,
    output_dir: str | Path | None = None,
) -> tuple[Dataset, BlossomRecTokenizer]:
    """
    Builds item-id sequences from a log of interactions.

    The steps, in this order: rows below `min_rating` go; of a user's repeats of an item the first or last stays
    (`deduplicate`); users and items with fewer than `k_core` interactions go, until all left have as many; users with
    fewer than `min_history` go; of each history the latest `max_history` stay; items are numbered by frequency. Events
    of a user are ordered by time; **ties stay in file order**, and so does a log without times. Users stand in the
    order in which the log first shows them; items of equal frequency too.

    Args:
        source: a path, folder or glob, a Polars or pandas frame, or a `Dataset`; see [`~data.readers.open_log`], which
            also takes `user`, `item`, `timestamp`, `rating` and `format`.
        min_rating (`float`, *optional*): rows with a lower rating are no interactions.
        deduplicate (`"none"`, `"first"` or `"last"`): which of a user's interactions with one item stays.
        k_core (`int` or `(int, int)`): least interactions a user and an item may have, as one number or (user, item).
        min_history, max_history (`int`): bounds on the events of a user.
        on_bad_rows (`"fail"` or `"skip"`): what to do at a row without a usable user, item, rating or time.
        tokenizer ([`BlossomRecTokenizer`], *optional*): encode with this vocabulary (serving, a later log) instead of
            making one; items it lacks become `[UNK]`.
        output_dir (`str` or `Path`, *optional*): where to write Dataset and tokenizer; without it they stay in memory.

    Returns:
        (`Dataset`, `BlossomRecTokenizer`): a row a user with `user_id` (int64 or string), `input_ids` (list of int32),
        `timestamps` (list of int64 or float64, if known) and `train_end`, `validation_end`, `test_end` (int32), here
        those of leave-one-out: n − 2, n − 1 and n, never below 0.

    Raises:
        `ValueError`: see [`~data.readers.open_log`]; bad rows; a filter that leaves nothing.
    """
    user_core, item_core = (k_core, k_core) if isinstance(k_core, int) else k_core
    if deduplicate not in ("none", "first", "last"):
        raise ValueError(f'deduplicate is {deduplicate!r}; it may be "none", "first" or "last".')
    if on_bad_rows not in ("fail", "skip"):
        raise ValueError(f'on_bad_rows is {on_bad_rows!r}; it may be "fail" or "skip".')
    for name, value in (("k_core", user_core), ("k_core", item_core), ("min_history", min_history)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it may be 1 (keep all) or more.")
    if max_history is not None and max_history < 1:
        raise ValueError(f"max_history is {max_history}; it may be 1 or more, or None for all.")
    log = open_log(source, format=format, user=user, item=item, timestamp=timestamp, rating=rating)
    if min_rating is not None and not log.has_rating:
        raise ValueError("min_rating is given, but the log has no column known to hold the rating; name it with rating=…")

    output_dir = None if output_dir is None else Path(output_dir)
    if output_dir is not None:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".blossomrec-", dir=None if output_dir is None else output_dir.parent))
    try:
        report = FilterReport(str(source) if isinstance(source, (str, Path)) else type(source).__name__, log.format)
        interactions = ingest(log, scratch, min_rating=min_rating, on_bad_rows=on_bad_rows)
        report.bad_rows = interactions.bad_rows
        report.add("read", interactions.rows + interactions.below_rating, interactions.users.size, interactions.items.size)
        if min_rating is not None:
            report.add(f"rating >= {min_rating:g}", interactions.rows, interactions.users.size, interactions.items.size)
        partitions = _partition(interactions)
        _sort(partitions, interactions, deduplicate)
        if deduplicate != "none":
            report.add(f"deduplicate {deduplicate}", *_count(partitions, interactions))
        keep_user, keep_item = _k_core(partitions, interactions, user_core, item_core)
        if (user_core, item_core) != (1, 1):
            report.add(f"k-core ({user_core}, {item_core})", *_count(partitions, interactions, keep_user, keep_item))
        cut = _Cut(keep_user, keep_item, min_history, max_history)
        counts = np.zeros(interactions.items.size, np.int64)
        users = 0
        for partition in partitions:
            code, item_code, _ = cut(partition)
            counts += np.bincount(item_code, minlength=counts.size)
            users += np.count_nonzero(np.diff(code)) + bool(code.size)
        if min_history > 1 or max_history is not None:
            report.add(f"history {min_history} to {max_history or 'any'}", counts.sum(), users, np.count_nonzero(counts))

        item_ids = interactions.items.ids()
        if tokenizer is None:
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            vocabulary = np.zeros(counts.size, np.int32)
            vocabulary[order] = np.arange(NUM_SPECIAL, NUM_SPECIAL + order.size, dtype=np.int32)
            tokenizer = BlossomRecTokenizer.from_items(
                item_ids[order].to_list(), item_type="int" if item_ids.dtype.is_integer() else "str"
            )
        else:
            vocabulary = np.array(tokenizer.encode_items(_as_type(item_ids, tokenizer.item_type)), np.int32)
        tables = _rows(partitions, interactions, cut, vocabulary)
        dataset = Dataset(pa.concat_tables(list(tables)))
        return dataset, tokenizer
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _as_type(ids: Any, item_type: str) -> list:
    import polars as pl

    return (ids.cast(pl.String) if item_type == "str" else ids).to_list()


@dataclass
class Partition:
    """Interactions of users `first_user` … `last_user − 1`, as three files."""

    user: Path
    item: Path
    time: Path
    first_user: int
    last_user: int
    time_dtype: np.dtype | None

    def load(self, *columns: str) -> list[np.ndarray | None]:
        dtypes = {"user": np.uint32, "item": np.uint32, "time": self.time_dtype}
        return [None if dtypes[name] is None else np.fromfile(getattr(self, name), dtypes[name]) for name in columns]


def _partition(log: Interactions) -> list[Partition]:
    whole = Partition(*(log.folder / f"{n}.bin" for n in ("user", "item", "time")), 0, log.users.size, log.time_dtype)
    return [whole]


def _sort(partitions: list[Partition], log: Interactions, deduplicate: str) -> None:
    """Orders each partition by user, then time, ties in file order, and drops a user's repeats of an item."""
    for partition in partitions:
        user, item, time = partition.load("user", "item", "time")
        order = np.argsort(user, kind="stable") if time is None else np.lexsort((time, user))
        user, item = user[order], item[order]
        time = None if time is None else time[order]
        if deduplicate != "none":
            pair = user.astype(np.int64) * log.items.size + item
            _, kept = np.unique(pair if deduplicate == "first" else pair[::-1], return_index=True)
            kept = np.sort(kept if deduplicate == "first" else pair.size - 1 - kept)
            user, item = user[kept], item[kept]
            time = None if time is None else time[kept]
        user.tofile(partition.user)
        item.tofile(partition.item)
        if time is not None:
            time.tofile(partition.time)


def _k_core(
    partitions: list[Partition], log: Interactions, user_core: int, item_core: int
) -> tuple[np.ndarray, np.ndarray]:
    keep_user, keep_item = np.ones(log.users.size, bool), np.ones(log.items.size, bool)
    while True:
        user_count, item_count = np.zeros(log.users.size, np.int64), np.zeros(log.items.size, np.int64)
        for partition in partitions:
            user, item = partition.load("user", "item")
            kept = keep_user[user] & keep_item[item]
            user_count += np.bincount(user[kept], minlength=user_count.size)
            item_count += np.bincount(item[kept], minlength=item_count.size)
        weak_user, weak_item = keep_user & (user_count < user_core), keep_item & (item_count < item_core)
        if not weak_user.any() and not weak_item.any():
            return keep_user, keep_item
        keep_user &= ~weak_user
        keep_item &= ~weak_item


def _count(partitions: list[Partition], log: Interactions, keep_user: Any = None, keep_item: Any = None) -> tuple:
    users, items, total = np.zeros(log.users.size, bool), np.zeros(log.items.size, bool), 0
    for partition in partitions:
        user, item = partition.load("user", "item")
        if keep_user is not None:
            kept = keep_user[user] & keep_item[item]
            user, item = user[kept], item[kept]
        users[user] = True
        items[item] = True
        total += user.size
    return total, users.sum(), items.sum()


@dataclass
class _Cut:
    """What of a sorted partition enters the Dataset."""

    keep_user: np.ndarray
    keep_item: np.ndarray
    min_history: int
    max_history: int | None

    def __call__(self, partition: Partition) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        user, item, time = partition.load("user", "item", "time")
        kept = self.keep_user[user] & self.keep_item[item]
        user, item, time = user[kept], item[kept], None if time is None else time[kept]
        starts = np.flatnonzero(np.diff(user, prepend=np.int64(-1)))
        lengths = np.diff(starts, append=user.size)
        kept = np.repeat(lengths >= self.min_history, lengths)
        if self.max_history is not None:
            from_end = np.repeat(starts + lengths, lengths) - np.arange(user.size)
            kept &= from_end <= self.max_history
        return user[kept], item[kept], None if time is None else time[kept]


def _rows(
    partitions: list[Partition], log: Interactions, cut: _Cut, vocabulary: np.ndarray
) -> Iterator[pa.Table]:
    """One Arrow table a partition, one row a user."""
    user_ids = log.users.ids()
    for partition in partitions:
        user, item, time = cut(partition)
        starts = np.flatnonzero(np.diff(user, prepend=np.int64(-1)))
        offsets = pa.array(np.append(starts, user.size).astype(np.int32))
        length = np.diff(np.append(starts, user.size))
        columns = {
            "user_id": user_ids[user[starts]].to_arrow().cast(
                pa.int64() if user_ids.dtype.is_integer() else pa.string()
            ),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(vocabulary[item])),
        }
        if time is not None:
            columns["timestamps"] = pa.ListArray.from_arrays(offsets, pa.array(time))
        for name, back in (("train_end", 2), ("validation_end", 1), ("test_end", 0)):
            columns[name] = pa.array(np.maximum(length - back, 0).astype(np.int32))
        yield pa.table(columns)
