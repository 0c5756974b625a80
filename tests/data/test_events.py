"""Event types, weights, targets, sessions, baskets and repeats on random logs, against plain Python."""

import numpy as np
import polars as pl
import pytest
from datasets import load_from_disk
from history_cases import ROWS, TYPES, ends_of, history_of
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.data import EventTable, build_sequences, split, split_by_leave_one_out
from blossomrec_hf.data.growth import join_logs


@settings(max_examples=80, deadline=None)
@given(
    rows=ROWS,
    options=st.fixed_dictionaries(
        {},
        optional={
            "event_types": st.sampled_from(["buy,view", "cart,view,buy"]),
            "targets": st.sampled_from(["buy", "buy,view"]),
            "type_weights": st.sampled_from(["view=0.1,buy=2", "view=0"]),
            "weight": st.just("weight"),
            "session_gap": st.just("2.5s"),
            "group": st.just("timestamp"),
            "collapse_repeats": st.just(True),
        },
    ),
    scale=st.sampled_from([1, 1000]),
    partition_rows=st.sampled_from([1, 7, 1000]),
)
def test_columns_of_events_are_those_of_plain_python(rows, options, scale, partition_rows):
    start = 1_600_000_000
    kept = [row for row in rows if row[2] in options.get("event_types", "view,cart,buy").split(",")]
    log = pl.DataFrame(rows, ["user", "item", "event_type", "time", "weight"], orient="row")
    time = (pl.col("time") + start) * scale
    log = log.with_columns(time=time.cast(pl.Int64) if scale == 1000 else time)
    names = list(dict.fromkeys(row[2] for row in kept))
    names = options["event_types"].split(",") if "event_types" in options else names
    needed = [name for name in TYPES if name in options.get("targets", "") + options.get("type_weights", "")]
    if not kept or any(name not in names for name in needed):
        with pytest.raises(ValueError, match="leaves nothing|is no event type of the log; it has"):
            build_sequences(log, event_type="event_type", **options)
        return
    dataset, tokenizer = build_sequences(log, event_type="event_type", partition_rows=partition_rows, **options)
    assert dataset.features["event_type_ids"].feature.names == names
    wanted = {"timestamps", "event_type_ids"}
    wanted |= {"weights"} if options.keys() & {"targets", "type_weights", "weight"} else set()
    wanted |= {"session_starts"} if "session_gap" in options else set()
    wanted |= {"basket_starts"} if "group" in options else set()
    assert set(dataset.column_names) - {"user_id", "input_ids", "train_end", "validation_end", "test_end"} == wanted
    users = list(dict.fromkeys(row[0] for row in kept))
    assert list(dataset["user_id"]) == users
    for row, user in zip(dataset, users):
        history = history_of([event for event in kept if event[0] == user], options)
        assert tokenizer.decode_items(row["input_ids"]) == [event["item"] for event in history]
        for name in wanted:
            values = [event[name] - (0 if name != "timestamps" else -start) for event in history] if name != "event_type_ids" else [
                names.index(event[name]) for event in history
            ]  # fmt: skip
            assert row[name] == pytest.approx(values)
        assert [row[f"{part}_end"] for part in ("train", "validation", "test")] == ends_of(history, options)
    assert split_by_leave_one_out(dataset)[:] == dataset[:]
    table = split_by_leave_one_out(EventTable.from_dataset(dataset))
    assert table.users["test_end"].tolist() == list(dataset["test_end"])


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_views_predict_targets_alone(rows):
    """Of the events of validation and test, those that are targets; their history has every event before."""
    kinds = {row[2] for row in rows}
    if "buy" not in kinds:
        return
    log = pl.DataFrame(rows, ["user", "item", "event", "time", "weight"], orient="row")
    dataset, tokenizer = build_sequences(log, event_type="event", targets="buy")
    users = list(dict.fromkeys(row[0] for row in rows))
    for source in (dataset, EventTable.from_dataset(dataset)):
        for part, held_out in (("test", 1), ("validation", 2)):
            expected = []
            for user in users:
                history = history_of([row for row in rows if row[0] == user], {"targets": "buy"})
                places = [n for n, event in enumerate(history) if event["event_type_ids"] == "buy"]
                if len(places) >= held_out and places[-held_out] > 0:
                    place = places[-held_out]
                    expected.append((user, [e["item"] for e in history[:place]], [history[place]["item"]]))
            if not expected:
                with pytest.raises(ValueError, match=f'no user with enough items for the part "{part}"'):
                    split(source, part)
                continue
            view = split(source, part, columns=["event_type_ids"])
            found = [
                (row["user_id"], tokenizer.decode_items(list(row["input_ids"])), tokenizer.decode_items(list(row["target_ids"])))
                for row in (view[n] for n in range(len(view)))
            ]  # fmt: skip
            assert found == expected


def test_columns_survive_saving_splitting_and_joining(tmp_path):
    rng = np.random.default_rng(5)
    log = pl.DataFrame(
        {
            "user": rng.integers(0, 20, 900), "item": rng.integers(0, 30, 900), "time": rng.integers(0, 10**6, 900),
            "kind": rng.choice(TYPES, 900),
        }
    )  # fmt: skip
    options = {
        "event_type": "kind",
        "event_types": "view,cart,buy",
        "type_weights": "cart=.5",
        "session_gap": "30m",
        "group": "timestamp",
    }
    memory, _ = build_sequences(log, **options)
    saved, _ = build_sequences(log, output_dir=tmp_path / "log", partition_rows=100, **options)
    loaded = load_from_disk(tmp_path / "log")
    assert loaded.features == memory.features == saved.features and loaded[:] == memory[:]
    assert len(memory.column_names) == 10
    view = split(
        loaded, "test", 7, columns=["timestamps", "event_type_ids", "weights", "session_starts", "basket_starts"]
    )
    by_user = {row["user_id"]: row for row in loaded}
    for row in view:  # without the users who have no target
        stored = by_user[row["user_id"]]
        end = stored["validation_end"]
        for name in ("timestamps", "event_type_ids", "weights", "session_starts", "basket_starts"):
            assert row[name] == stored[name][max(end - 7, 0) : end]
    later, _ = build_sequences(log.with_columns(pl.col("time") + 10**6), **options)
    joined = join_logs(memory, later)
    assert joined.features["event_type_ids"] == memory.features["event_type_ids"]
    for row in joined:
        first = memory[list(memory["user_id"]).index(row["user_id"])]
        assert row["event_type_ids"] == first["event_type_ids"] * 2 and row["weights"] == first["weights"] * 2
    other, _ = build_sequences(log, **options | {"event_types": "buy,cart,view"})
    with pytest.raises(ValueError, match="has the event types view, cart, buy, and the new one buy, cart, view"):
        join_logs(memory, other)


def test_events_after_the_last_target_are_counted(caplog):
    log = pl.DataFrame(
        {"user": [1] * 4 + [2] * 2, "item": list("abcdef"), "event": ["view", "buy", "view", "view", "view", "view"]}
    )
    dataset, _ = build_sequences(log, event_type="event", targets="buy")
    assert list(dataset["test_end"]) == [2, 0]
    said = "4 events come after the last target of their user and are dropped from every part"
    assert said in dataset.info.description and said in caplog.text
    split(dataset, "test")
    assert "test: dropped 1 of 2 users: 1 without an event before the targets" in caplog.text


@pytest.mark.parametrize("name", ["event_type", "behaviour", "Event Type", "action"])
def test_a_column_that_looks_like_event_types_is_named(caplog, name):
    log = pl.DataFrame({"user": [1, 1], "item": [2, 3], name: ["view", "buy"]})
    build_sequences(log)
    assert (
        f"the column '{name}' looks like event types, which are not read; read them with event_type='{name}' (--event_type {name})"
        in caplog.text
    )
    caplog.clear()
    build_sequences(log, event_type=name)
    assert "looks like" not in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"targets": "buy"}, "targets is buy, but source has no event_type known; name its column with event_type=…"),
        ({"event_type": "kind"}, "event_type='kind' is no column of source"),
        ({"event_type": "event", "event_types": "view", "targets": "buy"}, "targets has 'buy', which is not among event_types"),
        ({"event_type": "event", "targets": "sale"}, "targets has 'sale', which is no event type of the log; it has view, buy"),
        ({"event_type": "event", "type_weights": "view"}, "type_weights is 'view'; it may be types and weights"),
        ({"event_type": "event", "type_weights": "view=-1"}, "type_weights is 'view=-1'"),
        ({"event_type": "event", "event_types": "view,,buy"}, "event_types is 'view,,buy'; give different names"),
        ({"session_gap": "30"}, "session_gap is '30'; it may be a number of seconds, minutes, hours or days"),
        ({"session_gap": "30m"}, "session_gap is 30m, but the log is read without times"),
        ({"group": "timestamp"}, "group is timestamp, but the log is read without times"),
        ({"group": "order"}, "group is 'order'; it may be"),
        ({"weight": "event"}, "row 0: not a usable weight .weight 'view'"),
    ],
)  # fmt: skip
def test_options_of_events_are_checked(tmp_path, options, said):
    log = pl.DataFrame({"user": [1, 1], "item": [2, 3], "event": ["view", "buy"]})
    with pytest.raises(ValueError, match=said):
        build_sequences(log, output_dir=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_types_and_weights_are_bad_rows():
    log = pl.DataFrame(
        {"user": 1, "item": range(6), "kind": ["a", None, " ", "NULL", "b", "b"], "w": [1, 1, 1, 1, -1, None]}
    )
    with pytest.raises(ValueError, match="row 1: not a usable event_type .event_type None"):
        build_sequences(log, event_type="kind", weight="w")
    dataset, _ = build_sequences(log, event_type="kind", weight="w", on_bad_rows="skip")
    assert dataset["weights"][:] == [[1.0]]
    assert "Bad rows: 3 with no usable event_type, 2 with no usable weight" in dataset.info.description
