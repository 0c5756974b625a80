"""Packed training batches for `transformers.Trainer`."""

from typing import Any

from torch.utils.data import DataLoader

from .collators import PackingCollator
from .sampling import TokenBudgetSampler
from .windows import HistoryWindows


class PackedDataLoader(DataLoader):
    """
    A `DataLoader` of packed batches of exactly `max_tokens` tokens, sharded over ranks, the same number on each.

    Use it as it is, without `Accelerator.prepare`, which would shard it again.

    Args:
        windows ([`HistoryWindows`]): the examples.
        max_tokens (`int`): T of every batch.
        shuffle (`bool`), seed (`int`): as for [`TokenBudgetSampler`].
        num_replicas, rank (`int`): as for [`TokenBudgetSampler`].
        num_workers (`int`): processes that make batches; they live on from epoch to epoch, since starting them costs
            more than an epoch of a small log.
        kwargs: `pin_memory`, … of `DataLoader`.
    """

    def __init__(
        self,
        windows: HistoryWindows,
        max_tokens: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        sampler = TokenBudgetSampler(
            windows.lengths, max_tokens, shuffle=shuffle, seed=seed, num_replicas=num_replicas, rank=rank
        )
        longest = int(windows.lengths.max())
        super().__init__(
            windows,
            batch_sampler=sampler,
            collate_fn=PackingCollator(longest, max_tokens=max_tokens),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            **kwargs,
        )

    def set_epoch(self, epoch: int) -> None:
        """Mixes batches and crops anew; `Trainer` calls it before each epoch."""
        self.batch_sampler.set_epoch(epoch)
        self.dataset.set_epoch(epoch)


class PackedTrainerMixin:
    """
    Mix into a `Trainer` to train on packed batches of one size:

        class PackedTrainer(PackedTrainerMixin, Trainer): ...

        trainer = PackedTrainer(model, TrainingArguments(…), train_dataset=HistoryWindows(dataset, 1000), max_tokens=65536)

    Each rank gets its own batches, the same number on each, every example exactly once an epoch.
    `per_device_train_batch_size` plays no part. Evaluation stays `Trainer`'s.

    Args:
        max_tokens (`int`): tokens of a batch on each rank.
    """

    def __init__(self, *args: Any, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        if not isinstance(self.train_dataset, HistoryWindows):
            raise ValueError(f"train_dataset is a {type(self.train_dataset).__name__}; packing needs HistoryWindows.")

    def get_train_dataloader(self) -> PackedDataLoader:
        return PackedDataLoader(
            self.train_dataset,
            self.max_tokens,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
