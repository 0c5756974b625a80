"""
Baselines without training: the most popular items, overall, of the last days, and after a gap as long as that before the event
to be predicted; the items that follow the user's last item; and the user's most frequent and most recently viewed items.

Each of them ranks by its own count. Items with equal counts are ranked by their training frequency, and share their ranks if
that is equal, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..batches.histories import HistoryStore, to_device
from ..data.event_table import EventTable
from ..data.splits import event_batches, part_lengths, split, user_ids
from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.time_blossomrec import GAP_BOUNDS, NUM_GAPS, gap_buckets
from .held_out import HeldOutItems, entries_of
from .reports import NOW_LABEL


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


class PopularityScores:
    """
    Scores all items by their training frequency, equally for all users.

    Args:
        item_counts: int [vocab_size], how often each item occurs in training.
    """

    def __init__(self, item_counts: np.ndarray | torch.Tensor, *, device: torch.device | str = "cpu"):
        self.counts = torch.as_tensor(item_counts).to(device=device, dtype=torch.float32)

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        return self.counts.expand(len(users), -1)


class LastItemNeighbors:
    """
    Scores an item by how often it follows the user's last item in training (a first-order Markov chain). Equal counts are
    ordered by training frequency, which also ranks the items for users without a known last item.

    Args:
        training: the uncut training histories.
        held_out: the users to score.
        item_counts: int [vocab_size], how often each item occurs in training.
    """

    def __init__(
        self,
        training: HistoryStore,
        held_out: HeldOutItems,
        item_counts: np.ndarray | torch.Tensor,
        *,
        device: torch.device | str = "cpu",
    ):
        self.popularity = tie_breaker(item_counts, device)
        vocab_size = len(self.popularity)
        items = training.items.cpu().numpy().astype(np.int64)
        follows = np.ones(len(items), dtype=bool)
        follows[training.starts[training.lengths > 0]] = False
        second = np.flatnonzero(follows & (items >= NUM_SPECIAL_IDS))
        second = second[items[second - 1] >= NUM_SPECIAL_IDS]
        pairs, self.times = np.unique(items[second - 1] * vocab_size + items[second], return_counts=True)
        self.followers = pairs % vocab_size
        self.offsets = np.searchsorted(pairs // vocab_size, np.arange(vocab_size + 1))
        self.inputs = held_out.inputs

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        last = self.inputs.items.cpu().numpy()[self.inputs.starts[users] + self.inputs.lengths[users] - 1]
        last = np.where(self.inputs.lengths[users] > 0, last, 0)  # [PAD] has no followers
        rows, pairs = entries_of(self.offsets, last)
        return add_counts(self.popularity, len(users), rows, self.followers[pairs], self.times[pairs])


class UserFrequentItems:
    """
    Scores an item by how often it occurs in the user's whole history. Equal counts are ordered by training frequency, which
    also ranks the items for users without a history.

    Args:
        held_out: the users to score.
        item_counts: int [vocab_size], how often each item occurs in training.
    """

    def __init__(
        self, held_out: HeldOutItems, item_counts: np.ndarray | torch.Tensor, *, device: torch.device | str = "cpu"
    ):
        self.popularity = tie_breaker(item_counts, device)
        self.held_out = held_out

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        rows, entries = entries_of(self.held_out.history_offsets, users)
        items, counts = self.held_out.history_items[entries], self.held_out.history_counts[entries]
        return add_counts(self.popularity, len(users), rows, items, counts)


class GapPopularity:
    """
    Scores an item by how often, in training, it follows a gap of about the length of the gap between the user's last event and
    the event to be predicted: one in the same bucket of those that models of times have. It sees "now", the time of that event, and
    is the baseline for models that do. Equal counts are ordered by training frequency.

    Args:
        training: the uncut training histories, with the column `timestamps`.
        held_out: the users to score, with `timestamps` and `prediction_times`.
        item_counts: int [vocab_size], how often each item occurs in training.
    """

    def __init__(
        self,
        training: HistoryStore,
        held_out: HeldOutItems,
        item_counts: np.ndarray | torch.Tensor,
        *,
        device: torch.device | str = "cpu",
    ):
        self.popularity = tie_breaker(item_counts, device)
        vocab_size = len(self.popularity)
        items, times = (training.columns[name].cpu().long() for name in ("input_ids", "timestamps"))
        follows = torch.ones(len(items), dtype=torch.bool)
        follows[torch.from_numpy(training.starts[training.lengths > 0])] = False
        follows &= items >= NUM_SPECIAL_IDS
        places = follows.nonzero()[:, 0]
        bounds = torch.tensor(GAP_BOUNDS)
        pairs = gap_buckets(times[places] - times[places - 1], bounds) * vocab_size + items[places]
        counts = torch.bincount(pairs, minlength=NUM_GAPS * vocab_size)
        self.counts = counts.view(NUM_GAPS, vocab_size).to(device=device, dtype=torch.float32)
        inputs = held_out.inputs
        last = np.maximum(inputs.starts + inputs.lengths - 1, 0)
        gaps = torch.from_numpy(held_out.prediction_times) - inputs.columns["timestamps"].cpu().long()[last]
        self.buckets = gap_buckets(gaps, bounds).to(device)
        self.has_history = torch.from_numpy(inputs.lengths > 0).to(device)

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        users = to_device(torch.from_numpy(users), self.popularity.device)
        return self.popularity + self.counts[self.buckets[users]] * self.has_history[users, None]


class RecentlyViewed:
    """
    Scores the items of the user's history by how recently they were viewed, the latest first: of a log with targets, the items
    of events that are no targets (weight 0), otherwise all. Other items are ordered by training frequency.

    Args:
        dataset: a data set of [`~blossomrec_hf.data.build_sequences`].
        part: the part whose users are scored, `validation` or `test`.
        held_out: the users to score.
        item_counts: int [vocab_size], how often each item occurs in training.
    """

    def __init__(
        self,
        dataset: Dataset | EventTable,
        part: str,
        held_out: HeldOutItems,
        item_counts: np.ndarray | torch.Tensor,
        *,
        device: torch.device | str = "cpu",
    ):
        self.popularity = tie_breaker(item_counts, device)
        history = part_lengths(dataset, part)[0]
        weighted = "weights" in dataset.column_names
        weights = event_batches(dataset, "weights") if weighted else repeat((None, None))
        users, places, items, first = [], [], [], 0
        for (batch, lengths), (weight, _) in zip(event_batches(dataset), weights):
            user = np.repeat(np.arange(first, first + len(lengths)), lengths)
            place = np.arange(len(batch)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            viewed = (place < history[user]) & (batch >= NUM_SPECIAL_IDS) & (True if weight is None else weight == 0)
            for kept, values in ((users, user), (places, place), (items, batch)):
                kept.append(values[viewed].astype(np.int64))
            first += len(lengths)
        users, places, items = (np.concatenate(parts) for parts in (users, places, items))
        # The latest event of each user and item, and then the order of these items by time.
        latest_first = np.lexsort((-places, items, users))
        users, places, items = users[latest_first], places[latest_first], items[latest_first]
        latest = np.append(True, (np.diff(users) != 0) | (np.diff(items) != 0))[: len(users)]
        users, places, items = users[latest], places[latest], items[latest]
        in_order = np.lexsort((places, users))
        self.items = items[in_order]
        offsets = np.searchsorted(users[in_order], np.arange(len(dataset) + 1))
        row_of = {user: row for row, user in enumerate(user_ids(dataset))}
        self.rows = np.array([row_of[user] for user in held_out.user_ids])
        self.offsets = offsets

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        rows, entries = entries_of(self.offsets, self.rows[users])
        order = 1 + entries - self.offsets[self.rows[users]][rows]  # 1 for the item viewed longest ago
        return add_counts(self.popularity, len(users), rows, self.items[entries], order)


class RecentPopularity:
    """
    Scores an item by its training frequency in the days before the user's latest known event, that event included. The time of
    the event to be predicted is not used. Equal counts are ordered by the training frequency over all times.

    Args:
        dataset: a data set of [`~blossomrec_hf.data.build_sequences`] with times.
        part: the part whose users are scored, `validation` or `test`.
        held_out: the users to score.
        item_counts: int [vocab_size], how often each item occurs in training.
        days: length of the period in days.

    Raises:
        ValueError: if `dataset` has no times.
    """

    def __init__(
        self,
        dataset: Dataset | EventTable,
        part: str,
        held_out: HeldOutItems,
        item_counts: np.ndarray | torch.Tensor,
        *,
        days: float = 7,
        device: torch.device | str = "cpu",
    ):
        if "timestamps" not in dataset.column_names:
            raise ValueError(
                "`dataset` has no column timestamps; build it from a log with times, or use `PopularityScores`."
            )
        self.popularity = tie_breaker(item_counts, device)
        train_lengths, history_lengths = part_lengths(dataset, "train")[0], part_lengths(dataset, part)[0]
        items, times, latest, first = [], [], [], 0
        columns = (event_batches(dataset), event_batches(dataset, "timestamps"))
        for (batch_items, lengths), (batch_times, _) in zip(*columns, strict=True):
            users = slice(first, first + len(lengths))
            starts = np.cumsum(lengths) - lengths
            in_training = np.arange(len(batch_items)) - np.repeat(starts, lengths) < np.repeat(
                train_lengths[users], lengths
            )
            in_training &= batch_items >= NUM_SPECIAL_IDS
            items.append(batch_items[in_training])
            times.append(batch_times[in_training])
            last = starts + np.maximum(history_lengths[users], 1) - 1
            latest.append(batch_times[np.minimum(last, len(batch_times) - 1)])
            first += len(lengths)
        items, times = np.concatenate(items), np.concatenate(times)
        by_time = np.argsort(times, kind="stable")
        self.items, times = items[by_time], times[by_time]
        latest_of = dict(zip(user_ids(dataset), np.concatenate(latest).tolist()))
        now = np.array([latest_of[user] for user in held_out.user_ids])
        window = days * 86_400
        self.starts = np.searchsorted(times, now - window, side="right")
        self.stops = np.searchsorted(times, now, side="right")

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        vocab_size = len(self.popularity)
        counts = np.stack(
            [np.bincount(self.items[self.starts[user] : self.stops[user]], minlength=vocab_size) for user in users]
        )
        return self.popularity + to_device(torch.from_numpy(counts), self.popularity.device).float()


def tie_breaker(item_counts: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """
    Scale item counts to at least 0 and less than 1, float32 [vocab_size]. Added to an integer count c, frequencies that differ by
    less than about c millionths of the largest one become equal.
    """
    counts = PopularityScores(item_counts, device=device).counts
    return counts / (counts.max() + 1)


def add_counts(
    popularity: torch.Tensor, num_users: int, rows: np.ndarray, items: np.ndarray, counts: np.ndarray
) -> torch.Tensor:
    """Add `counts` at (`rows`, `items`) to the `popularity` of each user; float32 [users, vocab_size]."""
    rows, items, counts = to_device(torch.from_numpy(np.stack([rows, items, counts])), popularity.device)
    return popularity.repeat(num_users, 1).index_put((rows, items), counts.float(), accumulate=True)


def make_baselines(
    dataset: EventTable, part: str, held_out: HeldOutItems, counts: np.ndarray, device: torch.device | str
) -> dict[str, Callable[[np.ndarray], torch.Tensor]]:
    """
    The baselines that a log has, by name: popularity, overall and in the 7 days before the user's latest event (if the log has
    times), the user's most frequent items, the items that follow the user's last item, the most recently viewed items (if the
    log has event types), and the popularity after a gap as long as that before the event to be predicted (if `held_out` has
    prediction times).

    Args:
        dataset: the data.
        part: the part whose users are scored, `validation` or `test`.
        held_out: the users to score.
        counts: int64 [vocab_size], how often each item occurs in training.
        device: of the scores.
    """
    times = ["timestamps"] if held_out.prediction_times is not None else []
    training = HistoryStore.from_rows(split(dataset, "train", columns=times), columns=times)
    baselines = {
        "most popular": PopularityScores(counts, device=device),
        "user's most frequent": UserFrequentItems(held_out, counts, device=device),
        "after the last item": LastItemNeighbors(training, held_out, counts, device=device),
    }
    if "event_type_ids" in dataset.column_names:
        baselines["most recently viewed"] = RecentlyViewed(dataset, part, held_out, counts, device=device)
    if "timestamps" in dataset.column_names:
        recent = RecentPopularity(dataset, part, held_out, counts, device=device)
        baselines["popular in the last 7 days"] = recent
    else:
        logger.warning(
            "The log has no times, so there is no baseline of the items that were popular in the last 7 days."
        )
    if times:
        baselines[f"popular after such a gap{NOW_LABEL}"] = GapPopularity(training, held_out, counts, device=device)
    return baselines
