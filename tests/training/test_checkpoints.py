"""What lies on disk is whole or absent, wherever a kill falls."""

import shutil

import pytest
from accelerate import Accelerator

from blossomrec_hf.training.checkpoints import keep_only, numbered_folders, restore_former, written_aside


class Killed(BaseException):
    pass


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def write(folder, content):
    with written_aside(folder, Accelerator(cpu=True)) as aside:
        (aside / "a").write_text(content)
        (aside / "b").write_text(content)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_one_step_is_saved_again_leaves_one_of_both(tmp_path, monkeypatch, renames):
    write(tmp_path / "checkpoint-5", "first")
    rename, done = type(tmp_path).rename, []

    def killed_after(self, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", killed_after)
        if renames < 2:
            with pytest.raises(Killed):
                write(tmp_path / "checkpoint-5", "second")
        else:
            write(tmp_path / "checkpoint-5", "second")
    restore_former(tmp_path)
    ((number, folder),) = numbered_folders(tmp_path, "checkpoint")
    contents = {(folder / name).read_text() for name in ("a", "b")}
    assert number == 5 and contents == {"second" if renames == 2 else "first"}


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    for step in (5, 6):
        write(tmp_path / f"checkpoint-{step}", "x")
    rmtree = shutil.rmtree

    def killed_in_between(folder, **kwargs):
        if folder.exists():
            (folder / "a").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_in_between)
        with pytest.raises(Killed):
            keep_only(tmp_path, "checkpoint", 6)
    assert [number for number, _ in numbered_folders(tmp_path, "checkpoint")] == [6]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    keep_only(tmp_path, "checkpoint", 6)
    assert names(tmp_path) == ["checkpoint-6"]
