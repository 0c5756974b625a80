"""The event store of `blossomrec serve`, an SQLite file."""

import json
import os
import sqlite3
from pathlib import Path


class Store:
    """
    Events of users in an SQLite file, see `blossomrec serve`.

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
                return
            self.db = sqlite3.connect(self.path, check_same_thread=False)  # used by the worker thread only
            self.db.execute("PRAGMA schema_version")  # fails for other files before anything is written
            self._lock()
            self._create()
        except sqlite3.Error as error:
            raise ValueError(
                f"`store` is {path}, which cannot be used ({error}); give a file that the service wrote, or a new file in a "
                "writable folder."
            ) from error

    def _lock(self) -> None:
        # A separate file, so that others can still read the store. The lock is released when the process ends.
        self.lock = sqlite3.connect(f"{self.path}.lock", timeout=0, check_same_thread=False)
        try:
            self.lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            raise ValueError(
                f"`store` is {self.path}, which another process serves; stop that process, or give another file."
            ) from error

    def _create(self) -> None:
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
        self.db.execute("CREATE INDEX IF NOT EXISTS by_user ON events (user, id)")
        self.db.execute("SELECT id, user, item FROM events LIMIT 1").fetchall()
        files = [self.path, Path(f"{self.path}-wal")]
        self.files = {file: file.stat() for file in files if file.exists()}

    def in_place(self) -> bool:
        """Whether the files on disk are still the opened ones. Writes to a deleted file would be lost."""
        try:
            return all(os.path.samestat(file.stat(), opened) for file, opened in self.files.items())
        except OSError:
            return False

    def add(self, events: list[tuple[str, int | str]]) -> None:
        """Append (user, raw item id) pairs in one transaction, which is on the disk on return."""
        if not self.in_place():
            raise sqlite3.OperationalError(f"The store {self.path} was deleted or replaced")
        with self.db:
            rows = [(user, json.dumps(item)) for user, item in events]
            self.db.executemany("INSERT INTO events (user, item) VALUES (?, ?)", rows)

    def number(self, user: str) -> int:
        """The number of events of the user."""
        return self.db.execute("SELECT COUNT(*) FROM events WHERE user = ?", (user,)).fetchone()[0]

    def latest(self, user: str, number: int) -> list[int | str]:
        """The latest `number` items of the user, oldest first; all items if `number` is −1."""
        rows = self.db.execute("SELECT item FROM events WHERE user = ? ORDER BY id DESC LIMIT ?", (user, number))
        return [json.loads(item) for (item,) in rows][::-1]

    def last_item(self) -> int | str | None:
        """The latest stored item; `None` if the store is empty."""
        row = self.db.execute("SELECT item FROM events ORDER BY id DESC LIMIT 1").fetchone()
        return None if row is None else json.loads(row[0])

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
