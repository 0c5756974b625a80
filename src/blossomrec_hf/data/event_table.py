"""A prepared data set as arrays of events: in memory, or memory-mapped from one `.safetensors` file."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..model.ids_blossomrec import UNKNOWN_TYPE
from ..model.tokenization_blossomrec import BlossomRecTokenizer
from ..utils.files import atomic_write


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

EVENT_COLUMNS = ("input_ids", "timestamps", "event_type_ids", "weights", "session_starts", "basket_starts")
METADATA_FILE = "items.parquet"  # item titles and features
FEATURES_FILE = "item_features.safetensors"  # in an exported data set: the features, without polars
FORMAT, VERSION = "blossomrec_events", "1"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DTYPES = {
    **{"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4"},
    **{"U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"},
}
USERS_A_BATCH = 5_000  # whose events are in memory at once


@dataclass
class EventTable:
    """
    A prepared data set whose events lie end to end, user after user, in one array per column.

    It takes the place of the `Dataset` of [`~blossomrec_hf.data.build_sequences`] in [`~blossomrec_hf.data.split`] and the
    other functions that read the parts of a data set, and needs neither `datasets` nor `polars` nor `pyarrow`.

    Args:
        events: arrays [events] by column: `input_ids` (int32), and any others, such as `timestamps` (int64 seconds).
        offsets: int64 [users + 1], index of each user's first event; the last entry is the number of events.
        users: arrays [users] by column: `user_id` (int64, or `str` objects), `train_end`, `validation_end`, `test_end` (int32), and
            any others.
        repeat_share: share of the test targets that already occur in their user's history, see
            [`~blossomrec_hf.data.repeat_share`].
        files: contents of the files that belong to the data set, by name: the tokenizer, `items.parquet` if there is an item
            table, and its features in `item_features.safetensors`.
        event_types: names of the event types, in the order of `event_type_ids`; `None` if they are unknown.
    """

    events: dict[str, np.ndarray]
    offsets: np.ndarray
    users: dict[str, np.ndarray]
    repeat_share: float | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    event_types: list[str] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def column_names(self) -> list[str]:
        """Names of the columns of users and events."""
        return [*self.users, *self.events]

    def event_batches(self, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the values of all events and the number of events per user, for some users at a time."""
        for first in range(0, len(self), USERS_A_BATCH):
            offsets = self.offsets[first : first + USERS_A_BATCH + 1]
            yield self.events[column][offsets[0] : offsets[-1]], np.diff(offsets)

    @classmethod
    def from_dataset(cls, dataset: "Dataset") -> "EventTable":
        """
        Converts a `Dataset` of [`~blossomrec_hf.data.build_sequences`].

        Raises:
            ValueError: if a column of lists has not one value per event.
        """
        table = dataset.with_format("arrow")[:]
        events, users, offsets = {}, {}, None
        for name in ["input_ids", *(name for name in table.column_names if name != "input_ids")]:
            column = table[name].combine_chunks()
            if not hasattr(column, "value_lengths"):
                users[name] = column.to_numpy(zero_copy_only=False)
                continue
            lengths = column.value_lengths().to_numpy()
            ends = np.append(0, np.cumsum(lengths, dtype=np.int64))
            offsets = ends if offsets is None else offsets
            if not np.array_equal(ends, offsets):
                user = int(np.flatnonzero(np.diff(offsets) != lengths)[0])
                raise ValueError(
                    f"`dataset` has {lengths[user]} values in {name} of row {user}, whose history has "
                    f"{np.diff(offsets)[user]} events; each event needs one value."
                )
            events[name] = column.flatten().to_numpy(zero_copy_only=False)
        return cls(events, offsets, users, event_types=event_type_names(dataset))

    def to_dataset(self) -> "Dataset":
        """Converts to a `Dataset` in memory, one row per user."""
        import pyarrow as pa
        from datasets import ClassLabel, Dataset, DatasetInfo, Features, List

        offsets = pa.array(self.offsets, pa.int64() if self.offsets[-1] > 2**31 - 1 else pa.int32())
        lists = pa.LargeListArray if offsets.type == pa.int64() else pa.ListArray
        columns = {name: pa.array(np.asarray(values)) for name, values in self.users.items()}
        for name, values in self.events.items():
            columns[name] = lists.from_arrays(offsets, pa.array(np.asarray(values)))
        first = [name for name in ("user_id", *EVENT_COLUMNS) if name in columns]
        table = pa.table({name: columns[name] for name in [*first, *(columns.keys() - set(first))]})
        features = Features.from_arrow_schema(table.schema)
        if self.event_types is not None:
            features["event_type_ids"] = List(ClassLabel(names=self.event_types))
        return Dataset(table, info=DatasetInfo(features=features))

    def tokenizer(self) -> BlossomRecTokenizer:
        """The tokenizer of the data set."""
        with TemporaryDirectory() as folder:
            for name in TOKENIZER_FILES:
                Path(folder, name).write_bytes(self.files[name])
            return BlossomRecTokenizer.from_pretrained(folder)

    def save(self, path: str | Path) -> None:
        """
        Writes the data set to one `.safetensors` file, atomically.

        The tensors are `offsets`, `events.NAME`, `users.NAME` (texts as UTF-8 bytes with `users.NAME.offsets`) and
        `files.NAME`; the metadata in the header are `format`, `version`, `repeat_share`, `event_types` (a JSON list) and
        `sha256`, a checksum of the rest.
        """
        tensors = {"offsets": self.offsets}
        tensors |= {f"events.{name}": values for name, values in self.events.items()}
        tensors |= {f"files.{name}": np.frombuffer(content, np.uint8) for name, content in self.files.items()}
        for name, values in self.users.items():
            if values.dtype == object:
                texts = [text.encode() for text in values.tolist()]
                tensors[f"users.{name}.offsets"] = np.append(0, np.cumsum([len(text) for text in texts])).astype(int)
                values = np.frombuffer(b"".join(texts), np.uint8)
            tensors[f"users.{name}"] = values
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        metadata = {"format": FORMAT, "version": VERSION}
        if self.repeat_share is not None:
            metadata["repeat_share"] = repr(self.repeat_share)
        if self.event_types is not None:
            metadata["event_types"] = json.dumps(self.event_types)
        metadata["sha256"] = _checksum(tensors, metadata)
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "EventTable":
        """
        Maps a file that [`~EventTable.save`] wrote into memory.

        Raises:
            ValueError: for a damaged file, and one of another kind or version.
            OSError: if the file cannot be opened.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged, or no safetensors file ({error}); export the data set again."
            ) from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ValueError(
                f"{path} is a safetensors file, but no data set that `blossomrec export --data` of this version wrote; "
                "give such a file."
            )
        tensors = _map_tensors(path)
        if _checksum(tensors, metadata) != metadata.get("sha256"):
            raise ValueError(f"{path} is damaged: its checksum differs from the one in its header; export it again.")
        parts: dict[str, dict[str, np.ndarray]] = {"events": {}, "users": {}, "files": {}}
        for name, values in tensors.items():
            part, _, column = name.partition(".")
            if part in parts:
                parts[part][column] = values
        users = parts["users"]
        for name in [name.removesuffix(".offsets") for name in users if name.endswith(".offsets")]:
            ends, content = users.pop(f"{name}.offsets").tolist(), users[name].tobytes()
            users[name] = np.array([content[start:stop].decode() for start, stop in zip(ends, ends[1:])], object)
        share = metadata.get("repeat_share")
        return cls(
            parts["events"],
            np.asarray(tensors["offsets"]),
            users,
            None if share is None else float(share),
            {name: content.tobytes() for name, content in parts["files"].items()},
            json.loads(metadata["event_types"]) if "event_types" in metadata else None,
        )


class TableView(Sequence):
    """
    Some rows of an [`EventTable`], made at access like those of the view that [`~blossomrec_hf.data.split`] makes of a
    `Dataset`; lists of events are arrays.

    Args:
        table: the data set.
        rows: int [N], indices of the users.
        transform: maps a batch of stored columns to a batch of columns of the view.
    """

    def __init__(self, table: EventTable, rows: np.ndarray, transform: Any) -> None:
        self.table, self.rows, self.transform = table, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        user = self.rows[index]
        events = slice(self.table.offsets[user], self.table.offsets[user + 1])
        stored = {name: values[user : user + 1].tolist() for name, values in self.table.users.items()}
        stored |= {name: [values[events]] for name, values in self.table.events.items()}
        return {name: values[0] for name, values in self.transform(stored).items()}

    def select(self, indices: Sequence[int] | np.ndarray) -> "TableView":
        """The view of some of the rows."""
        return TableView(self.table, self.rows[np.asarray(indices)], self.transform)


def event_type_names(dataset: "Dataset | EventTable") -> list[str] | None:
    """Names of the event types, in the order of `event_type_ids`; `None` if the data set has none, or only their numbers."""
    if isinstance(dataset, EventTable):
        return dataset.event_types
    feature = getattr(dataset.features.get("event_type_ids"), "feature", None)
    return None if getattr(feature, "names", None) is None else list(feature.names)


def event_type_codes(names: Sequence[str] | None, wanted: Sequence[str]) -> np.ndarray:
    """
    int64 [names]: the id of each event type of a data set among the types `wanted` by a model, −1 for one that it lacks.

    Raises:
        ValueError: if the data set has no event types.
    """
    if names is None:
        raise ValueError(
            f"The model reads the event types {', '.join(wanted)}, but the data has none; name their column with `event_type`."
        )
    if unknown := [name for name in names if name not in wanted]:
        logger.warning("The event types %s are unknown to the model, which reads %s", unknown, list(wanted))
    return np.array([wanted.index(name) if name in wanted else UNKNOWN_TYPE for name in names], np.int64)


def recode_event_types(table: EventTable, wanted: Sequence[str] | None) -> EventTable:
    """The table with the event type ids of a model that reads the types `wanted`; the same table if no id changes."""
    if wanted is None or table.event_types == list(wanted):
        return table
    ids = event_type_codes(table.event_types, wanted)[table.events["event_type_ids"]]
    return replace(table, events=table.events | {"event_type_ids": ids}, event_types=list(wanted))


def _map_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a valid safetensors file, memory-mapped: the library for NumPy would copy them."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    content = np.memmap(path, np.uint8, "r", offset=8 + size)
    return {
        name: content[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of the tensors' names, types and contents."""
    described = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype.str} {tensors[name].size}\n".encode())
        digest.update(tensors[name].view(np.uint8).data)
    return digest.hexdigest()
