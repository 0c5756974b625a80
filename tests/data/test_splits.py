"""Splits are views: what each part reads and predicts, checked against lists cut by hand."""

import logging

import numpy as np
import polars as pl
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.data import (
    EventTable,
    build_sequences,
    has_users,
    hold_out_nothing,
    item_counts,
    repeat_share,
    split,
    split_by_leave_one_out,
    split_by_time,
    split_by_user,
)
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.data.overview import describe, summary
from blossomrec_hf.training import LogArguments


@pytest.fixture
def dataset() -> Dataset:
    """Users a, b, c with 5, 2 and 1 events; ids by frequency: x 2, y 3, z 4, w 5."""
    log = pl.DataFrame(
        {
            "user": ["a"] * 5 + ["b"] * 2 + ["c"],
            "item": ["x", "y", "x", "z", "w", "x", "y", "y"],
            "timestamp": [10, 20, 30, 40, 50, 35, 60, 70],
        }
    )
    return build_sequences(log)[0]


def test_leave_one_out(dataset, caplog):
    train, validation, test = (split(dataset, part) for part in ("train", "validation", "test"))
    assert train[:] == {"user_id": ["a"], "input_ids": [[2, 3, 2]], "target_ids": [[]]}
    assert validation[:] == {
        "user_id": ["a"], "input_ids": [[2, 3, 2]], "target_ids": [[4]], "seen_ids": [[2, 3, 2]]
    }  # fmt: skip
    assert test[:] == {
        "user_id": ["a", "b"],
        "input_ids": [[2, 3, 2, 4], [2]],
        "target_ids": [[5], [3]],
        "seen_ids": [[2, 3, 2, 4], [2]],
    }
    assert "dropped 2 of 3 users" in caplog.text


def test_max_length_cuts_what_is_read_and_not_what_is_seen(dataset):
    assert split(dataset, "test", 2)[0] == {
        "user_id": "a", "input_ids": [2, 4], "target_ids": [5], "seen_ids": [2, 3, 2, 4]
    }  # fmt: skip


def test_counts_are_those_of_training(dataset):
    assert item_counts(dataset, 6).tolist() == [0, 0, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="vocab_size is 4"):
        item_counts(split_by_time(dataset, 100, 100), 4)


def test_the_share_of_repeats_is_that_of_the_test_targets_in_their_users_history(dataset):
    assert repeat_share(dataset) == 0  # of a and b, w and y are new to them
    log = pl.DataFrame({"user": list("aaabbbccd"), "item": list("xyxxyzyyx"), "timestamp": range(9)})
    dataset = build_sequences(log)[0]
    assert repeat_share(dataset) == 2 / 3  # x of a, y of c, and not z of b; d has one event
    # By time, users without an event before do not count: only a has one, whose later events are y and x, or x.
    assert repeat_share(split_by_time(dataset, 1, 1)) == 1 / 2
    assert repeat_share(split_by_time(dataset, 2, 2)) == 1
    # Where nobody has a test target, the latest events count.
    assert repeat_share(split_by_time(dataset, 100, 100)) == 2 / 3


def test_a_built_folder_has_the_share_of_repeats(tmp_path):
    log = pl.DataFrame({"user": list("aaabbb"), "item": list("xyxxyz"), "timestamp": range(6)})
    build_sequences(log, output_dir=tmp_path / "built")
    assert FilterReport.load(tmp_path / "built").repeat_share == 0.5
    log_args = LogArguments(data=str(tmp_path / "built"))
    assert log_args.repeat_share(log_args.build()[0]) == 0.5
    assert ("Test targets that already occur in their user's history", "50.0%") in summary(
        describe(log_args.build()[0]), FilterReport.load(tmp_path / "built")
    )


def test_by_time(dataset, caplog):
    caplog.set_level(logging.INFO)
    timed = split_by_time(dataset, 30, 60)
    ends = [timed[name] for name in ("train_end", "validation_end", "test_end")]
    assert [list(column) for column in ends] == [[2, 0, 0], [5, 1, 0], [5, 2, 1]]
    assert "2 of 3 users have no event before 30" in caplog.text
    assert split(timed, "validation")[:]["target_ids"] == [[2, 4, 5]]
    assert split(timed, "test")[:] == {"user_id": ["b"], "input_ids": [[2]], "target_ids": [[3]], "seen_ids": [[2]]}
    assert [list(column) for column in (split_by_leave_one_out(timed)["train_end"], dataset["train_end"])] == [
        [3, 0, 0]
    ] * 2


def test_items_never_trained_are_unknown_and_no_target(dataset, caplog):
    timed = split_by_time(dataset, 30, 50)
    counts = item_counts(timed, 6)
    assert counts.tolist() == [0, 0, 1, 1, 0, 0]
    assert split(timed, "validation", counts=counts)[:]["target_ids"] == [[2]]  # z was never trained
    assert "1 of 3 targets never seen in training" in caplog.text
    both = split(timed, "test", counts=counts)[:]
    assert both["user_id"] == ["b"]  # the only target of a is w
    assert split(timed, "test")[0]["input_ids"] == [2, 3, 2, 4]
    longer = split(split_by_time(dataset, 30, 60), "test", counts=np.array([0, 0, 0, 1, 0, 0]))[:]
    assert longer["input_ids"] == [[1]] and longer["target_ids"] == [[3]]


def test_by_user():
    log = pl.DataFrame({"user": np.repeat(np.arange(300), 4), "item": np.tile([1, 2, 3, 4], 300)})
    dataset = split_by_user(build_sequences(log)[0], validation=0.2, test=0.3, seed=1)
    rows = {part: split(dataset, part)[:] for part in ("train", "validation", "test")}
    users = [set(rows[part]["user_id"]) for part in rows]
    assert sum(map(len, users)) == 300 and set.union(*users) == set(range(300))
    assert 40 <= len(users[1]) <= 80 and 65 <= len(users[2]) <= 115
    assert rows["train"]["input_ids"][0] == [2, 3, 4, 5]
    for part in ("validation", "test"):
        assert rows[part]["input_ids"][0] == [2, 3, 4] and rows[part]["target_ids"][0] == [5]
    assert item_counts(dataset, 6).tolist() == [0, 0] + [len(users[0])] * 4


def test_nothing_is_held_out(dataset):
    assert [has_users(dataset, part) for part in ("train", "validation", "test")] == [True] * 3
    everything = hold_out_nothing(dataset)
    assert split(everything, "train")[:] == {
        "user_id": ["a", "b"], "input_ids": [[2, 3, 2, 4, 5], [2, 3]], "target_ids": [[], []]
    }  # fmt: skip
    assert item_counts(everything, 6).tolist() == [0, 0, 3, 3, 1, 1]
    assert [has_users(everything, part) for part in ("train", "validation", "test")] == [True, False, False]
    by_user = split_by_user(dataset, validation=0.4, test=0.4)
    assert hold_out_nothing(by_user)[:] == everything[:]


def test_the_training_view_has_the_weights_and_baskets(dataset):
    weights = [[place % 2 for place in range(len(row["input_ids"]))] for row in dataset]
    weighted = hold_out_nothing(dataset.add_column("weights", weights))
    view = split(weighted, "train", max_length=4)
    assert view[:]["weights"] == [[1, 0, 1, 0], [0, 1]]
    assert not {"weights", "basket_starts"} & split(dataset, "train")[0].keys()
    starts = [[place % 2 == 0 for place in range(len(row["input_ids"]))] for row in dataset]
    view = split(hold_out_nothing(dataset.add_column("basket_starts", starts)), "train", max_length=4)
    assert view[:]["basket_starts"] == [[False, True, False, True], [True, False]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=12), st.integers(1, 3))
def test_a_split_by_user_holds_out_whole_baskets(starts, num_targets):
    starts = [[True, *row[1:]] for row in starts]
    items = [[number + 2 for number in range(len(row))] for row in starts]
    lengths = [len(row) for row in starts]
    ends = {f"{part}_end": lengths for part in ("train", "validation", "test")}
    dataset = Dataset.from_dict({"user_id": range(len(items)), "input_ids": items, "basket_starts": starts, **ends})
    for source in (dataset, EventTable.from_dataset(dataset)):
        divided = split_by_user(source, validation=0.4, test=0.4, num_targets=num_targets)
        rows = divided if source is dataset else divided.to_dataset()
        for row, part in zip(rows, rows["part"]):
            length = len(row["input_ids"])
            last = max(length - num_targets, 0)
            history = max(place for place, start in enumerate(row["basket_starts"]) if start and place <= last)
            wanted = history if part else length
            assert row[("test_end", "train_end", "validation_end")[part]] == wanted


def test_splits_survive_saving(dataset, tmp_path):
    split_by_time(dataset, 30, 60).save_to_disk(tmp_path / "timed")
    assert split(load_from_disk(tmp_path / "timed"), "validation")[:]["target_ids"] == [[2, 4, 5]]


def test_refusals(dataset):
    with pytest.raises(ValueError, match="part is 'dev'"):
        split(dataset, "dev")
    with pytest.raises(ValueError, match="max_length is 0"):
        split(dataset, "test", 0)
    with pytest.raises(ValueError, match="lacks input_ids"):
        split(Dataset.from_dict({"user_id": [1]}), "train")
    with pytest.raises(ValueError, match='part "train": it has 2 users, the longest history has 2 items, .*4 in all'):
        split(dataset.select([1, 2]), "train")
    with pytest.raises(ValueError, match='part "test": it has 1 users, the longest history has 1 items, .*`user`'):
        split(dataset.select([2]), "test")
    with pytest.raises(ValueError, match="no event is before"):
        split_by_time(dataset, 5, 6)
    with pytest.raises(ValueError, match="before validation_from"):
        split_by_time(dataset, 50, 6)
    with pytest.raises(ValueError, match="no column timestamps"):
        split_by_time(dataset.remove_columns("timestamps"), 5, 6)
    with pytest.raises(ValueError, match="less than 1 together"):
        split_by_user(dataset, validation=0.5, test=0.5)
