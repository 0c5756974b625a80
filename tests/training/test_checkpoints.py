"""What a run leaves on disk is whole or absent, on all processes together."""

import pytest
import torch
from accelerate import Accelerator
from forked_commands import run_code
from small_cases import make_model

from blossomrec_hf.training import checkpoints
from blossomrec_hf.training.checkpoints import (
    LOCK_FILE,
    RUN_FILE,
    RunFolder,
    keep_only,
    numbered_folders,
    written_by_all,
)
from blossomrec_hf.utils.files import atomic_folder, lock_file


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def write(folder, content):
    with written_by_all(atomic_folder, folder, Accelerator(cpu=True)) as partial:
        (partial / "a").write_text(content)


def test_a_folder_that_cannot_be_written_is_named_and_the_former_stays(tmp_path):
    write(tmp_path / "checkpoint-5", "first")
    with pytest.raises(OSError, match=r"checkpoint-5: No space left\. What was there before is whole"):
        with written_by_all(atomic_folder, tmp_path / "checkpoint-5", Accelerator(cpu=True)) as partial:
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


@pytest.mark.parametrize("name", [RUN_FILE, "model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"no pickle"])
def test_a_damaged_checkpoint_is_not_resumed(tmp_path, name, content):
    def make():
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        return RunFolder(tmp_path, accelerator, {"processes": {"number": 1}})

    make().save_checkpoint(3, 0, finished=False)
    assert make().start(resume=True)
    (tmp_path / "checkpoint-3" / name).write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint-3") as error:
        make().start(resume=True)
    assert len(str(error.value).splitlines()) == 1


def test_two_runs_share_no_folder(tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    folder = RunFolder(run, Accelerator(cpu=True), {"processes": {"number": 1}})
    of_another = lock_file(run / LOCK_FILE)
    with pytest.raises(ValueError, match=r"`output_dir` is \S+run, which another process uses"):
        folder.start(resume=True)
    assert RUN_FILE not in names(run)
    of_another.close()
    assert not folder.start(resume=True) and not folder.start(resume=True)  # after an error in the same process
    assert lock_file(run / LOCK_FILE) is None
    folder.save_final(make_model())
    assert LOCK_FILE not in names(run)

    def lock_nothing(path):
        raise OSError(f"{path} cannot be locked")

    monkeypatch.setattr(checkpoints, "lock_file", lock_nothing)
    assert not folder.start(resume=False)
    assert "cannot be locked. Start no other run with this folder." in caplog.text


def test_a_missing_model_of_the_best_step_is_no_reason_to_keep_the_last_weights(tmp_path):
    folder = RunFolder(tmp_path, Accelerator(cpu=True), {})
    assert not folder.load_best(0, make_model())  # no validation
    with pytest.raises(OSError, match="best-3, the model of the best step, is missing"):
        folder.load_best(3, make_model())


def test_processes_with_other_data_do_not_train_together(tmp_path):
    code = """
import os
from pathlib import Path
from accelerate import Accelerator
from blossomrec_hf.training.checkpoints import RunFolder

data = {"histories": 60, "checksum": int(os.environ["RANK"]) // 2}
RunFolder(Path("run"), Accelerator(cpu=True), {"data": data, "processes": {"number": 3}})
"""
    done = run_code(code, folder=tmp_path / "code", num_processes=3)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    message = "process 2 trains on something else (data checksum: 0 on process 0, 1 here); give all processes the same"
    assert message in done.stderr
