"""Times in every way in which logs write them, against datetime of Python; what could be read in two ways is refused."""

from datetime import UTC, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.data import build_sequences


def seconds(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)


def built(*times, **arguments) -> list:
    log = pl.DataFrame({"user": 1, "item": list(map(str, range(len(times)))), "date": list(times)}, strict=False)
    return build_sequences(log, **arguments)[0]["timestamps"][0]


@settings(max_examples=200, deadline=None)
@given(
    time=st.datetimes(datetime(1970, 1, 2), datetime(2099, 12, 30)),
    offset=st.none() | st.integers(-12 * 60, 14 * 60),
    form=st.sampled_from(
        ["%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y-%m-%d"]
    ),
    zone=st.sampled_from(["", "Z", " UTC", " GMT"]),
)
def test_iso_dates(time, offset, form, zone):
    """UTC, unless they name another zone."""
    if offset is not None and "%H" in form:
        time = time.replace(tzinfo=timezone(timedelta(minutes=offset)))
        form, zone = form + "%z", ""
    text = time.strftime(form)
    expected = datetime.strptime(text, form)
    if expected.tzinfo is None:
        expected = expected.replace(tzinfo=UTC)
    if 0 <= seconds(expected):
        assert built(text + zone) == [seconds(expected)]


@pytest.mark.parametrize(
    "text",
    [
        "02/01/2019",
        "2/1/2019 18:30",
        "02-01-2019",
        "02.01.19",
        "Jan 2, 2019",
        "Wed Jan 02 18:30:00 2019",
        "2019 01 02",
    ],
)
def test_dates_of_another_order_are_refused_until_their_format_is_given(text):
    with pytest.raises(ValueError, match=f"the time '{text}' is neither a number nor a date .*time_format="):
        built(text)
    with pytest.raises(ValueError, match="the time"):
        built(text, on_bad_rows="skip")


def test_time_format():
    days = [seconds(datetime(2019, 1, 3, tzinfo=UTC)), seconds(datetime(2019, 2, 1, tzinfo=UTC))]
    assert built("02/01/2019", "01/03/2019", time_format="%m/%d/%Y") == days
    assert built(20190201, 20190103, time_format="%Y%m%d") == days
    assert built("02/01/2019 1:00 AM +0100", time_format="%m/%d/%Y %I:%M %p %z") == days[1:]
    with pytest.raises(ValueError, match="time_format is '%Y-%m-%d', but the times look like '02/01/2019'"):
        built("02/01/2019", time_format="%Y-%m-%d")
    with pytest.raises(ValueError, match="source, row 1: not a usable timestamp .timestamp '13/13/2019'."):
        built("02/01/2019", "13/13/2019", time_format="%m/%d/%Y")
    with pytest.raises(ValueError, match="time_format is '%H', which is no format"):
        built("13", time_format="%H")


def test_dates_that_do_not_exist_are_bad_rows():
    with pytest.raises(ValueError, match="row 1: not a usable timestamp .timestamp '2019-02-30'."):
        built("2019-02-28", "2019-02-30")


@pytest.mark.parametrize("other", ["2019-01-02\n", "1546387200\n"], ids=["dates", "seconds"])
def test_files_with_times_of_two_units_are_refused(tmp_path, other):
    (tmp_path / "a.csv").write_text("user,item,time\n1,a,1546387200000\n")
    (tmp_path / "b.csv").write_text("user,item,time\n1,b," + other)
    with pytest.raises(
        ValueError, match="b.csv has times in (dates|s), but .*a.csv in ms; write all times in one unit"
    ):
        build_sequences(tmp_path)


@pytest.mark.parametrize(
    "values", [[[1, 2]], [True], [b"1"], [timedelta(1)]], ids=["list", "bool", "bytes", "duration"]
)
def test_columns_that_are_no_times_are_refused(values):
    with pytest.raises(ValueError, match="source: the column of times has type"):
        built(*values)
