"""
The last layer of inference as one operation: the attention of the last position of each packed history, for which keys are
rotated and blocks compressed as in `ops_triton.py`, and the rest is the kernel of `ops_triton_append.py`. Without gradients.
"""

import torch
from torch import Tensor, nn

from .ops_reference import Selection
from .ops_triton import NAMESPACE, compress
from .ops_triton_append import attend_events
from .ops_triton_launch import Layout, Sizes, check
from .ops_triton_rotate import plan, rotate_keys


_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor q_cos, Tensor q_sin, Tensor? gates"
_SCHEMA += (
    ", Tensor? position, Tensor? w1, Tensor? b1, Tensor? w2, Tensor cu_seqlens, SymInt[] settings, float scaling"
)
_SCHEMA += ", float threshold) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op(f"{NAMESPACE}::last_attention", mutates_args=(), schema=_SCHEMA)
def _last_attention(
    q, k, v, cos, sin, q_cos, q_sin, gates, position, w1, b1, w2, cu_seqlens, settings, scaling, threshold
):
    """The output `[1, S, H, d]` and the selection, two empty tensors if there is none."""
    max_seqlen, short, *sizes = settings
    layout = Layout(k, k.shape[1], cu_seqlens, max_seqlen, Sizes(*sizes), scaling)
    k, block_keys = rotate_keys(layout, k, cos, sin), None
    if w1 is not None:
        start, stop, _, _ = plan(layout)
        w1, b1, w2 = (x.to(k.dtype) for x in (w1, b1, w2))
        _, block_keys = compress(layout, k, start, stop, position, w1, b1, w2)
    options = {"sizes": layout.sizes, "scaling": scaling, "threshold": threshold, "short": bool(short)}
    out, selection = attend_events(q, q_cos, q_sin, gates, cu_seqlens, k, v, block_keys, num_rows=None, **options)
    return out, *(selection or (k.new_empty(0), k.new_empty(0)))


@_last_attention.register_fake
def _(q, k, v, cos, sin, q_cos, q_sin, gates, position, w1, b1, w2, cu_seqlens, settings, scaling, threshold):
    _, heads, last, width = q.shape
    out = q.new_empty(1, last, heads, width)
    if w1 is None:
        return out, k.new_empty(0), k.new_empty(0)
    shape = (last, k.shape[1], Sizes(*settings[2:]).selected)
    return out, q.new_empty(shape, dtype=torch.int64), q.new_empty(shape, dtype=torch.float32)


def last_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    query_embeddings: tuple[Tensor, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    sizes: Sizes,
    scaling: float,
    threshold: float,
    gates: Tensor | None = None,
    position: Tensor | None = None,
    mlp: nn.Sequential | None = None,
    short: bool = True,
) -> tuple[Tensor, Selection | None]:
    """
    Attention of the last position of each packed history, both streams or one, without gradients. Of an empty history, the
    output is 0.

    Args:
        q: of the last positions, `[1, H, S, d]`.
        k, v: of all positions, `[1, G, T, d]`; rotary embeddings not yet applied.
        position_embeddings, query_embeddings: cosines and sines of all positions, `[1, T, d]`, and of the last ones.
        gates: of the last positions, `[1, S, H, 2]`.

        The others are those of `ops_triton.blossom_attention`.

    Returns:
        `[1, S, H, d]`, and the `Selection` of the long-term stream.

    Raises:
        ValueError: if the kernels do not support the device, the dtype or a size.
    """
    check(
        q,
        block_size=sizes.block,
        num_selected_blocks=sizes.selected,
        short_block_size=sizes.short_block,
        heads_per_group=q.shape[1] // k.shape[1],
    )
    k, v = (x.squeeze(0).transpose(0, 1) for x in (k, v))
    cos, sin, q_cos, q_sin = (x.float().contiguous() for x in (*position_embeddings, *query_embeddings))
    weights = (None,) * 4 if mlp is None else (position, mlp[0].weight, mlp[0].bias, mlp[2].weight)
    out, *selection = _last_attention(
        *(q, k if k.stride(-1) == 1 else k.contiguous(), v.contiguous(), cos[0], sin[0], q_cos, q_sin),
        *(gates, *weights, cu_seqlens, [max_seqlen, int(short), *sizes], scaling, threshold),
    )
    return out, None if mlp is None else Selection(*selection)
