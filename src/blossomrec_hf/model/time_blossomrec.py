"""Times of events: buckets of gaps, hours and weekdays in a time zone, and the units of times."""

import functools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import torch

from .ids_blossomrec import UNKNOWN_TIME


HOUR, DAY = 3600, 86400
BUCKETS_PER_OCTAVE, NUM_OCTAVES = 1.3, 31
# Gaps in seconds at which a bucket begins, from 1 second to 58 years; the bucket before the first is that of gap 0.
GAP_BOUNDS = [round(2 ** (i / BUCKETS_PER_OCTAVE)) for i in range(int(BUCKETS_PER_OCTAVE * NUM_OCTAVES) + 1)]
NUM_GAPS = len(GAP_BOUNDS) + 1

ZONE_ROOM = 512  # changes of a zone's offset from 1970 to 2100; no zone has as many
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_YEAR = 2100
_STEP = 3 * DAY  # no zone has changed its offset and changed it back in less

# Seconds since 1970 have fewer digits until the year 5138; in a finer unit, times since 1973 have more.
MAX_SECONDS = 10**11
_UNITS = {1: "milliseconds", 2: "microseconds", 3: "nanoseconds"}  # by powers of 1,000 per second


@functools.cache
def zone_changes(name: str) -> tuple[list[int], list[int]]:
    """
    The offsets of a time zone from UTC, daylight saving time included: from each of the times on (seconds since 1970),
    local time is UTC plus the offset in seconds. `ZONE_ROOM` each; the last change is repeated.

    Args:
        name: IANA name, such as `"Europe/Berlin"`.

    Raises:
        ValueError: if this machine does not know the time zone.
    """
    try:
        zone = UTC if name == "UTC" else ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # `ZoneInfoNotFoundError` is a `KeyError`
        raise ValueError(
            f"`time_zone` is {name!r}, which this machine does not know; it must be an IANA name such as 'Europe/Berlin' "
            "(and where there is no database of time zones, `pip install tzdata`)."
        ) from error

    def offset(second: int) -> int:
        return round((_EPOCH + timedelta(seconds=second)).astimezone(zone).utcoffset().total_seconds())

    times, offsets = [UNKNOWN_TIME], [offset(0)]
    for end in range(_STEP, int((datetime(_LAST_YEAR, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()), _STEP):
        if (new := offset(end)) == offsets[-1]:
            continue
        before, after = end - _STEP, end
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (middle, after) if offset(middle) == offsets[-1] else (before, middle)
        times.append(after)
        offsets.append(new)
    room = ZONE_ROOM - len(times)
    return times + times[-1:] * room, offsets + offsets[-1:] * room


def gap_buckets(gaps: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The number of each gap's bucket, from 0 to `NUM_GAPS` − 1: how many of `bounds` `[NUM_GAPS − 1]` it reaches."""
    return torch.bucketize(gaps, bounds, right=True)


def local_times(times: torch.Tensor, changes: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Times in seconds since 1970 UTC as seconds of local time, by the table of `zone_changes`."""
    return times + offsets[torch.bucketize(times, changes, right=True) - 1]


def hours(local: torch.Tensor) -> torch.Tensor:
    """Hour of the day, 0 to 23, of local times in seconds."""
    return local % DAY // HOUR


def weekdays(local: torch.Tensor) -> torch.Tensor:
    """Day of the week, 0 for Monday to 6, of local times in seconds."""
    return (local // DAY + 3) % 7  # the first of January 1970 was a Thursday


def unit_problem(latest: int, trained: int) -> str | None:
    """
    What is wrong with the unit of times, if anything is.

    Args:
        latest: the latest of the times.
        trained: the latest time of the training data; 0 if it is not known.
    """
    if latest >= MAX_SECONDS:
        power = next((n for n in _UNITS if latest < MAX_SECONDS * 1000**n), max(_UNITS))
        return f"which is in {_UNITS[power]}; times are in seconds, so divide them by {1000**power:,}."
    if trained >= MAX_SECONDS // 1000 and 0 < latest < trained / 300:
        factor = 1000 if latest > trained / 3000 else None
        how = "1,000 times less" if factor else "far less"
        remedy = "multiply them by 1,000." if factor else "give seconds since 1970, as in training."
        return f"{how} than the latest time of the training data, {trained}; {remedy}"
    return None
