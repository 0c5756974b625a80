"""A prepared data set as one file of arrays: what the folder says, column by column and split by split."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, List
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from small_cases import small_log

from blossomrec_hf.data import (
    EventTable,
    build_sequences,
    has_users,
    hold_out_nothing,
    item_counts,
    repeat_share,
    split,
    split_by_leave_one_out,
    split_by_time,
    split_by_user,
)
from blossomrec_hf.data.event_table import event_type_names, recode_event_types
from blossomrec_hf.data.growth import recode_dataset_types
from blossomrec_hf.data.metadata import METADATA_FILE, read_item_metadata
from blossomrec_hf.data.splits import part_lengths, user_ids
from blossomrec_hf.data.storage import export_folder, load_folder
from blossomrec_hf.training import LogArguments


EVENT_TYPES = {
    "timestamps": (pa.int64(), st.integers(0, 2**40)),
    "event_type_ids": (pa.int8(), st.integers(0, 5)),
    "weights": (pa.float32(), st.floats(0, 1, width=32)),
    "session_starts": (pa.bool_(), st.booleans()),
}


@st.composite
def datasets(draw) -> Dataset:
    """Histories of 1 to 9 events with some of the columns that events may have."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    text = draw(st.booleans())
    ids = [f"u{n}é\x00" if text else n - 3 for n in range(len(lengths))]
    columns = {"user_id": pa.array(ids), "input_ids": draw_lists(draw, lengths, pa.int32(), st.integers(0, 11))}
    for name, (kind, values) in EVENT_TYPES.items():
        if draw(st.booleans()):
            columns[name] = draw_lists(draw, lengths, kind, values)
    rows = Dataset(pa.table(columns))
    if "event_type_ids" in columns and draw(st.booleans()):  # else only numbers are known, as in older data sets
        rows = rows.cast_column("event_type_ids", List(ClassLabel(names=[f"type {n}é" for n in range(6)])))
    return split_by_leave_one_out(rows.add_column("train_end", lengths).add_column("validation_end", lengths).add_column("test_end", lengths))  # fmt: skip


def draw_lists(draw, lengths, kind, values) -> pa.Array:
    return pa.array([[draw(values) for _ in range(length)] for length in lengths], pa.list_(kind))


def plain(row: dict) -> dict:
    return {name: np.asarray(value).tolist() for name, value in row.items()}


@settings(max_examples=25, deadline=None)
@given(datasets(), st.data())
def test_a_file_has_every_column_and_every_split_of_the_dataset(tmp_path_factory, dataset, data):
    path = tmp_path_factory.mktemp("table") / "data.safetensors"
    written = EventTable.from_dataset(dataset)
    written.repeat_share, written.files = 1 / 3, {"note.txt": b"any bytes"}
    written.save(path)
    table = EventTable.load(path)
    assert isinstance(table.events["input_ids"], np.memmap)
    assert (table.repeat_share, table.files) == (1 / 3, {"note.txt": b"any bytes"})
    assert sorted(table.column_names) == sorted(dataset.column_names)
    assert table.event_types == event_type_names(dataset)
    back = table.to_dataset()
    assert back.select_columns(dataset.column_names)[:] == dataset[:]
    assert {name: back.features[name] for name in dataset.features} == dict(dataset.features)

    ways = [lambda data: data, hold_out_nothing, lambda data: split_by_user(data, validation=0.3, test=0.3)]
    if "timestamps" in dataset.column_names:
        times = sorted(time for row in dataset["timestamps"] for time in row)
        ways.append(lambda data: split_by_time(data, times[len(times) // 2] + 1, times[-1] + 1))
    way = data.draw(st.sampled_from(ways))
    dataset, table = way(dataset), way(table)
    assert user_ids(table) == user_ids(dataset)
    np.testing.assert_array_equal(item_counts(table, 12), item_counts(dataset, 12))
    assert repeat_share(table) == repeat_share(dataset)
    columns = data.draw(st.lists(st.sampled_from(sorted(set(EVENT_TYPES) & set(table.column_names)) or ["input_ids"]), max_size=1))  # fmt: skip
    for part in ("train", "validation", "test"):
        for one, other in zip(part_lengths(table, part), part_lengths(dataset, part)):
            np.testing.assert_array_equal(one, other)
        if has_users(dataset, part):
            counts = data.draw(st.sampled_from([None, item_counts(dataset, 12)]))
            if counts is not None and not (counts[np.concatenate(dataset["input_ids"])] > 0).all():
                counts = None  # all targets could be unknown
            options = {"max_length": data.draw(st.sampled_from([None, 1, 3])), "columns": columns, "counts": counts}
            wanted = [plain(row) for row in split(dataset, part, **options)]
            view = split(table, part, **options)
            assert [plain(row) for row in view] == wanted
            assert [plain(row) for row in view.select([len(view) - 1, 0])] == [wanted[-1], wanted[0]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of a prepared data set with titles, the file it was exported to)"""
    folder = tmp_path_factory.mktemp("prepared")
    titles = small_log().select(item="item", title="item").unique("item")
    build_sequences(small_log(), output_dir=folder / "data", items=titles)
    export_folder(folder / "data", folder / "data.safetensors")
    return folder / "data", folder / "data.safetensors"


def test_an_exported_folder_is_read_wherever_a_prepared_one_is(exported):
    folder, file = exported
    by_folder, by_file = LogArguments(data=str(folder)), LogArguments(data=str(file))
    for read in ("build", "read_table"):
        (dataset, tokenizer), (other, other_tokenizer) = getattr(by_folder, read)(), getattr(by_file, read)()
        assert other_tokenizer.get_vocab() == tokenizer.get_vocab()
        assert other_tokenizer.item_type == tokenizer.item_type == "int"
        assert [plain(row) for row in split(other, "test")] == [plain(row) for row in split(dataset, "test")]
        assert by_file.repeat_share(other) == by_folder.repeat_share(dataset) == repeat_share(dataset)
    assert by_file.item_titles(tokenizer).equals(read_item_metadata(folder))
    assert EventTable.load(file).files.keys() == {"tokenizer.json", "tokenizer_config.json", METADATA_FILE}


def test_an_exported_file_is_recoded_to_the_vocabulary_of_a_model(exported):
    folder, file = exported
    tokenizer = type(LogArguments(data=str(file)).build()[1]).from_items([5, 3, 4])
    for read in ("build", "read_table"):
        rows = [plain(row) for row in split(getattr(LogArguments(data=str(file)), read)(tokenizer)[0], "train")]
        wanted = split(LogArguments(data=str(folder)).build(tokenizer)[0], "train")
        assert rows == [plain(row) for row in wanted]
        assert {item for row in rows for item in row["input_ids"]} == {1, 2, 3, 4}


def test_damaged_and_foreign_files_are_refused(exported, tmp_path):
    content, path = exported[1].read_bytes(), tmp_path / "data.safetensors"
    rng = np.random.default_rng()
    for place in [0, 8, len(content) - 1, *rng.integers(8, 2000, 20), *rng.integers(0, len(content), 20)]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))  # one bit
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"data\.safetensors is damaged|is a safetensors file, but no data set"):
            EventTable.load(path)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"data\.safetensors is damaged, or no safetensors file"):
            EventTable.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="but no data set that `blossomrec export --data` of this version wrote"):
        EventTable.load(path)
    with pytest.raises(FileNotFoundError):
        EventTable.load(tmp_path / "none.safetensors")


def test_a_failed_export_leaves_the_old_file(exported, tmp_path):
    path = tmp_path / "data.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no folder of a prepared data set: it has no state.json"):
        export_folder(tmp_path, path)
    broken = EventTable.load(exported[1])
    broken.events["objects"] = np.array([object()])
    with pytest.raises(Exception):  # whatever the library makes of it
        broken.save(path)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["data.safetensors"]


def test_filters_that_a_prepared_file_no_longer_takes_are_refused(exported):
    with pytest.raises(ValueError, match=r"`k_core` is \[5, 5\], but .*is already prepared"):
        LogArguments(data=str(exported[1]), k_core=5).read_table()


def test_a_column_needs_one_value_per_event():
    rows = {"user_id": [1, 2], "input_ids": [[2, 3], [4]], "timestamps": [[1, 2], [3, 4]]}
    with pytest.raises(ValueError, match="2 values in timestamps of row 1, whose history has 1 events"):
        EventTable.from_dataset(Dataset.from_dict(rows))


def test_the_layout_is_readable_without_this_package(exported):
    tensors = load_file(exported[1])
    assert {
        "offsets",
        "events.input_ids",
        "users.user_id",
        "users.train_end",
        "files.tokenizer.json",
    } <= tensors.keys()
    dataset = load_folder(exported[0])
    lengths = [len(row) for row in dataset["input_ids"]]
    np.testing.assert_array_equal(np.diff(tensors["offsets"]), lengths)
    np.testing.assert_array_equal(tensors["events.input_ids"], np.concatenate(dataset["input_ids"]))


def test_event_types_get_the_ids_of_a_model(caplog):
    rows = Dataset.from_dict({"user_id": [7, 8], "input_ids": [[2, 3], [4]], "event_type_ids": [[0, 2], [1]]})
    rows = rows.cast_column("event_type_ids", List(ClassLabel(names=["view", "cart", "buy"])))
    wanted = ["buy", "view", "gift"]
    for recoded in (recode_event_types(EventTable.from_dataset(rows), wanted), recode_dataset_types(rows, wanted)):
        table = recoded if isinstance(recoded, EventTable) else EventTable.from_dataset(recoded)
        assert table.events["event_type_ids"].tolist() == [1, 0, -1]
        assert event_type_names(recoded) == wanted
    assert "['cart'] are unknown to the model" in caplog.text
    assert recode_dataset_types(rows, ["view", "cart", "buy"]) is rows
    with pytest.raises(ValueError, match="reads the event types buy, view, gift, but the data has none"):
        recode_dataset_types(rows.remove_columns("event_type_ids"), wanted)
