"""Which histories make one batch: as many as fit a budget of tokens, every one once an epoch, on any number of ranks."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class TokenBudgetSampler(Sampler[list[int]]):
    """
    A batch sampler (`DataLoader(batch_sampler=…)`): lists of row indices whose lengths add up to at most `max_tokens`.

    Every row comes exactly once an epoch. Batches are about equally full, and each holds long and short histories.
    The number of batches is the same in every epoch and on every rank: where there are fewer histories than batches, a
    batch is the empty list, which [`PackingCollator`] with `max_tokens` turns into a batch without targets, so that
    no rank waits for another.

    With `Accelerator.prepare`, leave `rank` at `None`, give `num_replicas=accelerator.num_processes`, and set
    `DataLoaderConfiguration(even_batches=False)`: Accelerate deals the batches out, and they come out even.

    Args:
        lengths (sequence of `int` [rows]): items of each row.
        max_tokens (`int`): the budget.
        shuffle (`bool`): whether rows are mixed anew each epoch; else they are taken in order.
        seed (`int`): same seed and epoch, same batches, on every rank.
        max_length (`int`, *optional*): as given to the collator; lengths are clipped to it.
        num_replicas (`int`): ranks that train together; the number of batches is a multiple of it.
        rank (`int`, *optional*): the rank whose batches to give; all of them if `None`.

    Raises:
        `ValueError`: a clipped length exceeds the budget, or no rows, or a rank that is none of the replicas.
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
        if num_replicas < 1 or (rank is not None and not 0 <= rank < num_replicas):
            raise ValueError(
                f"rank is {rank} of num_replicas {num_replicas}; it may be 0 to num_replicas - 1, or None."
            )
        self.max_tokens, self.shuffle, self.seed, self.epoch = max_tokens, shuffle, seed, 0
        self.num_replicas, self.rank = num_replicas, rank
        self._num_batches = len(self._in_order()) if not shuffle else self._fewest_bins()
        self._num_batches += -self._num_batches % num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the same epoch gives the same batches."""
        self.epoch = epoch

    def _in_order(self) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for row, length in enumerate(self.lengths.tolist()):
            if length > room:
                batches.append([])
                room = self.max_tokens
            batches[-1].append(row)
            room -= length
        return batches

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

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: of the rank, or of all. The same each time it is asked."""
        if not self.shuffle:
            batches = self._in_order()
            batches += [[] for _ in range(self._num_batches - len(batches))]
        else:
            rng = np.random.default_rng((self.seed, epoch))
            batches = None
            # Roughly, not strictly, longest first: strictly would put the same long histories together every epoch.
            for spread in (0.7, 0.3, 0.1, 0.0):
                rank = self.lengths * rng.uniform(1 - spread, 1 + spread, self.lengths.size)
                shuffled = rng.permutation(self.lengths.size)
                order = shuffled[np.argsort(-rank[shuffled], kind="stable")]
                batches = batches or self._deal(order, self._num_batches)
            batches = [batches[number] for number in rng.permutation(len(batches))]
        return batches if self.rank is None else batches[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan(self.epoch))

    def __len__(self) -> int:
        return self._num_batches if self.rank is None else self._num_batches // self.num_replicas
