"""
Evaluation by full ranking: all items of the catalog are ranked for every user.

The model reads the latest items of a user's history and scores all items except `[PAD]` and `[UNK]`. The rank of a held-out item
is 1 + the number of items with a higher score + half of the number of other items with the same score. NaN counts as higher
than any score, so a diverged model ranks last.

A model whose `time_features` depend on the time of the recommendation is evaluated twice: **without now**, and **with now**, the
time of the event to be predicted (of the first one, if a user has several). The metrics with now end in `_now`, such as
`ndcg@10_now`; no other metric depends on the time of the event to be predicted. A model with `target_event_types` is given the
type of that event.

- If at most 1 % of the test targets already occur in their user's history, seen items are **excluded**: all items of the
  user's whole history (not only of the window that the model reads), except the held-out items.
- Otherwise **nothing** is excluded, and the metrics of repeated and of new targets are also reported separately, as
  `ndcg@10_repeated` and `ndcg@10_new`.

Both rankings are computed in one pass. Optionally, `ndcg@10_all` (nothing excluded) and `ndcg@10_unseen` (seen items excluded)
are reported for any log.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from ..batches import budget_batches
from ..batches.histories import to_device
from ..model.configuration_blossomrec import MAX_REPEAT_SHARE
from ..model.ids_blossomrec import NUM_SPECIAL_IDS
from ..model.ranking_blossomrec import top_of_rows
from ..utils.environment import keep_compiled_code, worth_compiling
from ..utils.progress import progress_bar
from .held_out import HeldOutItems, entries_of
from .metrics import DEFAULT_KS, per_user_metrics
from .model_scores import hold_out, is_sharded, scores_by_now


ALL_SUFFIX, UNSEEN_SUFFIX = "_all", "_unseen"
REPEATED_SUFFIX, NEW_SUFFIX = "_repeated", "_new"
NOW_SUFFIX = "_now"
MAX_SCORES = 2**26  # scores in memory at a time: 256 MiB in float32


@dataclass
class Ranks:
    """
    The ranks of the held-out items, float64 [held-out items]. An item outside the vocabulary has the rank infinity.

    Attributes:
        everything: the ranks among all items.
        unseen: the ranks among the items that do not occur in the user's history, and the user's held-out items.
        users: int64 [held-out items], the user of each item as an index of `user_ids`.
        repeated: bool [held-out items], whether the item occurs in its user's history.
        exclude_seen: whether metrics without a suffix are computed from `unseen`, else from `everything`.
        sampled: the ranks among the user's held-out items and sampled or given items, optional.
        sampled_suffix: the suffix of the metrics of `sampled`, such as "_uni100" for 100 sampled items or "_given99" for 99 given
            ones.
        top_items: int64 [users, k], the k best items of each user, optional. Excludes seen items if `exclude_seen`; among equal
            scores, the lower id comes first; padded with −1.
    """

    everything: np.ndarray
    unseen: np.ndarray
    users: np.ndarray
    user_ids: Sequence
    repeated: np.ndarray
    exclude_seen: bool
    sampled: np.ndarray | None = None
    sampled_suffix: str = ""
    top_items: np.ndarray | None = None

    def by_suffix(self, *, all_and_unseen: bool = False) -> dict[str, np.ndarray]:
        """
        The ranks by the suffix of the metrics' names: "" for the protocol of the log, "_all" and "_unseen" if
        `all_and_unseen`, and `sampled_suffix` if sampled.
        """
        ranks = {"": self.unseen if self.exclude_seen else self.everything}
        if all_and_unseen:
            ranks |= {ALL_SUFFIX: self.everything, UNSEEN_SUFFIX: self.unseen}
        if self.sampled is not None:
            ranks[self.sampled_suffix] = self.sampled
        return ranks

    def per_user_metrics(
        self, *, ks: Sequence[int] = DEFAULT_KS, all_and_unseen: bool = False
    ) -> dict[str, np.ndarray]:
        """
        `recall@k`, `ndcg@k`, `mrr@k` and `hit_rate@k` of each user with each suffix of [`by_suffix`], float64 [users]. If
        nothing is excluded, also with "_repeated" and "_new", for the held-out items that occur in the user's history and
        those that do not; NaN for users without such an item.
        """
        by_suffix = self.by_suffix(all_and_unseen=all_and_unseen)
        figures = {
            f"{name}{suffix}": values
            for suffix, ranks in by_suffix.items()
            for name, values in per_user_metrics(ranks, ks=ks, users=self.users).items()
        }
        kinds = () if self.exclude_seen else ((REPEATED_SUFFIX, self.repeated), (NEW_SUFFIX, ~self.repeated))
        for suffix, chosen in kinds:
            if chosen.any():
                users, places = np.unique(self.users[chosen], return_inverse=True)
                for name, values in per_user_metrics(by_suffix[""][chosen], ks=ks, users=places).items():
                    figures[f"{name}{suffix}"] = np.full(len(self.user_ids), np.nan)
                    figures[f"{name}{suffix}"][users] = values
        return figures

    def metrics(self, *, ks: Sequence[int] = DEFAULT_KS, all_and_unseen: bool = False) -> dict[str, float]:
        """The means of [`per_user_metrics`] over users, without NaN."""
        figures = self.per_user_metrics(ks=ks, all_and_unseen=all_and_unseen)
        return {name: float(np.nanmean(values)) for name, values in figures.items()}


def evaluate(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    max_length: int | None = None,
    max_tokens: int = 65536,
    num_negatives: int = 0,
    negatives: np.ndarray | None = None,
    exclude_seen: bool | None = None,
    all_and_unseen: bool = False,
    now: bool | None = None,
    test_after: float | None = None,
    accelerator: Accelerator | None = None,
    compile: bool | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """
    Evaluate a model by ranking the whole catalog for every user of a view.

    Args:
        model: a `BlossomRecForSequentialRecommendation` on its device, optionally wrapped by Accelerate.
        view: a view of [`~blossomrec_hf.data.split`], rows of the same form, or [`HeldOutItems`]. A model of times or event
            types needs them: `split(dataset, "test", columns=model.config.event_columns)`.
        ks: the cut-offs.
        max_length: number of latest items that the model reads of each history. Defaults to all.
        max_tokens: number of items per batch. At most `max_tokens` inputs and 2^26 scores are in memory at once.
        num_negatives: also rank each held-out item among the user's held-out items and this many sampled items.
        negatives: int [held-out items, number], the items to use in place of sampled ones, see
            [`HeldOutItems.read_negatives`].
        exclude_seen: whether to exclude seen items from the ranking; held-out items are never excluded. By default, they are
            excluded if `model.config.repeat_share` is at most 0.01. If that is `None`, the share of repeats among the
            held-out items decides.
        all_and_unseen: also report the metrics with nothing excluded (`_all`) and with seen items excluded (`_unseen`).
        now: whether the model is given the time of the event to be predicted. By default, a model whose `time_features`
            depend on it (`model.config.uses_now`) is evaluated with and without it; other models, without.
        test_after: seconds since 1970; only users whose last input and held-out events are after this time are evaluated. The
            view needs the column `timestamps`.
        accelerator: distributes the users over its processes. Every process returns the metrics of all users.
        compile: whether to compile the model first, see `compile_for_inference`. By default, it is compiled on a GPU for 2,000
            batches or more.

    Returns:
        `recall@k`, `ndcg@k`, `mrr@k` and `hit_rate@k`, means over users. If seen items are not excluded, also with the suffix
        `_repeated` (held-out items that occur in the user's history) and `_new` (all others). With `num_negatives`, also with
        `_uni100` (or another number), among the sampled items; with `negatives`, with `_given99` (likewise). All of them
        without now, and the same names with `_now` appended with now.

    Raises:
        ValueError: if no user has an item to predict, an item is outside the model's vocabulary, the view lacks a column
            that the model reads, or `now` is true for a model that does not depend on it.
    """
    config = (model if accelerator is None else accelerator.unwrap_model(model)).config
    held_out = hold_out(view, config, max_length=max_length, test_after=test_after)
    ranks_by_now = rank_by_now(
        model,
        held_out,
        max_tokens=max_tokens,
        num_negatives=num_negatives,
        negatives=negatives,
        exclude_seen=exclude_seen,
        now=now,
        accelerator=accelerator,
        compile=compile,
        progress=progress,
    )
    figures = {}
    for with_now, ranks in ranks_by_now.items():
        metrics = ranks.metrics(ks=ks, all_and_unseen=all_and_unseen)
        figures |= {f"{name}{NOW_SUFFIX if with_now else ''}": value for name, value in metrics.items()}
    return figures


def check_metric(name: str) -> None:
    """
    Raises:
        ValueError: if `name` is not a metric that [`evaluate`] returns for every view.
    """
    names = per_user_metrics([1.0])
    if name.removesuffix(NOW_SUFFIX).removesuffix(ALL_SUFFIX).removesuffix(UNSEEN_SUFFIX) not in names:
        raise ValueError(
            f"`metric_for_best_model` must be one of {', '.join(names)}, or one of them with {ALL_SUFFIX} or "
            f"{UNSEEN_SUFFIX}, and then {NOW_SUFFIX}, appended, got {name!r}."
        )


def rank_held_out_items(
    model: nn.Module, view: Dataset | Sequence[Mapping] | HeldOutItems, *, now: bool = False, **options: Any
) -> Ranks:
    """
    Compute the ranks from which [`evaluate`] computes its metrics, without now or with it.

    Args:
        now: whether the model is given the time of the event to be predicted.
        The other arguments are those of [`rank_by_now`].
    """
    return rank_by_now(model, view, now=now, **options)[now]


def rank_by_now(
    model: nn.Module,
    view: Dataset | Sequence[Mapping] | HeldOutItems,
    *,
    max_length: int | None = None,
    max_tokens: int = 65536,
    num_negatives: int = 0,
    negatives: np.ndarray | None = None,
    seed: int = 0,
    top_k: int = 0,
    exclude_seen: bool | None = None,
    now: bool | None = None,
    accelerator: Accelerator | None = None,
    compile: bool | None = None,
    progress: bool = True,
) -> dict[bool, Ranks]:
    """
    Compute the ranks from which [`evaluate`] computes its metrics, without (`False`) and with (`True`) now, see there. A user
    with an empty history is ranked by the popularity of the items (`model.item_counts`). The layers run once for both, unless
    they depend on now (the time feature `"next_gap_input"`) or the model is sharded.

    Args:
        seed: seed of the sampled items.
        top_k: number of best items to return for each user.
        The other arguments are those of [`evaluate`].
    """
    autocast = nullcontext if accelerator is None else accelerator.autocast
    bare_model = model if accelerator is None else accelerator.unwrap_model(model)
    held_out = hold_out(view, bare_model.config, max_length=max_length)
    if exclude_seen is None and bare_model.config.repeat_share is not None:
        exclude_seen = bare_model.config.exclude_seen
    device = next(bare_model.parameters()).device
    if compile is None:
        compile = worth_compiling(device, count_batches(held_out, max_tokens))
    if compile and not is_sharded(bare_model):
        longest = max(1, int(held_out.inputs.lengths.max(initial=1)))
        max_users = max(1, min(MAX_SCORES // bare_model.config.vocab_size, len(held_out)))
        keep_compiled_code()
        with autocast():
            bare_model.compile_for_inference(max_tokens=max_tokens, max_histories=max_users, max_length=longest)
    with evaluating(bare_model):
        return {
            with_now: rank_by_scores(
                scores,
                held_out,
                vocab_size=bare_model.config.vocab_size,
                device=device,
                max_tokens=max_tokens,
                num_negatives=num_negatives,
                negatives=negatives,
                seed=seed,
                top_k=top_k,
                exclude_seen=exclude_seen,
                accelerator=accelerator,
                progress=progress,
            )
            for with_now, scores in scores_by_now(bare_model, held_out, autocast, now=now).items()
        }


def rank_by_scores(
    score: Callable[[np.ndarray], torch.Tensor],
    held_out: HeldOutItems,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 65536,
    num_negatives: int = 0,
    negatives: np.ndarray | None = None,
    seed: int = 0,
    top_k: int = 0,
    exclude_seen: bool | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Ranks:
    """
    Rank held-out items by the scores of any function.

    Args:
        score: maps some users, int64 row numbers of `held_out.inputs`, to scores, float32 [users, vocab_size] on `device`.
        held_out: the held-out items.
        vocab_size: number of items plus the two special ids.
        exclude_seen: whether to exclude seen items. By default, the share of repeats among the held-out items decides.
        The other arguments are those of [`rank_by_now`].
    """
    if exclude_seen is None:
        exclude_seen = held_out.repeat_share <= MAX_REPEAT_SHARE
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    sampled_suffix = f"_uni{num_negatives}" if negatives is None else f"_given{negatives.shape[1]}"
    if negatives is None and num_negatives:
        negatives = held_out.sample_negatives(num_negatives, vocab_size=vocab_size, seed=seed)
    top_items = torch.zeros(len(held_out), top_k, dtype=torch.int64, device=device)

    def keep_top_items(users: np.ndarray, scores: torch.Tensor) -> None:
        ranked = scores[:, NUM_SPECIAL_IDS:]
        if exclude_seen:
            rows, items = to_device(torch.from_numpy(np.stack(held_out.seen_by_users(users))), scores.device)
            ranked = ranked.index_put((rows, items - NUM_SPECIAL_IDS), scores.new_tensor(-torch.inf))
        best, places = top_of_rows(ranked, top_k)
        top_items[torch.from_numpy(users).to(device)] = torch.where(best > -torch.inf, places + NUM_SPECIAL_IDS, -1)

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
        repeated=held_out.repeated,
        exclude_seen=exclude_seen,
        sampled=None if negatives is None else ranks[:, 2],
        sampled_suffix=sampled_suffix,
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
    Twice the ranks of the held-out items, int64 [held-out items, 2 or 3] on `device`: among all items, among unseen items and,
    with `negatives`, among the user's held-out items and the sampled items.

    Doubled ranks are integers, whose sum over processes is exact. 0 means not ranked: an item outside the vocabulary, or of
    another process.

    Args:
        score: maps users to scores, see [`rank_by_scores`].
        negatives: int [held-out items, number], the sampled items.
        share: (rank, number of processes), the part of the users to rank.
        observe: called with every batch of users and their scores.
    """
    largest = max(int(held_out.inputs.items.max()) if len(held_out.inputs.items) else 0, int(held_out.targets.max()))
    if largest >= vocab_size:
        raise ValueError(
            f"`view` has the item {largest}, but the model's vocabulary ends at {vocab_size - 1}; give a view of the "
            "model's own tokenizer."
        )
    held_out.inputs.to(device)
    doubled = torch.zeros(len(held_out.targets), 2 + (negatives is not None), dtype=torch.int64, device=device)

    rank, num_processes = share
    lengths = held_out.inputs.lengths
    # Users without a history come last, in separate batches.
    order = np.concatenate([np.flatnonzero(lengths > 0), np.flatnonzero(lengths == 0)])
    num_readers = int((lengths > 0).sum())
    max_users = max(1, MAX_SCORES // vocab_size)
    batches = [
        order[part][batch]
        for part in (slice(0, num_readers), slice(num_readers, None))
        for batch in budget_batches(lengths[order[part]], max_tokens, max_count=max_users)
    ]
    own_batches = batches[rank::num_processes]
    # Sharded models synchronize in every forward pass, so every process runs the same number of them.
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


def count_batches(held_out: HeldOutItems, max_tokens: int) -> int:
    """Number of batches of `max_tokens` items that the histories of an evaluation fill."""
    return -(-int(held_out.inputs.lengths.sum()) // max_tokens)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode for the duration of a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def add_double_ranks(
    doubled: torch.Tensor,
    scores: torch.Tensor,
    held_out: HeldOutItems,
    users: np.ndarray,
    negatives: np.ndarray | None = None,
) -> None:
    """
    Write twice the ranks of the held-out items of `users` to `doubled`, from their `scores` [users, vocab_size].

    An item with a higher score adds 2, and one with the same score adds 1. Both are counted as 2 − (s ≤ t) − (s < t), which is 2
    if s is NaN. The held-out item itself adds 1, so the best rank is 1.
    """
    device = scores.device
    rows, targets = entries_of(held_out.target_offsets, users)
    rankable = held_out.targets[targets] >= NUM_SPECIAL_IDS
    rows, targets = rows[rankable], targets[rankable]
    one_each = np.array_equal(rows, np.arange(len(users)))
    # With several held-out items per user, rows of scores are repeated: in chunks of as many rows as there are users.
    for chunk in [slice(0, len(targets))] if one_each else budget_batches(np.ones(len(targets)), max(1, len(users))):
        pair_rows, pair_items = held_out.seen_by_users(held_out.target_users[targets[chunk]])
        chunk_rows, chunk_items, chunk_targets = to_device(
            torch.from_numpy(np.stack([rows[chunk], held_out.targets[targets[chunk]], targets[chunk]])), device
        )
        pairs = to_device(torch.from_numpy(np.stack([pair_rows, pair_items])), device)

        candidates = scores if one_each else scores[chunk_rows]
        target_scores = candidates.gather(1, chunk_items[:, None])
        ranked = candidates[:, NUM_SPECIAL_IDS:]
        over_all = 1 + 2 * ranked.shape[1] - (ranked <= target_scores).sum(1) - (ranked < target_scores).sum(1)

        seen_scores, compared = candidates[pairs[0], pairs[1]], target_scores[pairs[0], 0]
        added = 2 - (seen_scores <= compared).long() - (seen_scores < compared).long()
        columns = [over_all, over_all.index_add(0, pairs[0], added, alpha=-1)]
        if negatives is not None:
            drawn = to_device(torch.from_numpy(negatives[targets[chunk]]), device).long()
            drawn_scores = candidates.gather(1, drawn)
            lower = (drawn_scores <= target_scores).sum(1) + (drawn_scores < target_scores).sum(1)
            among_drawn = 2 + 2 * drawn.shape[1] - lower
            # The held-out items of a user are ranked in one list; otherwise, several could have rank 1.
            other_rows, others = entries_of(held_out.target_offsets, held_out.target_users[targets[chunk]])
            other = (others != targets[chunk][other_rows]) & (held_out.targets[others] >= NUM_SPECIAL_IDS)
            plan = np.stack([other_rows[other], held_out.targets[others[other]]])
            other_rows, other_items = to_device(torch.from_numpy(plan), device)
            other_scores, compared = candidates[other_rows, other_items], target_scores[other_rows, 0]
            added = 2 - (other_scores <= compared).long() - (other_scores < compared).long()
            columns.append(among_drawn.index_add(0, other_rows, added))
        doubled[chunk_targets] = torch.stack(columns, dim=1)
