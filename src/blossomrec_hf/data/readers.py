"""open_log: opens a log of any source and format."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from ..utils.files import recover_folder
from . import known_sets
from .columns import find_usual, no_times_note
from .formats import FORMATS, recognize_format
from .metadata import has_titles
from .options import LogOptions
from .parts import Part
from .published_splits import is_published_split, open_published_split
from .splits import PARTS
from .tables import open_table
from .text_files import BadRows, LogFile, find_files
from .times import check_time_type


logger = logging.getLogger(__name__)

_RECBOLE_TABLES = ("item", "user", "kg", "link", "net")
_BENCHMARK_ENDS = {"train": ".train.inter", "validation": ".valid.inter", "test": ".test.inter"}


@dataclass
class Log:
    """A log that is opened and not read yet: its parts, and `notes`, sentences for the report on how it is read."""

    parts: list[Part]
    name: str
    format: str
    options: LogOptions
    license: str | None = None
    titles: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def has_timestamp(self) -> bool:
        return "timestamp" in self.parts[0].types

    def require(self, role: str, reason: str) -> None:
        """
        Checks that every part has a column of a role that needs numbers or names.

        Raises:
            ValueError: if one does not; `reason` is the option that needs it.
        """
        for part in self.parts:
            if role not in part.types:
                raise ValueError(f"{reason}, but {part.name} has no {role} known; name its column with {role}=…")
            dtype = part.types[role]
            texts = (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)
            if not (dtype.is_numeric() or dtype in texts):
                raise ValueError(
                    f"{reason}, but the column of {part.name} has type {dtype}; it may be numbers or texts."
                )


def open_log(source: Any, options: LogOptions = LogOptions()) -> Log:
    """
    Opens a log without reading it.

    Args:
        source: a file; a folder of a published split ([`~data.published_splits.open_published_split`]); a folder or a glob pattern (`**` stands for any folders) of files of one format, which are read in
            the order of their names; a URL of `fsspec` to one of these (`s3://…`, `gs://…`, `hf://…`,
            `zip://member.csv::archive.zip`); the name of a public data set ([`~data.known_sets.KNOWN`]), which is
            downloaded once; a folder of `Dataset.save_to_disk`, or the id of a data set on the Hub (its split `train`); a
            Polars or pandas frame, a pyarrow table or a `Dataset`; for a given split, a mapping of `train`, `validation` and
            `test` to one of these each, such as a `DatasetDict`. The keys of Hive partitions (folders such as
            `date=2024-01-01`) are columns. In JSON lines, Parquet and tables, the events of a user may be in lists.
        options ([`LogOptions`]): `format` is one of [`~data.formats.FORMATS`]. The columns of `csv`, `tsv`, `parquet`,
            `jsonl`, `recbole` and `python-lines` (Steam) have names, which `user`, `item`, `timestamp` and `rating` choose
            from. The others are `pairs` (user item), `sequences` (user item item …, a line per user), `item-sequences`
            (item item …, never recognized; the user ids are the numbers of the lines), `ml-100k` (`u.data`), `ml-1m`
            (`::`), `amazon-csv` (ratings without a header, 2014 or 2018), `gowalla`, `foursquare` and the layouts of
            [`~data.layouts.LAYOUTS`]. Text files may be compressed (`.gz`, `.zst`) or the member of a zip archive.

    Raises:
        FileNotFoundError: if there is no such file; for a public data set that cannot be downloaded, with the place to
            put it.
        ValueError: if a file is empty or damaged, a named column does not exist (near matches are named), the format is
            unknown, or only some of the files have times.
    """
    if isinstance(source, Mapping):
        return _open_given(source, options)
    if not isinstance(source, (str, Path)):
        return _open_table(source, "source", options)
    if options.format is not None and options.format not in FORMATS:
        raise ValueError(f"format is {options.format!r}; it may be one of {', '.join(sorted(FORMATS))}.")
    path = Path(source)
    recover_folder(path)
    if str(source) in known_sets.KNOWN and not path.exists():
        known = known_sets.KNOWN[str(source)]
        folder = known_sets.fetch(str(source))
        files = find_files(str(folder / known.log), options.encoding)
        log = _open_files(files, str(source), replace(options, format=known.format))
        log.license = known.license
        if known.titles is not None and (folder / known.titles).is_file():
            log.titles = folder / known.titles
        return log
    if (path / "state.json").is_file() or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return _open_table(_stored_dataset(str(source)), str(source), options)
    if is_published_split(path):
        _refuse_columns("item-sequences", options)
        notes = ["the split is that of the folder, as published with gSASRec"]
        return _checked(Log([open_published_split(path)], path.name, "item-sequences", options, notes=notes))
    files = find_files(str(source), options.encoding)
    if not files:
        raise FileNotFoundError(
            f"source {str(source)!r} is no file, no folder with files and no pattern that finds any, nor one of the public data "
            f"sets {', '.join(known_sets.KNOWN)}."
        )
    log = _open_files(files, path.name, options)  # the name alone: a card does not need this machine's folders
    if log.format == "recbole":
        _add_recbole_titles(log, files)
    return log


def _add_recbole_titles(log: Log, files: list[LogFile]) -> None:
    """The titles of `NAME.item` next to `NAME.inter`, if the log is on this machine and there are any."""
    interactions = next((Path(file.path) for file in files if file.suffix == "inter"), None)
    if interactions is None:  # a file of another name whose format was given
        return
    items = interactions.with_name(f"{interactions.name.split('.')[0]}.item")
    if items.is_file() and has_titles(items):
        log.titles = items
        log.notes.append(f"item titles are those of {items.name}, unless items=… names another item table")


def _open_files(files: list[LogFile], name: str, options: LogOptions) -> Log:
    for file in files:
        if file.size == 0:
            raise ValueError(f"{file} is empty; a log needs at least one event.")
    notes: list[str] = []
    files = _of_one_kind(files, name, notes)
    format = options.format or recognize_format(files[0], options)
    options = FORMATS[format].complete(options)
    if format == "sequences" and options.format is None:
        notes.append(
            'each line is read as a user and the items of this user; format="item-sequences" is without users'
        )
    if format == "item-sequences" and len(files) > 1:
        raise ValueError(
            f"source is {len(files)} files, but the users of item-sequences are the numbers of their lines; join the files."
        )
    if len(files) > 1 and any(file.name.endswith((".valid.inter", ".test.inter")) for file in files):
        notes.append("the files are those of a given split and read as one log; --split given keeps the split")
    logger.info("reading %d file(s) as %s, first %s", len(files), format, files[0])
    parts = [_open_part(file, format, options, notes) for file in files]
    if recoded := {file.text_encoding for file in files if format != "parquet"} - {"utf-8", options.encoding}:
        notes.append(f"the encoding is recognized as {' and '.join(sorted(recoded))}; name another with encoding=…")
    if not FORMATS[format].has_column_names:
        _refuse_columns(format, options)
        if options.timestamp == "":
            for part in parts:
                part.types = {column: dtype for column, dtype in part.types.items() if column != "timestamp"}
    return _checked(Log(parts, name, format, options, notes=notes))


def _refuse_columns(format: str, options: LogOptions) -> None:
    """Refuses the names of columns for a format whose columns have none."""
    if named := [f"{column}={name!r}" for column, name in options.column_names.items() if name]:
        raise ValueError(
            f"{named[0]} names a column, but the columns of the format {format} have no names; leave it out."
        )


def _of_one_kind(files: list[LogFile], name: str, notes: list[str]) -> list[LogFile]:
    """
    The files of a log, which have one suffix. Of a folder of RecBole, only the files of interactions.

    Raises:
        ValueError: if the files have several suffixes.
    """
    suffixes = [re.sub(r"\.(gz|zst|zip)$", "", file.name.lower()).rpartition(".")[2] for file in files]
    if len(set(suffixes)) == 1:
        return files
    names = [file.name.rpartition("/")[2] for file in files]
    if set(suffixes) <= {"inter", *_RECBOLE_TABLES} and "inter" in suffixes:
        left = [name for name, suffix in zip(names, suffixes) if suffix != "inter"]
        notes.append(
            f"the events are those of the .inter files of {name}, not of {', '.join(left)}; give an item table with items=…"
        )
        return [file for file, suffix in zip(files, suffixes) if suffix == "inter"]
    listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    raise ValueError(
        f"{name} has files of several kinds ({listed}); name the files of the log by a path or a pattern such as "
        f"*.{suffixes[0]}, and the file of an item table with items=…"
    )


def _open_part(file: LogFile, format: str, options: LogOptions, notes: list[str]) -> Part:
    """A file as a part, with the keys of its Hive partition as columns that its own columns take precedence over."""
    keys = {role: key for role, key in options.column_names.items() if key in file.partition}
    if wrong := [role for role in ("user", "item") if role in keys]:
        raise ValueError(f"{wrong[0]}={keys[wrong[0]]!r} is a folder's name; ids have to be in a column of the files.")
    part = FORMATS[format].open(file, replace(options, **dict.fromkeys(keys, "")), notes)
    usual = find_usual(file.partition)
    keys |= {role: key for role, key in usual.items() if getattr(options, role) is None and role not in part.types}
    if not keys:
        return part
    return _with_constants(
        part, {role: pl.Series([file.partition[key]], dtype=pl.String) for role, key in keys.items()}
    )


def _with_constants(part: Part, values: Mapping[str, pl.Series]) -> Part:
    """`part` with other columns, whose one value is that of every row."""
    constants = [pl.lit(value[0], value.dtype).alias(role) for role, value in values.items()]

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        for batch in part.read([role for role in wanted if role not in values], bad):
            yield batch.with_columns(constants).select("row", *wanted)

    return replace(part, types={**part.types, **{role: value.dtype for role, value in values.items()}}, read=read)


def find_given_split(source: str, validation: str | None = None, test: str | None = None) -> dict[str, str] | str:
    """
    The source of each part of a given split, for [`open_log`]; the folder itself if it has the layout of gSASRec.

    Args:
        source (`str`): the training events; or, without `validation` and `test`, a folder of RecBole's benchmark files
            `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter`, or of gSASRec's `train/input.txt`, `val/input.txt`,
            `val/output.txt`, `test/input.txt` and `test/output.txt`.
        validation, test (`str`, *optional*): the events of the other parts.

    Raises:
        ValueError: if the folder does not have one file for training and one for each other part at most.
    """
    if validation is not None or test is not None:
        named = {"train": source, "validation": validation, "test": test}
        return {part: path for part, path in named.items() if path is not None}
    if is_published_split(Path(source)):
        return source
    paths = [file.path for file in find_files(source)] if Path(source).is_dir() else []
    found = {part: [path for path in paths if path.endswith(_BENCHMARK_ENDS[part])] for part in PARTS}
    counts = {part: len(files) for part, files in found.items()}
    if counts["train"] != 1 or max(counts.values()) > 1 or sum(counts.values()) < 2:
        raise ValueError(
            f"source is {source!r}, which is no folder with a given split: it should have one file {_BENCHMARK_ENDS['train']} and "
            f"one {_BENCHMARK_ENDS['validation']} or {_BENCHMARK_ENDS['test']}; or name the files with --validation and --test."
        )
    return {part: files[0] for part, files in found.items() if files}


def check_given(sources: Mapping[str, Any]) -> dict[str, Any]:
    """
    The sources of a given split in the order of the parts.

    Raises:
        ValueError: if they are not those of training and of validation, test or both.
    """
    if "train" not in sources or set(sources) - set(PARTS) or len(sources) < 2:
        raise ValueError(
            f"source is a mapping of {', '.join(map(str, sources))}; a given split is one of train and of validation, test or "
            f"both. Give any other log itself, such as source[{next(iter(sources), 'train')!r}]."
        )
    return {part: sources[part] for part in PARTS if part in sources}


def given_note(names: Mapping[str, str]) -> str:
    """The sentence for the report on a given split, of the name of each part's log."""
    return f"the split is that of {', '.join(f'{name} ({part})' for part, name in names.items())}"


def _open_given(sources: Mapping[str, Any], options: LogOptions) -> Log:
    """The logs of a given split as one log, with the column `part`."""
    logs = {part: open_log(source, options) for part, source in check_given(sources).items()}
    if len(formats := {log.format for log in logs.values()}) > 1:
        raise ValueError(
            f"the parts of source have the formats {', '.join(sorted(formats))}; write them in one format."
        )
    parts = [
        _with_constants(part, {"part": pl.Series([PARTS.index(name)], dtype=pl.UInt8)})
        for name, log in logs.items()
        for part in log.parts
    ]
    notes = [given_note({part: log.name for part, log in logs.items()})]
    notes += [note for log in logs.values() for note in log.notes]
    return _checked(replace(logs["train"], parts=parts, notes=notes))


def _open_table(source: Any, name: str, options: LogOptions) -> Log:
    notes: list[str] = []
    return _checked(Log([open_table(_as_polars(source), name, options, notes)], name, "table", options, notes=notes))


def _checked(log: Log) -> Log:
    """`log`, after a check that all of its parts have times, or none; a note says if none has."""
    timed = [part for part in log.parts if "timestamp" in part.types]
    if timed and len(timed) < len(log.parts):
        without = next(part for part in log.parts if part not in timed)
        raise ValueError(
            f"{without.name} has no column known to be the time, but {timed[0].name} has; name the column with timestamp=…, "
            'or pass timestamp="" to read every history in the order of rows.'
        )
    for part in timed:
        check_time_type(part.types["timestamp"], part.name)
    if not timed:
        log.notes.append(no_times_note(log.options.timestamp))
    log.notes = list(dict.fromkeys(log.notes))
    return log


def _stored_dataset(source: str) -> Any:
    from datasets import load_dataset, load_from_disk

    if Path(source).exists():
        return load_from_disk(source)
    try:
        return load_dataset(source, split="train")
    except Exception as error:
        raise FileNotFoundError(
            f"source {source!r} is no file or folder here, and no data set of that id could be loaded from the Hub "
            f"({type(error).__name__}: {error})."
        ) from error


def _as_polars(source: Any) -> pl.LazyFrame:
    if isinstance(source, pl.LazyFrame):
        return source
    if isinstance(source, pl.DataFrame):
        return source.lazy()
    module = type(source).__module__.split(".")[0]
    try:
        if module == "pandas":
            return pl.from_pandas(source).lazy()
        if module == "datasets":
            return pl.from_arrow(source.with_format("arrow")[:]).lazy()
        if module == "pyarrow":
            return pl.from_arrow(source).lazy()
    except Exception as error:
        raise ValueError(
            f"source can not be read as a table ({error}); each column needs a name of its own and values of one type, not a "
            "mixture."
        ) from error
    raise ValueError(
        f"source is a {type(source).__name__}; it may be a path, a Polars or pandas frame, a pyarrow table or a Dataset."
    )
