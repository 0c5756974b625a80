"""Random packed histories for the tests of the ops files, and one call that runs them through any of these."""

import random
from dataclasses import dataclass, field

import torch
from torch import nn

from blossomrec_hf.model.attention_blossomrec import BlossomCompressor
from blossomrec_hf.model.ops_reference import Ops, straight_through


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
    def num_windows(self) -> int:
        return sum(n // self.stride for n in self.lengths)


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


def run(ops: Ops, case: Case, selection=None) -> dict[str, torch.Tensor]:
    """
    Every function of `ops` on the case: outputs by name, and the gradients of a random (but fixed) sum of them.
    With `selection` given, the attention takes that instead of its own.
    """
    t, scaling = case.tensors, case.width**-0.5
    where = {"max_seqlen": case.max_seqlen, "scaling": scaling}
    compressed = ops.compress(t["k"], case.compressor, case.cu_seqlens, stride=case.stride)
    own = ops.select(
        t["q"],
        compressed,
        case.cu_seqlens,
        num_selected_blocks=case.num_selected,
        block_size=case.block,
        stride=case.stride,
        threshold=1e-10,
        **where,
    )
    block_indices = own.block_indices if selection is None else selection
    qkv = t["q"], t["k"], t["v"]
    outputs = {
        "long": ops.attend_selected(
            *qkv, block_indices, straight_through(own.importance), case.cu_seqlens, block_size=case.block, **where
        ),
        "long_without_factor": ops.attend_selected(
            *qkv, block_indices, None, case.cu_seqlens, block_size=case.block, **where
        ),
        "short": ops.attend_short(
            *qkv, case.cu_seqlens, block_size=case.short_block, window=case.window, base=case.base, **where
        ),
        "full": ops.attend_full(*qkv, case.cu_seqlens, **where),
    }
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs.values()
    )
    inputs = [*t.values(), *case.mlp.parameters()]
    names = [*t, *(name for name, _ in case.mlp.named_parameters())]
    gradients = torch.autograd.grad(total, inputs)
    outputs |= {"compressed": compressed[: case.num_windows], "importance": own.importance}
    outputs |= {"block_indices": own.block_indices}
    return {k: v.detach() for k, v in outputs.items()} | {f"grad {n}": g for n, g in zip(names, gradients)}
