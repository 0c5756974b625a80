"""What the tests of commands and examples share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import polars as pl
from small_cases import small_log


REPOSITORY = Path(__file__).parents[1]
SMALL_MODEL = (
    "--hidden_size 16 --num_attention_heads 2 --num_key_value_heads 1 --intermediate_size 32 --max_length 20 "
    "--tokens_per_step 300 --learning_rate 1e-2 --warmup_steps 5"
).split()


def write_log(path, **sizes):
    """`small_log` as a CSV with times."""
    small_log(**sizes).with_columns(timestamp=pl.int_range(pl.len()).over("user")).write_csv(path)
    return path


def load_example(script: str) -> ModuleType:
    """A script of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), REPOSITORY / "examples" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
