"""
The gated sum of the long-term and the short-term stream on a CPU, for short histories of similar lengths: each history is
one tile, of which both streams read the logits under masks of their own. The backward pass computes the probabilities
again. Logits are in base 2, as in `ops_torch_tiles.py`.
"""

import torch

from .ops_reference import Keys, Queries, Selection
from .ops_torch_tiles import LOG2E, NEVER, SLICE_LOGITS, gather, reads_freely


# Up to this length, and this share of padding, one tile per history takes less time than the tiles of each stream (training
# steps on a CPU: 0.90 of the time at 50 items, 0.98 at 100, 1.0 at 128).
MAX_LENGTH = 100
MAX_PADDING = 0.2


def has_short_histories(keys: Keys, queries: Queries) -> bool:
    """Whether `attend_dense` is the fastest way for all positions of these histories."""
    if not (reads_freely(keys.k) and queries.every and 0 < queries.max_length <= MAX_LENGTH):
        return False
    return keys.k.shape[0] >= keys.first.shape[0] * queries.max_length * (1 - MAX_PADDING)


def attend_dense(
    q: torch.Tensor,
    keys: Keys,
    queries: Queries,
    gates: torch.Tensor,
    selection: Selection,
    *,
    block_size: int,
    distances: torch.Tensor,
    short_block_size: int,
    scaling: float,
    with_gradient: bool,
) -> torch.Tensor:
    """
    The gated sum of both streams, `[T, H, d]`.

    Args:
        q: `[T, H, d]` in float32 or better, as the keys.
        gates: `[T, H, 2]`, of the long-term and the short-term stream.
        selection: of the long-term stream.
        distances: those of the blocks that the short-term stream sees.
        with_gradient: whether the importance gets the straight-through gradient.
    """
    importance = selection.importance if with_gradient else None
    masks = _Masks.of(queries, keys, selection.block_indices, block_size, distances, short_block_size)
    with torch.autocast(q.device.type, enabled=False):
        return _AttendDense.apply(
            q, keys.k, keys.v, gates.to(q.dtype), importance, selection.block_indices, masks, scaling
        )


class _Masks:
    """
    What each stream does not see, as numbers that are added to logits, and the layout of histories in tiles.

    Attributes:
        token (`torch.LongTensor` `[S, L]`): the token in each slot; any valid one behind the end of a history.
        slot (`torch.LongTensor` `[T]`): the slot of each token.
        causal, short (`torch.Tensor` `[L, L]`): keys behind the query, and keys at other distances, by key and query.
        blocks (`torch.Tensor` `[T, G, L // b]`): complete blocks that are neither selected nor the own one.
    """

    @classmethod
    def of(cls, queries, keys, block_indices, block_size, distances, short_block_size) -> "_Masks":
        self, length = cls(), queries.max_length
        num_tokens, num_groups, _ = keys.k.shape
        place = torch.arange(length)
        self.token = (keys.first[:, None] + place).clamp(max=num_tokens - 1)
        self.slot = queries.history * length + queries.position
        later = place[:, None] > place
        block = torch.div(place, short_block_size, rounding_mode="floor")
        near = torch.zeros(length, dtype=torch.bool).index_fill_(0, distances, True)
        far = ~near[(block - block[:, None]).clamp(min=0)]
        self.causal, self.short = later.to(keys.k.dtype) * NEVER, far.to(keys.k.dtype) * NEVER
        number = length // block_size
        own = torch.div(queries.position, block_size, rounding_mode="floor")[:, None, None].expand(-1, num_groups, 1)
        self.chosen = torch.where(block_indices < 0, number, block_indices)
        blocks = keys.k.new_full((num_tokens, num_groups, number + 1), NEVER)
        self.blocks = blocks.scatter_(2, self.chosen, 0.0).scatter_(2, own, 0.0)[..., :number]
        self.block_size = block_size
        return self


class _AttendDense(torch.autograd.Function):
    """`attend_dense` with its backward pass. Tiles are `[S·G, r·L, d]`, logits `[S·G, L keys, r, L]`."""

    @staticmethod
    def forward(ctx, q, k, v, gates, importance, block_indices, masks, scaling):
        ctx.masks, ctx.scaling, ctx.with_gradient = masks, scaling, importance is not None
        q = q * (scaling * LOG2E)
        (num_histories, length), num_groups, width = masks.token.shape, k.shape[1], k.shape[2]
        r = q.shape[1] // num_groups
        outs = q.new_empty(2, num_histories, num_groups, r, length, width)
        lses = q.new_empty(2, num_histories, num_groups, 1, r, length)
        for part in _parts(masks, q.shape[1]):
            _, _, values, *logits = _logits(q, k, v, masks, part)
            for stream, x in enumerate(logits):
                top = x.amax(1, keepdim=True)
                probs = x.sub_(top).exp2_()
                total = probs.sum(1, keepdim=True)
                probs = probs.div_(total).flatten(2)
                outs[stream, part].view(-1, r * length, width).baddbmm_(probs.mT, values, beta=0)
                lses[stream, part].view_as(top).copy_(top.add_(total.log2_()))
        outs = outs.permute(0, 1, 4, 2, 3, 5).reshape(2, -1, q.shape[1] * width)
        outs = outs.index_select(1, masks.slot).view(2, *q.shape)
        ctx.save_for_backward(q, k, v, gates, outs, lses)
        return outs[0] * gates[..., :1] + outs[1] * gates[..., 1:]

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, gates, outs, lses = ctx.saved_tensors
        masks, (num_groups, width) = ctx.masks, k.shape[1:]
        num_histories, length = masks.token.shape
        heads, r, number = q.shape[1], q.shape[1] // num_groups, masks.blocks.shape[2]
        whole = number * masks.block_size  # positions of complete blocks

        def tiles(x):  # [T, H, w] → [S, G, r, L, w], 0 behind the end of a history
            x = x.new_zeros(num_histories * length, heads * x.shape[2]).index_copy_(0, masks.slot, x.flatten(1))
            return x.view(num_histories, length, num_groups, r, -1).permute(0, 2, 3, 1, 4)

        deltas = (grad * outs).sum(-1)  # also the gradients of the gates
        rows = tiles(torch.cat([deltas.permute(1, 2, 0), gates.log2()], -1)).permute(4, 0, 1, 2, 3)[:, :, :, None]
        deltas_of, gates_of = rows[:2].flatten(1, 2), rows[2:].flatten(1, 2)
        totals = lses.flatten(1, 2) - gates_of  # gates multiply the probabilities
        grads = tiles(grad).reshape(-1, r * length, width)
        grad_q = q.new_empty(num_histories, length, num_groups, r, width)
        grad_k, grad_v = (k.new_empty(num_histories, length, num_groups, width) for _ in range(2))
        of_blocks = q.new_zeros(num_histories, length, num_groups, number + 1)
        for part in _parts(masks, heads):
            queries, keys, values, long, short = _logits(q, k, v, masks, part)
            own = slice(part.start * num_groups, part.stop * num_groups)
            of_probs = torch.bmm(values, grads[own].mT).view_as(long)
            probs = (long - totals[0, own]).exp2_()
            of_logits = (of_probs - deltas_of[0, own]).mul_(probs)
            if ctx.with_gradient and number:
                parts = long[:, :whole].mul_(of_logits[:, :whole])
                parts = parts.view(-1, num_groups, number, masks.block_size, r, length).sum((3, 4))
                of_blocks[part, ..., :number] = parts.permute(0, 3, 1, 2)
            short = short.sub_(totals[1, own]).exp2_()
            of_logits.add_(of_probs.sub_(deltas_of[1, own]).mul_(short))
            probs, of_logits = probs.add_(short).flatten(2), of_logits.flatten(2)
            shape = (-1, num_groups, length, width)
            of_queries = torch.bmm(of_logits.mT, keys).view(-1, num_groups, r, length, width)
            grad_q[part] = of_queries.permute(0, 3, 1, 2, 4)
            grad_k[part] = torch.bmm(of_logits, queries).view(shape).transpose(1, 2)
            grad_v[part] = torch.bmm(probs, grads[own]).view(shape).transpose(1, 2)
        grad_q, grad_k, grad_v, of_blocks = (
            x.flatten(0, 1).index_select(0, masks.slot) for x in (grad_q, grad_k, grad_v, of_blocks)
        )
        of_importance = of_blocks.gather(2, masks.chosen).div_(LOG2E) if ctx.with_gradient else None
        grad_q = grad_q.mul_(ctx.scaling).view_as(q)
        return grad_q, grad_k / LOG2E, grad_v, deltas.permute(1, 2, 0), of_importance, None, None, None


def _parts(masks: _Masks, num_heads: int) -> list[slice]:
    """Slices of histories."""
    num_histories, length = masks.token.shape
    size = max(1, SLICE_LOGITS["cpu"] // (num_heads * length**2))
    return [slice(i, min(i + size, num_histories)) for i in range(0, num_histories, size)]


def _logits(q, k, v, masks: _Masks, part: slice) -> tuple[torch.Tensor, ...]:
    """Queries `[S·G, r·L, d]`, keys and values `[S·G, L, d]` of tiles, and the logits `[S·G, L, r, L]` of both streams."""
    token, (_, num_groups, width) = masks.token[part], k.shape
    length, number = token.shape[1], masks.blocks.shape[2]
    q = gather(q, token).unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)
    q = q.reshape(-1, q.shape[2] * length, width)
    k, v = (gather(x, token).transpose(1, 2).reshape(-1, length, width) for x in (k, v))
    long = torch.bmm(k, q.mT).unflatten(2, (-1, length)).add_(masks.causal[:, None])
    short = long + masks.short[:, None]
    blocks = gather(masks.blocks, token).permute(0, 2, 3, 1).flatten(0, 1)[:, :, None, None]
    long[:, : number * masks.block_size].unflatten(1, (number, masks.block_size)).add_(blocks)
    return q, k, v, long, short
