"""Pushed and pulled through a Hub on loopback, with the real client: the same to the last bit, or an error in words."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import change_config, error_message, same_weights, save_and_push, small_model, small_tokenizer
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.sharing import push
from blossomrec_hf.sharing.summary import SUMMARY_FILE, write_summary


HISTORY = [[100, 103, 139, 120, 101]]
load = BlossomRecForSequentialRecommendation.from_pretrained


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits ever longer between two tries


@pytest.fixture
def folder(tmp_path):
    """A run's folder as `blossomrec train` writes it."""
    small_model().save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    figures = {f"{name}@10{suffix}": 0.25 for name in ("recall", "ndcg") for suffix in ("", "_all")}
    configuration = {"data": "/home/ada/secret/log.csv", "attention_types": ["blossom"], "max_length": 50}
    run = {"configuration": configuration, "seed": 1, "test": figures, "exclude_seen": True, "device": "a machine"}
    write_summary(tmp_path, run)
    (tmp_path / "selection.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "optimizer.bin").write_bytes(b"x")
    return tmp_path


def assert_same(model, tokenizer, repo_id, **finding):
    """What is pulled gives the same weights, vocabulary and recommendations, whichever way."""
    expected = model.recommend(**tokenizer(HISTORY, return_tensors="pt"), top_k=5)
    for models, tokenizers in (
        (BlossomRecForSequentialRecommendation, BlossomRecTokenizer),
        (AutoModelForCausalLM, AutoTokenizer),
    ):
        pulled = models.from_pretrained(repo_id, **finding)
        pulled_tokenizer = tokenizers.from_pretrained(repo_id, **finding)
        assert same_weights(model, pulled)
        assert pulled_tokenizer.get_vocab() == tokenizer.get_vocab()
        found = pulled.recommend(**pulled_tokenizer(HISTORY, return_tensors="pt"), top_k=5)
        assert torch.equal(found.item_ids, expected.item_ids)
        # The same product, which BLAS adds up in another order where memory lies otherwise: the last bit.
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-6)
        assert pulled_tokenizer.decode_items(found.item_ids) == tokenizer.decode_items(expected.item_ids)


def test_model_and_tokenizer_there_and_back_in_one_commit(local_hub, folder):
    model, tokenizer = load(folder), BlossomRecTokenizer.from_pretrained(folder)
    pushed = push(folder, "ada/rec", private=True, commit_message="First")
    repository = local_hub.repository("ada/rec")
    assert repository.private and len(repository.commits) == 2  # that of the Hub itself, and ours
    assert (pushed.oid, repository.head.title) == (repository.refs["refs/heads/main"], "First")
    assert {"README.md", "tokenizer.json", SUMMARY_FILE, "selection.png", "pipeline_blossomrec.py"} <= set(
        repository.head.files
    )
    assert not any(name.startswith("checkpoint-") for name in repository.head.files)
    assert_same(model, tokenizer, "ada/rec")
    assert_same(model, tokenizer, "ada/rec", revision=pushed.oid)

    # A name of one's own; another try finds nothing to do.
    assert push(folder, "rec").oid == pushed.oid
    assert len(repository.commits) == 2


def test_an_item_index_is_uploaded_or_refused_if_stale(local_hub, tmp_path):
    index_module = pytest.importorskip("blossomrec_hf.serving.index")
    pytest.importorskip("faiss")
    model = small_model(num_items=200)
    index = index_module.ItemIndex.build(model)
    model.save_pretrained(tmp_path)
    small_tokenizer(200).save_pretrained(tmp_path)
    index.save(tmp_path)
    push(tmp_path, "ada/rec")
    folder = snapshot_download("ada/rec")
    pulled = load(folder)
    again = index_module.ItemIndex.load(folder, pulled)
    states = torch.randn(3, 16)
    assert torch.equal(again.search(states, 5), index.search(states, 5))
    small_model(num_items=200).save_pretrained(tmp_path)
    assert "item index" in error_message(lambda: push(tmp_path, "ada/rec"), ValueError)  # of another model
    for name in ("item_index.faiss", "item_index.json"):
        (tmp_path / name).unlink()
    push(tmp_path, "ada/rec")
    assert not any("index" in name for name in local_hub.repository("ada/rec").head.files)


def test_branches_and_pull_requests(local_hub):
    first, second, third = small_model(), small_model(), small_model(hidden_size=32)
    tokenizer = small_tokenizer()
    save_and_push("ada/rec", first, tokenizer)
    save_and_push("ada/rec", second, tokenizer, revision="v2")
    proposed = save_and_push("ada/rec", third, tokenizer, create_pr=True)
    assert proposed.pr_url.endswith("/ada/rec/discussions/1")
    assert_same(first, tokenizer, "ada/rec")
    assert_same(second, tokenizer, "ada/rec", revision="v2")
    assert_same(third, tokenizer, "ada/rec", revision=proposed.pr_revision)
    local_hub.rename("ada/rec", "ada/renamed")
    assert_same(first, tokenizer, "ada/rec")
    # A stranger may propose, too.
    save_and_push("ada/renamed", third, tokenizer, create_pr=True, token="hf_other")
    assert "refs/pr/2" in local_hub.repository("ada/renamed").refs


def test_weights_of_an_earlier_push_are_removed(local_hub, tmp_path):
    first, second, tokenizer = small_model(), small_model(), small_tokenizer()
    save_and_push("ada/rec", first, tokenizer)
    local_hub.multipart_bytes = 5000
    second.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    push(tmp_path, "ada/rec")
    local_hub.multipart_bytes = 2**62
    weights = [name for name in local_hub.repository("ada/rec").head.files if name.endswith(".safetensors")]
    assert len(weights) > 1 and "model.safetensors" not in weights
    assert_same(second, tokenizer, "ada/rec")
    save_and_push("ada/rec", first, tokenizer)
    assert_same(first, tokenizer, "ada/rec")


def test_a_run_s_folder(local_hub, folder):
    pushed = push(folder, "ada/rec", private=True)
    files = local_hub.repository("ada/rec").head.files
    assert pushed.oid == local_hub.repository("ada/rec").refs["refs/heads/main"]
    card = files["README.md"].content.decode()
    assert 'model="ada/rec"' in card and "OWNER/NAME" not in card and "![selection.png]" in card
    assert "log.csv" in card and "secret" not in card + files[SUMMARY_FILE].content.decode()
    assert_same(load(folder), BlossomRecTokenizer.from_pretrained(folder), "ada/rec")


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("drop", {"method": "PUT", "path": "/upload/"}),
        (503, {"method": "PUT", "path": "/upload/"}),
        (500, {"path": "/preupload/"}),
        (503, {"path": "/info/lfs/objects/batch"}),
        (502, {"path": "/verify/"}),
    ],
)
def test_a_passing_fault_is_retried(local_hub, fault, where):
    model, tokenizer = small_model(), small_tokenizer()
    local_hub.fail(fault, **where)
    save_and_push("ada/rec", model, tokenizer)
    assert 0 in [status for *_, status in local_hub.requests] or fault in [s for *_, s in local_hub.requests]
    assert len(local_hub.repository("ada/rec").commits) == 2
    assert_same(model, tokenizer, "ada/rec")


@pytest.mark.parametrize("fault", ["drop", 503, "truncate"])
def test_an_interrupted_push_commits_nothing_and_the_next_one_continues(local_hub, fault):
    model, tokenizer = small_model(), small_tokenizer()
    local_hub.fail(fault, path="/commit/")
    try:
        save_and_push("ada/rec", model, tokenizer)
    except ConnectionError as error:
        assert "the same call again" in str(error)
    except ValueError:  # half an answer is no JSON; the commit itself is there
        assert fault == "truncate"
    repository = local_hub.repository("ada/rec")
    assert len(repository.commits) == (2 if fault == "truncate" else 1)
    sent = local_hub.uploads()
    assert len(sent) == 1  # the weights arrived, and are not sent again
    save_and_push("ada/rec", model, tokenizer)
    assert local_hub.uploads() == sent and len(repository.commits) == 2
    assert_same(model, tokenizer, "ada/rec")


def test_bytes_that_change_on_the_way_up_are_not_stored(local_hub):
    """The Hub compares hashes; a file that changes between hashing and sending is error_message, and nothing is committed."""
    model, tokenizer = small_model(), small_tokenizer()
    local_hub.fail(400, method="PUT", path="/upload/")
    with pytest.raises(Exception, match="model.safetensors"):
        save_and_push("ada/rec", model, tokenizer)
    assert len(local_hub.repository("ada/rec").commits) == 1
    save_and_push("ada/rec", model, tokenizer)
    assert_same(model, tokenizer, "ada/rec")


def test_a_damaged_download_is_refused(local_hub, tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    save_and_push("ada/rec", model, tokenizer)
    local_hub.fail("corrupt", method="GET", path="/cdn/")
    message = error_message(lambda: load("ada/rec", cache_dir=tmp_path), ValueError)
    assert "model.safetensors of ada/rec" in message and "removed from the cache" in message
    assert same_weights(model, load("ada/rec", cache_dir=tmp_path))


@pytest.mark.parametrize("fault", ["truncate", "drop", 503])
def test_an_interrupted_download_is_retried_or_reported(local_hub, tmp_path, fault):
    model, tokenizer = small_model(), small_tokenizer()
    save_and_push("ada/rec", model, tokenizer)
    local_hub.fail(fault, method="GET", path="/cdn/")
    try:
        assert same_weights(model, load("ada/rec", cache_dir=tmp_path))
    except OSError as error:
        assert "ada/rec" in str(error)
    assert same_weights(model, load("ada/rec", cache_dir=tmp_path))


def test_without_network_a_complete_cache_loads_and_an_incomplete_one_is_reported(local_hub, tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    save_and_push("ada/rec", model, tokenizer)
    load("ada/rec", cache_dir=tmp_path)
    local_hub.stop()
    assert same_weights(model, load("ada/rec", cache_dir=tmp_path))
    assert same_weights(model, load("ada/rec", cache_dir=tmp_path, local_files_only=True))
    (weights,) = Path(tmp_path).rglob("snapshots/*/model.safetensors")
    weights.unlink()
    for finding in ({}, {"local_files_only": True}):
        assert "in the cached files" in error_message(
            lambda f=finding: load("ada/rec", cache_dir=tmp_path, **f), OSError
        )
    message = error_message(lambda: save_and_push("ada/other", model, tokenizer), ConnectionError)
    assert "the same call again" in message


def test_pickled_weights_of_the_hub_are_refused(local_hub, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    HfApi().create_repo("ada/rec")
    HfApi().upload_folder(repo_id="ada/rec", folder_path=tmp_path)
    assert "pickle (pytorch_model.bin)" in error_message(lambda: load("ada/rec"), ValueError)
    assert not any(method == "GET" and path.startswith("/cdn/") for method, path, _ in local_hub.requests[-3:])


def test_private_gated_and_missing_repositories(local_hub):
    save_and_push("ada/rec", small_model(), small_tokenizer(), private=True)
    for finding in ({"token": "hf_other"}, {"token": False}, {"revision": "v9"}):
        assert "ada/rec" in error_message(lambda finding=finding: load("ada/rec", **finding), OSError)
    assert "ada/none" in error_message(lambda: load("ada/none"), OSError)
    local_hub.repository("ada/rec").private = False
    local_hub.repository("ada/rec").gated = True
    assert "gated" in error_message(lambda: load("ada/rec", token="hf_other"), OSError)


def test_missing_permissions_are_explained(local_hub, monkeypatch, folder):
    model, tokenizer = small_model(), small_tokenizer()

    def refusal(repo_id="ada/rec", kind=PermissionError, **options):
        return error_message(lambda: save_and_push(repo_id, model, tokenizer, **options), kind)

    expired = refusal(token="hf_expired")
    assert "the Hub rejected `token`" in expired and "no valid token was found" in expired
    assert "may not write to ada/rec" in refusal(token="hf_reader")
    assert "may not write to ada/rec" in refusal(token="hf_other")
    for name in ("a b", "ada/rec/more", "ada--rec", "-rec", "ada/", "x" * 100):
        assert "`repo_id` is" in refusal(name, ValueError)
    save_and_push("ada/rec", model, tokenizer)
    assert "already exists" in refusal(kind=FileExistsError, exist_ok=False)
    assert "41 ids" in error_message(lambda: save_and_push("ada/x", model, small_tokenizer(39)), ValueError)

    monkeypatch.delenv("HF_TOKEN")
    without = refusal()
    assert without.startswith("Cannot push to ada/rec: no valid token was found; ") and ". " not in without
    assert "hf auth login" in without and "HF_TOKEN" in without
    assert without == refusal(token=False) == error_message(lambda: push(folder, "ada/rec"), PermissionError)
    assert len(local_hub.repositories) == 1


def test_folders_without_a_loadable_model_are_not_pushed(local_hub, folder, tmp_path):
    def refusal():
        return error_message(lambda: push(folder, "ada/rec"), ValueError)

    shutil.copytree(folder, tmp_path / "copy")
    change_config(folder, vocab_size=50)
    assert "42 ids, the model's vocabulary 50" in refusal()
    change_config(folder, vocab_size=42)
    (folder / "ops_torch.py").write_text("")
    assert "ops_torch.py" in refusal()
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal()
    (folder / "model.safetensors").unlink()
    assert "no model" in refusal()
    assert not local_hub.repositories


def test_a_card_with_wrong_metadata_is_not_pushed(local_hub, folder):
    (folder / "README.md").write_text("---\nlicense: mine\n---\n# x\n")
    assert "license" in error_message(lambda: push(folder, "ada/rec"), ValueError)
    assert len(local_hub.repository("ada/rec").commits) == 1


@pytest.mark.parametrize("first", ["model", "tokenizer"])
def test_uploads_by_transformers_itself_load(local_hub, first):
    model, tokenizer = small_model(), small_tokenizer()
    parts = {"model": model, "tokenizer": tokenizer}
    for name in sorted(parts, key=lambda name: name != first):
        parts[name].push_to_hub("ada/rec", private=True)
    repository = local_hub.repository("ada/rec")
    assert repository.private and len(repository.commits) == 3  # the Hub's, and one of each part
    weights = [c for c in repository.commits.values() if "model.safetensors" in c.files]
    assert {"config.json", "checkpoint_manifest.json", "modeling_blossomrec.py", "README.md"} <= set(weights[0].files)
    assert_same(model, tokenizer, "ada/rec")

    # Another model takes its place, then one of the package's own uploads.
    other = small_model()
    other.push_to_hub("ada/rec")
    assert_same(other, tokenizer, "ada/rec")
    save_and_push("ada/rec", model, tokenizer)
    assert_same(model, tokenizer, "ada/rec")


def test_what_is_uploaded_while_saving_has_its_manifest(local_hub, tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    for _ in range(2):
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path, push_to_hub=True, repo_id="ada/rec")
        files = local_hub.repository("ada/rec").head.files
        hashes = json.loads(files["checkpoint_manifest.json"].content)["sha256"]
        assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_blossomrec.py"} <= set(hashes)
        assert all(files[name].sha256 == digest for name, digest in hashes.items())
        assert_same(model, tokenizer, "ada/rec")
        model.config.hidden_dropout_prob += 0.1
        model.config.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="ada/rec")
        assert load("ada/rec").config.hidden_dropout_prob == model.config.hidden_dropout_prob
        model = small_model()


def test_weights_of_two_uploads_are_refused_and_a_push_cleans_up(local_hub, tmp_path):
    """`transformers` leaves the single file of an earlier upload next to new parts, and would load it."""
    model, tokenizer = small_model(), small_tokenizer()
    save_and_push("ada/rec", small_model(), tokenizer)
    model.push_to_hub("ada/rec", max_shard_size="20KB")
    message = error_message(lambda: load("ada/rec"), ValueError)
    assert message == error_message(lambda: AutoModelForCausalLM.from_pretrained("ada/rec"), ValueError)
    assert (
        "model.safetensors" in message and "model.safetensors.index.json" in message and "blossomrec push" in message
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    push(tmp_path, "ada/rec")
    assert_same(model, tokenizer, "ada/rec")
