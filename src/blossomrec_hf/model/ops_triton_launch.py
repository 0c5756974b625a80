"""
What the kernels of `ops_triton_kernels.py` and `ops_triton_backward_kernels.py` can do, and how each of them is launched:
grids, tile sizes, buffers. Sizes of buffers and grids follow from shapes and `max_seqlen`, so nothing here synchronises.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_blossomrec import BlossomRecConfig
from .ops_triton_backward_kernels import (
    invert_kernel,
    inverted_kernel,
    keys_kernel,
    score_key_kernel,
    selected_dq_kernel,
    short_dq_kernel,
    spread_kernel,
)
from .ops_triton_kernels import (
    plan_kernel,
    rotate_kernel,
    select_kernel,
    selected_kernel,
    short_kernel,
    triton,
    windows_kernel,
)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: the kernels run on the CPU

WIDTHS = (16, 32, 64, 128)
BLOCK_SIZES = (16, 32, 64)
MAX_SELECTED_BLOCKS = 16
MAX_SHORT_BLOCK = 64
MAX_TILE_BYTES = 2**16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Pairs of (query, selected block) that one program of the backward pass works on; blocks chosen more often are split.
CHUNK = 256
# Positions of a tile of the short-term stream, at least.
SHORT_TILE = 16
# Tile sizes, warps and pipeline stages of each kernel, the fastest of some twenty on an H100 (bfloat16, H=8, G=2, d=16,
# b=16, k=4, B=8, 65,536 tokens). Warps are those of that case; larger tiles and heads get more.
LAUNCH = {
    "select": {"BQ": 16, "BM": 64, "num_warps": 1, "num_stages": 2},
    "selected": {"num_warps": 1, "num_stages": 1},
    "short": {"num_warps": 1, "num_stages": 2},
    "selected_dq": {"num_warps": 1, "num_stages": 1},
    "short_dq": {"num_warps": 4, "num_stages": 2},
    "inverted": {"PQ": 16, "num_warps": 1, "num_stages": 2},
    "spread": {"BM": 64, "BQ": 64, "num_warps": 2, "num_stages": 3},
    "keys": {"num_warps": 1, "num_stages": 1},
}


class Sizes(NamedTuple):
    """The numbers of a configuration that the kernels are specialised on."""

    stride: int
    length: int
    block: int
    selected: int
    short_block: int
    window: int
    base: int

    @classmethod
    def of(cls, config: BlossomRecConfig) -> "Sizes":
        """Those of a configuration."""
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
    A sentence that says what the kernels cannot do, or `None` where they can do everything asked.

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
    rows = max(16, power_of_two(short_tile(short_block_size))) * power_of_two(heads_per_group)
    if rows * width * dtype.itemsize > MAX_TILE_BYTES:
        return (
            f"`blossom_triton` cannot hold a short-term block of {short_block_size} positions with {heads_per_group} "
            f"heads of width {width} in {dtype} for each key/value head; use `blossom_torch`."
        )
    return None


def check(x: Tensor, **sizes: int) -> None:
    reason = why_unsupported(x.device.type, x.dtype, x.shape[-1], **sizes)
    if reason is not None:
        raise ValueError(reason)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def short_tile(block_size: int) -> int:
    """Positions of a tile of the short-term stream: whole blocks of it."""
    return max(1, SHORT_TILE // block_size) * block_size


class Layout:
    """What the launches of one call have in common."""

    def __init__(self, q: Tensor, num_groups: int, cu_seqlens: Tensor, max_seqlen: int, sizes: Sizes, scaling: float):
        self.num_tokens, self.heads, self.width = q.shape
        self.groups = num_groups
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.sizes = sizes
        self.scaling = scaling
        self.scale2 = scaling * math.log2(math.e)
        self.dtype, self.device = q.dtype, q.device
        self.rows = self.num_tokens // sizes.block
        rep = self.heads // num_groups
        self.heads_kw = {"H": self.heads, "G": num_groups, "D": self.width}
        self.rep_kw = {"REP": rep, "REPP": power_of_two(rep)}
        self.precision = {"PREC": "ieee" if q.dtype == torch.float32 else "tf32"}
        # Queries of a tile of the selected stream: 16 rows, but no more keys than shared memory holds.
        fitting = 512 * 2 // (self.width * q.element_size())
        self.query_tile = max(1, min(16 // self.rep_kw["REPP"], fitting))
        self.selected_kw = self.rep_kw | {"REPP": max(self.rep_kw["REPP"], 16 // self.query_tile)}
        self.selected_rows = self.query_tile * self.selected_kw["REPP"]
        short = sizes.short_block
        self.tile = short_tile(short)
        power = next(p for p in (sizes.base**e for e in range(64)) if p >= sizes.window)
        self.short_kw = {"B": short, "WINDOW": sizes.window, "POWER": power, "BASE": sizes.base}
        self.tile_kw = {"TILE": self.tile, "N": max(16, power_of_two(self.tile))}
        self.num_tiles = self.num_tokens // self.tile + cu_seqlens.shape[0] - 1

    def launch(self, name: str, rows: int, columns: int, **changes: int) -> dict[str, int]:
        """The entry of `LAUNCH`, with warps for tiles of `rows` times `columns` or the head width."""
        elements = rows * max(columns, self.width) * (2 if self.dtype == torch.float32 else 1)
        options = LAUNCH[name] | changes
        return options | {"num_warps": min(max(options["num_warps"], options["num_warps"] * elements // 1024), 8)}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        start = self.empty(self.num_tokens, dtype=torch.int32)
        stop = self.empty(self.num_tokens, dtype=torch.int32)
        tile_history = self.empty(self.num_tiles, dtype=torch.int32)
        grid = (self.cu_seqlens.shape[0] - 1, max(1, ceil(self.max_seqlen, 1024)))
        plan_kernel[grid](self.cu_seqlens, start, stop, tile_history, TILE=self.tile, CHUNK=1024)
        return start, stop, tile_history

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        q_out = self.empty(*q.shape)
        k_out = self.empty(*k.shape)
        mean_q = self.empty(*(k.shape if mean else (0,)))
        grid = (ceil(self.num_tokens, 32), self.groups)
        rotate_kernel[grid](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            mean_q,
            self.num_tokens,
            *q.stride()[:2],
            *k.stride()[:2],
            self.scale2,
            **self.heads_kw,
            REP=self.rep_kw["REP"],
            MEAN=mean,
            BT=32,
        )
        return q_out, k_out, mean_q

    def windows(self, k: Tensor, position: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        stride, length, block = self.sizes[:3]
        out = self.empty(self.rows * (block // stride), self.groups, length, self.width)
        if out.shape[0]:
            lines = min(power_of_two(length), max(1, 4096 // self.width))
            windows_kernel[(out.shape[0], self.groups)](
                k,
                position,
                start,
                stop,
                out,
                self.num_tokens,
                G=self.groups,
                D=self.width,
                B=block,
                STRIDE=stride,
                LENGTH=length,
                BL=lines,
                num_warps=1 if lines * self.width <= 1024 else 4,
            )
        return out

    def pool(self, c: Tensor) -> Tensor:
        """Score keys `[rows, G, d]` of compressed keys `[rows · b / s, G, d]`."""
        per_block = self.sizes.block // self.sizes.stride
        return c if per_block == 1 else c.unflatten(0, (-1, per_block)).mean(1, dtype=torch.float32).to(c.dtype)

    def select(self, mean_q: Tensor, c: Tensor, start: Tensor, threshold: float, save: bool):
        tokens, groups, selected = self.num_tokens, self.groups, self.sizes.selected
        blocks = self.empty(tokens, groups, selected, dtype=torch.int64)
        pi = self.empty(tokens, groups, selected, dtype=torch.float32)
        lse = self.empty(*((tokens, groups) if save else (0,)), dtype=torch.float32)
        u = self.empty(*((tokens, groups, self.width) if save else (0,)))
        padded = power_of_two(selected)
        launch = self.launch("select", LAUNCH["select"]["BQ"], LAUNCH["select"]["BM"])
        select_kernel[(ceil(tokens, launch["BQ"]), groups)](
            mean_q,
            c,
            start,
            blocks,
            pi,
            lse,
            u,
            tokens,
            self.rows,
            threshold,
            G=groups,
            D=self.width,
            B=self.sizes.block,
            K=selected,
            KP=padded,
            SAVE=save,
            **self.precision,
            **launch,
        )
        return blocks, pi, lse, u

    def selected(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, start: Tensor, save: bool):
        out = self.empty(*q.shape)
        lse = self.empty(*(q.shape[:2] if save else (0,)), dtype=torch.float32)
        selected_kernel[(ceil(self.num_tokens, self.query_tile), self.groups)](
            q,
            k,
            v,
            blocks,
            start,
            out,
            lse,
            self.num_tokens,
            self.scale2,
            **self.heads_kw,
            B=self.sizes.block,
            K=self.sizes.selected,
            **self.selected_kw,
            BQ=self.query_tile,
            SAVE=save,
            **self.precision,
            **self.launch("selected", 16 * self.query_tile, self.selected_rows),
        )
        return out, lse

    def short(self, q, k, v, tile_history, long_out: Tensor | None, gates: Tensor | None, save: bool):
        gated = gates is not None
        out = self.empty(*q.shape)
        # Without gates the stream is the output.
        short_out = self.empty(*(q.shape if save and gated else (0,)))
        lse = self.empty(*(q.shape[:2] if save else (0,)), dtype=torch.float32)
        short_kernel[(self.num_tiles, self.groups)](
            q,
            k,
            v,
            self.cu_seqlens,
            tile_history,
            long_out if gated else q,
            gates if gated else q,
            out,
            short_out if gated else out,
            lse,
            self.scale2,
            *(gates.stride() if gated else (0, 0, 0)),
            **self.heads_kw,
            **self.rep_kw,
            **self.short_kw,
            **self.tile_kw,
            GATED=gated,
            SAVE=save,
            **self.precision,
            **self.launch("short", self.tile_kw["N"] * self.rep_kw["REPP"], self.tile_kw["N"]),
        )
        return out, short_out, lse

    def selected_backward(
        self, q, k, v, out, grad, gates, lse, blocks, start, dgates, scored: tuple[Tensor, ...] | None, factor: bool
    ):
        """
        Args:
            scored: π, score keys and u of the selection, to carry the factor's gradient on to the queries.

        Returns:
            dq (without the rotary embedding's part), delta, the factor's gradient, its sum over blocks, and the number of
            the (block, group) of each pair. If `scored`, the gradient is that of the scores but for what `spread` adds.
        """
        num_keys = self.rows * self.groups
        pairs = blocks.shape if factor else (0,)
        dq = self.empty(*q.shape)
        delta = self.empty(*q.shape[:2], dtype=torch.float32)
        weight = self.empty(*pairs, dtype=torch.float32)
        weight_sum = self.empty(*(blocks.shape[:2] if scored else (0,)), dtype=torch.float32)
        pair = self.empty(*blocks.shape, dtype=torch.int16 if num_keys < 2**15 else torch.int32)
        gated = gates is not None
        selected_dq_kernel[(ceil(self.num_tokens, self.query_tile), self.groups)](
            q,
            k,
            v,
            out,
            grad,
            gates if gated else q,
            lse,
            blocks,
            *(scored or (lse, q, q)),
            start,
            dq,
            delta,
            dgates if gated else q,
            weight,
            weight_sum,
            pair,
            self.num_tokens,
            num_keys,
            self.scale2,
            self.scaling,
            *(gates.stride() + dgates.stride() if gated else (0,) * 6),
            **self.heads_kw,
            B=self.sizes.block,
            K=self.sizes.selected,
            **self.selected_kw,
            BQ=self.query_tile,
            GATED=gated,
            FACTOR=factor,
            SCORED=scored is not None,
            **self.precision,
            **self.launch("selected_dq", 16 * self.query_tile, self.selected_rows),
        )
        return dq, delta, weight, weight_sum, pair

    def query_backward(self, q, k, v, tile_history, out, grad, gates, lse, long_dq, rotary, dgates, short: bool):
        dq = self.empty(*q.shape)
        delta = self.empty(*(q.shape[:2] if short else (0,)), dtype=torch.float32)
        gated = gates is not None
        short_dq_kernel[(self.num_tiles, self.groups)](
            q,
            k,
            v,
            self.cu_seqlens,
            tile_history,
            out,
            grad,
            gates if gated else q,
            lse,
            q if long_dq is None else long_dq,
            *(rotary or (q, q)),
            dq,
            delta,
            dgates if gated else q,
            self.scale2,
            self.scaling,
            *(gates.stride() + dgates.stride() if gated else (0,) * 6),
            **self.heads_kw,
            **self.rep_kw,
            **self.short_kw,
            **self.tile_kw,
            SHORT=short,
            LONG=long_dq is not None,
            GATED=gated,
            ROTARY=rotary is not None,
            **self.precision,
            **self.launch("short_dq", self.tile_kw["N"] * self.rep_kw["REPP"], self.tile_kw["N"]),
        )
        return dq, delta

    def invert(self, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs in the order of their (block, group), where each one's begin, and whose each chunk is."""
        num_keys = self.rows * self.groups
        values, order = pair.flatten().sort(stable=True)
        offsets = self.empty(num_keys + 1, dtype=torch.int32)
        chunk_key = self.empty(pair.numel() // CHUNK + num_keys, dtype=torch.int32)
        invert_kernel[(ceil(num_keys, 128),)](values, offsets, chunk_key, pair.numel(), num_keys, CHUNK=CHUNK, BK=128)
        return order, offsets, chunk_key

    def inverted(self, q, k, v, grad, gates, lse, delta, start, stop, inverted, scored: tuple[Tensor, Tensor] | None):
        """Parts of dk, dv and of the score keys' gradient, one for each chunk; `scored`: mean queries and weights."""
        order, offsets, chunk_key = inverted
        num_chunks = chunk_key.shape[0]
        queries = max(1, 4 * LAUNCH["inverted"]["PQ"] // self.rep_kw["REPP"])
        shape = (num_chunks, self.sizes.block, self.width)
        dk, dv = self.empty(*shape, dtype=torch.float32), self.empty(*shape, dtype=torch.float32)
        dc = self.empty(*((num_chunks, self.width) if scored else (0,)), dtype=torch.float32)
        gated = gates is not None
        inverted_kernel[(num_chunks,)](
            q,
            k,
            v,
            grad,
            gates if gated else q,
            lse,
            delta,
            *(scored or (q, lse)),
            order,
            offsets,
            chunk_key,
            start,
            stop,
            dk,
            dv,
            dc,
            self.num_tokens,
            self.rows * self.groups,
            self.scale2,
            *(gates.stride()[:2] if gated else (0, 0)),
            **self.heads_kw,
            B=self.sizes.block,
            K=self.sizes.selected,
            **self.rep_kw,
            CHUNK=CHUNK,
            GATED=gated,
            SCORED=scored is not None,
            **self.precision,
            **self.launch("inverted", queries * self.rep_kw["REPP"], self.sizes.block, PQ=queries),
        )
        return dk, dv, dc

    def spread(self, mean_q, c, lse, weight_sum, pair, start, stop) -> Tensor:
        """
        Parts (to be subtracted) of the score keys' gradient that come through the softmax; `pair` `[T, G, k]`: number of
        the (block, group) of each pair, of which the first takes no part.
        """
        block = self.sizes.block
        keys, queries = LAUNCH["spread"]["BM"], LAUNCH["spread"]["BQ"]
        span = max(1024, ceil(self.max_seqlen, 16 * queries) * queries)
        num_splits = ceil(keys * block + self.max_seqlen, span)
        parts = self.empty(num_splits, self.rows, self.groups, self.width, dtype=torch.float32)
        spread_kernel[(ceil(self.rows, keys), self.groups, num_splits)](
            mean_q,
            c,
            lse,
            weight_sum,
            pair,
            start,
            stop,
            parts,
            self.num_tokens,
            self.rows,
            span,
            G=self.groups,
            D=self.width,
            B=block,
            K=self.sizes.selected,
            **self.precision,
            **self.launch("spread", keys // 4, queries),
        )
        return parts

    def score_keys(self, dc_part: Tensor, spread_part: Tensor, offsets: Tensor) -> Tensor:
        """The gradient of the compressed keys `[rows · b / s, G, d]`."""
        stride, _, block = self.sizes[:3]
        dc = self.empty(self.rows * (block // stride), self.groups, self.width)
        # The mean queries carry scaling · log2(e).
        score_key_kernel[(ceil(self.rows * self.groups, 16),)](
            dc_part,
            spread_part,
            offsets,
            dc,
            self.rows,
            spread_part.shape[0],
            math.log(2) * stride / block,
            G=self.groups,
            D=self.width,
            CHUNK=CHUNK,
            PER_BLOCK=block // stride,
            BR=16,
            num_warps=1,
        )
        return dc

    def key_backward(
        self, q, k, v, tile_history, grad, gates, long: tuple[Tensor, ...] | None, short, dwindows, rotary
    ) -> tuple[Tensor, Tensor]:
        """`long`: lse, delta, dk and dv parts and their offsets; `short`: lse, delta."""
        dk, dv = self.empty(*k.shape), self.empty(*v.shape)
        gated = gates is not None
        long_lse, long_delta, dk_part, dv_part, offsets = long or (q,) * 5
        keys_kernel[(self.num_tiles, self.groups)](
            q,
            k,
            v,
            self.cu_seqlens,
            tile_history,
            grad,
            gates if gated else q,
            long_lse,
            long_delta,
            *(short or (q, q)),
            dk_part,
            dv_part,
            offsets,
            q if dwindows is None else dwindows,
            *(rotary or (q, q)),
            dk,
            dv,
            self.scale2,
            self.scaling,
            *(gates.stride() if gated else (0, 0, 0)),
            **self.heads_kw,
            **self.rep_kw,
            SB=self.sizes.block,
            CHUNK=CHUNK,
            STRIDE=self.sizes.stride,
            LENGTH=self.sizes.length,
            **self.short_kw,
            **self.tile_kw,
            SHORT=short is not None,
            LONG=long is not None,
            WINDOWS=dwindows is not None,
            GATED=gated,
            ROTARY=rotary is not None,
            **self.precision,
            **self.launch("keys", self.tile_kw["N"] * self.rep_kw["REPP"], self.tile_kw["N"]),
        )
        return dk, dv


# One layer in one operation.
