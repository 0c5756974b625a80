"""An upload takes the files of a checkpoint and no other file of its folder."""

import json

import pytest
from checkpoint_cases import error_message, small_model, small_tokenizer

from blossomrec_hf.sharing.upload import files_to_push


PUBLIC = """
    README.md LICENSE config.json generation_config.json model-00001-of-00002.safetensors model.safetensors.index.json
    checkpoint_manifest.json tokenizer.json tokenizer_config.json training_summary.json items.parquet
    item_index.faiss item_index.json selection.png adapter/adapter_config.json adapter/adapter_model.safetensors
""".split()
PRIVATE = """
    events.db events.db-wal credentials.json id_rsa key.pem .env .netrc ratings.csv log.parquet train.log run.yaml run.json
    metrics.jsonl notes.md notes.txt holiday.png setup.py training_args.bin optimizer.pt scheduler.pkl model.pth
    pytorch_model.bin checkpoint-12/optimizer.bin best-3/model.safetensors .cache/x a.partial results.json.lock
    runs/events data/config.json adapter/notes.txt model.safetensors.csv config.json.bak
""".split()


@pytest.fixture
def folder(tmp_path):
    for name in PUBLIC + PRIVATE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}" if name.endswith(".json") else "x")
    (tmp_path / "README.md").write_text("# x\n\n![selection.png](selection.png)\n")
    return tmp_path


def test_what_goes_and_what_stays(folder):
    assert files_to_push(folder) == sorted(PUBLIC)


def test_code_goes_where_auto_map_names_it(folder):
    for name in ("mine.py", "helper.py", "private.py"):
        (folder / name).write_text("from .helper import x\n" if name == "mine.py" else "")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "mine.Model"}}))
    assert files_to_push(folder) == sorted([*PUBLIC, "helper.py", "mine.py"])


def test_all_of_a_saved_checkpoint_goes(tmp_path):
    small_model().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    assert files_to_push(tmp_path) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "adapter/adapter_config.json", "LICENSE.txt"])
def test_the_target_of_a_symbolic_link_never_goes(folder, tmp_path_factory, name):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert f"{name} is a symbolic link to {secret}" in error_message(lambda: files_to_push(folder), ValueError)
    (folder / name).unlink()
    (folder / "mine").write_text("x")
    (folder / name).symlink_to(folder / "mine")  # to a file of the folder: a copy of it
    assert name in files_to_push(folder)


def test_the_target_of_a_linked_folder_never_goes(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "adapter_config.json").write_text("{}")
    for path in (folder / "adapter").iterdir():
        path.unlink()
    (folder / "adapter").rmdir()
    (folder / "adapter").symlink_to(elsewhere)
    assert "symbolic link" in error_message(lambda: files_to_push(folder), ValueError)
