"""Evaluation by full ranking: every item of the catalogue is ranked for every user.

The protocol: the model reads the latest items of a user's history and scores all items but `[PAD]` and `[UNK]`; the
rank of a held-out item is 1 + the items that score strictly higher + half of the others that score the same. A score
that is not a number counts as higher than any, so a diverged model ranks last and not first. Ranks come in two kinds,
made in one pass:

- over **all** items, the figures named `ndcg@10`, ...;
- over the **unseen** items, those that the user's whole history does not hold (also what lies before the window that
  the model reads), the figures named `ndcg@10_unseen`, .... A held-out item always stays in, even if the user has met
  it before.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from .histories import NUM_SPECIAL_TOKENS, HistoryStore, budget_batches, concatenate, iterate_columns, to_device
from .metrics import DEFAULT_KS, ranking_metrics
from .progress import progress_bar


UNSEEN_SUFFIX = "_unseen"
MAX_SCORES = 2**26  # scores alive at a time: 256 MiB in float32


class HeldOutItems:
    """
    A validation or test view in memory: what the model reads, what it has to find, and what each user has already met.

    Made once and evaluated many times. Users without a held-out item are left out.

    Attributes:
        inputs: the histories that the model reads.
        targets: int64 [number of held-out items], each item once a user, in the order of the users.
        target_users: int64 of the same shape: the user of each, as a row of `inputs`.
        seen_items, seen_offsets: each user's distinct items, less specials and the user's own held-out items.
        user_ids: the users' names.
    """

    def __init__(
        self,
        inputs: HistoryStore,
        targets: Sequence[Sequence[int]],
        seen: Sequence[Sequence[int]],
        user_ids: Sequence,
    ):
        self.inputs = inputs
        self.user_ids = list(user_ids)
        distinct_targets = [np.unique(np.asarray(items, dtype=np.int64)) for items in targets]
        self.targets = np.concatenate([np.empty(0, dtype=np.int64), *distinct_targets])
        self.target_users = np.repeat(np.arange(len(distinct_targets)), [len(items) for items in distinct_targets])
        self.target_offsets = np.searchsorted(self.target_users, np.arange(len(distinct_targets) + 1))

        # One number a (user, item) pair makes the whole log one sort instead of a set for every user.
        items, offsets = concatenate(seen)
        stride = int(max(items.max(initial=0), self.targets.max(initial=0))) + 1
        users = np.repeat(np.arange(len(distinct_targets)), np.diff(offsets))
        pairs = np.unique(users[items >= NUM_SPECIAL_TOKENS] * stride + items[items >= NUM_SPECIAL_TOKENS])
        pairs = np.setdiff1d(pairs, self.target_users * stride + self.targets, assume_unique=True)
        self.seen_items = pairs % stride
        self.seen_offsets = np.searchsorted(pairs // stride, np.arange(len(distinct_targets) + 1))

    @classmethod
    def from_rows(cls, rows: Dataset | Sequence[Mapping], *, max_length: int | None = None) -> "HeldOutItems":
        """
        Reads a validation or test view: `user_id`, `input_ids`, `target_ids` and `seen_ids` (the whole uncut history;
        where a row has none, it is `input_ids`). `max_length` is how many of its latest items the model reads.
        """
        columns = getattr(rows, "column_names", None)
        first = rows[0] if len(rows) else {}
        seen_column = "seen_ids" if "seen_ids" in (first or columns or ()) else "input_ids"
        kept = [
            row for row in iterate_columns(rows, "user_id", "input_ids", "target_ids", seen_column) if len(row[2]) > 0
        ]
        if not kept:
            raise ValueError("`rows` hold no user with an item to predict: there is nothing to evaluate.")
        user_ids, inputs, targets, seen = zip(*kept)
        return cls(HistoryStore(*concatenate(inputs), max_length=max_length), targets, seen, user_ids)

    def __len__(self) -> int:
        return len(self.user_ids)

    def seen_by(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The items met by the user of each held-out item: two int64 arrays [pairs], the place in `targets` and the item.
        """
        users = self.target_users[targets]
        counts = self.seen_offsets[users + 1] - self.seen_offsets[users]
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(self.seen_offsets[users] - (ends - counts), counts)
        return np.repeat(np.arange(len(targets)), counts), self.seen_items[places]


@dataclass
class Ranks:
    """
    The rank of each held-out item, float64 [number of held-out items]: over all items and over the unseen ones.
    `users` [same] tells the user of each, counted from 0 in the order of `user_ids`. An item outside the vocabulary
    has rank infinity.
    """

    everything: np.ndarray
    unseen: np.ndarray
    users: np.ndarray
    user_ids: list

    def metrics(self, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
        """`recall@k`, `ndcg@k`, `mrr@k`, `hit_rate@k`, and the same with `_unseen` appended."""
        return {
            **ranking_metrics(self.everything, ks=ks, users=self.users),
            **ranking_metrics(self.unseen, ks=ks, users=self.users, suffix=UNSEEN_SUFFIX),
        }


def evaluate(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    max_length: int | None = None,
    max_tokens: int = 65536,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """
    Ranks the whole catalogue for every user of a view.

    Args:
        model: a `BlossomRecForSequentialRecommendation`, on its device, wrapped by Accelerate or not.
        view: a view of [`~blossomrec_hf.data.split`], rows like its, or [`HeldOutItems`] made before.
        ks: the cut-offs.
        max_length: how many of its latest items the model reads of each history; all of them when left out.
        max_tokens: the items that the model reads at a time. No more than `max_tokens` inputs and 2^26 scores are
            alive at once, never a matrix of users by items.
        accelerator: with several processes, each ranks its share of the users and all of them get the figures of all.

    Returns:
        `recall@k`, `ndcg@k`, `mrr@k`, `hit_rate@k` over all items, and the same with `_unseen` appended over the items
        that the user has not met.

    Raises:
        ValueError: if no user has an item to predict, or an item is outside the model's vocabulary.
    """
    ranks = rank_held_out_items(
        model, view, max_length=max_length, max_tokens=max_tokens, accelerator=accelerator, progress=progress
    )
    return ranks.metrics(ks=ks)


def rank_held_out_items(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    max_length: int | None = None,
    max_tokens: int = 65536,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Ranks:
    """
    The ranks from which [`evaluate`] makes its figures; same arguments.

    A user whose history is empty is served by the popularity of the items (`model.item_counts`).
    """
    held_out = view if isinstance(view, HeldOutItems) else HeldOutItems.from_rows(view, max_length=max_length)
    if accelerator is None:
        doubled = double_ranks(model, held_out, max_tokens=max_tokens, progress=progress)
    else:
        doubled = double_ranks(
            accelerator.unwrap_model(model),
            held_out,
            max_tokens=max_tokens,
            autocast=accelerator.autocast,
            share=(accelerator.process_index, accelerator.num_processes),
            progress=progress,
        )
        doubled = accelerator.reduce(doubled, reduction="sum")
    ranks = doubled.cpu().numpy() / 2
    ranks[ranks == 0] = np.inf
    return Ranks(ranks[:, 0], ranks[:, 1], held_out.target_users, held_out.user_ids)


def double_ranks(
    model: nn.Module,
    held_out: HeldOutItems,
    *,
    max_tokens: int = 65536,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> torch.Tensor:
    """
    Twice the ranks, over all and over unseen items: int64 [held-out items, 2] on the model's device.

    Twice, because integers stay exact in a sum over processes. 0 stands for "not ranked": an item outside the
    vocabulary, or one of another process's share.

    Args:
        model: a `BlossomRecForSequentialRecommendation`, not wrapped.
        autocast: makes the context in which the layers run.
        share: (rank, number of processes): which part of the users is ranked here.
    """
    device = next(model.parameters()).device
    vocab_size = model.config.vocab_size
    largest = max(int(held_out.inputs.items.max()) if len(held_out.inputs.items) else 0, int(held_out.targets.max()))
    if largest >= vocab_size:
        raise ValueError(f"`view` holds the item {largest}, but the model's vocabulary ends at {vocab_size - 1}.")
    held_out.inputs.to(device)
    doubled = torch.zeros(len(held_out.targets), 2, dtype=torch.int64, device=device)

    rank, num_processes = share
    readers = np.flatnonzero(held_out.inputs.lengths > 0)
    max_users = max(1, MAX_SCORES // vocab_size)
    batches = [
        readers[batch] for batch in budget_batches(held_out.inputs.lengths[readers], max_tokens, max_count=max_users)
    ]
    own_batches = batches[rank::num_processes]
    # Sharded models meet in every forward pass, so each process makes the same number of them.
    spare_passes = -(-len(batches) // num_processes) - len(own_batches)
    newcomers = np.flatnonzero(held_out.inputs.lengths == 0)[rank::num_processes]

    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        progress_bar(
            total=len(held_out), description="Evaluating", enabled=progress and rank == 0, leave=False
        ) as bar,
    ):
        for users in own_batches:
            scores = last_item_scores(model, held_out.inputs.pack(users), autocast)
            add_double_ranks(doubled, scores, held_out, users)
            bar.update(len(users) * num_processes)
        for _ in range(spare_passes):
            last_item_scores(model, held_out.inputs.pack(batches[0]), autocast)
        for chunk in budget_batches(np.ones(len(newcomers)), max_users):
            popularity = model.item_counts.to(device=device, dtype=torch.float32)
            add_double_ranks(doubled, popularity.expand(chunk.stop - chunk.start, -1), held_out, newcomers[chunk])
    model.train(was_training)
    return doubled


def last_item_scores(
    model: nn.Module,
    batch: dict[str, torch.Tensor | int],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """
    float32 [histories, vocabulary]: the scores of all items after the last item of each packed history.

    Under mixed precision the layers run in it and the scores do not: in bfloat16, with its eight bits, a large part of
    a catalogue would score the same.
    """
    with autocast():
        hidden_states = model.base_model(**batch).last_hidden_state[0]
    last = hidden_states[batch["cu_seq_lens_q"][1:].long() - 1]
    return nn.functional.linear(last.float(), model.get_output_embeddings().weight.float())


def add_double_ranks(doubled: torch.Tensor, scores: torch.Tensor, held_out: HeldOutItems, users: np.ndarray) -> None:
    """
    Writes twice the ranks of the held-out items of `users` into `doubled`; `scores` [users, vocabulary] are theirs.

    An item scoring higher adds 2, one scoring the same 1; both are counted as 2 − (s ≤ t) − (s < t), which makes 2 of
    a comparison with what is not a number. The held-out item itself adds the 1 that makes the best rank 1.
    """
    device = scores.device
    owned = held_out.target_offsets[users + 1] - held_out.target_offsets[users]
    ends = np.cumsum(owned)
    targets = np.arange(owned.sum()) + np.repeat(held_out.target_offsets[users] - (ends - owned), owned)
    rows = np.repeat(np.arange(len(users)), owned)
    rankable = held_out.targets[targets] >= NUM_SPECIAL_TOKENS
    rows, targets = rows[rankable], targets[rankable]
    one_each = len(rows) == len(users) and (owned == 1).all()
    # With several held-out items a user their scores are rows again and again: as many at a time as there are users.
    for chunk in [slice(0, len(targets))] if one_each else budget_batches(np.ones(len(targets)), max(1, len(users))):
        pair_rows, pair_items = held_out.seen_by(targets[chunk])
        chunk_rows, chunk_items, chunk_targets = to_device(
            torch.from_numpy(np.stack([rows[chunk], held_out.targets[targets[chunk]], targets[chunk]])), device
        )
        pairs = to_device(torch.from_numpy(np.stack([pair_rows, pair_items])), device)

        candidates = scores if one_each else scores[chunk_rows]
        target_scores = candidates.gather(1, chunk_items[:, None])
        ranked = candidates[:, NUM_SPECIAL_TOKENS:]
        over_all = 1 + 2 * ranked.shape[1] - (ranked <= target_scores).sum(1) - (ranked < target_scores).sum(1)

        seen_scores, compared = candidates[pairs[0], pairs[1]], target_scores[pairs[0], 0]
        added = 2 - (seen_scores <= compared).long() - (seen_scores < compared).long()
        over_unseen = over_all.index_add(0, pairs[0], added, alpha=-1)
        doubled[chunk_targets] = torch.stack([over_all, over_unseen], dim=1)
