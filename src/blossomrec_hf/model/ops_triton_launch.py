"""
What the operations of `ops_triton.py` share: Triton itself, what the kernels support, and how a call is laid out in
memory and split among programs. Each operation is a file of its own, `ops_triton_*.py`, kernels next to their launchers:

- `ops_triton_rotate.py`: offsets of histories, rotary embedding, compression windows;
- `ops_triton_select.py`: scores, softmax and the best blocks; the gradient of the score keys;
- `ops_triton_selected.py`: attention to the selected blocks, one program per block;
- `ops_triton_streams.py`, `ops_triton_streams_backward.py`: attention to the own block and to short-term blocks, and the
  gated sum of the streams.

Conventions of the kernels:

- Layouts are those of `ops_reference.py`, contiguous unless strides are passed: `[T, H, D]` queries, `[T, G, D]` keys.
  `REP` query heads share a key/value head; tiles of query rows have `REPP` (a power of two) rows per query.
- A history that begins at token `lo` owns the rows from `lo // N` on in every array with one row per N complete
  positions, and the tiles from `lo // N + i` on among tiles that may be incomplete (i is its number). Both follow
  from the offset alone, so nothing is counted, scanned or read back. A few rows and tiles stay unused.
- `start` and `stop` `[T]` are the offsets of the history around each token.
- Softmaxes work in base 2: rotated queries carry the factor scaling · log2(e), and an `lse` is a base-2 logarithm.
- Offsets of elements are `INDEX`: int32 if no buffer needs more, which saves registers.
- A pair is a query and one of its selected blocks, for one key/value head: number (t · G + g) · K + slot.
- Nothing is added atomically: every sum has one writer and a fixed order, so results are bitwise reproducible.
- Sizes of buffers and grids follow from shapes and `max_seqlen`, so no launch synchronizes.
"""

import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_blossomrec import BlossomRecConfig


try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["T", "num_rows", "num_keys", "num_pairs", "num_splits", "num_powers", "span"])
except ImportError:  # `why_unsupported` says so before any kernel is called
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(function):
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: the kernels run on the CPU

WIDTHS = (16, 32, 64, 128)
BLOCK_SIZES = (16, 32, 64)
MAX_SELECTED_BLOCKS = 16
MAX_SHORT_BLOCK = 64
MAX_TILE_BYTES = 2**16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows of queries that one program of the selected stream works on; blocks that are chosen more often are split.
CHUNK_ROWS = 256
# Tile sizes, warps and pipeline stages of each kernel, the fastest measured on an H100 (bfloat16; 65,536 tokens with H=8,
# G=2, d=16, and 16,384 tokens with H=G=8, d=32; b=16, k=4, B=8). Larger tiles and heads get more warps. `ROWS` are rows of
# queries (fewer of wider heads in "selected_backward"), `COLUMNS` and `KEYS` keys.
LAUNCH = {
    "select": {"BQ": 16, "BM": 32, "num_warps": 1, "num_stages": 2},
    "selected": {"ROWS": 32, "num_warps": 1, "num_stages": 3},
    "selected_backward": {"ROWS": 32, "num_warps": 1, "num_stages": 2},
    "streams": {"ROWS": 16, "COLUMNS": 32, "num_warps": 1, "num_stages": 1},
    "query_backward": {"COLUMNS": 32, "num_warps": 1, "num_stages": 2},
    "key_backward": {"KEYS": 8, "ROWS": 32, "num_warps": 1, "num_stages": 2},
    "spread": {"BM": 32, "BQ": 64, "num_warps": 2, "num_stages": 3},
}


class Sizes(NamedTuple):
    """The numbers of a configuration for which the kernels are compiled."""

    stride: int
    length: int
    block: int
    selected: int
    short_block: int
    window: int
    base: int

    @classmethod
    def of(cls, config: BlossomRecConfig) -> "Sizes":
        """The sizes of a configuration."""
        return cls(
            stride=config.compress_stride,
            length=config.compress_block_size,
            block=config.selection_block_size,
            selected=config.num_selected_blocks,
            short_block=config.short_term_block_size,
            window=config.short_term_window,
            base=config.power_law_base,
        )


def why_unsupported(
    device: str,
    dtype: torch.dtype,
    width: int,
    *,
    block_size: int = 16,
    num_selected_blocks: int = 1,
    short_block_size: int = 1,
    heads_per_group: int = 1,
) -> str | None:
    """
    A sentence that says what the kernels cannot do, or `None` if they support all of it.

    Args:
        device: `"cuda"` or another device type.
        width: head width d.
        block_size, num_selected_blocks, short_block_size: b, k and B of the configuration.
        heads_per_group: query heads that share a key/value head.
    """
    if triton is None:
        return "`blossom_triton` needs Triton, which is not installed; install `triton`, or use `blossom_torch`."
    if device != "cuda" and not INTERPRETED:
        return f"`blossom_triton` needs a CUDA device, the input is on {device!r}; use `blossom_torch` there."
    for name, value, choices in (
        ("dtype", dtype, DTYPES),
        ("head width", width, WIDTHS),
        ("selection_block_size", block_size, BLOCK_SIZES),
        ("num_selected_blocks", num_selected_blocks, range(1, MAX_SELECTED_BLOCKS + 1)),
        ("short_term_block_size", short_block_size, range(1, MAX_SHORT_BLOCK + 1)),
    ):
        if value not in choices:
            allowed = f"1 to {choices[-1]}" if isinstance(choices, range) else ", ".join(map(str, choices))
            return f"`blossom_triton` has no kernels for {name} {value} (only {allowed}); use `blossom_torch`."
    rows = max(16, power_of_two(whole_blocks(16, short_block_size))) * power_of_two(heads_per_group)
    if rows * width * dtype.itemsize > MAX_TILE_BYTES:
        return (
            f"`blossom_triton` does not support a short-term block of {short_block_size} positions with "
            f"{heads_per_group} heads of width {width} in {dtype} per key/value head; use `blossom_torch`."
        )
    return None


def check(x: Tensor, **sizes: int) -> None:
    """Raises a `ValueError` if the kernels do not support `x` or a size; `sizes`: those of `why_unsupported`."""
    reason = why_unsupported(x.device.type, x.dtype, x.shape[-1], **sizes)
    if reason is not None:
        raise ValueError(reason)


def ceil(a: int, b: int) -> int:
    """`a` divided by `b`, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def whole_blocks(positions: int, block_size: int) -> int:
    """The largest multiple of a block size in `positions`, at least one block."""
    return max(1, positions // block_size) * block_size


class Layout:
    """Sizes, tiles and constants that the launches of one call have in common."""

    def __init__(self, q: Tensor, num_groups: int, cu_seqlens: Tensor, max_seqlen: int, sizes: Sizes, scaling: float):
        self.num_tokens, self.heads, self.width = q.shape
        self.groups = num_groups
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.sizes = sizes
        self.scaling = scaling
        self.dtype, self.device = q.dtype, q.device
        self.rows = self.num_tokens // sizes.block
        self.num_keys = self.rows * num_groups
        rep = self.heads // num_groups
        self.heads_kw = {"H": self.heads, "G": num_groups, "D": self.width}
        self.rep_kw = {"REP": rep, "REPP": power_of_two(rep)}
        self.chunk = max(1, min(256, CHUNK_ROWS // self.rep_kw["REPP"]))  # in pairs
        self.precision = {"PREC": "ieee" if q.dtype == torch.float32 else "tf32"}
        # The distances of short-term blocks are 0 … window − 1, then `POWER`, `POWER` · base, …
        first_power = next(p for p in (sizes.base**e for e in range(32)) if p >= sizes.window)
        self.short_kw = {"B": sizes.short_block, "WINDOW": sizes.window, "BASE": sizes.base}
        self.short_kw["POWER"] = min(first_power, 2**31 - 1)
        # Positions of a tile of queries, and of one of keys: whole short-term blocks.
        self.query_tile = whole_blocks(ceil(LAUNCH["streams"]["ROWS"], self.rep_kw["REPP"]), sizes.short_block)
        self.key_tile = whole_blocks(LAUNCH["key_backward"]["KEYS"], sizes.short_block)

    def launch(self, name: str, rows: int, columns: int) -> dict[str, int]:
        """The warps for tiles of `rows` times `columns` or the head width, and the pipeline stages of `LAUNCH`."""
        elements = rows * max(columns, self.width) * (2 if self.dtype == torch.float32 else 1)
        warps = min(max(LAUNCH[name]["num_warps"], elements // 1024), 8)
        return {"num_warps": warps, "num_stages": LAUNCH[name]["num_stages"]}

    @property
    def num_powers(self) -> int:
        """How many powers of the base, from `POWER` on, are distances inside of the longest history."""
        powers = (self.short_kw["POWER"] * self.sizes.base**e for e in range(32))
        return sum(p * self.sizes.short_block < self.max_seqlen for p in powers)

    @property
    def index(self) -> dict[str, object]:
        """The integers that count the elements of the largest buffers: the parts of pairs and of chunks, and windows."""
        chunk_rows = self.num_tokens * self.groups * (2 + self.sizes.selected * self.sizes.block // self.chunk)
        window_rows = self.num_tokens // self.sizes.stride * self.groups * self.sizes.length
        rows = max(self.num_tokens * self.heads * self.sizes.selected, chunk_rows, window_rows)
        return {"INDEX": tl.int32 if rows * self.width < 2**31 else tl.int64}

    def num_tiles(self, tile: int) -> int:
        """An upper bound of the number of tiles of `tile` positions."""
        return self.num_tokens // tile + self.cu_seqlens.shape[0] - 1

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is not initialized, by default in the dtype of the queries."""
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)


@jit
def block_place(row, T, start, stop, B: tl.constexpr):
    """The first token of the complete block in a `row`, the start of its history, and whether there is one."""
    token = tl.minimum((row + 1) * B - 1, T - 1)  # lies in the block if there is one
    lo = tl.load(start + token)
    first = lo + (row - lo // B) * B
    return first, lo, first + B <= tl.load(stop + token)


@jit
def unrotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Gradient of a rotary embedding, as two halves `[ROWS, D / 2]`; `cos` and `sin` `[ROWS, D]`."""
    x1, x2 = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
    c1, c2 = tl.split(tl.permute(tl.reshape(cos, (ROWS, 2, D // 2)), (0, 2, 1)))
    s1, s2 = tl.split(tl.permute(tl.reshape(sin, (ROWS, 2, D // 2)), (0, 2, 1)))
    return x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
