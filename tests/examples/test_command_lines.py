"""`--help` tells what each argument is and its default; a checkpoint that is not there is told in a sentence."""

import argparse
import runpy
import sys

import pytest
from example_cases import REPOSITORY


EXAMPLES = (
    "convert evaluate export finetune load_test model_card prepare_data push_to_hub recommend serve train".split()
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_tells_each_argument_and_its_default(name, monkeypatch):
    if name in ("serve", "load_test"):
        pytest.importorskip("fastapi")
        pytest.importorskip("prometheus_client")
        pytest.importorskip("uvicorn")
    monkeypatch.syspath_prepend(REPOSITORY / "examples")  # load_test.py imports serve.py
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    shown = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: shown.append(parser))
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"), run_name="__main__")

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
    ("script", "argument", "more"),
    [("evaluate.py", "--models", ()), ("finetune.py", "--model", ("--output_dir", "out"))],
)
def test_a_model_that_is_not_there_is_told_in_one_sentence(run_example, tmp_path, monkeypatch, script, argument, more):
    monkeypatch.chdir(tmp_path)
    error = run_example(script, argument, "nowhere", *more, status=2, field="stderr")
    assert error.splitlines()[-1].startswith(f"{argument} is nowhere, ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()
