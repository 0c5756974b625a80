"""Packed batches from a Dataset that is read in order, a shard at a time, instead of by random access."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from ..data.splits import part_lengths
from .collators import PackingCollator


class PackedStream(TorchIterableDataset):
    """
    Streams the training part of a built Dataset as packed batches of exactly `max_tokens` tokens, for
    `DataLoader(stream, batch_size=None)`.

    Each reader (a worker of a rank) takes every so-many-th user, mixes a buffer of `buffer_size` histories and puts each
    history into the first of a few open batches that it fits. Every history comes exactly once an epoch. All readers
    give the same number of batches: the lengths are read beforehand (they are small), so that it is known, and a reader
    that runs out gives batches without targets.

    With Accelerate, do not let it dispatch this loader: it would slice every tensor, `cu_seq_lens_q` included. The stream
    shards itself by `rank` and `num_replicas`; use the loader as it is, or
    `DataLoaderConfiguration(dispatch_batches=False)` and one replica.

    Args:
        dataset: from [`build_sequences`], or a `datasets.IterableDataset` of its rows, such as
            `load_dataset(…, streaming=True)`.
        max_tokens (`int`): T of every batch.
        max_length (`int`, *optional*): each history's latest so many items; `max_tokens` if not given.
        buffer_size (`int`): histories that are mixed; 1 keeps their order.
        seed (`int`): same seed and epoch, same batches.
        rank, num_replicas (`int`): which of how many ranks this is.
    """

    _OPEN = 8  # batches filled side by side: enough for 99 %, and little memory

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        max_tokens: int,
        *,
        max_length: int | None = None,
        buffer_size: int = 10_000,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank} of num_replicas {num_replicas}; it may be 0 to num_replicas - 1.")
        if max_tokens < 2 or buffer_size < 1:
            raise ValueError(f"max_tokens is {max_tokens}, buffer_size {buffer_size}; they may be 2 and 1, or more.")
        self.dataset, self.max_tokens, self.buffer_size = dataset, max_tokens, buffer_size
        self.max_length = min(max_length or max_tokens, max_tokens)
        self.seed, self.rank, self.num_replicas, self.epoch = seed, rank, num_replicas, 0
        if isinstance(dataset, Dataset):
            self.lengths = part_lengths(dataset, "train")[0]
        else:
            rows = dataset.select_columns([name for name in dataset.column_names if name in ("train_end", "part")])
            self.lengths = np.array([0 if row.get("part") else row["train_end"] for row in rows], np.int64)
        self.collate = PackingCollator(self.max_length, max_tokens=max_tokens)
        self._counted: tuple[int, int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; call it before the loader's workers start."""
        self.epoch = epoch

    def num_batches(self, num_workers: int = 0) -> int:
        """Batches that a rank gives in this epoch when `num_workers` read for it."""
        workers = max(num_workers, 1)
        return workers * self._batches_a_reader(workers)

    def _batches_a_reader(self, workers: int) -> int:
        """The most that any reader needs: all simulate all, on lengths alone."""
        if self._counted is None or self._counted[:2] != (self.epoch, workers):
            readers = self.num_replicas * workers
            most = max(sum(1 for _ in self._pack(self._lengths_only(r, readers), r)) for r in range(readers))
            self._counted = (self.epoch, workers, most)
        return self._counted[2]

    def _lengths_only(self, reader: int, readers: int) -> Iterator[tuple[int, Any]]:
        for length in self.lengths[reader::readers].tolist():
            if length >= 2:
                yield min(length, self.max_length), None

    def _histories(self, reader: int, readers: int) -> Iterator[tuple[int, Any]]:
        rows = self.dataset.select_columns(["input_ids"])
        if isinstance(rows, Dataset):
            rows = rows.with_format("numpy").select(range(reader, len(rows), readers))
        else:
            # Its own iterator would give a loader's workers shards of their own; `iter` gives every row to each.
            rows = ({"input_ids": ids} for batch in rows.iter(batch_size=100) for ids in batch["input_ids"])
            rows = itertools.islice(rows, reader, None, readers)
        for row, length in zip(rows, self.lengths[reader::readers].tolist()):
            if length >= 2:
                history = row["input_ids"][:length][-self.max_length :]
                yield len(history), {"input_ids": history}

    def _pack(self, histories: Iterator[tuple[int, Any]], reader: int) -> Iterator[list[Any]]:
        rng = np.random.default_rng((self.seed, self.epoch, reader))
        open_batches: list[tuple[int, list[Any]]] = []  # room left, histories
        for length, history in _mixed(histories, self.buffer_size, rng):
            place = next((n for n, (room, _) in enumerate(open_batches) if room >= length), None)
            if place is None and len(open_batches) == self._OPEN:
                fullest = min(range(self._OPEN), key=lambda n: open_batches[n][0])
                yield open_batches.pop(fullest)[1]
            if place is None:
                open_batches.append((self.max_tokens, []))
                place = len(open_batches) - 1
            room, batch = open_batches[place]
            batch.append(history)
            open_batches[place] = (room - length, batch)
        yield from (batch for _, batch in open_batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.num_replicas * workers
        left = self._batches_a_reader(workers)
        for batch in self._pack(self._histories(reader, readers), reader):
            yield self.collate(batch)
            left -= 1
        for _ in range(left):
            yield self.collate([])


def _mixed(histories: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """`histories` in random order, as far as a buffer of `size` lets them move."""
    buffer = []
    for history in histories:
        if len(buffer) < size:
            buffer.append(history)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = history
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
