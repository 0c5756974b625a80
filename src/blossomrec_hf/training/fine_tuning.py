"""What fine-tuning learns from, and its settings."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import TrainingArguments

from ..batches.histories import HistoryStore, concatenate
from ..batches.windows import HistoryWindows, Window


# Of `transformers.TrainingArguments`; examples/FIGURES.md has the measurement.
FINE_TUNING_DEFAULTS = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.07,  # of all steps
    "report_to": "none",
}
REPLAY_SHARE = 0.25
MIN_STEPS = 200
EVALUATIONS = 10


def windows_to_learn(
    histories: Sequence[np.ndarray],
    past_ends: Sequence[int],
    train_ends: Sequence[int],
    *,
    max_length: int,
    window: Window = "overlapping",
    columns: Mapping[str, Sequence[np.ndarray]] | None = None,
    replay_share: float = REPLAY_SHARE,
    seed: int = 0,
) -> HistoryWindows:
    """
    Windows to fine-tune on: the new events of each user, with the past as context, and some of the past again.

    Args:
        histories: int [events] per user, vocabulary ids.
        past_ends: the number of events before the first new one, per user.
        train_ends: the number of events up to the end of the training part, per user.
        max_length: items of a window, 2 or more.
        window: see [`HistoryWindows`]. With `"overlapping"`, each new event is the target of exactly one window.
        columns: other columns of the events by name, [events] per user, as [`HistoryStore`] reads them; optional.
        replay_share: of all targets, the share that are past events, 0 or more and below 1; less if the past is shorter.
        seed: of the draw of the windows to replay, and of random crops.

    Returns:
        The windows, none if no event has another one before it.
    """
    num_users, ends = len(histories), list(train_ends)
    known = list(past_ends)
    if replay_share:
        ends += [min(pair) for pair in zip(past_ends, train_ends)]
        known += [1] * num_users
    users = [number % num_users for number in range(len(ends))]
    items, offsets = concatenate(histories[user][:end] for user, end in zip(users, ends))
    joined = {
        name: np.concatenate([lists[user][:end] for user, end in zip(users, ends)])
        for name, lists in (columns or {}).items()
    }
    weights = joined.pop("weights", None)
    store = HistoryStore(items, offsets, num_known=np.array(known, np.int64), columns=joined, weights=weights)
    stride = max_length - max_length // 2
    windows = HistoryWindows(store, max_length, window=window, stride=stride, seed=seed)
    new, past = np.flatnonzero(windows.sources < num_users), np.flatnonzero(windows.sources >= num_users)
    past = past[np.random.default_rng(seed).permutation(len(past))]
    num_targets = windows.num_targets
    before = np.cumsum(num_targets[past]) - num_targets[past]
    replayed = past[before < num_targets[new].sum() * replay_share / (1 - replay_share)]
    return windows.select(np.concatenate([new, replayed]))


def count_steps(num_rows: int, args: TrainingArguments, min_steps: int = MIN_STEPS) -> int:
    """
    The steps of `args.num_train_epochs`, at least `min_steps`, rounded up to a multiple of `EVALUATIONS`: so the last one
    is evaluated and saved where `eval_steps` and `save_steps` are 1 / `EVALUATIONS`.
    """
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_steps = max(math.ceil(math.ceil(num_rows / rows_per_step) * args.num_train_epochs), min_steps)
    return math.ceil(num_steps / EVALUATIONS) * EVALUATIONS
