"""The held-out items and the seen items of each user."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..batches.histories import HistoryStore, concatenate, iterate_columns
from ..model.ids_blossomrec import NUM_SPECIAL_IDS, UNKNOWN_TIME, UNKNOWN_TYPE
from ..model.tokenization_blossomrec import BlossomRecTokenizer


logger = logging.getLogger(__name__)

# Columns of held-out events that a model may be told: the argument of `HeldOutItems`, and the value for an unknown one.
_TOLD = {"timestamps": ("prediction_times", UNKNOWN_TIME), "event_type_ids": ("target_types", UNKNOWN_TYPE)}


class HeldOutItems:
    """
    A validation or test view in memory: the inputs of the model, the held-out items, and the seen items of each user. It can
    be evaluated many times. Users without a held-out item are dropped.

    Attributes:
        inputs: the histories that the model reads.
        targets: int64 [held-out items], in the order of the users; each item occurs once per user.
        target_users: int64 [held-out items], the row of `inputs` that belongs to each item.
        history_lengths: int64 [users], the number of items in each user's whole history.
        history_items, history_counts, history_offsets: the distinct items of each user's history without special ids, in
            ascending order, how often each occurs, and the index of each user's first one.
        seen_items, seen_offsets: the same items without the user's held-out items.
        repeated: bool [held-out items], whether the item occurs in its user's history.
        user_ids: the raw ids of the users.
        prediction_times: int64 [users], seconds: the time of each user's first held-out event ("now"); `None` if unknown.
        target_types: int64 [users], the event type of each user's first held-out event; `None` if unknown.
    """

    def __init__(
        self,
        inputs: HistoryStore,
        targets: Sequence[Sequence[int]],
        seen: Sequence[Sequence[int]],
        user_ids: Sequence,
        *,
        prediction_times: np.ndarray | None = None,
        target_types: np.ndarray | None = None,
    ):
        self.inputs = inputs
        self.prediction_times, self.target_types = prediction_times, target_types
        self.user_ids = list(user_ids)
        distinct_targets = [np.unique(np.asarray(items, dtype=np.int64)) for items in targets]
        self.targets = np.concatenate([np.empty(0, dtype=np.int64), *distinct_targets])
        self.target_users = np.repeat(np.arange(len(distinct_targets)), [len(items) for items in distinct_targets])
        self.target_offsets = np.searchsorted(self.target_users, np.arange(len(distinct_targets) + 1))

        # One number per (user, item) pair: a single sort of the whole log replaces a set per user.
        items, offsets = concatenate(seen)
        self.history_lengths = np.diff(offsets)
        stride = int(max(items.max(initial=0), self.targets.max(initial=0))) + 1
        users = np.repeat(np.arange(len(distinct_targets)), np.diff(offsets))
        real = items >= NUM_SPECIAL_IDS
        pairs, self.history_counts = np.unique(users[real] * stride + items[real], return_counts=True)
        self.history_items = pairs % stride
        self.history_offsets = np.searchsorted(pairs // stride, np.arange(len(distinct_targets) + 1))
        target_pairs = self.target_users * stride + self.targets
        self.repeated = np.isin(target_pairs, pairs, assume_unique=True)  # both are, and else NumPy hashes for minutes
        pairs = np.setdiff1d(pairs, target_pairs, assume_unique=True)
        self.seen_items = pairs % stride
        self.seen_offsets = np.searchsorted(pairs // stride, np.arange(len(distinct_targets) + 1))

    @classmethod
    def from_rows(
        cls,
        rows: Dataset | Sequence[Mapping],
        *,
        max_length: int | None = None,
        num_users: int | None = None,
        columns: Sequence[str] = (),
        test_after: float | None = None,
    ) -> "HeldOutItems":
        """
        Create it from a validation or test view.

        Args:
            rows: rows with `user_id`, `input_ids`, `target_ids` and optionally `seen_ids`, the whole uncut history, which
                defaults to `input_ids`.
            max_length: number of latest items that the model reads of each history. Defaults to all.
            num_users: number of users to sample, see [`sample_users`]. Defaults to all.
            columns: other columns of the events that the model reads, see `BlossomRecConfig.event_columns`. The rows need
                them, and `target_timestamps` or `target_event_type_ids` likewise: `split(dataset, "test", columns=...)`.
            test_after: seconds since 1970. Keep the users whose last input and held-out events are after this time; the rows
                need `timestamps` and `target_timestamps`. Defaults to all users.

        Raises:
            ValueError: if no user has a held-out item, no user is late enough, or the rows lack a column.
        """
        rows = rows if num_users is None else sample_users(rows, num_users)
        first = rows[0] if len(rows) else {}
        stored = first or getattr(rows, "column_names", None) or ()
        seen_column = "seen_ids" if "seen_ids" in stored else "input_ids"
        read = dict.fromkeys([*columns, *(() if test_after is None else ("timestamps",))])
        read |= dict.fromkeys(f"target_{name}" for name in list(read) if name in _TOLD)
        if first and "target_ids" not in first:
            raise ValueError('`rows` has no target_ids; give a view such as `split(dataset, "test")`.')
        if first and (missing := [name for name in read if name not in first]):
            raise ValueError(
                f"`rows` has no {' and no '.join(missing)}; give the view `split(dataset, part, columns={_needed(read)})` of a "
                "data set with these columns."
            )
        names = ("user_id", "input_ids", "target_ids", seen_column, *read)
        kept = [row for row in iterate_columns(rows, *names) if len(row[2]) > 0]
        if not kept:
            raise ValueError(
                f"`rows` has {len(rows)} users, but none of them has an item to predict; give a view such as "
                '`split(dataset, "test")`.'
            )
        by_name = dict(zip(names, zip(*kept)))
        if test_after is not None:
            by_name = _late_users(by_name, test_after)
        items, offsets = concatenate(by_name["input_ids"])
        values = {name: np.concatenate([np.asarray(row) for row in by_name[name]]) for name in columns}
        return cls(
            HistoryStore(items, offsets, max_length=max_length, columns=values),
            by_name["target_ids"],
            by_name[seen_column],
            by_name["user_id"],
            **first_held_out(by_name, columns),
        )

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def repeat_share(self) -> float:
        """The share of held-out items that already occur in their user's history."""
        return float(self.repeated.sum() / max((self.targets >= NUM_SPECIAL_IDS).sum(), 1))

    def seen_by_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The seen items of some users: two int64 arrays [pairs] of positions in `users` and items.
        """
        places, entries = entries_of(self.seen_offsets, users)
        return places, self.seen_items[entries]

    def sample_negatives(self, number: int, *, vocab_size: int, seed: int = 0) -> np.ndarray:
        """
        Sample the items among which each held-out item is ranked, as RecBole's `uni100` does: uniformly and with
        replacement from the items that are neither in the user's whole history nor held out.

        Returns:
            int32 [held-out items, number]; equal for equal seeds.

        Raises:
            ValueError: if a user has seen every item.
        """
        user_of_seen = np.repeat(np.arange(len(self)), np.diff(self.seen_offsets))
        excluded = [user_of_seen * vocab_size + self.seen_items, self.target_users * vocab_size + self.targets]
        excluded = np.sort(np.concatenate(excluded))
        met = np.bincount(excluded // vocab_size, minlength=len(self))
        if met.max() >= vocab_size - NUM_SPECIAL_IDS:
            user = self.user_ids[int(met.argmax())]
            raise ValueError(
                f"`number` is {number}, but user {user!r} has seen every item, so none can be sampled; give 0, or a larger catalog."
            )
        rng = np.random.default_rng(seed)
        users = np.repeat(self.target_users, number)
        negatives = np.zeros(len(users), dtype=np.int32)
        open_places = np.arange(len(users))
        while len(open_places):
            drawn = rng.integers(NUM_SPECIAL_IDS, vocab_size, size=len(open_places), dtype=np.int32)
            negatives[open_places] = drawn
            keys = users[open_places] * vocab_size + drawn
            found = excluded[np.minimum(np.searchsorted(excluded, keys), len(excluded) - 1)] == keys
            open_places = open_places[found]
        return negatives.reshape(len(self.targets), number)

    def read_negatives(
        self, path: str | Path, tokenizer: BlossomRecTokenizer, users: Collection[int | str]
    ) -> np.ndarray:
        """
        Read the items among which each held-out item is ranked from a file such as S3-Rec's `_sample.txt`: a line per user,
        with the user's id and the same number of item ids, separated by spaces. All held-out items of a user are ranked among
        the items of the user's line.

        Args:
            path: the file.
            tokenizer: the catalog.
            users: the raw ids of all users of the data set. Lines of users without a held-out item are not used.

        Returns:
            int32 [held-out items, number].

        Raises:
            ValueError: if a line has an unknown user or item, a user of an earlier line, another number of items than the
                first line, or a held-out item of its user; or if a user with a held-out item has no line.
        """
        known, rows = set(map(str, users)), {str(user): row for row, user in enumerate(self.user_ids)}
        raw_items = tokenizer.decode_items(list(range(NUM_SPECIAL_IDS, len(tokenizer))))
        input_ids = {str(item): input_id for input_id, item in enumerate(raw_items, NUM_SPECIAL_IDS)}
        lines: dict[str, list[int]] = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                user, *items = text.split()
                if problem := self._problem_of(user, items, known, rows, input_ids, lines):
                    raise ValueError(f"`negatives`: line {number} of {path} {problem}.")
                lines[user] = [input_ids[item] for item in items]
        if missing := next((user for user in rows if user not in lines), None):
            raise ValueError(f"`negatives`: {path} has no line of the user {missing!r}, who has a held-out item.")
        by_row = np.array([lines[user] for user in rows], np.int32)
        return by_row[self.target_users]

    def _problem_of(
        self,
        user: str,
        items: list[str],
        users: set[str],
        rows: Mapping[str, int],
        input_ids: Mapping[str, int],
        lines: Mapping[str, list[int]],
    ) -> str | None:
        """What is wrong with a line of a file of negatives, if anything."""
        if user not in users:
            return f"has the user {user!r}, whom the data set does not have"
        if user in lines:
            return f"has the user {user!r} of an earlier line"
        first = len(next(iter(lines.values()), items))
        if not items or len(items) != first:
            return f"has {len(items)} items, but every line needs as many, at least 1 (the first one has {first})"
        if unknown := next((item for item in items if item not in input_ids), None):
            return f"has the item {unknown!r}, which is not in the catalog of the model"
        if user in rows:
            held_out = self.targets[self.target_offsets[rows[user]] : self.target_offsets[rows[user] + 1]].tolist()
            if found := next((item for item in items if input_ids[item] in held_out), None):
                return f"has the item {found!r}, which is held out for this user"
        return None


def first_held_out(rows: Mapping[str, Sequence], columns: Collection[str]) -> dict[str, np.ndarray]:
    """
    What [`HeldOutItems`] has of each user's first held-out event: arguments of it, int64 [users]; unknown without one.

    Args:
        rows: columns of the rows of a view, such as `target_timestamps`.
        columns: columns of the events that the model reads.
    """
    return {
        argument: np.array([values[0] if len(values) else unknown for values in rows[f"target_{name}"]], np.int64)
        for name, (argument, unknown) in _TOLD.items()
        if name in columns
    }


def _needed(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("target_")]


def _late_users(rows: dict[str, tuple], time: float) -> dict[str, tuple]:
    """The rows, by column, whose last input and held-out events are after `time`."""
    inputs = np.array([row[-1] if len(row) else -np.inf for row in rows["timestamps"]])
    targets = np.array([min(row) for row in rows["target_timestamps"]])
    late = np.flatnonzero(np.minimum(inputs, targets) > time)
    logger.info(
        "%d of %d users have their last input and their held-out events after %.12g (seconds since 1970)",
        len(late),
        len(inputs),
        time,
    )
    if not len(late):
        raise ValueError(
            f"`test_after` is {time:.12g}, but no user has an input and a held-out event so late (the latest held-out event is "
            f"at {targets.max()}); give an earlier time, in seconds since 1970."
        )
    return {name: tuple(values[row] for row in late) for name, values in rows.items()}


def sample_users(rows: Dataset | Sequence[Mapping], number: int, *, seed: int = 0) -> Dataset | list[Mapping]:
    """
    Sample `number` rows of a view of [`~blossomrec_hf.data.split`] and keep their order; all rows if there are no more. The
    same seed and number of rows give the same sample.

    Raises:
        ValueError: if `number` is below 1.
    """
    if number < 1:
        raise ValueError(f"`number` is {number}; it must be 1 or more.")
    if len(rows) <= number:
        return rows
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), number, replace=False))
    return rows.select(chosen) if hasattr(rows, "select") else [rows[int(row)] for row in chosen]


def entries_of(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The entries of some rows of a ragged array: two int64 arrays [entries] of positions in `rows` and indices of entries.

    Args:
        offsets: int64 [number of rows + 1], the index of each row's first entry.
        rows: int64, the selected rows.
    """
    counts = offsets[rows + 1] - offsets[rows]
    starts = np.cumsum(counts) - counts
    return np.repeat(np.arange(len(rows)), counts), np.arange(counts.sum()) + np.repeat(offsets[rows] - starts, counts)
