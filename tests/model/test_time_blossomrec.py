"""Buckets of gaps, and hours and weekdays in a time zone, against Python's own."""

import random
import re
from datetime import datetime
from zoneinfo import ZoneInfo, available_timezones

import pytest
import torch

from blossomrec_hf.model import time_blossomrec
from blossomrec_hf.model.time_blossomrec import (
    GAP_BOUNDS,
    NUM_GAPS,
    ZONE_ROOM,
    gap_buckets,
    hours,
    local_times,
    unit_problem,
    weekdays,
    zone_changes,
)


@pytest.mark.parametrize(
    "name",
    ["UTC", "Europe/Berlin", "America/St_Johns", "Africa/Casablanca", "Pacific/Apia", "Australia/Lord_Howe", None],
)
def test_hours_and_weekdays_are_those_of_the_zone(name):
    name = random.choice(sorted(available_timezones())) if name is None else name
    print(name)
    changes, offsets = zone_changes(name)
    assert len(changes) == len(offsets) == ZONE_ROOM
    around = [change + step for change in changes[1:] if 0 < change < 4 * 10**9 for step in (-1, 0, 1)]
    times = torch.tensor([*around, *(random.randrange(-(10**8), 4 * 10**9) for _ in range(2000))])
    times = times[times >= 0] if name != "UTC" else times  # tables begin in 1970
    local = local_times(times, torch.tensor(changes), torch.tensor(offsets))
    expected = [datetime.fromtimestamp(t, ZoneInfo(name)) for t in times.tolist()]
    assert hours(local).tolist() == [x.hour for x in expected]
    assert weekdays(local).tolist() == [x.weekday() for x in expected]


def test_an_unknown_zone_is_refused():
    with pytest.raises(ValueError, match="`time_zone` is 'Europe/Berln', which this machine does not know"):
        zone_changes("Europe/Berln")


def test_gaps_of_a_bucket_differ_by_less_than_an_octave():
    assert GAP_BOUNDS == sorted(set(GAP_BOUNDS)) and NUM_GAPS == 42
    assert all(later <= 2 * earlier for earlier, later in zip(GAP_BOUNDS, GAP_BOUNDS[1:]))
    octaves = torch.tensor([GAP_BOUNDS[-1] / GAP_BOUNDS[0]]).log2()
    assert float((NUM_GAPS - 2) / octaves) == pytest.approx(1.3, abs=0.01)
    bounds = torch.tensor(GAP_BOUNDS)
    gaps = torch.tensor([0, 1, 2, 3, 4, 5, GAP_BOUNDS[-1] - 1, GAP_BOUNDS[-1], 2**62])
    assert gap_buckets(gaps, bounds).tolist() == [0, 1, 2, 3, 3, 4, NUM_GAPS - 2, NUM_GAPS - 1, NUM_GAPS - 1]


@pytest.mark.parametrize(
    ("latest", "trained", "problem"),
    [
        (1_700_000_000, 0, None),
        (1_700_000_000, 900_000_000, None),
        (900_000, 0, None),  # seconds since another start
        (900_000, 800_000, None),
        (0, 1_700_000_000, None),
        (1_700_000_000_000, 0, "milliseconds.*divide them by 1,000.$"),
        (1_700_000_000_000_000, 0, "microseconds.*by 1,000,000.$"),
        (1_700_000_000_000_000_000, 0, "nanoseconds.*by 1,000,000,000.$"),
        (1_700_000, 1_600_000_000, "1,000 times less.*multiply"),
        (19_600, 1_600_000_000, "far less.*seconds since 1970"),
    ],
)
def test_units_are_recognized(latest, trained, problem):
    found = unit_problem(latest, trained)
    assert found is None if problem is None else re.search(problem, found)


def test_tables_are_computed_once(monkeypatch):
    first = zone_changes("Europe/Paris")
    monkeypatch.setattr(time_blossomrec, "ZoneInfo", None)
    assert zone_changes("Europe/Paris") is first
