"""Hashes of source files that change when the code changes, and not when its comments and docstrings do."""

import ast
import hashlib
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path


def hash_files(root: str | Path, patterns: Sequence[str]) -> dict[str, str]:
    """
    Hash Python files without comments, docstrings, blank lines and trailing spaces, equally on all versions of Python.

    Args:
        root: the folder that patterns and names are relative to.
        patterns: patterns of files, such as `"model/*.py"`; one that matches no file is an error.

    Returns:
        12 hexadecimal digits per file, by its path relative to `root`, in the order of the paths.
    """
    root = Path(root)
    paths: set[Path] = set()
    for pattern in patterns:
        found = set(root.glob(pattern))
        if not found:
            raise ValueError(f"`patterns` has {pattern!r}, which matches no file in {root}; correct it.")
        paths |= found
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(strip(path.read_text("utf-8")).encode()).hexdigest()[:12]
        for path in sorted(paths)
    }


def join_hashes(hashes: dict[str, str]) -> str:
    """One hash, 12 hexadecimal digits, of the hashes of several files."""
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:12]


def strip(source: str) -> str:
    """The source without comments, docstrings, blank lines and trailing spaces."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        first, rows = body[0].value, range(body[0].lineno - 1, body[0].end_lineno)
        alone = not lines[rows[0]][: body[0].col_offset].strip()
        if alone and isinstance(first, ast.Constant) and isinstance(first.value, str):
            for row in rows:
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
