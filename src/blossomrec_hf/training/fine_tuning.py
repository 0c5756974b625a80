"""What fine-tuning learns from, and its settings."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainingArguments


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


def windows(history: np.ndarray, *, past_end: int = 0, max_length: int) -> list[dict[str, Any]]:
    """
    Training rows of which each event of `history` from `past_end` on is the target of exactly one. The first half of a
    window, and what it has from before `past_end`, is context.

    Args:
        history: int [events], vocabulary ids.
        max_length: items of a window, 2 or more.

    Returns:
        Rows of `input_ids` int [at most `max_length`] and `num_known` (the number of first items that are no targets),
        none if no event has another one before it.
    """
    if len(history) <= max(past_end, 1):
        return []
    context = max_length // 2
    first = max(past_end - context, 0)
    starts = range(first, max(len(history) - context, first + 1), max_length - context)
    return [
        {
            "input_ids": history[start : start + max_length],
            "num_known": max(past_end, 1) - start if start == first else context,
        }
        for start in starts
    ]


def windows_to_learn(
    histories: Sequence[np.ndarray],
    past_ends: Sequence[int],
    train_ends: Sequence[int],
    *,
    max_length: int,
    replay_share: float = REPLAY_SHARE,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Rows to fine-tune on: the new events of each user, with the past as context, and some of the past again.

    Args:
        histories: int [events] per user, vocabulary ids.
        past_ends: the number of events before the first new one, per user.
        train_ends: the number of events up to the end of the training part, per user.
        max_length: items of a row, 2 or more.
        replay_share: of all targets, the share that are past events, 0 or more and below 1; less if the past is shorter.
        seed: of the draw of the windows to replay.

    Returns:
        See [`windows`].
    """
    rows, past_rows = [], []
    for history, past_end, train_end in zip(histories, past_ends, train_ends):
        rows += windows(history[:train_end], past_end=past_end, max_length=max_length)
        if replay_share:
            past_rows += windows(history[: min(past_end, train_end)], max_length=max_length)
    num_wanted = sum(map(_num_targets, rows)) * replay_share / (1 - replay_share)
    for number in np.random.default_rng(seed).permutation(len(past_rows)):
        if num_wanted <= 0:
            break
        rows.append(past_rows[number])
        num_wanted -= _num_targets(rows[-1])
    return rows


def _num_targets(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) - row["num_known"]


def count_steps(num_rows: int, args: TrainingArguments, min_steps: int = MIN_STEPS) -> int:
    """
    The steps of `args.num_train_epochs`, at least `min_steps`, rounded up to a multiple of `EVALUATIONS`: so the last one
    is evaluated and saved where `eval_steps` and `save_steps` are 1 / `EVALUATIONS`.
    """
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    num_steps = max(math.ceil(math.ceil(num_rows / rows_per_step) * args.num_train_epochs), min_steps)
    return math.ceil(num_steps / EVALUATIONS) * EVALUATIONS
