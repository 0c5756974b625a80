"""Which rows fine-tuning learns from."""

import numpy as np
import pytest
from transformers import TrainingArguments

from blossomrec_hf.training.fine_tuning import EVALUATIONS, count_steps, windows_to_learn


def learned_from(histories, *args, **kwargs):
    """Windows of histories whose items are numbers from 0, and their targets."""
    windows = windows_to_learn([np.asarray(history) + 2 for history in histories], *args, **kwargs)
    rows = [{"input_ids": row["input_ids"] - 2, "num_known": row.get("num_known", 1)} for row in windows]
    return rows, [item for row in rows for item in row["input_ids"][row["num_known"] :].tolist()]


def test_every_new_event_is_the_target_of_one_window_with_the_past_in_view():
    seed = int(np.random.default_rng().integers(2**32))
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    for _ in range(300):
        num_events, max_length = rng.integers(0, 60), int(rng.integers(2, 30))
        past_end = int(rng.integers(0, num_events + 1))
        history = np.arange(num_events)  # an item is its place
        rows, targets = learned_from([history], [past_end], [num_events], max_length=max_length, replay_share=0)
        assert targets == list(range(max(past_end, 1), num_events))
        for row in rows:
            items, num_known = row["input_ids"], row["num_known"]
            assert 1 <= num_known < len(items) <= max_length
            assert items[0] == 0 or num_known >= max_length // 2


def test_short_histories_are_learned():
    """53 users with 1 to 4 new events each, 19 of them with fewer than three: every new event is a target."""
    past = [np.arange(2, 2 + 40)] * 53
    new = [np.arange(100 + 10 * user, 100 + 10 * user + (user % 4) + 1) for user in range(53)]
    histories = [np.concatenate(both) for both in zip(past, new)]
    _, targets = learned_from(histories, [40] * 53, list(map(len, histories)), max_length=20, replay_share=0)
    assert sorted(targets) == sorted(np.concatenate(new).tolist())


def test_random_crops_and_latest_windows_have_a_new_event():
    histories, past_ends = [np.arange(30), np.arange(50)], [25, 3]
    for window, epochs in (("latest", 1), ("random_crop", 100)):
        windows = windows_to_learn(
            [history + 2 for history in histories], past_ends, [30, 50], max_length=8, window=window, replay_share=0
        )
        targets = set()
        for epoch in range(epochs):
            windows.set_epoch(epoch)
            assert windows.num_targets.min() >= 1 and len(windows) == 2
            targets |= {(n, item - 2) for n in range(2) for item in windows[n]["input_ids"][windows.num_known[n] :]}
        new = {(n, item) for n, past_end in enumerate(past_ends) for item in histories[n][past_end:]}
        assert targets == new if window == "random_crop" else targets < new
    crops = windows_to_learn(
        [history + 2 for history in histories], past_ends, [30, 50], max_length=8, window="random_crop"
    )
    crops.set_epoch(3)  # of a selection
    assert all(len(row["input_ids"]) == 8 for row in crops)


def test_events_of_weight_0_are_not_learned():
    columns = {"weights": [np.arange(100) % 3 == 0]}
    windows = windows_to_learn([np.arange(100)], [40], [100], max_length=10, columns=columns, replay_share=0)
    batch = windows.pack(np.arange(len(windows)), labels=True)
    assert sorted(batch["labels"][batch["labels"] >= 0].tolist()) == [42, 45, *range(48, 100, 3)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_share_of_replayed_events_is_the_one_asked_for(share):
    histories = [np.arange(100)] * 40
    past_ends, train_ends = [80] * 30 + [100] * 10, [100] * 30 + [90] * 10
    _, targets = learned_from(histories, past_ends, train_ends, max_length=10, replay_share=share, seed=3)
    learned = np.array(targets)
    num_new = 30 * 20
    assert (learned >= 80).sum() >= num_new
    assert abs((len(learned) - num_new) - num_new * share / (1 - share)) < 10  # one window more at most
    assert learned.max() == 99 and (learned == 99).sum() == 30  # nothing after the training part
    _, again = learned_from(histories, past_ends, train_ends, max_length=10, replay_share=share, seed=3)
    assert again == learned.tolist()


def test_a_small_log_is_learned_for_more_epochs(tmp_path):
    args = TrainingArguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=3, use_cpu=True)
    assert count_steps(5, args, min_steps=42) == 50
    assert count_steps(801, args, min_steps=42) == 310
    assert count_steps(801, args, min_steps=42) % EVALUATIONS == 0
