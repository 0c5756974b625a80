"""Sorted events of users as rows of a Dataset: one row per user, one list per column of events."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import ClassLabel, Features, List

from .event_table import USERS_A_BATCH
from .filters import FilterReport
from .holdout import given_ends, leave_one_out_ends
from .options import EventOptions
from .partitions import Partition, runs
from .time_units import UNITS


@dataclass(frozen=True)
class EventColumns:
    """
    Computes the columns of a Dataset from the stored columns of events.

    Args:
        options ([`EventOptions`]): the options of the build.
        time_unit (`str`, *optional*): unit of the stored times.
        types (`list[str]`): the event types, by code.

    Raises:
        ValueError: if `targets` or `type_weights` name an event type that the log does not have.
    """

    options: EventOptions
    time_unit: str | None
    types: list[str]

    def __post_init__(self) -> None:
        for name, types in (("targets", self.options.target_list), ("type_weights", self.options.weights_by_type)):
            if missing := [type for type in types or () if type not in self.types]:
                raise ValueError(
                    f"{name} has {missing[0]!r}, which is no event type of the log; it has {', '.join(self.types[:20])}."
                )

    def weights_by_code(self) -> np.ndarray | None:
        """float32 [types]: the weight of each type, 0 for types that are not predicted; `None` if all weights are 1."""
        given, targets = self.options.weights_by_type, self.options.target_list
        if not given and targets is None:
            return None
        return np.array([given.get(t, 1.0) * (targets is None or t in targets) for t in self.types], np.float32)

    def compute(self, stored: Mapping[str, np.ndarray], starts: np.ndarray) -> dict[str, np.ndarray]:
        """
        The columns of events besides `input_ids`.

        Args:
            stored: columns of sorted events, see [`~data.ingest.Interactions`].
            starts: int [users], the index of each user's first event.

        Returns:
            those that are known, arrays [events]: `timestamps` (int64 seconds), `event_type_ids` (int64), `weights` (float32),
            `session_starts` and `basket_starts` (bool).
        """
        columns, weights = {}, None
        if "time" in stored:
            columns["timestamps"] = to_seconds(stored["time"], self.time_unit)
        if "event_type" in stored:
            columns["event_type_ids"] = stored["event_type"].astype(np.int64)
            by_code = self.weights_by_code()
            weights = None if by_code is None else by_code[stored["event_type"]]
        if "weight" in stored:
            weights = stored["weight"] if weights is None else weights * stored["weight"]
        if weights is not None:
            columns["weights"] = weights
        if self.options.gap_seconds is not None:
            gap = self.options.gap_seconds * UNITS[self.time_unit or "s"]
            columns["session_starts"] = _begins(np.diff(stored["time"]) > gap, starts)
        if self.options.group == "timestamp":
            apart = np.diff(columns["timestamps"]) != 0
            if "part" in stored:  # a given split divides what happened in one second
                apart |= np.diff(stored["part"]) != 0
            columns["basket_starts"] = _begins(apart, starts)
        return columns


def to_seconds(times: np.ndarray, unit: str | None) -> np.ndarray:
    """Times of a unit in whole seconds (int64), rounded down."""
    if unit in (None, "s") and times.dtype == np.int64:
        return times
    return (times // UNITS[unit or "s"]).astype(np.int64)


def _begins(apart: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool [events]: whether an event is the first of its user or `apart` (bool [events - 1]) from the one before."""
    begins = np.append(True, apart)
    begins[starts] = True
    return begins


class RowMaker:
    """
    Makes rows of a Dataset from sorted events, and counts what the report names.

    Args:
        events ([`EventColumns`]): the columns besides `input_ids`.
        report ([`FilterReport`]): gets the number of events after the last target of their user, and of those that are
            earlier than an event of an earlier part.
    """

    def __init__(self, events: EventColumns, report: FilterReport) -> None:
        self.events, self.report = events, report
        self.unused = self.early = 0

    def rows(
        self,
        user_ids: pa.Array,
        input_ids: np.ndarray,
        stored: Mapping[str, np.ndarray],
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> pa.Table:
        """
        One row per user, with a list per column of events and the ends of the given split or of leave-one-out.

        Args:
            user_ids: the ids of the users.
            input_ids: int32 [events], the vocabulary ids.
            stored: columns of sorted events, see [`~data.ingest.Interactions`].
            starts, lengths: int [users], the index of each user's first event, and the number of events.
        """
        columns = {"input_ids": input_ids, **self.events.compute(stored, starts)}
        offsets = pa.array(np.append(starts, lengths.sum()), pa.int32())
        rows = {"user_id": user_ids}
        rows |= {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        if "part" in stored:
            ends = given_ends(stored["part"], starts)
            self.early += _count_early(stored, starts)
        else:
            ends = leave_one_out_ends(lengths, columns.get("weights"), columns.get("basket_starts"))
        rows |= {f"{part}_end": pa.array(end, pa.int32()) for part, end in ends.items()}
        self.unused += int(lengths.sum() - ends["test"].sum())
        table = pa.table(rows)
        if "event_type_ids" not in columns:
            return table
        features = Features.from_arrow_schema(table.schema)
        features |= {"event_type_ids": List(ClassLabel(names=self.events.types))}
        return table.replace_schema_metadata(Features(features).arrow_schema.metadata)

    def note_counts(self) -> None:
        """Adds the counts to the report."""
        if self.unused:
            self.report.note(
                [f"{self.unused:,} events come after the last target of their user and are dropped from every part"]
            )
        if self.early:
            self.report.note(
                [
                    f"in {self.early:,} places, a given part of a user begins before the part before it ends, so that a "
                    "model reads later events to predict earlier ones"
                ]
            )


def user_rows(
    parts: list[Partition],
    user_ids: pl.Series,
    vocabulary: np.ndarray,
    events: EventColumns,
    report: FilterReport,
) -> Iterator[pa.Table]:
    """
    Yields Arrow tables of `USERS_A_BATCH` users or fewer, see [`RowMaker`].

    Args:
        parts: the events, sorted.
        user_ids: the ids of the user codes.
        vocabulary: int32 [items], the vocabulary id of each item code.
    """
    maker = RowMaker(events, report)
    id_type = pa.int64() if user_ids.dtype.is_integer() else pa.string()
    for part in parts:
        for stored in _some_users(part):
            starts, lengths = runs(stored["user"])
            ids = user_ids[stored["user"][starts]].to_arrow().cast(id_type)
            yield maker.rows(ids, vocabulary[stored["item"]], stored, starts, lengths)
    maker.note_counts()


def _some_users(part: Partition) -> Iterator[dict[str, np.ndarray]]:
    """Yields the events of a part, those of `USERS_A_BATCH` users at a time; small arrays take less time to allocate."""
    stored = part.load()
    starts, _ = runs(stored["user"])
    bounds = np.append(starts[::USERS_A_BATCH], stored["user"].size)
    for start, stop in zip(bounds, bounds[1:]):
        some = {name: column[start:stop] for name, column in stored.items()}
        if "time" in some and some["time"].dtype == np.uint32:
            some["time"] = some["time"].astype(np.int64)  # differences may be negative
        yield some


def _count_early(stored: Mapping[str, np.ndarray], starts: np.ndarray) -> int:
    """The number of events that are earlier than the one before them in their history, which is of an earlier part."""
    if "time" not in stored:
        return 0
    early = np.diff(stored["time"]) < 0
    early[starts[1:] - 1] = False
    return int(early.sum())
