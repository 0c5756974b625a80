"""
A model whose layers lie on several devices. The second one is the meta device here, which has shapes without values:
every operation between tensors of two devices fails there as it does between two GPUs.
"""

from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from small_cases import make_model

from blossomrec_hf.model import modules_blossomrec
from blossomrec_hf.model.modules_blossomrec import WeightsFingerprint


class Moves(ModelHook):
    """Moves the inputs of a layer to its device, as the hooks of a device map do; values from meta come as zeros."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        def move(x):
            return torch.zeros_like(x, device=self.device) if isinstance(x, torch.Tensor) and x.is_meta else x

        args = [move(x) for x in args]
        kwargs = {name: tuple(map(move, x)) if isinstance(x, tuple) else move(x) for name, x in kwargs.items()}
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """Values of weights, and autocast."""
    monkeypatch.setattr(
        modules_blossomrec, "_fingerprint", lambda model, num_items: WeightsFingerprint("", "", num_items)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, **kwargs: nullcontext())


def spread(model, devices: list[str]):
    for layer, device in zip(model.model.layers, devices, strict=True):
        add_hook_to_module(layer.to(device), Moves(device))
    return model


@pytest.mark.parametrize("settings", [{}, {"time_features": ["next_gap_input"]}], ids=["plain", "open"])
@pytest.mark.parametrize("attention_types", ["blossom", "full"])
def test_the_states_of_a_cache_lie_where_their_layers_do(attention_types, settings):
    devices = ["cpu", "meta", "cpu"]
    model = spread(make_model(num_hidden_layers=3, attention_types=attention_types, **settings).eval(), devices)
    ids, new = torch.randint(2, 62, (3, 40)), torch.randint(2, 62, (3, 9))
    times = {"timestamps": torch.arange(40).expand(3, -1)} if settings else {}
    later = {"timestamps": torch.arange(50, 59).expand(3, -1)} if settings else {}
    with torch.no_grad():
        cache = model(ids, **times, use_cache=True).cache
        logits = model(new, **later, cache=cache).logits
    assert [layer.states.device.type for layer in cache.layers] == devices
    assert cache.lengths.tolist() == [49] * 3 and logits.shape == (3, 9, 62) and logits.isfinite().all()


def test_a_cache_with_a_layer_elsewhere_can_be_selected_and_grows():
    model = spread(make_model(num_hidden_layers=3).eval(), ["cpu", "meta", "cpu"])
    with torch.no_grad():
        cache = model(torch.randint(2, 62, (3, 40)), use_cache=True).cache
        cache = cache.select([2, 0])
        assert model(torch.randint(2, 62, (2, 90)), cache=cache).logits.shape == (2, 90, 62)
