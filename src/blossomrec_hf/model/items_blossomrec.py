"""Item vectors: unit vectors for cosine scores, and matrices that are kept while no weight changes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .modules_blossomrec import tensor_state


MIN_NORM = 1e-12  # vectors of a smaller norm count as zero


def unit_vectors(vectors: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    Vectors of length `scale`, computed in float32 or better; a vector of zeros stays one and gets no gradient.

    Args:
        vectors: `[..., hidden_size]`.

    Returns:
        the same shape and dtype.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factors = torch.where(norms > MIN_NORM, scale / norms.clamp(min=MIN_NORM), 0.0)
    return (wide * factors).to(vectors.dtype)


class _Kept(NamedTuple):
    """A matrix, the tensors that it was computed from, and their states at that time."""

    matrix: torch.Tensor
    sources: list[torch.Tensor]  # aliases, so that their memory is not used again while the matrix is kept
    identities: list[torch.Tensor]
    states: list[tuple[int, int, int]]


class KeptMatrix:
    """
    A matrix that is computed from weights. In evaluation mode without gradients it is kept until a weight is replaced or
    changed in place (a change through `.data`, which PyTorch does not record, is not noticed). Threads may share it.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __deepcopy__(self, memo: dict) -> "KeptMatrix":
        return KeptMatrix()

    def __reduce__(self) -> tuple:
        return KeptMatrix, ()

    def drop(self) -> None:
        """Free the memory."""
        self._kept = None

    def get(
        self, module: nn.Module, sources: Sequence[torch.Tensor], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """
        The matrix that `compute` returns.

        Args:
            module: whose mode decides whether the matrix is kept.
            sources: the weights that it depends on.
        """
        if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _can_watch(sources):
            return compute()
        kept, states = self._kept, [tensor_state(x) for x in sources]
        if kept is None or kept.states != states or any(a is not b for a, b in zip(kept.identities, sources)):
            # A matrix of inference mode could not be watched itself.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(sources[0].device.type, enabled=False):
                matrix = compute()
            kept = self._kept = _Kept(matrix, [x.detach() for x in sources], list(sources), states)
        return kept.matrix


def _can_watch(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether changes of these tensors are noticed: not those of offloaded weights, or of gathered ones (FSDP)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(x.is_meta or x.is_inference() for x in tensors)
