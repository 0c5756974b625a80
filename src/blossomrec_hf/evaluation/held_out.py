"""What an evaluation asks for: the held-out items of each user, and the items that the user has already met."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.data import Dataset

from ..batches.histories import HistoryStore, concatenate, iterate_columns
from ..model.ids_blossomrec import NUM_SPECIAL_IDS


class HeldOutItems:
    """
    A validation or test view in memory: what the model reads, what it has to find, and what each user has already met.

    Made once and evaluated many times. Users without a held-out item are left out.

    Attributes:
        inputs: the histories that the model reads.
        targets: int64 [number of held-out items], each item once a user, in the order of the users.
        target_users: int64 of the same shape: the user of each, as a row of `inputs`.
        history_lengths: int64 [users], the items of each user's whole history.
        history_items, history_counts, history_offsets: each user's distinct items without specials, in ascending order,
            and how often each occurs in the user's history.
        seen_items, seen_offsets: the same items without the user's own held-out items.
        repeated: bool of the shape of `targets`: whether the user's history has the item.
        user_ids: the users' names.
    """

    def __init__(
        self,
        inputs: HistoryStore,
        targets: Sequence[Sequence[int]],
        seen: Sequence[Sequence[int]],
        user_ids: Sequence,
    ):
        self.inputs = inputs
        self.user_ids = list(user_ids)
        distinct_targets = [np.unique(np.asarray(items, dtype=np.int64)) for items in targets]
        self.targets = np.concatenate([np.empty(0, dtype=np.int64), *distinct_targets])
        self.target_users = np.repeat(np.arange(len(distinct_targets)), [len(items) for items in distinct_targets])
        self.target_offsets = np.searchsorted(self.target_users, np.arange(len(distinct_targets) + 1))

        # One number a (user, item) pair makes the whole log one sort instead of a set for every user.
        items, offsets = concatenate(seen)
        self.history_lengths = np.diff(offsets)
        stride = int(max(items.max(initial=0), self.targets.max(initial=0))) + 1
        users = np.repeat(np.arange(len(distinct_targets)), np.diff(offsets))
        real = items >= NUM_SPECIAL_IDS
        pairs, self.history_counts = np.unique(users[real] * stride + items[real], return_counts=True)
        self.history_items = pairs % stride
        self.history_offsets = np.searchsorted(pairs // stride, np.arange(len(distinct_targets) + 1))
        target_pairs = self.target_users * stride + self.targets
        self.repeated = np.isin(target_pairs, pairs)
        pairs = np.setdiff1d(pairs, target_pairs, assume_unique=True)
        self.seen_items = pairs % stride
        self.seen_offsets = np.searchsorted(pairs // stride, np.arange(len(distinct_targets) + 1))

    @classmethod
    def from_rows(
        cls, rows: Dataset | Sequence[Mapping], *, max_length: int | None = None, num_users: int | None = None
    ) -> "HeldOutItems":
        """
        Reads a validation or test view: `user_id`, `input_ids`, `target_ids` and `seen_ids` (the whole uncut history;
        where a row has none, it is `input_ids`). `max_length` is how many of its latest items the model reads;
        `num_users` takes a fixed sample, see [`sample_users`].
        """
        rows = rows if num_users is None else sample_users(rows, num_users)
        columns = getattr(rows, "column_names", None)
        first = rows[0] if len(rows) else {}
        seen_column = "seen_ids" if "seen_ids" in (first or columns or ()) else "input_ids"
        kept = [
            row for row in iterate_columns(rows, "user_id", "input_ids", "target_ids", seen_column) if len(row[2]) > 0
        ]
        if not kept:
            raise ValueError(
                f"`rows` hold {len(rows)} users and none of them an item to predict, so there is nothing to evaluate; give "
                '`split(dataset, "validation")` or that of "test".'
            )
        user_ids, inputs, targets, seen = zip(*kept)
        return cls(HistoryStore(*concatenate(inputs), max_length=max_length), targets, seen, user_ids)

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def repeat_share(self) -> float:
        """The share of the held-out items that already occur in their user's history."""
        return float(self.repeated.sum() / max((self.targets >= NUM_SPECIAL_IDS).sum(), 1))

    def seen_by_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The items that each of `users` has met: two int64 arrays [pairs], the place in `users` and the item.
        """
        places, entries = entries_of(self.seen_offsets, users)
        return places, self.seen_items[entries]

    def sample_negatives(self, number: int, *, vocab_size: int, seed: int = 0) -> np.ndarray:
        """
        Items to rank each held-out item against, as RecBole's `uni100` draws them: uniformly, with replacement, among
        the items that are neither in the user's whole history nor held out. int32 [held-out items, number]; same seed,
        same items.

        Raises:
            ValueError: for a user who has met every item.
        """
        user_of_seen = np.repeat(np.arange(len(self)), np.diff(self.seen_offsets))
        excluded = [user_of_seen * vocab_size + self.seen_items, self.target_users * vocab_size + self.targets]
        excluded = np.sort(np.concatenate(excluded))
        met = np.bincount(excluded // vocab_size, minlength=len(self))
        if met.max() >= vocab_size - NUM_SPECIAL_IDS:
            user = self.user_ids[int(met.argmax())]
            raise ValueError(f"`number` is {number}, but user {user!r} has met every item: no negative can be drawn.")
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


def sample_users(rows: Dataset | Sequence[Mapping], number: int, *, seed: int = 0) -> Dataset | list[Mapping]:
    """
    `number` rows of a view of [`~blossomrec_hf.data.split`], in their order; all if it has no more. The same seed and
    number of rows give the same sample.

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
    The entries of some rows of a ragged array: int64 [entries] twice, the place in `rows` and the index of each.

    Args:
        offsets: int64 [number of rows + 1], where each row starts.
        rows: int64, the rows wanted.
    """
    counts = offsets[rows + 1] - offsets[rows]
    starts = np.cumsum(counts) - counts
    return np.repeat(np.arange(len(rows)), counts), np.arange(counts.sum()) + np.repeat(offsets[rows] - starts, counts)
