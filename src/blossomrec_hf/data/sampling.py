"""Which histories make one batch: as many as fit a budget of tokens."""

from collections.abc import Iterator, Sequence

import numpy as np


class TokenBudgetSampler:
    """
    A batch sampler (`DataLoader(batch_sampler=…)`): lists of row indices whose lengths add up to at most `max_tokens`.

    Rows are taken in random order and put into the first open batch that they fit; every row comes exactly once an
    epoch. Same seed and epoch, same batches.

    Args:
        lengths (sequence of `int` [rows]): items of each row.
        max_tokens (`int`): the budget.
        shuffle (`bool`), seed (`int`): order of rows.
        max_length (`int`, *optional*): as given to the collator; lengths are clipped to it.

    Raises:
        `ValueError`: a clipped length exceeds the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        if max_length is not None:
            self.lengths = np.minimum(self.lengths, max_length)
        if self.lengths.size and self.lengths.max() > max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, but a history has {self.lengths.max()} items; raise max_tokens to that or "
                "pass a max_length."
            )
        self.max_tokens, self.shuffle, self.seed, self.epoch = max_tokens, shuffle, seed, 0
        self._planned: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the same epoch gives the same batches."""
        self.epoch = epoch

    def _plan(self) -> list[list[int]]:
        if self._planned is not None and self._planned[0] == self.epoch:
            return self._planned[1]
        order = np.arange(self.lengths.size)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        done: list[list[int]] = []
        open_batches: list[tuple[int, list[int]]] = []  # (room left, rows)
        for row in order.tolist():
            length = int(self.lengths[row])
            for place, (room, rows) in enumerate(open_batches):
                if length <= room:
                    rows.append(row)
                    open_batches[place] = (room - length, rows)
                    break
            else:
                open_batches.append((self.max_tokens - length, [row]))
                if len(open_batches) > 8:  # the fullest is closed, so that memory and search stay small
                    fullest = min(range(len(open_batches)), key=lambda place: open_batches[place][0])
                    done.append(open_batches.pop(fullest)[1])
        batches = done + [rows for _, rows in open_batches]
        self._planned = (self.epoch, batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan())

    def __len__(self) -> int:
        return len(self._plan())
