"""What is no checkpoint ends a command with one sentence, and at once."""

import pytest
from checkpoint_cases import same_weights, small_model, small_tokenizer, told
from huggingface_hub import constants

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.command_line import ends_with_a_sentence, load_checkpoint


def refused(path, kind=BlossomRecForSequentialRecommendation, argument="model") -> str:
    sentence = told(lambda: load_checkpoint(kind, str(path), argument), SystemExit)
    assert sentence.startswith(f"--{argument} is {path}, ") and len(sentence.splitlines()) == 1
    assert "examples/train.py" in sentence and "owner/name" in sentence
    return sentence


def test_what_is_there_is_loaded(local_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    model, tokenizer = small_model(), small_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.push_to_hub("ada/rec", tokenizer=tokenizer)
    for path in (str(tmp_path), "ada/rec"):
        assert same_weights(model, load_checkpoint(BlossomRecForSequentialRecommendation, path))
        assert load_checkpoint(BlossomRecTokenizer, path).get_vocab() == tokenizer.get_vocab()
    local_hub.stop()  # it is in the cache
    assert same_weights(model, load_checkpoint(BlossomRecForSequentialRecommendation, "ada/rec"))


def test_folders_that_hold_no_checkpoint(local_hub, tmp_path):
    for path in ("nowhere", "./no/where", tmp_path / "nowhere", "a--b/c"):
        assert "there is no such folder" in refused(path, argument="models")
    assert local_hub.requests == []
    assert "no config.json" in refused(tmp_path)
    assert "no config.json" in refused(tmp_path, BlossomRecTokenizer)
    small_model().save_pretrained(tmp_path)
    assert "no tokenizer.json" in refused(tmp_path, BlossomRecTokenizer)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors" in told(
        lambda: load_checkpoint(BlossomRecForSequentialRecommendation, str(tmp_path)), SystemExit
    )


def test_the_hub_without_such_a_repository_or_out_of_reach(local_hub, monkeypatch):
    assert "no such repository" in refused("runs/typo")
    local_hub.fail(503)
    assert "could not be asked (" in refused("runs/typo")
    local_hub.stop()
    assert "could not be asked (" in refused("runs/typo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("runs/typo")


def test_only_what_was_named_ends_with_a_sentence():
    with pytest.raises(SystemExit, match="a sentence"), ends_with_a_sentence(OSError):
        raise PermissionError("a sentence")
    with pytest.raises(ValueError), ends_with_a_sentence(OSError):
        raise ValueError
    with ends_with_a_sentence(OSError):
        pass
