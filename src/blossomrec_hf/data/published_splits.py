"""gSASRec's published splits: files of histories, and of the items that follow them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from .parts import Part, reading
from .splits import PARTS
from .text_files import BadRows


_TRAIN, _VALIDATION, _TEST = range(len(PARTS))
_FILES = ("train/input.txt", "val/input.txt", "val/output.txt", "test/input.txt", "test/output.txt")
_TYPES = {"user": pl.String(), "item": pl.String(), "part": pl.UInt8(), "weight": pl.Float32()}


def is_published_split(folder: Path) -> bool:
    """Whether a folder has the files of a published split."""
    return all((folder / name).is_file() for name in _FILES)


def open_published_split(folder: Path) -> Part:
    """
    The events of a published split (https://github.com/asash/gSASRec-pytorch, `datasets/ml1m/preprocess_ml1m.py`). The last
    item of each user is the test. The one before it is the validation of some users, and of the others neither validation
    nor training. `train/input.txt` and `test/input.txt` have a line per user, the items of a history; `val/input.txt` has
    one per user with a validation item. The numbers of the lines of `train/input.txt` are the user ids.

    An event that is read and never predicted has weight 0: the one before the test of users without a validation item, and
    the one before the validation item, which the published training does not have.

    Raises:
        ValueError: if the files do not belong together.
    """

    def read(wanted: Sequence[str], bad: BadRows) -> Iterator[pl.DataFrame]:
        with reading(str(folder)):
            yield _events(folder).select("row", *wanted)

    return Part(str(folder), _TYPES, read)


def _events(folder: Path) -> pl.DataFrame:
    lines = {name: _items(folder / name) for name in _FILES}
    columns = {"train": "train/input.txt", "before": "test/input.txt", "target": "test/output.txt"}
    counts = [len(lines[name]) for name in columns.values()]
    if len(set(counts)) > 1:
        raise _wrong(folder, f"{', '.join(columns.values())} have {', '.join(map(str, counts))} lines")
    users = pl.DataFrame({name: lines[path] for name, path in columns.items()}).with_row_index("row", offset=1)
    before, train = pl.col("before"), pl.col("train")
    withheld = before.list.len().cast(pl.Int64) - train.list.len()
    users = users.with_columns(withheld=withheld)
    belongs = (before.list.head(train.list.len()) == train) & (pl.col("target").list.len() == 1)
    wrong = users.filter(~(belongs & pl.col("withheld").is_in([1, 2])))
    if wrong.height:
        raise _wrong(
            folder, f"line {wrong['row'][0]} of train/input.txt is not the line of test/input.txt without 1 or 2 items"
        )
    validated = users.filter(pl.col("withheld") == 2)
    validated = validated.select(inputs=before.list.head(before.list.len() - 1), outputs=before.list.tail(1))
    if not all(validated[f"{name}s"].equals(lines[f"val/{name}.txt"]) for name in ("input", "output")):
        raise _wrong(folder, "the lines of val are not those of the users whose last 2 items train/input.txt lacks")

    history = pl.concat_list("before", "target")
    left = pl.int_ranges(pl.col("item").list.len(), 0, -1)  # number of events from this one on
    events = users.select("row", "withheld", item=history).with_columns(left=left).explode("item", "left")
    part = pl.when(pl.col("left") == 1).then(_TEST).when(pl.col("left") == 2).then(_VALIDATION).otherwise(_TRAIN)
    is_read_only = pl.col("left") == pl.col("withheld") + 1
    return events.select(
        "row",
        "item",
        user=pl.col("row").cast(pl.String),
        part=part.cast(pl.UInt8),
        weight=pl.when(is_read_only).then(0.0).otherwise(1.0).cast(pl.Float32),
    )


def _items(path: Path) -> pl.Series:
    """The items of each line."""
    lines = pl.Series(path.name, path.read_text(encoding="utf-8").splitlines(), dtype=pl.String)
    return lines.str.extract_all(r"\S+")


def _wrong(folder: Path, problem: str) -> ValueError:
    return ValueError(f"{folder} has the files of gSASRec's split, but {problem}; take all of them from one split.")
