"""The `blossomrec` command."""

import subprocess
import sys

import pytest

import blossomrec_cli
from blossomrec_hf.model import streams_blossomrec


def test_help_lists_the_commands_and_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['blossomrec', '--help']; import blossomrec_cli; blossomrec_cli.main();"
        "print('imported:', sorted({'torch', 'transformers', 'blossomrec_hf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in blossomrec_cli.COMMANDS)
    assert "imported: []" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"), [("recomend", "did you mean recommend?"), ("xyz", "the commands are prepare, train")]
)
def test_an_unknown_command_is_named(name, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blossomrec", name])
    with pytest.raises(SystemExit, match="2"):
        blossomrec_cli.main()
    assert f"no command {name!r}; {words}" in capsys.readouterr().err


def test_a_command_gets_its_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blossomrec", "compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        blossomrec_cli.main()
    assert capsys.readouterr().out.startswith("usage: blossomrec compare ")


def test_a_command_without_its_extra_names_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blossomrec", "serve", "--help"])
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "blossomrec_hf.commands.serve", raising=False)
    with pytest.raises(SystemExit, match="2"):
        blossomrec_cli.main()
    assert 'requires fastapi: `pip install "blossomrec-hf[serve]"`' in capsys.readouterr().err


def test_a_module_of_ones_own_is_imported_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_streams.py").write_text(
        "from blossomrec_hf import Stream, register_stream\n\n\nclass Mine(Stream):\n    pass\n\n\nregister_stream('mine', Mine)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(streams_blossomrec, "STREAMS", dict(streams_blossomrec.STREAMS))
    monkeypatch.setattr(sys, "argv", ["blossomrec", "--import", "my_streams", "compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        blossomrec_cli.main()
    assert "mine" in streams_blossomrec.STREAMS
    assert capsys.readouterr().out.startswith("usage: blossomrec compare ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--import"], "requires a module and a command"),
        (["--import", "my_streams"], "requires a module and a command"),
        (["--import", "no_such_module", "train"], "is 'no_such_module', which cannot be imported: No module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["blossomrec", *arguments])
    with pytest.raises(SystemExit, match="2"):
        blossomrec_cli.main()
    assert words in capsys.readouterr().err
