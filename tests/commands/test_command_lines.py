"""`--help` tells what each argument is and its default; a checkpoint that is not there is told in a sentence."""

import argparse
import importlib
import sys

import pytest

import blossomrec_cli


@pytest.mark.parametrize("name", blossomrec_cli.COMMANDS)
def test_help_tells_each_argument_and_its_default(name, monkeypatch):
    if name == "serve":
        pytest.importorskip("fastapi")
        pytest.importorskip("prometheus_client")
        pytest.importorskip("uvicorn")
    monkeypatch.setattr(sys, "argv", [f"blossomrec {name}", "--help"])
    shown = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: shown.append(parser))
    with pytest.raises(SystemExit):
        importlib.import_module(f"blossomrec_hf.commands.{name}").main()

    (parser,) = shown
    text = " ".join(parser.format_help().split())
    described = [action for action in parser._actions if action.dest != "help"]
    assert described and parser.description.strip().splitlines()[0] in text
    for action in described:
        assert action.help, f"{action.dest} has no help"
        if action.default is not None and action.const is not False:
            default = " ".join(str(action.default).split())
            assert f"(default: {default})" in text, f"the default of {action.dest} is not shown"
    assert "default: None" not in text and "==SUPPRESS==" not in text


@pytest.mark.parametrize(
    ("name", "argument", "more"),
    [("evaluate", "--models", ()), ("finetune", "--model", ("--output_dir", "out"))],
)
def test_a_model_that_is_not_there_is_told_in_one_sentence(run_command, tmp_path, monkeypatch, name, argument, more):
    monkeypatch.chdir(tmp_path)
    error = run_command(name, argument, "nowhere", *more, status=2, field="stderr")
    assert error.splitlines()[-1].startswith(f"{argument} is nowhere, ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()
