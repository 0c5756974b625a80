import torch
from torch import nn

from blossomrec_hf.training.gradients import FlatGradients


def test_gradients_are_views_of_one_tensor_per_dtype_that_backward_passes_add_to():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1).double())
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1).double())
    plain.load_state_dict(model.state_dict())
    buffer = FlatGradients(list(model.parameters()))
    views = [parameter.grad for parameter in model.parameters()]
    assert [flat.dtype for flat in buffer.flat] == [torch.float32, torch.float64]
    for _ in range(2):
        x = torch.randn(4, 3)
        for network in (model, plain):
            network[1](network[0](x).double()).sum().backward()
    for view, parameter, expected in zip(views, model.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is view and view.data_ptr() % 16 == 0
        torch.testing.assert_close(view, expected.grad, rtol=0, atol=0)
    for flat, layer in zip(buffer.flat, model):
        assert flat.sum().isclose(layer.weight.grad.sum() + layer.bias.grad.sum())
    buffer.zero()
    assert not any(view.any() for view in views)
