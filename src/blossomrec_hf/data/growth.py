"""A log that grows: sequences in another vocabulary, and new events after those of earlier logs."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, List

from ..model.tokenization_blossomrec import BlossomRecTokenizer
from .event_table import EVENT_COLUMNS, event_type_codes, event_type_names
from .holdout import leave_one_out_ends
from .splits import PARTS, item_counts, part_lengths


logger = logging.getLogger(__name__)

LEAST_TO_LEARN = 2  # new events of a user before the held-out ones


def recode(dataset: Dataset, source: BlossomRecTokenizer, target: BlossomRecTokenizer) -> Dataset:
    """
    A Dataset of [`build_sequences`] in another vocabulary, in memory; the same Dataset where no id changes.

    Args:
        dataset: encoded with `source`.
        target: the vocabulary to encode with. Items that it lacks become `[UNK]`, and the log reports their number.
    """
    old, new = source.get_vocab(), target.get_vocab()
    if old.items() <= new.items():
        return dataset
    ids = np.full(max(old.values()) + 1, target.unk_token_id, np.int32)
    for token, index in old.items():
        ids[index] = new.get(token, target.unk_token_id)
    if unknown := len(old.keys() - new.keys()):
        logger.warning("%d of %d items of the data are not in the vocabulary: [UNK]", unknown, source.num_items)

    def recode_batch(table: pa.Table) -> pa.Table:
        items, offsets = _flatten(table, "input_ids")
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids[items]))
        return table.set_column(table.column_names.index("input_ids"), "input_ids", lists)

    rows = dataset.with_format("arrow").map(recode_batch, batched=True, keep_in_memory=True, features=dataset.features)
    return rows.with_format(None)


def recode_dataset_types(dataset: Dataset, wanted: Sequence[str] | None) -> Dataset:
    """
    A Dataset with the event type ids of a model that reads the types `wanted`, in memory; the same Dataset if no id changes.
    """
    names = event_type_names(dataset)
    if wanted is None or names == list(wanted):
        return dataset
    codes = event_type_codes(names, wanted)

    def recode_batch(table: pa.Table) -> pa.Table:
        types, offsets = _flatten(table, "event_type_ids")
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(codes[types]))
        return table.set_column(table.column_names.index("event_type_ids"), "event_type_ids", lists)

    features = Features(dict(dataset.features) | {"event_type_ids": List(ClassLabel(names=list(wanted)))})
    rows = dataset.with_format("arrow").map(recode_batch, batched=True, keep_in_memory=True, features=features)
    return rows.with_format(None)


def join_logs(old: Dataset | None, new: Dataset) -> Dataset:
    """
    One row per user of either log: the events of `old`, then those that `new` adds.

    An event of `new` that `old` has as well counts once, so `new` may be a week, or the whole log and a week more. With
    times in both, it is the same item (and event type) of the same user in the same second, and events are ordered by time
    (ties: `old` first). Otherwise, a history in `new` that begins with the user's whole history in `old` continues it.

    Args:
        old, new: Datasets of [`build_sequences`] or of this function, with one vocabulary. Without `old`, all events
            are new. User ids are compared as text where one log has integers and the other text.

    Raises:
        ValueError: if both logs have event types, but not the same ones in the same order, or only one has weights or
            baskets.

    Returns:
        `Dataset`, in memory: the users of `new` in its order, then the others, with `user_id`, `input_ids`,
        `timestamps` and other columns of events that both logs have, `past_end` (int32, the number of events before the first new one) and
        `train_end`, `validation_end`, `test_end`. The last two targets of a user, or the baskets with
        them, are held out for validation and test if at least `LEAST_TO_LEARN` new events come before them. All events of
        other users with new events are training. The training part of a user without new events stays as it was, and nothing
        of it is evaluated.
    """
    logs = [data for data in (old, new) if data is not None]
    shared = [name for name in EVENT_COLUMNS if all(name in data.column_names for data in logs)]
    for name, what, options in (("weights", "weights", "targets"), ("basket_starts", "baskets", "group")):
        if name not in shared and any(name in data.column_names for data in logs):
            raise ValueError(
                f"Only one of the earlier log and the new one has {what}; prepare both with the same {options}, or both "
                "without."
            )
    features = {name: new.features[name] for name in shared if name == "event_type_ids"}
    if any(data.features[name] != feature for data in logs for name, feature in features.items()):
        types = [", ".join(data.features["event_type_ids"].feature.names) for data in logs]
        raise ValueError(
            f"The earlier log has the event types {types[0]}, and the new one {types[1]}; prepare both with the same event_types."
        )
    if old is None:
        rows = new.with_format("arrow")[:].select(["user_id", *shared])
        lengths = np.diff(_flatten(rows, "input_ids")[1])
        return _with_parts(rows, lengths, features, past=np.zeros_like(lengths), trained=lengths)
    tables = [data.with_format("arrow")[:] for data in logs]
    users = [pl.from_arrow(table["user_id"]).alias("id") for table in tables]
    if users[0].dtype != users[1].dtype:
        users = [ids.cast(pl.String) for ids in users]
    known = pl.concat([users[1], users[0]]).unique(maintain_order=True).to_frame().with_row_index("user")
    codes = [
        ids.to_frame().join(known, on="id", how="left", maintain_order="left")["user"].to_numpy() for ids in users
    ]
    before, after = (_events(table, code, shared) for table, code in zip(tables, codes))
    timed = "timestamps" in shared
    after = _without_repeats(before, after, timed)
    events = pl.concat([before.with_columns(is_new=False), after.with_columns(is_new=True)])
    events = events.sort("user", *["timestamps"] * timed, "is_new", maintain_order=True)
    if "basket_starts" in shared:  # a new event may be of the second of an earlier one
        new_second = (pl.col("timestamps").diff() != 0).over("user").fill_null(True)
        events = events.with_columns(basket_starts=new_second)
    is_new = pl.col("is_new")
    past = pl.when(is_new.any()).then(is_new.cast(pl.Int8).arg_max()).otherwise(pl.len())
    totals = events.group_by("user", maintain_order=True).agg(pl.len(), past=past)
    offsets = pa.array(np.append(0, totals["len"].cum_sum().to_numpy()), pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, events[name].to_arrow()) for name in shared}
    rows = pa.table({"user_id": known["id"].to_arrow(), **lists})
    trained = np.zeros(len(known), np.int64)
    trained[codes[0]] = part_lengths(old, "train")[0]
    return _with_parts(rows, totals["len"].to_numpy(), features, past=totals["past"].to_numpy(), trained=trained)


def add_item_counts(counts: np.ndarray, dataset: Dataset, old: Dataset | None) -> np.ndarray:
    """
    The item frequencies of a model after it has learned `dataset`; no event counts twice.

    Args:
        counts: int64 [vocab_size], those that the model has.
        dataset: what it learns, made by [`join_logs`] from `old` and new events.
        old: what it learned before, if known. Otherwise, a log in which every item occurs at least as often as in
            `counts` is taken to contain what the model learned before, and its counts replace the old ones; those of
            another log are added.

    Returns:
        int64 [vocab_size].
    """
    learned = item_counts(dataset, len(counts))
    if old is not None:
        return np.maximum(counts + learned - item_counts(old, len(counts)), 0)
    total = np.bincount(_flatten(dataset.with_format("arrow")[:], "input_ids")[0], minlength=len(counts))
    if counts.any() and (total >= counts).all():
        logger.warning(
            "The log has every item at least as often as the model has learned it: nothing is counted twice."
        )
        return learned
    return counts + learned


def read_histories(dataset: Dataset, column: str = "input_ids") -> list[np.ndarray]:
    """All events of each user: a column, by default the vocabulary ids, [events] each."""
    values, offsets = _flatten(dataset.with_format("arrow")[:], column)
    return np.split(values, offsets[1:-1])


def _flatten(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists, and where each list begins; the last offset is the total."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), np.append(0, lists.value_lengths().to_numpy().cumsum())


def _events(table: pa.Table, users: np.ndarray, columns: list[str]) -> pl.DataFrame:
    """One row per event, in the order of the table, with `user` and `columns`."""
    lengths = np.diff(_flatten(table, "input_ids")[1])
    values = {name: pl.from_arrow(table[name].combine_chunks().flatten()) for name in columns}
    return pl.DataFrame({"user": users.repeat(lengths), **values})


def _without_repeats(before: pl.DataFrame, after: pl.DataFrame, timed: bool) -> pl.DataFrame:
    """The events of `after` that `before` does not have, see [`join_logs`]."""
    if timed:
        # The second event of a user with one item at one time repeats the second, not the first.
        key = ["user", "input_ids", "timestamps", *(["event_type_ids"] if "event_type_ids" in after.columns else [])]
        before, numbered = (frame.with_columns(number=pl.int_range(pl.len()).over(key)) for frame in (before, after))
        return numbered.join(
            before.select(*key, "number"), on=[*key, "number"], how="anti", maintain_order="left"
        ).drop("number")
    before, after = (frame.with_columns(place=pl.int_range(pl.len()).over("user")) for frame in (before, after))
    earlier = before.select("user", "place", known="input_ids", length=pl.len().over("user"))
    same = after.join(earlier, on=["user", "place"]).group_by("user")
    same = same.agg(pl.col("length").first(), repeated=(pl.col("input_ids") == pl.col("known")).sum())
    repeats = same.filter(pl.col("repeated") == pl.col("length")).select("user", "length")
    after = after.join(repeats, on="user", how="left", maintain_order="left")
    return after.filter(pl.col("place") >= pl.col("length").fill_null(0)).drop("place", "length")


def _with_parts(
    rows: pa.Table, lengths: np.ndarray, features: dict[str, Any], *, past: np.ndarray, trained: np.ndarray
) -> Dataset:
    """`rows` with the ends of the parts, see [`join_logs`]; `trained` is for users without new events."""
    lengths, past = lengths.astype(np.int64), past.astype(np.int64)
    columns = (_flatten(rows, name)[0] if name in rows.column_names else None for name in ("weights", "basket_starts"))
    held_out = leave_one_out_ends(lengths, *columns)
    enough = held_out["train"] - past >= LEAST_TO_LEARN
    test_end = np.where(lengths > past, lengths, trained)
    ends = {f"{part}_end": np.where(enough, held_out[part], test_end) for part in PARTS}
    for name, values in {"past_end": past, **ends}.items():
        rows = rows.append_column(name, pa.array(values, pa.int32()))
    return Dataset(rows, info=DatasetInfo(features=Features(Features.from_arrow_schema(rows.schema) | features)))
