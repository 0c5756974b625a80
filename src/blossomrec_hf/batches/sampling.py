"""Which histories make one batch: a number of them, or as many as fit a budget of tokens; each once per epoch."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class HistorySampler(Sampler[list[int]]):
    """
    A batch sampler (`DataLoader(batch_sampler=…)`) that yields lists of row indices, each row once per epoch.

    The number of batches is the same in every epoch and on every rank. A batch is empty if there are fewer rows than
    ranks, so that no rank waits for another. Subclasses define [`~HistorySampler.batches`] and set `num_batches`, their
    number, a multiple of `num_replicas`.

    Args:
        shuffle (`bool`): whether rows are shuffled in each epoch; else they are taken in order.
        seed (`int`): the same seed and epoch give the same batches, on every rank.
        num_replicas (`int`): number of ranks that train together.
        rank (`int`, *optional*): the rank whose batches to yield; by default, the batches of all ranks.

    Raises:
        ValueError: if `rank` is none of the ranks.
    """

    num_batches: int

    def __init__(self, *, shuffle: bool, seed: int, num_replicas: int, rank: int | None) -> None:
        if num_replicas < 1 or (rank is not None and not 0 <= rank < num_replicas):
            raise ValueError(
                f"rank is {rank} of num_replicas {num_replicas}; it may be 0 to num_replicas - 1, or None."
            )
        self.shuffle, self.seed, self.num_replicas, self.rank, self.epoch = shuffle, seed, num_replicas, rank, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the same epoch gives the same batches."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, of all ranks."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches(self.epoch)
        return iter(batches if self.rank is None else batches[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_batches if self.rank is None else self.num_batches // self.num_replicas


class BatchSizeSampler(HistorySampler):
    """
    Batches of `batch_size` rows. The rows that remain at the end of an epoch are divided equally among the ranks.

    Args:
        num_rows (`int`): number of rows.
        batch_size (`int`): rows of a batch.
        drop_last (`bool`, defaults to `False`): whether to drop the rows that remain.
        shuffle, seed, num_replicas, rank: see [`HistorySampler`].

    Raises:
        ValueError: if no batch can be made, or `rank` is none of the ranks.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int | None = None,
    ) -> None:
        super().__init__(shuffle=shuffle, seed=seed, num_replicas=num_replicas, rank=rank)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        per_step = batch_size * num_replicas
        steps = num_rows // per_step if drop_last else -(-num_rows // per_step)
        if not steps:
            raise ValueError(f"num_rows is {num_rows}, too few for a batch of {per_step}; lower batch_size.")
        self.num_rows, self.batch_size, self.num_batches = num_rows, batch_size, steps * num_replicas

    def batches(self, epoch: int) -> list[list[int]]:
        rows = np.arange(self.num_rows)
        if self.shuffle:
            rows = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        per_step = self.batch_size * self.num_replicas
        full = self.num_rows // per_step * per_step
        batches = rows[:full].reshape(-1, self.batch_size).tolist()
        if len(batches) < self.num_batches:
            batches += [part.tolist() for part in np.array_split(rows[full:], self.num_replicas)]
        return batches


class TokenBudgetSampler(HistorySampler):
    """
    Batches of rows whose lengths add up to at most `max_tokens`, about equally full, each of long and short histories.

    With `Accelerator.prepare`, leave `rank` at `None`, give `num_replicas=accelerator.num_processes`, and set
    `DataLoaderConfiguration(even_batches=False)`: Accelerate divides the batches among the ranks.

    Args:
        lengths (sequence of `int` [rows]): number of events of each row.
        max_tokens (`int`): the budget.
        max_length (`int`, *optional*): as given to the collator; lengths are clipped to it.
        shuffle, seed, num_replicas, rank: see [`HistorySampler`].

    Raises:
        ValueError: if a clipped length exceeds the budget, there are no rows, or `rank` is none of the ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        max_length: int | None = None,
        num_replicas: int = 1,
        rank: int | None = None,
    ) -> None:
        super().__init__(shuffle=shuffle, seed=seed, num_replicas=num_replicas, rank=rank)
        self.lengths = np.asarray(lengths, np.int64)
        if max_length is not None:
            self.lengths = np.minimum(self.lengths, max_length)
        if not self.lengths.size:
            raise ValueError("lengths is empty; a sampler needs at least one row.")
        if self.lengths.max() > max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, but a history has {self.lengths.max()} items; raise max_tokens to that or "
                "pass a max_length."
            )
        self.max_tokens = max_tokens
        self.num_batches = self._fewest_bins() if shuffle else len(budget_batches(self.lengths, max_tokens))
        self.num_batches += -self.num_batches % num_replicas

    def batches(self, epoch: int) -> list[list[int]]:
        if not self.shuffle:
            rows = np.arange(self.lengths.size)
            batches = [rows[part].tolist() for part in budget_batches(self.lengths, self.max_tokens)]
            return batches + [[] for _ in range(self.num_batches - len(batches))]
        rng = np.random.default_rng((self.seed, epoch))
        batches = None
        # Roughly, not strictly, longest first: strictly would put the same long histories together every epoch.
        for spread in (0.7, 0.3, 0.1, 0.0):
            rank = self.lengths * rng.uniform(1 - spread, 1 + spread, self.lengths.size)
            shuffled = rng.permutation(self.lengths.size)
            order = shuffled[np.argsort(-rank[shuffled], kind="stable")]
            batches = batches or self._deal(order, self.num_batches)
        return [batches[number] for number in rng.permutation(len(batches))]

    def _fewest_bins(self) -> int:
        bins = max(1, -(-int(self.lengths.sum()) // self.max_tokens))
        longest_first = np.argsort(-self.lengths, kind="stable")
        while self._deal(longest_first, bins) is None:
            bins += 1
        return bins

    def _deal(self, order: np.ndarray, bins: int) -> list[list[int]] | None:
        """Each row, in `order`, to the emptiest of `bins` batches; `None` if one overflows."""
        batches: list[list[int]] = [[] for _ in range(bins)]
        emptiest = [(0, number) for number in range(bins)]
        for row, length in zip(order.tolist(), self.lengths[order].tolist()):
            load, number = emptiest[0]
            if load + length > self.max_tokens:
                return None
            batches[number].append(row)
            heapq.heapreplace(emptiest, (load + length, number))
        return batches


def budget_batches(sizes: np.ndarray, max_total: int, *, max_count: int | None = None) -> list[slice]:
    """
    Cuts a list of sizes, in its order, into runs whose sum is at most `max_total` and whose count is at most `max_count`.
    A size above `max_total` makes a run of its own.
    """
    ends = np.cumsum(sizes)
    batches: list[slice] = []
    start = 0
    while start < len(sizes):
        spent = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, spent + max_total, side="right")))
        if max_count is not None:
            stop = min(stop, start + max_count)
        batches.append(slice(start, stop))
        start = stop
    return batches
