"""Which parameters weight decay applies to."""

import pytest
import torch
from small_cases import make_model

from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.training import LoopArguments
from blossomrec_hf.training.optimizer import make_optimizer


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
def test_biases_norms_and_embeddings_do_not_decay(optim):
    features = ItemFeatures.from_columns({"genre": [["a"], ["b"]] * 30})
    model = make_model(
        item_features=features.config(),
        item_dropout_prob=0.1,
        time_features=["next_gap", "hour"],
        event_types=["view"],
    )
    decayed, others = make_optimizer(model, LoopArguments(optim=optim, weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    decays = {name for name, weight in model.named_parameters() if any(weight is other for other in decayed["params"])}
    kept = {name for name, weight in model.named_parameters() if any(weight is other for other in others["params"])}
    assert decays.isdisjoint(kept) and decays | kept == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".bias") or "norm" in name or "item" in name for name in kept), kept
    assert any("compressor.position" in name for name in decays) and any("vectors.hour" in name for name in decays)
    assert not any(name.endswith(".bias") or "norm" in name or "embedding" in name for name in decays)
    assert isinstance(make_optimizer(model, LoopArguments()), torch.optim.AdamW)
