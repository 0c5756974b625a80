"""Batches of histories for a training step, on any number of ranks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .collators import PackingCollator
from .histories import HistoryStore
from .sampling import BatchSizeSampler, HistorySampler, TokenBudgetSampler


class HistoryDataLoader(DataLoader):
    """
    A `DataLoader` of packed or padded batches, each history once per epoch, the same number of batches on each rank.

    Use it as it is, without `Accelerator.prepare`, which would shard it again. Batches depend on the seed and the epoch
    alone, so that training resumes in the middle of an epoch exactly (`accelerate.skip_first_batches`).

    Args:
        histories ([`HistoryStore`]): the histories, such as [`HistoryWindows`].
        batch_size (`int`, *optional*): histories of a batch on each rank. Exclusive with `max_tokens`.
        max_tokens (`int`, *optional*): tokens of a batch on each rank.
        collate (*optional*): a [`PackingCollator`] or [`PaddingCollator`]. By default, batches are packed, to exactly
            `max_tokens` positions if given.
        drop_last (`bool`, defaults to `False`): whether to drop the histories that are too few for a batch on each rank;
            with `batch_size`.
        shuffle (`bool`, defaults to `True`): whether histories are shuffled in each epoch, see [`~HistoryDataLoader.set_epoch`].
        seed (`int`, defaults to 0): seed of the order.
        num_replicas (`int`, defaults to 1): number of ranks that train together.
        rank (`int`, defaults to 0): this rank.
        kwargs: other arguments of `DataLoader`: `num_workers`, `pin_memory`, …

    Raises:
        ValueError: if not exactly one of `batch_size` and `max_tokens` is given, and as the samplers do.
    """

    def __init__(
        self,
        histories: HistoryStore,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        collate: Callable[[Any], Mapping[str, Any]] | None = None,
        drop_last: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        **kwargs: Any,
    ) -> None:
        if (batch_size is None) == (max_tokens is None):
            raise ValueError(
                f"batch_size is {batch_size} and max_tokens is {max_tokens}; give one of them: histories or tokens of a batch."
            )
        options: dict[str, Any] = {"shuffle": shuffle, "seed": seed, "num_replicas": num_replicas, "rank": rank}
        if collate is None:
            collate = PackingCollator(int(histories.lengths.max(initial=1)), max_tokens=max_tokens)
        if max_tokens is None:
            sampler = BatchSizeSampler(len(histories), batch_size, drop_last=drop_last, **options)
        else:
            sampler = TokenBudgetSampler(histories.lengths, max_tokens, max_length=collate.max_length, **options)
        # Else each start of an epoch would draw from the generator of dropout, also where a resumed run does not.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(_Batches(histories), batch_sampler=_EpochBatches(sampler), collate_fn=collate, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the histories, and the random crops, of an epoch; `Trainer` calls it before each epoch."""
        self.batch_sampler.set_epoch(epoch)


class _EpochBatches(Sampler[list[tuple[int, list[int]]]]):
    """The batches of a sampler with the epoch, which workers that live longer than an epoch could not tell."""

    def __init__(self, sampler: HistorySampler) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, list[int]]]]:
        return ([(self.sampler.epoch, rows)] for rows in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class _Batches(Dataset):
    """Maps an epoch and some rows to their histories, or to one of `[PAD]` without targets if there are no rows."""

    def __init__(self, histories: HistoryStore) -> None:
        self.histories = histories

    def __len__(self) -> int:
        return len(self.histories)  # the number of examples that `Trainer` reports

    def __getitems__(self, batches: list[tuple[int, list[int]]]) -> HistoryStore:
        ((epoch, rows),) = batches
        self.histories.set_epoch(epoch)
        if rows:
            return self.histories.select(rows)
        columns = {name: np.zeros(1, values.numpy().dtype) for name, values in self.histories.columns.items()}
        return HistoryStore(columns.pop("input_ids"), np.array([0, 1]), columns=columns)
