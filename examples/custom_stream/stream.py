"""
A stream from outside of the package: attention to compressed keys and compressed values, the third branch of native
sparse attention (arXiv 2502.11089, section 3.3.1). A query sees every complete window of its past as one key and one value,
so that it reads the whole history, coarsely.

Import this file before a model is built, and name the stream in a layer type:

    import stream
    config = BlossomRecConfig(attention_types="blossom+compressed", ...)

The layer then has three streams with a gate each: long-term, short-term and compressed. Nothing else changes: the model is
trained, cached, exported and saved as any other. `save_pretrained` copies this file next to the weights, and
`from_pretrained(..., trust_remote_code=True)` imports it from there.
"""

import torch
from torch import nn

from blossomrec_hf import BlossomRecConfig, Stream, register_stream
from blossomrec_hf.model.ops_reference import Blocks, Keys, Ops, Queries
from blossomrec_hf.model.streams_blossomrec import BlossomCompressor


class CompressedStream(Stream):
    """Attention to windows of l = `compress_block_size` positions, one every s = `compress_stride`."""

    gate_bias = -2.0  # like the long-term stream, it starts with a small share
    has_probabilities = False  # of positions: it attends to windows

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        self.block_size = config.compress_stride  # a window is complete every s positions
        self.block_width = 2 * config.head_dim  # a compressed key and a compressed value

    def modules(self) -> dict[str, nn.Module]:
        """A compressor of keys and one of values; the long-term stream has its own."""
        return {"window_keys": BlossomCompressor(self.config), "window_values": BlossomCompressor(self.config)}

    def summarize(self, ops: Ops, layer: nn.Module, keys: Keys, blocks: Queries) -> torch.Tensor:
        k = ops.compress(keys.k, layer.window_keys, blocks, keys.first)
        v = ops.compress(keys.v, layer.window_values, blocks, keys.first)
        return torch.cat([k, v], -1)

    def attend(
        self, ops: Ops, layer: nn.Module, q: torch.Tensor, keys: Keys, queries: Queries, blocks: Blocks
    ) -> tuple[torch.Tensor, None]:
        complete = torch.div(queries.position + 1, self.block_size, rounding_mode="floor")  # windows before each query
        if blocks.rows.shape[-3] == 0:
            return q * 0 + blocks.rows.sum() * 0, None  # with gradients, zero
        rows = blocks.rows.to(q.dtype)
        windows = Keys(*rows.chunk(2, -1), blocks.first, rows)
        # The windows are positions of a shorter history, in which the query is at its latest window.
        latest = queries._replace(
            position=(complete - 1).clamp(min=0),
            max_length=max(queries.max_length // self.block_size, 1),
            every=False,
        )
        out = ops.attend_full(q, windows, latest, scaling=layer.scaling)
        return out.masked_fill((complete == 0)[:, None, None], 0.0), None


register_stream("compressed", CompressedStream)
