"""Hashes of source files that change when the code of runs that finish changes: not with comments, docstrings and checks."""

import ast
import hashlib
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path


def hash_files(root: str | Path, patterns: Sequence[str]) -> dict[str, str]:
    """
    Hash Python files without what [`strip`] removes, equally on all versions of Python.

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
    """
    The source without comments, docstrings, blank lines, trailing spaces, and what a run that finishes does not do: `raise`
    statements, and each `if` that only raises.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    removed = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) or _only_raises(node)]
    removed += [node.body[0] for node in ast.walk(tree) if _has_docstring(node)]
    for node in removed:
        rows = range(node.lineno - 1, node.end_lineno)
        if not lines[rows[0]][: node.col_offset].strip():
            for row in rows:
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
        return False
    return isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)


def _only_raises(node: ast.AST) -> bool:
    """Whether a statement is an `if` without `else` that raises and, before, assigns at most; its condition assigns nothing."""
    if not isinstance(node, ast.If) or node.orelse or any(isinstance(x, ast.NamedExpr) for x in ast.walk(node.test)):
        return False
    *before, last = node.body
    return isinstance(last, ast.Raise) and all(isinstance(statement, ast.Assign) for statement in before)
