"""
Triton's interpreter in half the time: `conftest.py` imports this file where Triton interprets.

Each function that a kernel calls patches the whole language again, and each sum or product of integers is computed once
more, in int64, to find overflow. The language stays patched until the kernel ends, so once is enough; overflow is looked
for in tests with the fixture `overflow_is_an_error`.
"""

import dataclasses
from collections.abc import Callable
from types import FunctionType

from triton import language
from triton.runtime import interpreter


def patch_once(fn: FunctionType, patch: Callable = interpreter._patch_lang) -> interpreter._LangPatchScope:
    """`patch(fn)` if a module of the language that `fn` uses is not patched, otherwise nothing to restore."""
    used = [m for m in (language, language.core) if any(value is m for value in fn.__globals__.values())]
    if any(language.core.is_builtin(module.load) for module in used):
        return patch(fn)
    return interpreter._LangPatchScope()


def find_overflow(find: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=find)


interpreter._patch_lang = patch_once
find_overflow(False)
