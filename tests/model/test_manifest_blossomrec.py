"""The manifest: every saved file is compared with its hash, no other file is touched."""

import hashlib
import json
import sys

import pytest
from checkpoint_cases import change_json, error_message, small_model, small_tokenizer

from blossomrec_hf.model.manifest_blossomrec import MANIFEST_NAME, check_manifest, code_files, inside, update_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    small_model().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def hashes(folder):
    return json.loads((folder / MANIFEST_NAME).read_text())["sha256"]


def test_every_saved_file_has_its_hash(folder):
    saved = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= saved
    assert {"modeling_blossomrec.py", "tokenization_blossomrec.py", "pipeline_blossomrec.py"} <= saved
    assert set(hashes(folder)) == saved
    for name, digest in hashes(folder).items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_saving_again_drops_what_is_gone_and_keeps_what_it_did_not_write(folder):
    tokenizer_hash = hashes(folder)["tokenizer.json"]
    (folder / "tokenizer.json").write_text("changed by hand")
    small_model().save_pretrained(folder, max_shard_size="20KB")
    found = hashes(folder)
    assert "model.safetensors" not in found and "model.safetensors.index.json" in found
    assert found["tokenizer.json"] == tokenizer_hash  # the model did not write it, so it does not vouch for it
    assert "tokenizer.json" in error_message(lambda: check_manifest(folder), ValueError)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "", ".hidden", "a\\b", "a\nb"])
def test_names_outside_of_the_folder_are_refused_and_not_read(folder, name):
    (folder.parent / "secret").write_text("secret")
    change_json(folder / MANIFEST_NAME, sha256={name: "0" * 64})
    message = error_message(lambda: check_manifest(folder), ValueError)
    assert repr(name) in message and "its own folder" in message
    assert hashlib.sha256(b"secret").hexdigest() not in message


def test_symbolic_links_are_followed_inside_of_the_folder_alone(folder):
    (folder.parent / "secret").write_text("secret")
    (folder / "there.txt").symlink_to(folder.parent / "secret")
    (folder / "here.txt").symlink_to(folder / "config.json")
    assert inside(folder, "here.txt").read_text() == (folder / "config.json").read_text()
    message = error_message(lambda: inside(folder, "there.txt"), ValueError)
    assert "there.txt is a symbolic link to" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"sha256": []}', '{"sha256": {"a": 1}}', "[" * 100_000])
def test_a_damaged_manifest_is_refused_and_replaced_by_the_next_save(folder, content):
    (folder / MANIFEST_NAME).write_text(content)
    assert "damaged" in error_message(lambda: check_manifest(folder), ValueError)
    update_manifest(folder, ["config.json"])
    assert list(hashes(folder)) == ["config.json"]


def test_code_of_others_named_in_auto_map_is_found_with_what_it_imports(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom .helper import x\ntry:\n    from .optional import y\nexcept ImportError: ..."
    )
    (tmp_path / "helper.py").write_text("from .mine import z\n")
    (tmp_path / "optional.py").write_text("")
    (tmp_path / "stranger.py").write_text("")
    (tmp_path / "slow.py").write_text("")
    auto_map = {"AutoModel": "mine.Model", "AutoConfig": "owner/name--far.Config", "AutoTokenizer": [None, "slow.T"]}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert code_files(tmp_path) == ["helper.py", "mine.py", "optional.py", "slow.py"]
    auto_map = {"AutoModel": "../mine.Model", "AutoConfig": 3, "AutoTokenizer": {}}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map, "custom_pipelines": [1]}))
    assert code_files(tmp_path) == []


def test_it_runs_where_only_transformers_is_installed():
    """What travels imports nothing of the package but its own files."""
    imported = {
        name for name in sys.modules["blossomrec_hf.model.manifest_blossomrec"].__dict__ if "blossomrec" in name
    }
    assert imported == set()
