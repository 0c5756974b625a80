"""The event store of `blossomrec serve`, an SQLite file."""

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..utils.files import lock_file


class StoredEvent(NamedTuple):
    """
    An event of a user.

    Attributes:
        item: raw item id.
        timestamp: seconds since 1970; `None` in stores of earlier versions, which had no times.
        event_type: name of the event type; `None` if it is unknown.
    """

    item: int | str
    timestamp: int | None = None
    event_type: str | None = None


_COLUMNS = {"timestamp": "INTEGER", "event_type": "TEXT"}  # that stores of earlier versions lack


class Store:
    """
    Events of users in an SQLite file, see `blossomrec serve`. A store of an earlier version gets the columns for times and
    event types when it is opened; its events stay as they are, without both.

    Args:
        path: the file, created if it does not exist.
        read_only: open a store that another process may be writing, without creating or locking anything.

    Raises:
        ValueError: if another process serves the store, or the file is not a writable store.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path).resolve()
        self.lock: sqlite3.Connection | None = None
        try:
            if read_only:
                self.db = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
                self._selected = self._stored_columns()
                return
            self.db = sqlite3.connect(self.path, check_same_thread=False)  # used by the worker thread only
            self.db.execute("PRAGMA schema_version")  # fails for other files before anything is written
            self._lock()
            self._create()
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"`store` is {path}, which cannot be used ({error}); give a file that the service wrote, or a new file in a "
                "writable folder."
            ) from error

    def _lock(self) -> None:
        # A separate file, so that others can still read the store. The lock is released when the process ends.
        self.lock = lock_file(f"{self.path}.lock")
        if self.lock is None:
            raise ValueError(
                f"`store` is {self.path}, which another process serves; stop that process, or give another file."
            )

    def _create(self) -> None:
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
        self.db.execute("CREATE INDEX IF NOT EXISTS by_user ON events (user, id)")
        self.db.execute("SELECT id, user, item FROM events LIMIT 1").fetchall()
        for name in self._missing_columns():  # each one is added completely or not at all, also by `kill -9`
            self.db.execute(f"ALTER TABLE events ADD COLUMN {name} {_COLUMNS[name]}")
        self._selected = self._stored_columns()
        files = [self.path, Path(f"{self.path}-wal")]
        self.files = {file: file.stat() for file in files if file.exists()}

    def in_place(self) -> bool:
        """Whether the files on disk are still the opened ones. Writes to a deleted file would be lost."""
        try:
            return all(os.path.samestat(file.stat(), opened) for file, opened in self.files.items())
        except OSError:
            return False

    def _missing_columns(self) -> list[str]:
        present = {row[1] for row in self.db.execute("PRAGMA table_info(events)")}
        return [name for name in _COLUMNS if name not in present]

    def _stored_columns(self) -> str:
        """What to select for a [`StoredEvent`]."""
        missing = self._missing_columns()
        return ", ".join(["item", *("NULL" if name in missing else name for name in _COLUMNS)])

    def add(self, events: Sequence[tuple[str, StoredEvent]]) -> None:
        """Append events, each with its user, in one transaction, which is on the disk on return."""
        if not self.in_place():
            raise sqlite3.OperationalError(f"The store {self.path} was deleted or replaced")
        with self.db:
            rows = [(user, json.dumps(event.item), event.timestamp, event.event_type) for user, event in events]
            self.db.executemany("INSERT INTO events (user, item, timestamp, event_type) VALUES (?, ?, ?, ?)", rows)

    def number(self, user: str) -> int:
        """The number of events of the user."""
        return self.db.execute("SELECT COUNT(*) FROM events WHERE user = ?", (user,)).fetchone()[0]

    def latest(self, user: str, number: int) -> list[StoredEvent]:
        """The latest `number` events of the user, oldest first; all events if `number` is −1."""
        rows = self.db.execute(
            f"SELECT {self._selected} FROM events WHERE user = ? ORDER BY id DESC LIMIT ?", (user, number)
        )
        return [StoredEvent(json.loads(item), time, kind) for item, time, kind in rows][::-1]

    def last_item(self) -> int | str | None:
        """The latest stored item; `None` if the store is empty."""
        row = self.db.execute("SELECT item FROM events ORDER BY id DESC LIMIT 1").fetchone()
        return None if row is None else json.loads(row[0])

    def last_time(self, user: str) -> int | None:
        """The time of the user's latest event with one; `None` if there is none. Times never fall."""
        row = self.db.execute(
            "SELECT timestamp FROM events WHERE user = ? AND timestamp IS NOT NULL ORDER BY id DESC LIMIT 1", (user,)
        ).fetchone()
        return None if row is None else row[0]

    def num_without_time(self) -> int:
        """The number of events without a time."""
        return self.db.execute("SELECT COUNT(*) FROM events WHERE timestamp IS NULL").fetchone()[0]

    def close(self) -> None:
        """Merge the write-ahead log into the file and release the lock."""
        if self.lock is not None:
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()
        if self.lock is not None:
            self.lock.close()


def first_read(number: int, max_history: int) -> int:
    """The number of earliest events, of `number`, that the model does not read, see `blossomrec serve`."""
    step = max(1, max_history // 4)
    return -(-max(0, number - max_history) // step) * step
