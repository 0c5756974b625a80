"""The columns of a log that a build reads, by the names that logs give them."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence


ROLES = ("user", "item", "rating", "timestamp", "event_type", "weight")
ONLY_NAMED = ("event_type", "weight")  # not read unless the options name them

# The names that logs give to the column of a role, most specific first. Case, spaces and the signs _ - . do not count.
_USUAL = {
    "user": (
        "user_id", "user", "uid", "reviewer_id", "user_name", "customer_id", "visitor_id", "steam_id",
    ),
    "item": (
        "item_id", "item", "iid", "movie_id", "parent_asin", "asin", "video_id", "business_id", "product_id",
        "location_id", "venue_id", "app_id", "track_id", "artist_id", "article_id", "isbn",
    ),
    "rating": ("rating", "overall", "stars", "score", "is_click", "hours"),
    "timestamp": (
        "timestamp", "unix_review_time", "time_ms", "time", "ts", "datetime", "date", "event_time", "utc_time",
        "event_timestamp", "event_datetime", "event_date", "event_ts", "timestamp_s", "timestamp_ms", "timestamp_us",
        "timestamp_ns", "unix_time", "unix_timestamp", "epoch", "created_at", "created", "created_time", "created_date",
        "creation_time", "creation_date", "t_dat", "order_time", "order_date", "order_datetime", "order_timestamp",
        "order_purchase_timestamp", "purchase_time", "purchase_date", "purchased_at", "transaction_time",
        "transaction_date", "invoice_date", "review_time", "review_date", "rating_time", "rating_date",
        "rating_timestamp", "rated_at", "checkin_time", "click_time", "view_time", "watched_at", "listened_at",
        "played_at", "read_at", "visited_at", "occurred_at", "date_time", "date_added", "server_time", "local_time",
    ),
    "event_type": (
        "event_type", "event", "event_name", "behavior_type", "behaviour_type", "behavior", "behaviour", "action", "action_type",
        "interaction_type", "interaction", "type",
    ),
    "weight": (),
}  # fmt: skip


def find_columns(
    columns: Sequence[str], names: Mapping[str, str | None], where: str, notes: list[str]
) -> dict[str, str]:
    """
    The column of each role (`user`, `item`, `rating`, `timestamp`, `event_type`, `weight`) that a log has.

    Args:
        columns: the columns of the log.
        names: the given name of a role's column, `None` for the first usual name, or "" not to read it.
        where (`str`): the file, for messages.
        notes: gets a sentence if several columns have a usual name of one role.

    Raises:
        ValueError: if a given name is no column, no column has a usual name of a user or an item, or two columns have the
            name of one that is read.
    """
    found = {}
    plain: dict[str, list[str]] = {}
    for name in columns:
        plain.setdefault(_plain(name), []).append(name)
    for role, usual in _USUAL.items():
        given = names.get(role)
        if given is None and role in ONLY_NAMED:
            match = None
            if looks := [name for key in map(_plain, usual) for name in plain.get(key, ())]:
                notes.append(
                    f"the column {looks[0]!r} looks like event types, which are not read; read them with {role}={looks[0]!r} "
                    f"(--{role} {looks[0]})"
                )
        elif given is None:
            exact_first = (sorted(plain.get(_plain(key), ()), key=key.__ne__) for key in usual)
            matches = list(dict.fromkeys(name for names in exact_first for name in names))
            match = matches[0] if matches else None
            if len(matches) > 1:
                others = " and ".join(map(repr, matches[1:]))
                notes.append(
                    f"the {role} is read from the column {match!r}, not from {others}; name another with {role}=…"
                )
        elif given in columns or not given:
            match = given or None
        else:
            near = difflib.get_close_matches(given, columns, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {_listed(columns)}."
            raise ValueError(f"{role}={given!r} is no column of {where}; {hint}")
        if match is None and role in ("user", "item"):
            raise _not_found(role, columns, where)
        if match is not None and columns.count(match) > 1:
            raise ValueError(
                f"{where} has {columns.count(match)} columns called {match!r}, one of which would be read as the {role}; give "
                "each a name of its own."
            )
        if match is not None:
            found[role] = match
    return found


def find_usual(columns: Iterable[str]) -> dict[str, str]:
    """The column of times or ratings that goes by a usual name."""
    plain = {_plain(name): name for name in columns}
    found = {role: [plain[key] for key in map(_plain, usual) if key in plain] for role, usual in _USUAL.items()}
    return {role: names[0] for role, names in found.items() if names and role in ("rating", "timestamp")}


def _not_found(role: str, columns: Sequence[str], where: str) -> ValueError:
    near = difflib.get_close_matches(role, columns, n=3, cutoff=0.4)
    hint = f" Near matches: {_listed(near)}." if near else ""
    if numbers(columns):
        hint += " If its first row is an event, name the columns with columns=…"
    return ValueError(
        f"{where} has no column known to be the {role}; it has {_listed(columns)}.{hint} Name the column with {role}=…"
    )


def is_header(names: Sequence[str]) -> bool:
    """Whether the usual names of a user and of an item are among `names`."""
    plain = set(map(_plain, names))
    return all(not plain.isdisjoint(map(_plain, _USUAL[role])) for role in ("user", "item"))


def numbers(names: Iterable[str]) -> list[str]:
    """Those of `names` that are numbers, as in a first row that is an event."""
    return [name for name in names if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", name)]


def no_times_note(timestamp: str | None) -> str:
    """The sentence for the report on a log that is read without times; `timestamp` is the option."""
    if timestamp == "":
        return "no times are read: every history is in the order of rows"
    return "no column of times is used: every history is in the order of rows; name a column with timestamp=… if there is one"


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    return ", ".join(repr(name if len(name) <= 60 else name[:60] + "…") for name in columns[:20]) + more


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]+", "", name.lower().split(":")[0])
