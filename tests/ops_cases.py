"""Random packed histories for the tests of the ops files, and one call that runs them through any of these."""

import random
from dataclasses import dataclass, field

import torch
from torch import nn

from blossomrec_hf.model.ops_reference import (
    Blocks,
    Keys,
    Ops,
    Queries,
    complete_blocks,
    every_position,
    straight_through,
)
from blossomrec_hf.model.streams_blossomrec import BlossomCompressor


class Compressor(nn.Module):
    """A compressor of given learned positions `[G, l, d]` and MLP."""

    forward = BlossomCompressor.forward

    def __init__(self, position: torch.Tensor, mlp: nn.Module) -> None:
        super().__init__()
        self.position, self.mlp = position, mlp


@dataclass
class Case:
    """Histories of `lengths`, block sizes that fit together, and random tensors."""

    lengths: list[int]
    stride: int
    windows_per_block: int
    compress_block_size: int
    num_selected: int
    short_block: int
    window: int
    base: int
    heads: int
    groups: int
    width: int
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, length, d = sum(self.lengths), self.compress_block_size, self.width

        def random_tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=self.dtype, device=self.device)

        self.block = self.stride * self.windows_per_block
        self.cu_seqlens = torch.tensor([0, *self.lengths], device=self.device).cumsum(0)
        self.max_seqlen = max(self.lengths)
        self.mlp = nn.Sequential(nn.Linear(length * d, length * d), nn.ReLU(), nn.Linear(length * d, d, bias=False))
        self.mlp.to(dtype=self.dtype, device=self.device)
        # Twice the usual spread, so that the importance is far from uniform.
        self.tensors = {
            "q": 2 * random_tensor(tokens, self.heads, d),
            "k": 2 * random_tensor(tokens, self.groups, d),
            "v": random_tensor(tokens, self.groups, d),
            "position": random_tensor(self.groups, length, d) / 4,
        }
        for tensor in self.tensors.values():
            tensor.requires_grad_()

    @property
    def compressor(self) -> Compressor:
        return Compressor(self.tensors["position"], self.mlp)

    @property
    def num_blocks(self) -> int:
        return sum(n // self.block for n in self.lengths)

    @property
    def keys(self) -> Keys:
        return Keys(self.tensors["k"], self.tensors["v"], self.cu_seqlens[:-1])

    @property
    def every(self) -> Queries:
        """The queries of all positions."""
        return every_position(self.cu_seqlens, sum(self.lengths), self.max_seqlen)

    def rows(self, queries: Queries) -> torch.Tensor:
        """The packed rows of queries."""
        return self.cu_seqlens[queries.history] + queries.position

    def windows(self) -> tuple[Queries, torch.Tensor]:
        """The windows of all complete blocks, and the first block of each history."""
        blocks, first = complete_blocks(self.cu_seqlens, sum(self.lengths), self.block)
        back = self.stride * torch.arange(1 - self.windows_per_block, 1, device=self.device)
        history = blocks.history.repeat_interleave(self.windows_per_block)
        return blocks._replace(history=history, position=(blocks.position[:, None] + back).flatten()), first


def random_case(max_length: int = 700, **kwargs) -> Case:
    """A case with one to five histories of 0 to `max_length` items, at least one of them not empty."""
    lengths = [random.choice([0, 1, 2, random.randint(1, 60), random.randint(1, max_length)]) for _ in range(4)]
    lengths[random.randrange(4)] = random.randint(1, max_length)
    stride = random.choice([1, 2, 3, 4, 8, 16])
    heads, groups, width = random.choice([(4, 2, 4), (2, 2, 6), (4, 1, 8), (8, 2, 2)])
    settings = {
        "lengths": lengths,
        "stride": stride,
        "windows_per_block": random.choice([1, 2, 4]),
        "compress_block_size": stride * random.choice([1, 2]) + random.choice([0, 3]),
        "num_selected": random.choice([1, 2, 4, 7]),
        "short_block": random.choice([1, 2, 5, 8]),
        "window": random.choice([1, 2, 3]),
        "base": random.choice([2, 3]),
        "heads": heads,
        "groups": groups,
        "width": width,
    }
    return Case(**(settings | kwargs))


def run(
    ops: Ops,
    case: Case,
    selection: torch.Tensor | None = None,
    queries: Queries | None = None,
    keys: Keys | None = None,
) -> dict[str, torch.Tensor]:
    """
    Every function of `ops` on the case: outputs by name, and the gradients of a random (but fixed) sum of them.

    Args:
        selection: blocks that the attention reads in place of its own choice.
        queries: defaults to all positions; others take the rows of q at their positions.
        keys: defaults to the packed ones.
    """
    t, scaling = case.tensors, case.width**-0.5
    keys = case.keys if keys is None else keys
    q, queries = (t["q"], case.every) if queries is None else (t["q"][case.rows(queries)], queries)
    windows, first = case.windows()
    compressed = ops.compress(t["k"], case.compressor, windows, case.cu_seqlens[:-1])
    blocks = Blocks(compressed.unflatten(0, (-1, case.windows_per_block)).mean(1), first)
    settings = {"num_selected_blocks": case.num_selected, "block_size": case.block, "threshold": 1e-10}
    own = ops.select(q, blocks, queries, **settings, scaling=scaling)
    block_indices = own.block_indices if selection is None else selection
    at, long = (q, keys, queries), {"block_size": case.block, "scaling": scaling}
    short = {"block_size": case.short_block, "window": case.window, "base": case.base}
    outputs = {
        "long": ops.attend_selected(*at, block_indices, straight_through(own.importance), **long),
        "long_without_factor": ops.attend_selected(*at, block_indices, None, **long),
        "short": ops.attend_short(*at, **short, scaling=scaling),
        "full": ops.attend_full(*at, scaling=scaling),
    }
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs.values()
    )
    inputs = [*t.values(), *case.mlp.parameters()]
    names = [*t, *(name for name, _ in case.mlp.named_parameters())]
    gradients = torch.autograd.grad(total, inputs)
    outputs |= {"compressed": compressed[: case.num_blocks * case.windows_per_block], "importance": own.importance}
    outputs |= {"block_indices": own.block_indices}
    return {k: v.detach() for k, v in outputs.items()} | {f"grad {n}": g for n, g in zip(names, gradients)}
