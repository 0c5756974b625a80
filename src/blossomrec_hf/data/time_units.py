"""The unit of a log's times, from their size."""

_YEAR_2100 = 4_102_444_800  # in seconds
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def time_unit(median: float) -> str:
    """The unit of a log's times: the one in which their median is before 2100. Counters (1, 2, 3 …) are seconds."""
    return next((unit for unit, scale in UNITS.items() if median <= _YEAR_2100 * scale), "ns")


def latest_time(unit: str | None) -> int:
    """The start of the year 2100 in a unit; a later number is not the time of an event."""
    return _YEAR_2100 * UNITS[unit or "s"]
