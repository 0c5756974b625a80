"""The sub-quadratic functions against the reference, and their promise of linear memory."""

import pytest
import torch
from ops_cases import random_case, run
from torch.utils._python_dispatch import TorchDispatchMode

from blossomrec_hf.model import ops_torch
from blossomrec_hf.model.ops_reference import REFERENCE_OPS
from blossomrec_hf.model.ops_torch import ONE_OPS, TORCH_OPS


def assert_equal(case, actual: dict, expected: dict, values: float, gradients: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        tolerance = gradients if name.startswith("grad") else values
        scale = max(1.0, expected[name].abs().max().item()) if expected[name].numel() else 1.0
        message = f"{name} of {case}"
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance * scale, msg=message)


@pytest.mark.parametrize("dense_up_to", [0, 10**6], ids=["gathered", "dense"])
@pytest.mark.parametrize("slice_elements", [2**25, 3000], ids=["whole", "sliced"])
@pytest.mark.parametrize("trial", range(6))
def test_same_values_and_gradients_as_the_reference(monkeypatch, dense_up_to, slice_elements, trial):
    monkeypatch.setattr(ops_torch, "DENSE_MAX_LENGTH", dense_up_to)
    monkeypatch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", slice_elements)
    case = random_case(max_length=250)
    assert_equal(case, run(TORCH_OPS, case), run(REFERENCE_OPS, case), 1e-10, 1e-8)


@pytest.mark.parametrize("trial", range(2))
def test_same_at_the_default_sizes_and_long_histories(trial):
    case = random_case(
        lengths=[700, 1, 333, 0, 17], stride=16, windows_per_block=1, compress_block_size=32, num_selected=4
    )
    assert_equal(case, run(TORCH_OPS, case), run(REFERENCE_OPS, case), 1e-10, 1e-8)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [0, 0, 5], [15], [16], [17]])
def test_same_on_histories_of_hardly_any_items(lengths):
    case = random_case(lengths=lengths, stride=16, windows_per_block=1, compress_block_size=32)
    assert_equal(case, run(TORCH_OPS, case), run(REFERENCE_OPS, case), 1e-10, 1e-8)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 333])
def test_the_last_position_of_one_history(length):
    for _ in range(4):
        case = random_case(lengths=[length])
        t, where = case.tensors, {"max_seqlen": length, "scaling": case.width**-0.5}
        blocks = {"num_selected_blocks": case.num_selected, "block_size": case.block, "stride": case.stride}
        short = {"block_size": case.short_block, "window": case.window, "base": case.base}
        results = []
        for ops, q in ((REFERENCE_OPS, t["q"]), (ONE_OPS, t["q"][-1:])):
            qkv, offsets = (q, t["k"], t["v"]), case.cu_seqlens
            c = ops.compress(t["k"], case.compressor, offsets, stride=case.stride)
            selected = ops.select(q, c, offsets, threshold=1e-10, **blocks, **where)
            long = ops.attend_selected(*qkv, selected.block_indices, None, offsets, block_size=case.block, **where)
            outs = [long, ops.attend_short(*qkv, offsets, **short, **where), ops.attend_full(*qkv, offsets, **where)]
            results.append([c, *(x[-1:] for x in (*selected, *outs))])
        expected, actual = results
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, msg=lambda m: f"{m}\n{case}")


def test_half_precision_stays_close_when_the_selection_is_given():
    case = random_case(lengths=[300, 40], stride=8, windows_per_block=2, compress_block_size=16, width=8)
    expected = run(REFERENCE_OPS, case)
    selection = expected["block_indices"]
    half = random_case(**{name: getattr(case, name) for name in case.__dataclass_fields__ if name != "tensors"})
    half.tensors = {k: v.detach().bfloat16().requires_grad_() for k, v in case.tensors.items()}
    half.mlp = case.mlp
    half.mlp.to(torch.bfloat16)
    actual = run(TORCH_OPS, half, selection)
    for name in ("long", "short", "full", "compressed"):
        error = (actual[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 2e-2, (name, error)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max(
            [self.numel, *(x.untyped_storage().nbytes() // x.itemsize for x in outs if isinstance(x, torch.Tensor))]
        )
        return out


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", 2**16)
    sizes = {}
    for length in (2048, 8192):
        case = random_case(
            lengths=[length],
            stride=16,
            windows_per_block=1,
            compress_block_size=32,
            num_selected=4,
            short_block=8,
            window=1,
            base=2,
            heads=2,
            groups=1,
            width=2,
            dtype=torch.float32,
        )
        no_full_attention = TORCH_OPS._replace(attend_full=lambda q, *args, **kwargs: q)
        with LargestTensor() as largest:
            run(no_full_attention, case)
        sizes[length] = largest.numel
    # Four times the tokens: four times the elements, a sixteenth power of the short-term distances aside.
    assert sizes[8192] <= 5 * sizes[2048], sizes
    assert sizes[8192] < 8192 * 8192 // 16, sizes
