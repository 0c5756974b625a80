"""Times of events: numbers, dates and texts of dates become numbers; a text with two readings is an error."""

import polars as pl


_ISO_DATE = r"^\s*\d{4}[-/]\d"
_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z")


def check_time_type(dtype: pl.DataType, where: str) -> None:
    """
    Checks the data type of a column of times.

    Raises:
        ValueError: if it cannot be times.
    """
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Datetime, pl.Date, pl.Null)):
        raise ValueError(
            f"{where}: the column of times has type {dtype}; times may be numbers, dates or texts. Name another with "
            'timestamp=…, or pass timestamp="" to take the order of rows.'
        )


def as_times(column: pl.Series, time_format: str | None, where: str) -> tuple[pl.Series, bool]:
    """
    The times of a column as Int64 (Float64 if they have fractions), and whether they are dates. Dates are microseconds
    since 1970, in UTC if they have no time zone. A time that cannot be read is null.

    Args:
        time_format (`str`, *optional*): format of texts and integers, as for `strftime` ("%d/%m/%Y %H:%M"); by default,
            ISO 8601 dates and numbers are read.
        where (`str`): the file, for messages.

    Raises:
        ValueError: if dates are not ISO 8601 and `time_format` is missing or does not fit.
    """
    if column.dtype in (pl.Datetime, pl.Date):
        return column.cast(pl.Datetime("us")).to_physical(), True
    if time_format is not None:
        return _formatted(column, time_format, where), True
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    numbers = as_numbers(column)
    if column.dtype != pl.String or numbers.null_count() < len(column):
        return numbers, False
    dates = _iso_dates(column)
    other = column.filter(column.str.contains(r"\d\D+\d") & ~column.str.contains(_ISO_DATE))
    if dates.null_count() == len(dates) and len(other):
        raise ValueError(
            f"{where}: the time {other[0]!r} is neither a number nor a date as ISO 8601 writes it (2019-02-01 18:30:00); pass "
            'its format, such as time_format="%d/%m/%Y %H:%M" or "%m/%d/%Y %H:%M".'
        )
    return dates, True


def as_numbers(column: pl.Series) -> pl.Series:
    """Numbers, or texts of numbers, as Int64 if all are whole, otherwise Float64; other texts are null."""
    text = column.dtype == pl.String
    column = column.str.strip_chars() if text else column
    if text or column.dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        if whole.null_count() == column.null_count():
            return whole
    number = column.cast(pl.Float64, strict=False).fill_nan(None)
    whole = number.cast(pl.Int64, strict=False)
    return whole if (whole == number).fill_null(True).all() else number


def _iso_dates(text: pl.Series) -> pl.Series:
    """Texts of ISO 8601 dates, also with slashes, or with UTC or GMT at the end, as microseconds since 1970."""
    text = text.str.strip_chars().str.replace(r"\s*(?:Z|UTC|GMT)$", "")
    text = text.set(~text.str.contains(_ISO_DATE), None)
    text = text.str.replace_all("/", "-", literal=True).str.replace("T", " ", literal=True)
    dates = pl.Series(text.name, [], pl.Int64).extend_constant(None, len(text))
    for form in _FORMATS:
        unread = dates.is_null() & text.is_not_null()
        if not unread.any():
            break
        dates = dates.fill_null(_parsed(text.set(~unread, None), form))
    return dates


def _parsed(text: pl.Series, form: str) -> pl.Series:
    zone = "UTC" if "z" in form else None
    return text.str.to_datetime(form, strict=False, time_unit="us", time_zone=zone).to_physical()


def _formatted(column: pl.Series, time_format: str, where: str) -> pl.Series:
    try:
        dates = _parsed(column.cast(pl.String).str.strip_chars(), time_format)
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"time_format is {time_format!r}, which is no format ({str(error).splitlines()[0]})."
        ) from error
    if dates.null_count() == len(dates) > column.null_count():
        raise ValueError(
            f"{where}: time_format is {time_format!r}, but the times look like {column.drop_nulls()[0]!r}; pass the format "
            "in which they are written."
        )
    return dates
