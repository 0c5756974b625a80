import os

from blossomrec_hf.utils import environment
from blossomrec_hf.utils.environment import keep_compiled_code


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
