"""Events on disk in parts of whole users, which are sorted and filtered one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from .ingest import Interactions


PARTITION_ROWS = 1 << 23  # events in memory at once: about 0.6 GB while they are sorted
_CHUNK_ROWS = 1 << 21


@dataclass
class Partition:
    """
    The events of some users, one file per column.

    Args:
        stem (`Path`): path of the files, before the name of the column.
        columns: the data type of each column, see [`~data.ingest.Interactions`].
    """

    stem: Path
    columns: dict[str, np.dtype]

    def path(self, column: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{column}.bin")

    def load(self, *columns: str, start: int = 0, count: int = -1) -> dict[str, np.ndarray]:
        """The named columns (by default, all), from event `start` on."""
        return {
            name: np.fromfile(self.path(name), dtype, count, offset=start * dtype.itemsize)
            for name, dtype in self.columns.items()
            if not columns or name in columns
        }

    def store(self, values: dict[str, np.ndarray], mode: str = "wb") -> None:
        for name, dtype in self.columns.items():
            with open(self.path(name), mode) as file:
                values[name].astype(dtype, copy=False).tofile(file)

    def keep(self, chosen: np.ndarray) -> None:
        """Drops the events that are not `chosen` (bool [events])."""
        if not chosen.all():
            for name in self.columns:
                self.load(name)[name][chosen].tofile(self.path(name))


def partition(log: Interactions, rows: int = PARTITION_ROWS) -> list[Partition]:
    """Splits a log by user into parts of about `rows` events, with users in order, and in file order within each part."""
    whole = Partition(log.folder / "log_", log.columns)
    if log.rows <= rows:
        return [whole]
    per_user = np.zeros(log.users.size, np.int64)
    starts = range(0, log.rows, _CHUNK_ROWS)
    for start in starts:
        user = whole.load("user", start=start, count=_CHUNK_ROWS)["user"]
        per_user += np.bincount(user, minlength=per_user.size)
    part_of_user = ((np.cumsum(per_user) - 1) // rows).astype(np.uint16)  # 16 bits: numpy sorts them by radix
    parts = [Partition(log.folder / f"part{number}_", log.columns) for number in range(int(part_of_user[-1]) + 1)]
    for start in starts:
        chunk = whole.load(start=start, count=_CHUNK_ROWS)
        number = part_of_user[chunk["user"]]
        order = np.argsort(number, kind="stable")
        chunk = {name: column[order] for name, column in chunk.items()}
        ends = np.cumsum(np.bincount(number, minlength=len(parts)))
        for part, stop, size in zip(parts, ends, np.diff(ends, prepend=0)):
            part.store({name: column[stop - size : stop] for name, column in chunk.items()}, mode="ab")
    for column in whole.columns:
        whole.path(column).unlink()
    return parts


def sort(part: Partition) -> None:
    """Orders the events of a part by user and time, ties in file order; by user, part and time if a split is given."""
    columns = part.load()
    user, time = columns["user"].astype(np.int64), columns.get("time", np.zeros(1, np.int64))
    first, span = time.min(initial=0), int(time.max(initial=0)) - int(time.min(initial=0)) + 1
    if "part" not in columns and time.dtype.kind in "iu" and (int(user.max(initial=0)) + 1) * span < 2**63:
        key = user * span + (time - first)
        if (key[1:] >= key[:-1]).all():
            return
        others = {name: column for name, column in columns.items() if name not in ("user", "time")}
        ordered = pl.DataFrame({"key": key, **others}).sort("key", maintain_order=True)
        columns = {name: ordered[name].to_numpy() for name in others}
        columns["user"] = np.repeat(np.arange(user.max() + 1), np.bincount(user))
        columns["time"] = ordered["key"].to_numpy() - columns["user"] * span + first  # a division takes longer
        part.store(columns)
    else:
        order = np.lexsort([columns[name] for name in ("time", "part", "user") if name in columns])
        part.store({name: column[order] for name, column in columns.items()})


def collapse_repeats(part: Partition) -> None:
    """Drops events with the item, and event type if they are read, of the event before in a sorted history."""
    columns = part.load("user", "item", "event_type")
    chosen = np.zeros(columns["user"].size, bool)
    for column in columns.values():
        chosen |= np.append(True, column[1:] != column[:-1])[: chosen.size]
    part.keep(chosen)


def deduplicate(part: Partition, which: str) -> None:
    """Keeps the `"first"` or `"last"` of each user's events with one item in a sorted part."""
    columns = part.load("user", "item")
    pair = pl.Series(columns["user"].astype(np.uint64) << np.uint64(32) | columns["item"])
    part.keep((pair.is_first_distinct() if which == "first" else pair.is_last_distinct()).to_numpy())


def k_core(
    parts: list[Partition],
    num_users: int,
    num_items: int,
    user_core: int,
    item_core: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Drops users with fewer than `user_core` and items with fewer than `item_core`, until all left have as many."""
    keep_user, keep_item = np.ones(num_users, bool), np.ones(num_items, bool)
    weak = -1
    while weak:
        user_count, item_count = np.zeros(num_users, np.int64), np.zeros(num_items, np.int64)
        for part in parts:
            columns = part.load("user", "item")
            chosen = keep_user[columns["user"]] & keep_item[columns["item"]]
            user, item = columns["user"][chosen], columns["item"][chosen]
            user_count += np.bincount(user, minlength=num_users)
            item_count += np.bincount(item, minlength=num_items)
            if user.size < 0.9 * chosen.size:  # the later rounds drop little, which is cheaper skipped than rewritten
                part.keep(chosen)
        keep_user, keep_item = user_count >= user_core, item_count >= item_core
        weak = int((~keep_user & (user_count > 0)).sum() + (~keep_item & (item_count > 0)).sum())
        progress(weak)
    for part in parts:
        columns = part.load("user", "item")
        part.keep(keep_user[columns["user"]] & keep_item[columns["item"]])


def bound_histories(part: Partition, shortest: int, longest: int | None) -> None:
    """Drops users with fewer than `shortest` events, and all but the latest `longest` events of the others."""
    user = part.load("user")["user"]
    starts, lengths = runs(user)
    chosen = np.repeat(lengths >= shortest, lengths)
    if longest is not None:
        chosen &= np.repeat(starts + lengths, lengths) - np.arange(user.size) <= longest
    part.keep(chosen)


def count(parts: list[Partition], num_items: int) -> tuple[int, np.ndarray]:
    """The number of users, and the number of events of each item code."""
    users, items = 0, np.zeros(num_items, np.int64)
    for part in parts:
        columns = part.load("user", "item")
        users += np.unique(columns["user"]).size
        items += np.bincount(columns["item"], minlength=num_items)
    return users, items


def runs(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each user's first event in a sorted part, and the number of the user's events."""
    starts = np.flatnonzero(np.diff(user, prepend=np.int64(-1)))
    return starts, np.diff(starts, append=user.size)
