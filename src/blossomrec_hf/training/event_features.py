"""Options for what a new model reads of events besides their items: times and types."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.event_table import EventTable, event_type_names
from ..data.splits import target_types
from ..model.configuration_blossomrec import BlossomRecConfig


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(kw_only=True)
class EventFeatureArguments:
    """What a new model reads of the times and types of events."""

    time_features: str | None = field(
        default=None,
        metadata={
            "help": "What the model reads of the times of events, separated by commas: previous_gap, next_gap, next_gap_input, "
            "hour, weekday. By default, nothing."
        },
    )
    time_zone: str = field(default="UTC", metadata={"help": "Time zone of hour and weekday, such as Europe/Berlin."})
    event_types: bool = field(
        default=False,
        metadata={
            "help": "Read the types of events (see event_type). With targets, the model predicts events of their types."
        },
    )

    def event_settings(self, dataset: "EventTable | Dataset") -> dict[str, Any]:
        """
        The settings of `BlossomRecConfig` for times and event types, with the names of the types in the data.

        Raises:
            ValueError: if event types are to be read, but the data has none, or if no time feature reads the time zone.
        """
        features = None
        if self.time_features is not None:
            features = [name.strip() for name in self.time_features.split(",")]
        if self.time_zone != "UTC" and not {"hour", "weekday"} & {*(features or ())}:
            raise ValueError(
                f"`time_zone` is {self.time_zone!r}, but `time_features` is {self.time_features!r}, which does not read it; add "
                "hour or weekday to `time_features`, or omit `time_zone`."
            )
        settings = {"time_features": features, "time_zone": self.time_zone}
        settings |= {"event_types": None, "target_event_types": None}
        if self.event_types:
            names = event_type_names(dataset)
            if names is None:
                raise ValueError(
                    "`event_types` is true, but the data has no event types; name their column with `event_type`."
                )
            settings |= {"event_types": names, "target_event_types": target_types(dataset)}
        return settings


def require_event_columns(config: BlossomRecConfig, column_names: Sequence[str], remedy: str) -> None:
    """
    Raises:
        ValueError: if the data lacks a column that a model of `config` reads. The message ends with the `remedy`.
    """
    if missing := [name for name in config.event_columns if name not in column_names]:
        raise ValueError(
            f"The model reads {' and '.join(missing)} of events, but the data has {', '.join(column_names)}; name the "
            f"columns of the log with `timestamp` and `event_type`, or {remedy}."
        )
