import pytest

from blossomrec_hf.utils.code_hash import hash_files, join_hashes, strip


SOURCE = '''"""A module."""

import os  # for paths


def twice(x: int) -> int:
    """
    Doubles # this
    """
    # twice
    text = "# no comment"
    return 2 * x  # double


class Empty:
    "no more than a docstring"
'''
CODE = 'import os\ndef twice(x: int) -> int:\n    text = "# no comment"\n    return 2 * x\nclass Empty:'


def test_comments_and_docstrings_are_no_code():
    assert strip(SOURCE) == CODE


CHECKED = """
def half(x, y):
    if x % 2:  # odd
        place = y[
            0
        ]
        raise ValueError(
            f"`x` is {x}"
        )
    if not y: raise IndexError
    if (z := len(y)) > 3:
        raise KeyError
    if x > 9:
        y = 2
    elif x > 8:
        raise KeyError(x)
    else:
        raise ValueError
    if z:
        x = 1
        raise IndexError from None
    else:
        x = 2
    return x // 2
"""
UNCHECKED = """
def half(x, y):
    if (z := len(y)) > 3:
    if x > 9:
        y = 2
    elif x > 8:
    else:
    if z:
        x = 1
    else:
        x = 2
    return x // 2
"""


def test_checks_are_no_code_of_runs_that_finish():
    assert strip(CHECKED) == UNCHECKED.strip()


def test_a_hash_changes_with_the_code_alone(tmp_path):
    path = tmp_path / "part" / "module.py"
    path.parent.mkdir()
    hashes = []
    for source in (
        SOURCE,
        SOURCE.replace("Doubles", "Returns twice").replace("# double", ""),
        SOURCE.replace("2 * x", "3 * x"),
    ):
        path.write_text(source)
        hashes.append(hash_files(tmp_path, ["part/*.py"]))
    assert hashes[0] == hashes[1] != hashes[2] and list(hashes[0]) == ["part/module.py"]
    assert join_hashes(hashes[0]) == join_hashes(hashes[1]) != join_hashes(hashes[2])
    with pytest.raises(ValueError, match="'other/\\*.py', which matches no file"):
        hash_files(tmp_path, ["other/*.py"])
