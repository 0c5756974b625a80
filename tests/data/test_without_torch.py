"""Preparing data does not wait for torch."""

import subprocess
import sys
from pathlib import Path

import blossomrec_hf.data


def test_sequences_are_built_without_torch():
    """The package's own `__init__` is left out: it is about models."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('blossomrec_hf'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['blossomrec_hf'] = package\n"
        "from blossomrec_hf.data import build_sequences, generate_log, item_counts, split\n"
        "dataset, tokenizer = build_sequences(generate_log(10))\n"
        "print(len(split(dataset, 'test')[:]['target_ids']), item_counts(dataset, len(tokenizer)).sum() > 0)\n"
        "print('torch' in sys.modules)\n"
    )
    package = Path(blossomrec_hf.data.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True)
    assert done.stdout.split() == ["10", "True", "False"], done.stderr


def test_every_name_is_there():
    for name in blossomrec_hf.data.__all__:
        assert getattr(blossomrec_hf.data, name).__name__ == name
