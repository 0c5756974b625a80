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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from .histories import NUM_SPECIAL_TOKENS, HistoryStore, budget_batches, concatenate, iterate_columns, to_device
from .metrics import DEFAULT_KS, per_user_metrics
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
        history_lengths: int64 [users], the items of each user's whole history.
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
        self.history_lengths = np.diff(offsets)
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
            raise ValueError(
                f"`rows` hold {len(rows)} users and none of them an item to predict, so there is nothing to evaluate; give "
                '`split(dataset, "validation")` or that of "test".'
            )
        user_ids, inputs, targets, seen = zip(*kept)
        return cls(HistoryStore(*concatenate(inputs), max_length=max_length), targets, seen, user_ids)

    def __len__(self) -> int:
        return len(self.user_ids)

    def seen_by_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The items that each of `users` has met: two int64 arrays [pairs], the place in `users` and the item.
        """
        counts = self.seen_offsets[users + 1] - self.seen_offsets[users]
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(self.seen_offsets[users] - (ends - counts), counts)
        return np.repeat(np.arange(len(users)), counts), self.seen_items[places]

    def sample_negatives(self, number: int, *, vocab_size: int, seed: int = 0) -> np.ndarray:
        """
        Items to rank each held-out item against, as RecBole's `uni100` draws them: uniformly, with replacement, among
        the items that are neither in the user's whole history nor held out. int32 [held-out items, number]; same seed,
        same items.

        Raises:
            ValueError: for a user who has met every item.
        """
        user_of_seen = np.repeat(np.arange(len(self)), np.diff(self.seen_offsets))
        excluded = [user_of_seen * vocab_size + self.seen_items, self.target_users * vocab_size + self.targets]
        excluded = np.sort(np.concatenate(excluded))
        met = np.bincount(excluded // vocab_size, minlength=len(self))
        if met.max() >= vocab_size - NUM_SPECIAL_TOKENS:
            user = self.user_ids[int(met.argmax())]
            raise ValueError(f"`number` is {number}, but user {user!r} has met every item: no negative can be drawn.")
        rng = np.random.default_rng(seed)
        users = np.repeat(self.target_users, number)
        negatives = np.zeros(len(users), dtype=np.int32)
        open_places = np.arange(len(users))
        while len(open_places):
            drawn = rng.integers(NUM_SPECIAL_TOKENS, vocab_size, size=len(open_places), dtype=np.int32)
            negatives[open_places] = drawn
            keys = users[open_places] * vocab_size + drawn
            found = excluded[np.minimum(np.searchsorted(excluded, keys), len(excluded) - 1)] == keys
            open_places = open_places[found]
        return negatives.reshape(len(self.targets), number)


@dataclass
class Ranks:
    """
    The rank of each held-out item, float64 [number of held-out items]. An item outside the vocabulary has rank
    infinity.

    Attributes:
        everything: over all items.
        unseen: over the items that the user's history does not hold.
        sampled: over the item itself and `num_negatives` drawn ones, if that was asked for.
        top_items: int64 [users, k], the k best unseen items of each user, if that was asked for.
        users: int64, the user of each held-out item, counted from 0 in the order of `user_ids`.
    """

    everything: np.ndarray
    unseen: np.ndarray
    users: np.ndarray
    user_ids: list
    sampled: np.ndarray | None = None
    num_negatives: int = 0
    top_items: np.ndarray | None = None

    def by_suffix(self) -> dict[str, np.ndarray]:
        """The ranks by what their figures' names end with: "", "_unseen" and, if sampled, "_uni100"."""
        ranks = {"": self.everything, UNSEEN_SUFFIX: self.unseen}
        if self.sampled is not None:
            ranks[f"_uni{self.num_negatives}"] = self.sampled
        return ranks

    def per_user_metrics(self, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, np.ndarray]:
        """`recall@k`, `ndcg@k`, `mrr@k`, `hit_rate@k` of each user, with each suffix: float64 [users]."""
        return {
            f"{name}{suffix}": values
            for suffix, ranks in self.by_suffix().items()
            for name, values in per_user_metrics(ranks, ks=ks, users=self.users).items()
        }

    def metrics(self, *, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
        """The means of [`per_user_metrics`] over the users."""
        return {name: float(values.mean()) for name, values in self.per_user_metrics(ks=ks).items()}


def evaluate(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    max_length: int | None = None,
    max_tokens: int = 65536,
    num_negatives: int = 0,
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
        num_negatives: also rank each held-out item against so many drawn items (`uni100` with 100).
        accelerator: with several processes, each ranks its share of the users and all of them get the figures of all.

    Returns:
        `recall@k`, `ndcg@k`, `mrr@k`, `hit_rate@k` over all items, and the same with `_unseen` appended over the items
        that the user has not met, and with `_uni100` (or another number) over the drawn ones.

    Raises:
        ValueError: if no user has an item to predict, or an item is outside the model's vocabulary.
    """
    ranks = rank_held_out_items(
        model,
        view,
        max_length=max_length,
        max_tokens=max_tokens,
        num_negatives=num_negatives,
        accelerator=accelerator,
        progress=progress,
    )
    return ranks.metrics(ks=ks)


def rank_held_out_items(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    max_length: int | None = None,
    max_tokens: int = 65536,
    num_negatives: int = 0,
    seed: int = 0,
    top_k: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Ranks:
    """
    The ranks from which [`evaluate`] makes its figures; same arguments, and:

    Args:
        num_negatives: also rank each held-out item against so many drawn items (`uni100` with 100), drawn with `seed`.
        top_k: also keep the best so many unseen items of each user.

    A user whose history is empty is served by the popularity of the items (`model.item_counts`).
    """
    held_out = view if isinstance(view, HeldOutItems) else HeldOutItems.from_rows(view, max_length=max_length)
    autocast = nullcontext if accelerator is None else accelerator.autocast
    bare_model = model if accelerator is None else accelerator.unwrap_model(model)
    with evaluating(bare_model):
        return rank_by_scores(
            ModelScores(bare_model, held_out, autocast),
            held_out,
            vocab_size=bare_model.config.vocab_size,
            device=next(bare_model.parameters()).device,
            max_tokens=max_tokens,
            num_negatives=num_negatives,
            seed=seed,
            top_k=top_k,
            accelerator=accelerator,
            progress=progress,
        )


def rank_by_scores(
    score: Callable[[np.ndarray], torch.Tensor],
    held_out: HeldOutItems,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 65536,
    num_negatives: int = 0,
    seed: int = 0,
    top_k: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Ranks:
    """
    Ranks held-out items by any scores.

    Args:
        score: makes float32 [users, vocab_size] on `device` for some users, given as rows of `held_out.inputs`.
        vocab_size: the items and the two specials.
        The other arguments are those of [`rank_held_out_items`].
    """
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    negatives = held_out.sample_negatives(num_negatives, vocab_size=vocab_size, seed=seed) if num_negatives else None
    top_items = torch.zeros(len(held_out), top_k, dtype=torch.int64, device=device)

    def keep_top_items(users: np.ndarray, scores: torch.Tensor) -> None:
        rows, items = to_device(torch.from_numpy(np.stack(held_out.seen_by_users(users))), scores.device)
        unseen_scores = scores.index_put((rows, items), scores.new_tensor(-torch.inf))
        unseen_scores[:, :NUM_SPECIAL_TOKENS] = -torch.inf
        top_items[torch.from_numpy(users).to(device)] = unseen_scores.topk(top_k).indices

    doubled = double_ranks(
        score,
        held_out,
        vocab_size=vocab_size,
        device=device,
        max_tokens=max_tokens,
        negatives=negatives,
        share=share,
        progress=progress,
        observe=keep_top_items if top_k else None,
    )
    if accelerator is not None:
        doubled = accelerator.reduce(doubled, reduction="sum")
        top_items = accelerator.reduce(top_items, reduction="sum") if top_k else top_items
    ranks = doubled.cpu().numpy() / 2
    ranks[ranks == 0] = np.inf
    return Ranks(
        everything=ranks[:, 0],
        unseen=ranks[:, 1],
        users=held_out.target_users,
        user_ids=held_out.user_ids,
        sampled=ranks[:, 2] if num_negatives else None,
        num_negatives=num_negatives,
        top_items=top_items.cpu().numpy() if top_k else None,
    )


def double_ranks(
    score: Callable[[np.ndarray], torch.Tensor],
    held_out: HeldOutItems,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 65536,
    negatives: np.ndarray | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
    observe: Callable[[np.ndarray, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """
    Twice the ranks of the held-out items: int64 [held-out items, 2 or 3] on `device`, over all items, over unseen
    items and, if there are any, over the item and its `negatives`.

    Twice, because integers stay exact in a sum over processes. 0 stands for "not ranked": an item outside the
    vocabulary, or one of another process's share.

    Args:
        score: makes float32 [users, vocab_size] for some users, given as rows of `held_out.inputs`.
        negatives: int [held-out items, number].
        share: (rank, number of processes): which part of the users is ranked here.
        observe: sees every batch of users and their scores.
    """
    largest = max(int(held_out.inputs.items.max()) if len(held_out.inputs.items) else 0, int(held_out.targets.max()))
    if largest >= vocab_size:
        raise ValueError(f"`view` holds the item {largest}, but the model's vocabulary ends at {vocab_size - 1}.")
    held_out.inputs.to(device)
    doubled = torch.zeros(len(held_out.targets), 2 + (negatives is not None), dtype=torch.int64, device=device)

    rank, num_processes = share
    lengths = held_out.inputs.lengths
    # Users without a history come last, in batches of their own.
    order = np.concatenate([np.flatnonzero(lengths > 0), np.flatnonzero(lengths == 0)])
    num_readers = int((lengths > 0).sum())
    max_users = max(1, MAX_SCORES // vocab_size)
    batches = [
        order[part][batch]
        for part in (slice(0, num_readers), slice(num_readers, None))
        for batch in budget_batches(lengths[order[part]], max_tokens, max_count=max_users)
    ]
    own_batches = batches[rank::num_processes]
    # Sharded models meet in every forward pass, so each process makes the same number of them.
    spare_passes = -(-len(batches) // num_processes) - len(own_batches)

    bar = progress_bar(total=len(held_out), description="Evaluating", enabled=progress and rank == 0, leave=False)
    with torch.no_grad(), bar:
        for users in own_batches:
            scores = score(users)
            add_double_ranks(doubled, scores, held_out, users, negatives)
            if observe is not None:
                observe(users, scores)
            bar.update(len(users) * num_processes)
        for _ in range(spare_passes):
            score(batches[0])
    return doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class ModelScores:
    """
    The scores of a model for users of `held_out`; the popularity of the items for those without a history.

    Args:
        model: a `BlossomRecForSequentialRecommendation`, not wrapped.
        autocast: makes the context in which the layers run.
    """

    def __init__(
        self, model: nn.Module, held_out: HeldOutItems, autocast: Callable[[], AbstractContextManager] = nullcontext
    ):
        self.model = model
        self.inputs = held_out.inputs
        self.autocast = autocast

    def __call__(self, users: np.ndarray) -> torch.Tensor:
        if self.inputs.lengths[users[0]] == 0:
            return self.model.item_counts.float().expand(len(users), -1)
        return last_item_scores(self.model, self.inputs.pack(users), self.autocast)


def last_item_scores(
    model: nn.Module,
    batch: dict[str, torch.Tensor | int],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """
    float32 [histories, vocabulary]: the scores of all items after the last item of each packed history.

    Under mixed precision the layers run in it and the scores do not: in bfloat16, with its eight bits, a large part of
    a catalogue would score the same. Only a sharded model (FSDP), whose weights are gathered in its forward pass alone,
    scores with its own logits.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model(**batch, logits_to_keep=1).logits[:, -1].float()
    with autocast():
        hidden_states = model.base_model(**batch).last_hidden_state[0]
    last = hidden_states[batch["cu_seq_lens_q"][1:].long() - 1]
    return nn.functional.linear(last.float(), model.get_output_embeddings().weight.float())


def add_double_ranks(
    doubled: torch.Tensor,
    scores: torch.Tensor,
    held_out: HeldOutItems,
    users: np.ndarray,
    negatives: np.ndarray | None = None,
) -> None:
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
        pair_rows, pair_items = held_out.seen_by_users(held_out.target_users[targets[chunk]])
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
        columns = [over_all, over_all.index_add(0, pairs[0], added, alpha=-1)]
        if negatives is not None:
            drawn = to_device(torch.from_numpy(negatives[targets[chunk]]), device).long()
            drawn_scores = candidates.gather(1, drawn)
            lower = (drawn_scores <= target_scores).sum(1) + (drawn_scores < target_scores).sum(1)
            columns.append(2 + 2 * drawn.shape[1] - lower)
        doubled[chunk_targets] = torch.stack(columns, dim=1)
