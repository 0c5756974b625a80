"""New models."""

import numpy as np
import torch
from accelerate.utils import set_seed

from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation


def initialize_model(
    config: BlossomRecConfig, *, seed: int, counts: np.ndarray, attn_implementation: str | None = None
) -> BlossomRecForSequentialRecommendation:
    """
    A new model, equal on every process.

    Args:
        config: its configuration.
        seed: seed of the initial weights.
        counts: int64 [vocab_size], how often each item occurs in training, see [`~blossomrec_hf.data.item_counts`].
        attn_implementation: see `transformers`; by default, the fastest that the hardware supports.
    """
    set_seed(seed)  # the loop seeds what differs between processes
    model = BlossomRecForSequentialRecommendation._from_config(config, attn_implementation=attn_implementation)
    model.item_counts.copy_(torch.as_tensor(counts))
    return model
