import os

import pytest
import torch

from blossomrec_hf.utils import environment
from blossomrec_hf.utils.environment import (
    COMPILE_PASSES,
    check_processes,
    describe_environment,
    keep_compiled_code,
    worth_compiling,
)


def test_long_runs_on_a_gpu_are_compiled_by_default():
    assert worth_compiling(torch.device("cuda"), COMPILE_PASSES)
    assert not worth_compiling(torch.device("cuda"), COMPILE_PASSES - 1)
    assert not worth_compiling(torch.device("cpu"), COMPILE_PASSES)


def test_compiled_code_is_kept_unless_another_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "HF_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "blossomrec" / "compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(environment, "HF_HOME", str(tmp_path / "file"))  # where no folder can be made
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_processes_that_work_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(1)  # not from a launcher
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_processes(2)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but 1 process works alone; .* ACCELERATE_USE_CPU=true"):
        check_processes(1)


@pytest.mark.parametrize(("threads", "device"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_the_device_is_named_in_english(threads, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe_environment()["device"] == device
