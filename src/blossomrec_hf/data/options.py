"""The options of `build_sequences`: declared once for Python, Spark and the command line, and checked before any work."""

import codecs
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .columns import ROLES
from .time_units import duration_seconds


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """
    How a log is read; see [`~data.readers.open_log`].

    Raises:
        ValueError: if an option has a value that it cannot have.
    """

    format: str | None = _option("Format of the files; by default, recognized from their names and first lines.")
    user: str | None = _option("Column of user ids; by default, the first usual name.")
    item: str | None = _option("Column of item ids; by default, the first usual name.")
    timestamp: str | None = _option(
        'Column of times; by default, the first usual name. An empty name ("") reads every history in the order of rows.'
    )
    rating: str | None = _option("Column of ratings; by default, the first usual name.")
    event_type: str | None = _option("Column of event types (view, purchase); by default, they are not read.")
    weight: str | None = _option("Column of the events' weights in the loss, 0 or more; by default, 1.")
    columns: str | None = _option(
        "Names of the columns of a file without a header, in order, separated by commas; by default, the first row names them."
    )
    separator: str | None = _option("Character between fields; by default, recognized among comma, tab, ; and |.")
    quoting: bool | None = _option(
        "Whether fields may be in double quotes; by default, unless the separator is a tab."
    )
    encoding: str | None = _option("Encoding of text files; by default, recognized among UTF-8, UTF-16 and Latin-1.")
    time_format: str | None = _option(
        "Format of times, as for strftime (%%d/%%m/%%Y %%H:%%M); by default, numbers and ISO 8601 dates are read."
    )
    keep_na_ids: bool = _option("Read NA, NULL, nan and None as ids. By default, they are missing ids.", False)
    on_bad_rows: Literal["fail", "skip"] = _option(
        "What to do with a row that cannot be read: fail, or skip and count it.", "fail"
    )

    def __post_init__(self) -> None:
        if self.on_bad_rows not in ("fail", "skip"):
            raise ValueError(f'on_bad_rows is {self.on_bad_rows!r}; it may be "fail" or "skip".')
        if self.separator is not None:
            object.__setattr__(self, "separator", self.separator.replace("\\t", "\t"))
            if len(self.separator) != 1 or not self.separator.isascii() or self.separator in '"\r\n':
                raise ValueError(
                    f"separator is {self.separator!r}; it may be one ASCII character, such as , or ; or |."
                )
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError as error:
                raise ValueError(
                    f"encoding is {self.encoding!r}, which is unknown; it may be utf-8, utf-16, latin-1 or another of Python's."
                ) from error
        if self.columns is not None and len(set(named := [name for name in self.column_list if name])) < len(named):
            raise ValueError(f"columns is {self.columns!r}; give each column a name of its own.")

    @property
    def column_list(self) -> list[str] | None:
        """The names of the columns of a file without a header."""
        return _split(self.columns)

    @property
    def column_names(self) -> dict[str, str | None]:
        """The given name of each column, or `None` if it goes by a usual name."""
        return {name: getattr(self, name) for name in ROLES}


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """
    Which events become sequences, in the order in which the filters apply.

    Raises:
        ValueError: if an option has a value that it cannot have.
    """

    min_rating: float | None = _option("Drop rows with a lower rating; by default, every row is an event.")
    deduplicate: Literal["none", "first", "last"] = _option(
        "Which of a user's events with one item to keep: none of them is dropped, or the first or last one stays.",
        "none",
    )
    k_core: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "Drop users and items with fewer events, until all have as many; one number, or two for users and items."
        },
    )
    min_history: int = _option("Drop users with fewer events.", 1)
    max_history: int | None = _option("Keep only this many latest events of a user; by default, all.")

    def __post_init__(self) -> None:
        cores = [self.k_core] if isinstance(self.k_core, int) else list(self.k_core)
        if len(cores) not in (1, 2) or not all(isinstance(core, int) for core in cores):
            raise ValueError(f"k_core is {self.k_core}; it may be one number, or two for users and items.")
        object.__setattr__(self, "k_core", [cores[0], cores[-1]])
        if self.deduplicate not in ("none", "first", "last"):
            raise ValueError(f'deduplicate is {self.deduplicate!r}; it may be "none", "first" or "last".')
        for name, value in (("k_core", min(self.k_core)), ("min_history", self.min_history)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it may be 1 (keep all) or more.")
        if self.max_history is not None and self.max_history < self.min_history:
            raise ValueError(
                f"max_history is {self.max_history}; it may be None (no bound) or min_history ({self.min_history}) or more."
            )


@dataclass(frozen=True, kw_only=True)
class EventOptions:
    """
    What an event is: its type and weight, and the session and basket that it belongs to.

    Raises:
        ValueError: if an option has a value that it cannot have.
    """

    event_types: str | None = _option(
        "Event types to read, separated by commas; others are dropped. By default, all, in the order of their first events."
    )
    targets: str | None = _option(
        "Event types to predict, separated by commas; the others are only read. By default, every event is predicted."
    )
    type_weights: str | None = _option(
        "Weights of event types in the loss, such as view=0.1,purchase=1, multiplied by `weight`; by default, 1."
    )
    session_gap: str | None = _option(
        "Longest time between two events of a session, such as 30m, 12h or 7d; by default, sessions are not marked."
    )
    group: Literal["none", "timestamp"] = _option(
        "What makes a basket: nothing, or the same second (timestamp). The items of a basket are predicted together from "
        "the events before it, and held out together.",
        "none",
    )
    collapse_repeats: bool = _option(
        "Drop an event that repeats the item (and event type) of the one before it in the history.", False
    )

    def __post_init__(self) -> None:
        if self.group not in ("none", "timestamp"):
            raise ValueError(f'group is {self.group!r}; it may be "none" or "timestamp".')
        for name in ("event_types", "targets"):
            if (types := _split(getattr(self, name))) is not None and (not all(types) or len(set(types)) < len(types)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give different names, separated by commas.")
        for name, types in (("targets", self.target_list), ("type_weights", self.weights_by_type)):
            unread = [type for type in types or () if self.type_list is not None and type not in self.type_list]
            if unread:
                raise ValueError(
                    f"{name} has {unread[0]!r}, which is not among event_types ({self.event_types}); add it."
                )
        _ = self.gap_seconds

    @property
    def type_list(self) -> list[str] | None:
        """The event types to read."""
        return _split(self.event_types)

    @property
    def target_list(self) -> list[str] | None:
        """The event types to predict."""
        return _split(self.targets)

    @property
    def weights_by_type(self) -> dict[str, float]:
        """The given weights of event types."""
        weights = {}
        for entry in _split(self.type_weights) or ():
            name, _, number = entry.rpartition("=")
            if not name or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
                raise ValueError(
                    f"type_weights is {self.type_weights!r}; it may be types and weights of 0 or more, such as "
                    "view=0.1,purchase=1."
                )
            weights[name] = float(number)
        return weights

    @property
    def gap_seconds(self) -> float | None:
        """The longest time between two events of a session."""
        return None if self.session_gap is None else duration_seconds("session_gap", self.session_gap)

    @property
    def needs_types(self) -> str | None:
        """The given option that needs event types, for messages."""
        return next((name for name in ("event_types", "targets", "type_weights") if getattr(self, name)), None)

    @property
    def needs_times(self) -> str | None:
        """The given option that needs times, for messages."""
        return "session_gap" if self.session_gap is not None else "group" if self.group != "none" else None


@dataclass(frozen=True, kw_only=True)
class ItemOptions:
    """
    Which columns of the item table are features. Other columns are stored as they are.

    Raises:
        ValueError: if an option has a value that it cannot have.
    """

    item_categories: str | None = _option(
        "Columns of the item table with categories, separated by commas; several of one item are a list, or separated by | "
        "(in columns of RecBole's kind token_seq, by spaces). "
        'year is the year and the decade of titles such as "Toy Story (1995)" if there is no such column.'
    )
    item_numbers: str | None = _option(
        "Columns of the item table with numbers, separated by commas; they become categories, two per power of 2."
    )
    item_vectors: str | None = _option(
        "Columns of the item table with vectors, separated by commas: lists of numbers, or numbers separated by spaces."
    )
    item_text: str | None = _option(
        "Columns of the item table with texts, separated by commas; each becomes vectors, in the column NAME_vector."
    )
    text_model: str = _option(
        "Model of sentence-transformers that makes vectors of texts, a folder or a name on the Hub.",
        "sentence-transformers/all-MiniLM-L6-v2",
    )

    def __post_init__(self) -> None:
        *features, texts = self.columns.values()
        for names in ([name for kind in features for name in kind], texts):
            if not all(names) or len(set(names)) < len(names):
                given = "item_text has" if names is texts else "item_categories, item_numbers and item_vectors have"
                raise ValueError(
                    f"{given} the columns {', '.join(map(repr, names))}; give different names, separated by commas."
                )

    @property
    def columns(self) -> dict[str, list[str]]:
        """The columns of each kind of feature."""
        given = {
            "categories": self.item_categories,
            "numbers": self.item_numbers,
            "vectors": self.item_vectors,
            "texts": self.item_text,
        }
        return {kind: _split(names) or [] for kind, names in given.items()}


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",")]


def parse_options(options: Mapping[str, Any], *groups: type) -> Iterator[Any]:
    """
    Sorts keyword arguments into the dataclasses that declare them.

    Raises:
        TypeError: if no dataclass declares an argument.
        ValueError: if an option has a value that it cannot have.
    """
    names = {field.name for group in groups for field in fields(group)}
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(sorted(names))}."
            raise TypeError(f"unexpected keyword argument {name!r}; {hint}")
    for group in groups:
        yield group(**{field.name: options[field.name] for field in fields(group) if field.name in options})
