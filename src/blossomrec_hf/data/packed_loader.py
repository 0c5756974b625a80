"""Packed training batches for `transformers.Trainer`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from .collators import PackingCollator
from .sampling import TokenBudgetSampler
from .windows import HistoryWindows


class _InOneTensor:
    """
    What a worker sends of a batch: one int64 tensor. Each tensor that crosses from process to process costs the
    receiving one a connection, more than its bytes do, and the receiver is who launches the training step.
    """

    def __init__(self, collate: PackingCollator) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> torch.Tensor:
        batch = self.collate(rows)
        offsets = batch["cu_seq_lens_q"]
        even = torch.nn.functional.pad(offsets, (0, len(offsets) % 2)).view(torch.int64)
        numbers = torch.tensor([batch["max_length_q"], len(offsets)])
        return torch.cat([numbers, even, *(batch[name][0] for name in ("input_ids", "position_ids", "labels"))])

    @staticmethod
    def batch(sent: torch.Tensor) -> dict[str, Any]:
        """The batch again, as views of `sent`."""
        max_length, num_offsets = sent[:2].tolist()
        words = -(-num_offsets // 2)
        offsets = sent[2 : 2 + words].view(torch.int32)[:num_offsets]
        input_ids, position_ids, labels = sent[2 + words :][None].chunk(3, 1)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": max_length,
            "max_length_k": max_length,
        }


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
        collate = PackingCollator(int(windows.lengths.max()), max_tokens=max_tokens)
        super().__init__(
            windows,
            batch_sampler=sampler,
            collate_fn=_InOneTensor(collate) if num_workers else collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            **kwargs,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        return map(_InOneTensor.batch, batches) if self.num_workers else batches

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
