"""Which histories each step reads, and on which process."""

import logging

import numpy as np

from ..batches import TokenBudgetSampler
from ..batches.histories import HistoryStore
from .arguments import LoopArguments


logger = logging.getLogger(__name__)


class StepPlan:
    """
    The histories of each step: every history with an item to predict once an epoch. The plan is the same on every
    process, so that none has to ask the others.

    Args:
        histories: the training view.
        args: of [`~blossomrec_hf.training.train`].
        vocab_size: vocabulary size of the model.
        num_processes: number of processes that share a step.
        process_index: index of this process.

    Attributes:
        trainable: int64 [N], indices of the histories with an item to predict (random crops: in any epoch).

    Raises:
        ValueError: if no history has an item to predict, an id is outside the vocabulary, times go backwards, or a history is
            longer than `args.tokens_per_step`.
    """

    def __init__(
        self,
        histories: HistoryStore,
        args: LoopArguments,
        *,
        vocab_size: int,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.histories, self.args = histories, args
        self.num_parts = num_processes * args.gradient_accumulation_steps
        self.first_part = process_index * args.gradient_accumulation_steps
        self.trainable = np.flatnonzero(histories.has_targets)
        if len(self.trainable) == 0:
            raise ValueError(
                f"`train_view` has {len(histories)} histories, the longest of {histories.lengths.max(initial=0)} items, "
                "and none with an item to predict; give histories of two items or more."
            )
        largest = int(histories.items.max())
        if largest >= vocab_size:
            raise ValueError(
                f"`train_view` has the id {largest}; those of the model lie in 0 … {vocab_size - 1}. For new items, "
                "grow the vocabulary: `tokenizer.add_items(...)`, then `model.resize_token_embeddings(...)`."
            )
        if "timestamps" in histories.columns and (row := _falling_row(histories)) is not None:
            raise ValueError(
                f"`train_view` has times that go backwards in history {row}; sort the events of each history by time."
            )
        if histories.lengths[self.trainable].max() > args.tokens_per_step:
            longest = histories.lengths[self.trainable].max()
            raise ValueError(
                f"`tokens_per_step` is {args.tokens_per_step}, but a history has {longest} items; raise it to that, or lower "
                "`max_length`."
            )
        if len(self.trainable) < len(histories):
            missing = len(histories) - len(self.trainable)
            logger.info("%d of %d histories or windows have no item to predict.", missing, len(histories))
        self._planned_epoch, self._planned_steps = -1, []
        self.sampler = TokenBudgetSampler(histories.lengths[self.trainable], args.tokens_per_step, seed=args.seed)

    def total_steps(self) -> int:
        """Number of steps of the whole run, which schedules depend on."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.args.num_train_epochs * len(self.epoch_steps(0))

    def epoch_steps(self, epoch: int) -> list[np.ndarray]:
        """The histories of each step of an epoch: int64 [S] each. The latest plan is kept, because many histories take long."""
        if self._planned_epoch != epoch:
            self.sampler.set_epoch(epoch)
            self._planned_steps = [self.trainable[rows] for rows in self.sampler]
            self._planned_epoch = epoch
        return self._planned_steps

    def own_parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """
        Splits the histories of a step into one part per forward pass, about equal in items.

        Returns:
            The parts of this process, one per accumulation step; a part may be empty.
        """
        parts = self._parts(rows)
        return parts[self.first_part : self.first_part + self.args.gradient_accumulation_steps]

    def largest_part(self) -> int:
        """
        Number of items that a part may have, over all processes: those of the largest one of the first epoch, and a few more,
        because later epochs have other parts.
        """
        lengths = self.histories.lengths
        largest = max(int(lengths[part].sum()) for rows in self.epoch_steps(0) for part in self._parts(rows))
        return min(largest + largest // 64 + 1, max(largest, self.args.tokens_per_step))

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        lengths = self.histories.lengths[rows]
        middles = np.cumsum(lengths) - lengths / 2
        part_of_row = (middles * self.num_parts / lengths.sum()).astype(np.int64)
        return [rows[part_of_row == part] for part in range(self.num_parts)]


def _falling_row(histories: HistoryStore) -> int | None:
    """The first history in which a time is before the one of the previous event, if any."""
    times = histories.columns["timestamps"].cpu().numpy()
    falls = np.append(0, np.cumsum(np.diff(times) < 0))  # up to each event
    first = np.minimum(histories.starts, len(times) - 1)
    last = first + np.maximum(histories.lengths, 1) - 1
    found = np.flatnonzero(falls[last] > falls[first])
    return int(found[0]) if len(found) else None
