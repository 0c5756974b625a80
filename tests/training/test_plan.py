"""Every history once an epoch, in one of the parts of one step."""

import numpy as np
import pytest
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
    assert {plan.largest_part() for plan in plans} == {max(sizes)}


def test_a_view_with_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none with an item to predict"):
        args = LoopArguments(output_dir=str(tmp_path))
        TrainingLoop(make_model(), [{"input_ids": [5]}, {"input_ids": [1, 0]}], args=args)
