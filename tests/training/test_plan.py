"""Every history once an epoch, in one of the parts of one step."""

from collections import Counter
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import make_model

from blossomrec_hf.batches import HistoryStore
from blossomrec_hf.data import split
from blossomrec_hf.training import LoopArguments, TrainingLoop
from blossomrec_hf.training.plan import StepPlan


def make_plan(log, process_index=0, **changes):
    args = LoopArguments(max_length=20, tokens_per_step=200, **changes)
    histories = HistoryStore.from_rows(split(log[0], "train"), max_length=20)
    return StepPlan(histories, args, vocab_size=62, num_processes=3, process_index=process_index)


def test_a_step_is_cut_into_parts_without_loss(log):
    plans = [make_plan(log, index, gradient_accumulation_steps=2) for index in range(3)]
    for rows in plans[0].epoch_steps(3):
        parts = [part for plan in plans for part in plan.own_parts(rows)]
        assert len(parts) == 6
        assert np.concatenate(parts).tolist() == rows.tolist()
    every_row = np.concatenate(plans[0].epoch_steps(3))
    assert sorted(every_row) == sorted(plans[0].trainable)
    assert [r.tolist() for r in plans[1].epoch_steps(3)] == [r.tolist() for r in plans[0].epoch_steps(3)]
    assert [r.tolist() for r in plans[0].epoch_steps(3)] != [r.tolist() for r in plans[0].epoch_steps(4)]


def test_the_largest_part_is_that_of_any_process(log):
    plans = [make_plan(log, index) for index in range(3)]
    sizes = [
        plan.histories.lengths[part].sum()
        for plan in plans
        for rows in plan.epoch_steps(0)
        for part in plan.own_parts(rows)
    ]
    (largest,) = {plan.largest_part() for plan in plans}
    assert max(sizes) <= largest <= 65 / 64 * max(sizes) + 1


def test_the_steps_of_later_epochs_have_no_more_items_than_the_largest_part():
    """A step that has more is compiled and captured again, which takes longer than an epoch."""
    lengths = np.random.default_rng().lognormal(4, 1, size=3000).astype(np.int64).clip(2, 500)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    histories = HistoryStore(np.full(offsets[-1], 2, np.int32), offsets)
    plan = StepPlan(histories, LoopArguments(max_length=500, tokens_per_step=16384), vocab_size=3)
    sizes = [lengths[rows].sum() for epoch in range(20) for rows in plan.epoch_steps(epoch)]
    assert max(sizes) <= plan.largest_part() <= 16384


def test_a_view_with_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none with an item to predict"):
        args = LoopArguments(output_dir=str(tmp_path))
        TrainingLoop(make_model(), [{"input_ids": [5]}, {"input_ids": [1, 0]}], args=args)


class Noting(TrainingLoop):
    """Notes the targets of each step instead of learning them."""

    def training_step(self, rows):
        for part in self.plan.own_parts(rows):
            if len(part):
                batch = self.plan.histories.pack(part, labels=True)
                self.noted.append((self.state.epoch, batch["labels"][batch["labels"] >= 0].tolist()))
        self.state.step += 1
        self.state.step_in_epoch += 1

    def log(self):
        pass


def targets_of_epochs(rows: list[dict], num_epochs: int, **arguments) -> list[Counter]:
    """How often a run has each item as a target, in each epoch."""
    with TemporaryDirectory() as folder:
        args = LoopArguments(
            output_dir=folder, num_train_epochs=num_epochs, tokens_per_step=64, save_seconds=1e9, **arguments
        )
        loop = Noting(make_model(vocab_size=1000), rows, args=args)
        loop.noted = []
        loop.run()
    return [Counter(item for n, part in loop.noted if n == epoch for item in part) for epoch in range(num_epochs)]


def rows_of(lengths: list[int], is_target: np.ndarray) -> list[dict]:
    """Histories in which every event is another item, with weights; and the items to predict."""
    ends = np.cumsum(lengths)
    return [
        {"input_ids": np.arange(end - length, end) + 2, "weights": is_target[end - length : end].astype(np.float32)}
        for length, end in zip(lengths, ends)
    ]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=8),
    st.integers(2, 30),
    st.sampled_from([1.0, 0.5]),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_with_overlapping_windows_each_event_is_a_target_once_per_epoch(lengths, max_length, share, parts, seed):
    is_target = np.random.default_rng(seed).random(sum(lengths)) < share
    is_target[1] = True
    rows = rows_of(lengths, is_target)
    found = targets_of_epochs(rows, 2, windows="overlapping", max_length=max_length, gradient_accumulation_steps=parts)
    wanted = Counter(
        item for row in rows for item in row["input_ids"][1:] if row["weights"][item - row["input_ids"][0]]
    )
    assert found == [wanted, wanted]


def test_random_crops_change_with_the_epoch_and_reach_the_only_target():
    is_target = np.zeros(70, bool)
    is_target[[20, 45, 62]] = True  # one per history, which most crops miss
    found = targets_of_epochs(rows_of([40, 20, 10], is_target), 60, windows="random_crop", max_length=5)
    assert set().union(*found) == {22, 47, 64} and len(set(map(str, found))) > 1
    everything = targets_of_epochs(rows_of([40, 20, 10], np.ones(70, bool)), 60, windows="random_crop", max_length=5)
    assert all(sum(epoch.values()) == 12 for epoch in everything)
    assert set().union(*everything) == set(range(2, 72)) - {2, 42, 62}
