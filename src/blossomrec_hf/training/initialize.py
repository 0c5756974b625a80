"""New models, and what they remember of their training data."""

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from ..batches.histories import HistoryStore
from ..model.configuration_blossomrec import BlossomRecConfig
from ..model.features_blossomrec import ItemFeatures
from ..model.modeling_blossomrec import BlossomRecForSequentialRecommendation


def initialize_model(
    config: BlossomRecConfig,
    *,
    seed: int,
    counts: np.ndarray,
    features: ItemFeatures | None = None,
    attn_implementation: str | None = None,
) -> BlossomRecForSequentialRecommendation:
    """
    A new model, equal on every process.

    Args:
        config: its configuration.
        seed: seed of the initial weights.
        counts: int64 [vocab_size], how often each item occurs in training, see [`~blossomrec_hf.data.item_counts`].
        features: features of the items, which `config.item_features` describes.
        attn_implementation: see `transformers`; by default, the fastest that the hardware supports.
    """
    set_seed(seed)  # the loop seeds what differs between processes
    model = BlossomRecForSequentialRecommendation._from_config(config, attn_implementation=attn_implementation)
    model.item_counts.copy_(torch.as_tensor(counts))
    if features is not None:
        model.set_item_features(features)
    return model


def keep_latest_time(model: nn.Module, histories: HistoryStore) -> None:
    """Store the latest time of the training data in a model of times, which then recognizes times in another unit."""
    times = histories.columns.get("timestamps")
    for name, latest in model.named_buffers():
        if name.split(".")[-1] == "latest_time" and times is not None and len(times):
            latest.clamp_(min=int(times.max()))
