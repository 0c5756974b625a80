"""What is no checkpoint ends a command with one sentence, and at once."""

import logging

import pytest
from checkpoint_cases import error_message, same_weights, small_model, small_tokenizer
from huggingface_hub import constants
from transformers import HfArgumentParser

from blossomrec_hf import BlossomRecForSequentialRecommendation, BlossomRecTokenizer
from blossomrec_hf.data.options import LogOptions
from blossomrec_hf.sharing import push
from blossomrec_hf.utils.command_line import Parser, exit_on_error, load_checkpoint


def refused(path, kind=BlossomRecForSequentialRecommendation, argument="model") -> str:
    sentence = error_message(lambda: load_checkpoint(kind, str(path), argument), ValueError)
    assert sentence.startswith(f"--{argument} is {path}, ") and len(sentence.splitlines()) == 1
    assert "blossomrec train" in sentence and "owner/name" in sentence
    return sentence


def test_options_may_have_hyphens_for_underscores():
    parser = Parser(description="Test")
    parser.add_argument("folder")
    parser.add_argument("--max_history", type=int, default=3)
    for name in ("--max_history", "--max-history"):
        assert vars(parser.parse_args(["here", name, "5"])) == {"folder": "here", "max_history": 5}
    assert "--max_history MAX_HISTORY" in parser.format_help()


def test_what_is_there_is_loaded(local_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    model, tokenizer = small_model(), small_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    push(tmp_path, "ada/rec")
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
    assert "model.safetensors" in error_message(
        lambda: load_checkpoint(BlossomRecForSequentialRecommendation, str(tmp_path)), OSError
    )


def test_the_hub_without_such_a_repository_or_out_of_reach(local_hub, monkeypatch):
    assert "no such repository" in refused("runs/typo")
    local_hub.fail(503)
    assert "could not be reached (" in refused("runs/typo")
    local_hub.stop()
    assert "could not be reached (" in refused("runs/typo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("runs/typo")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("`k_core` is 0;\n  it must be at least 1."), "`k_core` is 0; it must be at least 1."),
        (OSError(28, "No space left on device", "out/file"), "No space left on device: out/file."),
        (OSError(28, "No space left on device", "a", None, "out/a"), "No space left on device: a -> out/a."),
        (ConnectionError("The Hub could not be reached."), "The Hub could not be reached."),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file"), "[enforce fail] . PytorchStream"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640"), "[enforce fail at inline"),
        (Exception("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (ImportError("Writing ONNX needs `pip install blossomrec-hf[onnx]`."), "Writing ONNX needs"),
        (ValueError(), "ValueError"),
    ],
)
def test_bad_input_ends_a_command_with_one_sentence_and_code_2(error, sentence, capsys, caplog):
    caplog.set_level(logging.DEBUG, logger="blossomrec_hf.utils.command_line")

    @exit_on_error()
    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith(sentence) and len(shown.splitlines()) == 1
    assert "in command" in caplog.text  # the traceback, for whoever looks for it


def test_an_argument_that_a_command_does_not_have_is_named(capsys):
    with pytest.raises(SystemExit), exit_on_error():
        HfArgumentParser(LogOptions).parse_args_into_dataclasses(["--item", "sku", "genres"])
    assert capsys.readouterr().err.startswith("genres is no argument of this command; see --help for its arguments.")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_on_error():
        raise RuntimeError("a bug")
    with exit_on_error():
        pass
