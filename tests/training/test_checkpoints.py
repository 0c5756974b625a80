"""What a run leaves on disk is whole or absent, on all processes together."""

import pytest
from accelerate import Accelerator

from blossomrec_hf.training.checkpoints import MetricsFile, atomic_folder_of_all, keep_only, numbered_folders


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def write(folder, content):
    with atomic_folder_of_all(folder, Accelerator(cpu=True)) as partial:
        (partial / "a").write_text(content)


def test_a_folder_that_cannot_be_written_is_named_and_the_former_stays(tmp_path):
    write(tmp_path / "checkpoint-5", "first")
    with pytest.raises(OSError, match=r"checkpoint-5: No space left\. What was there before is whole"):
        with atomic_folder_of_all(tmp_path / "checkpoint-5", Accelerator(cpu=True)) as partial:
            (partial / "a").write_text("second")
            raise RuntimeError("No space left")
    assert names(tmp_path) == ["checkpoint-5"] and (tmp_path / "checkpoint-5" / "a").read_text() == "first"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file"):
        write(tmp_path / "file" / "checkpoint-5", "x")


def test_only_the_numbered_folders_that_are_kept_stay(tmp_path):
    for step in (5, 6, 10):
        write(tmp_path / f"checkpoint-{step}", "x")
    (tmp_path / "checkpoint-notes").mkdir()
    keep_only(tmp_path, "checkpoint", 6)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-notes"]
    assert [number for number, _ in numbered_folders(tmp_path, "checkpoint")] == [6]


def test_a_continued_log_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        MetricsFile(path, enabled=True, step=step - 1).write(step=step)
    path.write_text(path.read_text() + '{"step": 4')  # a kill cut the last line
    MetricsFile(path, enabled=True, step=2).write(step=3, again=True)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
