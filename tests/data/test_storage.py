"""A data set on disk is found by every reader, also after a kill between the two renames that replace it."""

import os
import shutil
import time

import polars as pl
import pytest
from small_cases import small_log

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.options import LogOptions
from blossomrec_hf.data.overview import write_report
from blossomrec_hf.data.readers import open_log
from blossomrec_hf.data.storage import load_folder
from blossomrec_hf.model.files_blossomrec import LEFTOVER_SECONDS
from blossomrec_hf.sharing.dataset_cards import dataset_card
from blossomrec_hf.training import LogArguments


@pytest.fixture
def cut_off(tmp_path):
    """The rows of a data set, and its folder as a writer leaves it that is killed after the first rename."""
    folder = tmp_path / "data"
    dataset, _ = build_sequences(small_log(), output_dir=folder)
    rows = dataset["input_ids"][:]
    folder.rename(tmp_path / ".data.former")
    return rows, folder


@pytest.mark.parametrize(
    "read",
    [
        load_folder,
        lambda folder: LogArguments(data=str(folder)).build()[0],
        lambda folder: open_log(folder, LogOptions(user="user_id", item="train_end")) and load_folder(folder),
        lambda folder: write_report(folder.parent / "report.html", folder) and load_folder(folder),
        lambda folder: dataset_card(folder) and load_folder(folder),
    ],
    ids=["load_folder", "LogArguments", "open_log", "write_report", "dataset_card"],
)
def test_the_old_data_set_is_read(cut_off, read):
    rows, folder = cut_off
    assert read(folder)["input_ids"][:] == rows


def test_the_old_data_set_is_not_overwritten_unasked(cut_off):
    rows, folder = cut_off
    with pytest.raises(FileExistsError, match="overwrite"):
        build_sequences(pl.DataFrame({"user": [1], "item": [2]}), output_dir=folder)
    assert load_folder(folder)["input_ids"][:] == rows


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(ValueError, match="is a file; give another path"):
            build_sequences("no such log", output_dir=place)


def test_what_a_killed_build_left_is_reported_and_a_day_later_removed(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # as if the build had been killed before
        build_sequences(small_log(), output_dir=tmp_path / "data")
    (left,) = (path for path in tmp_path.iterdir() if path.name != "data")
    build_sequences(small_log(), output_dir=tmp_path / "data", overwrite=True)
    assert left.is_dir() and any(str(left) in message for message in caplog.messages)
    long_ago = time.time() - LEFTOVER_SECONDS - 10
    for path in (*left.rglob("*"), left):
        os.utime(path, (long_ago, long_ago))
    build_sequences(small_log(), output_dir=tmp_path / "data", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "filters.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", ["", '{"features": 3}', "[1]"])
def test_a_damaged_data_set_is_refused_by_its_name(tmp_path, name, content):
    build_sequences(small_log(), output_dir=tmp_path / "data")
    (tmp_path / "data" / name).write_text(content)
    log = LogArguments(data=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=str(tmp_path / "data")):
        log.repeat_share(log.build()[0])
