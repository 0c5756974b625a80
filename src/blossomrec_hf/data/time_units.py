"""Units of times and durations."""

import re
from datetime import UTC, datetime


_YEAR_2100 = 4_102_444_800  # in seconds
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def time_unit(median: float) -> str:
    """The unit of a log's times: the one in which their median is before 2100. Counters (1, 2, 3 …) are seconds."""
    return next((unit for unit, scale in UNITS.items() if median <= _YEAR_2100 * scale), "ns")


def latest_time(unit: str | None) -> int:
    """The start of the year 2100 in a unit; a later number is not the time of an event."""
    return _YEAR_2100 * UNITS[unit or "s"]


def duration_seconds(name: str, duration: str) -> float:
    """
    A duration such as 90s, 30m, 12h or 7d, in seconds.

    Raises:
        ValueError: if it is no duration; `name` is the option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", duration.strip())
    if match is None:
        raise ValueError(
            f"{name} is {duration!r}; it may be a number of seconds, minutes, hours or days, such as 90s, 30m, 12h or 7d."
        )
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


def as_seconds(name: str, time: float | str, or_else: str | None = None) -> float:
    """
    A number of seconds, or a date as ISO 8601 writes it (UTC if it has no time zone), in seconds since 1970.

    Args:
        name: the option, for the error message.
        or_else: what else the option may be, for the error message.

    Raises:
        ValueError: if it is neither.
    """
    try:
        return float(time)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(time)
    except ValueError as error:
        others = "a number of seconds or a date such as 2024-01-31"
        if or_else is not None:
            others = f"a number of seconds, a date such as 2024-01-31, or {or_else}"
        raise ValueError(f"{name} is {time!r}; it may be {others}.") from error
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()
