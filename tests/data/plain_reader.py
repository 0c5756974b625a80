"""A reader of logs in plain Python, slow and short: what the readers of the package are compared with."""

import json
import re
from statistics import median


MISSING = {"", "NA", "Na", "na", "N/A", "n/a", "#N/A", "<NA>", "NULL", "Null", "null", "NaN", "Nan", "NAN", "nan"}
MISSING |= {"None", "NONE", "none", "\\N"}


def parse(text: str, separator: str, quoting: bool, width: int) -> tuple[list[tuple[int, list[str]]], int]:
    """The rows of `width` fields, each with its line, and the number of other rows; one character after the other."""

    def field(place: int) -> tuple[str, int] | None:
        if not (quoting and text[place : place + 1] == '"'):
            end = place
            while text[end] not in (separator, "\n"):
                end += 1
            return text[place:end], end
        value, place = "", place + 1
        while place < len(text):
            if text[place] != '"':
                value, place = value + text[place], place + 1
            elif text[place : place + 2] == '""':
                value, place = value + '"', place + 2
            else:
                return value, place + 1
        return None

    def row(place: int) -> tuple[list[str], int] | None:
        fields = []
        while (found := field(place)) is not None:
            fields.append(found[0])
            place = found[1]
            if text[place] == "\n":
                fields[-1] = fields[-1].removesuffix("\r")
                return fields, place + 1
            if text[place : place + 2] == "\r\n":
                return fields, place + 2
            if text[place] != separator:
                return None
            place += 1
        return None

    text = text if text.endswith("\n") else text + "\n"
    good, bad, place = [], 0, 0
    while place < len(text):
        line = text.count("\n", 0, place)
        found = row(place)
        end = text.index("\n", place) + 1 if found is None else found[1]
        if found is not None and len(found[0]) == width:
            good.append((line, found[0]))
        elif text[place:end].strip(" \t\n\v\f\r"):
            bad += 1
        place = end
    return good, bad


def spelled(texts: list[str]) -> list:
    """Ids as integers if all are, some perhaps written as floats; else as they are."""
    whole = [re.sub(r"^(-?\d+)\.0+$", r"\1", text) for text in texts]
    return [int(text) for text in whole] if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", text) for text in whole) else texts


def read(text: str, format: str) -> tuple[list[tuple[str, str, str | None]], int]:
    """The (user, item, time) of the rows that have the fields of their format, and the number of other rows."""
    if format in ("csv", "tsv"):
        header, body = text.split("\n", 1)
        separator = "," if format == "csv" else "\t"
        columns = header.split(separator)
        rows, bad = parse(body, separator, format == "csv", len(columns))
        places = [columns.index(name) for name in ("user", "item", "timestamp")]
        return [tuple(row[place] for place in places) for _, row in rows], bad
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if format in ("ml-100k", "ml-1m"):
        rows = [line.split("\t" if format == "ml-100k" else "::") for line in lines]
        good = [tuple(row[place].strip() for place in (0, 1, 3)) for row in rows if len(row) == 4]
        return good, len(rows) - len(good)
    if format == "jsonl":
        return [_json(line) for line in lines], 0
    words = [line.split() for line in lines]
    if format == "pairs":
        return [(row[0], row[1] if len(row) == 2 else "", None) for row in words], 0
    return [(row[0], item, None) for row in words for item in row[1:]], sum(len(row) == 1 for row in words)


def _object(line: str) -> dict:
    """The JSON object of a line, an empty one if it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def has_lists(text: str) -> bool:
    """Whether a line of a JSON lines file has a list of items: a layout of its own, of one line per user or session."""
    return any(isinstance(_object(line).get("item"), list) for line in text.split("\n"))


def _json(line: str) -> tuple[str, str, str | None]:
    values = [_object(line).get(name) for name in ("user", "item", "timestamp")]
    return tuple("" if value is None else value if isinstance(value, str) else json.dumps(value) for value in values)


def histories(text: str, format: str) -> tuple[dict, int]:
    """The (item, seconds) of each user in the order of time, and the number of bad rows."""
    rows, bad = read(text, format)
    timed = format not in ("pairs", "sequences")
    if format == "jsonl":  # a log without times, if no line has one
        timed = any("timestamp" in _object(line) for line in text.split("\n"))
    numbers = [_number(time) if timed else 0 for _, _, time in rows]
    known = [number for number in numbers if number is not None]
    scale = next((scale for scale in (1, 10**3, 10**6) if known and median(known) <= 4_102_444_800 * scale), 10**9)
    latest = 4_102_444_800 * scale
    good = [
        (user, item, number)
        for (user, item, _), number in zip(rows, numbers)
        if user.strip(" \t\n\v\f\r") not in MISSING and item.strip(" \t\n\v\f\r") not in MISSING
        if number is not None and 0 <= number <= latest
    ]
    users, items = spelled([row[0] for row in good]), spelled([row[1] for row in good])
    result: dict = {}
    for user, item, (_, _, number) in zip(users, items, good):
        result.setdefault(user, []).append((item, number))
    ordered = {user: sorted(events, key=lambda event: event[1]) for user, events in result.items()}
    seconds = {user: [(item, int(time // scale)) for item, time in events] for user, events in ordered.items()}
    return seconds, bad + len(rows) - len(good)


def _number(text: str) -> float | None:
    if re.fullmatch(r"[-+]?\d{1,18}", text.strip()):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+)", text.strip()) else None
