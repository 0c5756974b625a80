"""Packed training batches for `transformers.Trainer`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from .collators import PackingCollator
from .sampling import TokenBudgetSampler
from .windows import HistoryWindows


class _Batches(TorchDataset):
    """
    `(epoch, number)` → the rows of that batch. Who makes batches also plans epochs, the next one while this one is at
    work: with workers, the process that launches the training steps does neither.
    """

    def __init__(self, windows: HistoryWindows, sampler: TokenBudgetSampler) -> None:
        self.windows, self.sampler = windows, sampler
        self._planner: ThreadPoolExecutor | None = None  # of the process it is used in
        self._plans: dict[int, Future[list[list[int]]]] = {}

    def __len__(self) -> int:
        return len(self.windows)  # `Trainer` tells it as the number of examples

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        ((epoch, number),) = places
        self._planner = self._planner or ThreadPoolExecutor(1)
        self._plans = {
            near: self._plans.get(near) or self._planner.submit(self.sampler.plan, near) for near in (epoch, epoch + 1)
        }
        return self.windows.examples(self._plans[epoch].result()[number], epoch)


class _Places(Sampler[list[tuple[int, int]]]):
    """A batch sampler of one epoch's batches, or, `endless`, of all epochs from `epoch` on, by `(epoch, number)`."""

    def __init__(self, per_epoch: int, *, endless: bool = False) -> None:
        self.per_epoch, self.endless, self.epoch = per_epoch, endless, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epochs = count(self.epoch) if self.endless else [self.epoch]
        return ([(epoch, number)] for epoch in epochs for number in range(self.per_epoch))


class _Batch(dict):
    """
    A batch of [`PackingCollator`] that is sent as one tensor. Each tensor that crosses from process to process costs the
    receiving one a connection, more than its bytes do, and the receiver is who launches the training step.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        offsets = self["cu_seq_lens_q"]
        even = torch.nn.functional.pad(offsets, (0, len(offsets) % 2)).view(torch.int64)
        numbers = torch.tensor([self["max_length_q"], len(offsets)])
        return _unpack, (torch.cat([numbers, even, *(self[x][0] for x in ("input_ids", "position_ids", "labels"))]),)


def _unpack(sent: torch.Tensor) -> dict[str, Any]:
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


class _Pack:
    def __init__(self, collate: PackingCollator) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        return batch if get_worker_info() is None else _Batch(batch)


class PackedDataLoader(DataLoader):
    """
    A `DataLoader` of packed batches of exactly `max_tokens` tokens, sharded over ranks, the same number on each.

    Use it as it is, without `Accelerator.prepare`, which would shard it again.

    Args:
        windows ([`HistoryWindows`]): the examples.
        max_tokens (`int`): T of every batch.
        shuffle (`bool`), seed (`int`): as for [`TokenBudgetSampler`].
        num_replicas, rank (`int`): as for [`TokenBudgetSampler`].
        num_workers (`int`): processes that make batches. They live on from epoch to epoch, and begin the next one while
            the last batches of this one are used: a small log's epoch is shorter than their start.
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
        kwargs |= {"num_workers": num_workers, "persistent_workers": num_workers > 0, "in_order": True}
        # Or the start of workers would draw from the generator that dropout draws from, at other steps in a resumed run.
        kwargs.setdefault("generator", torch.Generator())
        kwargs["collate_fn"] = _Pack(PackingCollator(int(windows.lengths.max()), max_tokens=max_tokens))
        super().__init__(_Batches(windows, sampler), batch_sampler=_Places(len(sampler)), **kwargs)
        self._all_epochs = None
        if num_workers:
            self._all_epochs = DataLoader(self.dataset, batch_sampler=_Places(len(sampler), endless=True), **kwargs)
        self._batches: Iterator[dict[str, Any]] | None = None
        self._epoch_at_hand: int | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._all_epochs is None:
            return super().__iter__()
        return self._from_all_epochs(self.batch_sampler.epoch)

    def _from_all_epochs(self, epoch: int) -> Iterator[dict[str, Any]]:
        if self._epoch_at_hand != epoch:  # the first one, or another than that after the last, or one was left early
            self._all_epochs.batch_sampler.set_epoch(epoch)
            self._batches = iter(self._all_epochs)
        self._epoch_at_hand = None
        for left, batch in zip(reversed(range(len(self))), self._batches):
            if left == 0:  # before the last one is given: `Trainer` asks for no more than these
                self._epoch_at_hand = epoch + 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Mixes batches and crops anew; `Trainer` calls it before each epoch."""
        self.batch_sampler.set_epoch(epoch)


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
