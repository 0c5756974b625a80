"""
A stream for a study: the long-term stream with a short convolution of the keys before they are compressed.

Importing this file registers `"convolved_long_term"`, and `attention_types="convolved_long_term+short_term"` is BlossomRec
with it. `ablations.yaml` imports it.
"""

import torch
from torch import nn

from blossomrec_hf import BlossomRecConfig, register_stream
from blossomrec_hf.model.streams_blossomrec import BlossomCompressor, LongTermStream


TAPS = 4  # each key is mixed with the three before it


class ConvolvedCompressor(BlossomCompressor):
    """
    Compresses windows of l keys after a causal depthwise convolution, with weights of its own for each channel of each
    key/value head. It starts as the identity.

    A window therefore has `TAPS - 1` more keys at its start. Keys before the history are 0. The learned positions are added
    before the convolution, whose output at the l latest places enters the MLP.
    """

    def __init__(self, config: BlossomRecConfig) -> None:
        super().__init__(config)
        groups, length, width = self.position.shape
        self.position = nn.Parameter(torch.empty(groups, length + TAPS - 1, width))
        self.taps = nn.Parameter(torch.zeros(TAPS, groups, 1, width))
        with torch.no_grad():
            self.taps[-1] = 1

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows of keys `[..., G, l + TAPS - 1, d]` → compressed keys `[..., G, d]`."""
        keys = windows + self.position
        length = keys.shape[-2] - TAPS + 1
        mixed = sum(self.taps[i] * keys[..., i : i + length, :] for i in range(TAPS))
        return self.mlp(mixed.flatten(-2))


class ConvolvedLongTermStream(LongTermStream):
    """The long-term stream, whose compressor convolves the keys."""

    def modules(self) -> dict[str, nn.Module]:
        compressor = ConvolvedCompressor(self.config)
        compressor.requires_grad_(self.config.selection_gradient != "none")
        return {"compressor": compressor}


register_stream("convolved_long_term", ConvolvedLongTermStream)
