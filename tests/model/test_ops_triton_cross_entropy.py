"""The fused full softmax, held to the same in float64."""

import random

import pytest
import torch

from blossomrec_hf.model import ops_triton_cross_entropy
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS
from blossomrec_hf.model.loss_blossomrec import cross_entropy
from blossomrec_hf.model.ops_triton_cross_entropy import WIDTHS, _launch, why_unsupported


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_unsupported(DEVICE, torch.float32, 16) is not None, reason="needs Triton, and a GPU or its interpreter"
)


def draw(positions: int, items: int, width: int, device: str = DEVICE):
    hidden = torch.randn(positions, width, device=device)
    weight = torch.randn(items + NUM_SPECIAL_IDS, width, device=device) * width**-0.5
    targets = torch.randint(NUM_SPECIAL_IDS, items + NUM_SPECIAL_IDS, (positions,), device=device)
    return hidden, weight, targets.masked_fill(torch.rand(positions, device=device) < 0.2, -100)


def loss_and_gradients(hidden, weight, targets, implementation, needed=(True, True), **options):
    inputs = [x.detach().clone().requires_grad_(need) for x, need in zip((hidden, weight), needed)]
    loss = cross_entropy(*inputs, targets, implementation=implementation, **options)
    wanted = [x for x in inputs if x.requires_grad]
    return [loss.detach(), *(torch.autograd.grad(loss * 3, wanted) if wanted else ())]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradients_are_those_of_the_full_softmax(needed, weighted):
    for positions, items in ((1, 1), (random.randint(2, 70), random.randint(2, 90)), (33, 32)):
        hidden, weight, targets = draw(positions, items, random.choice((16, 32)))
        number = torch.tensor(7, device=DEVICE)
        loss_weights = torch.rand(positions, device=DEVICE) * 2 if weighted else None
        options = {"needed": needed, "num_items_in_batch": number, "loss_weights": loss_weights}
        expected = loss_and_gradients(hidden.double(), weight.double(), targets, "torch", **options)
        actual = loss_and_gradients(hidden, weight, targets, "triton", **options)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_special_ids_take_no_part_and_a_batch_without_targets_has_loss_zero():
    hidden, weight, targets = draw(20, 30, 16)
    _, dhidden, dweight = loss_and_gradients(hidden, weight, targets, "triton")
    assert not dweight[:NUM_SPECIAL_IDS].any() and not dhidden[targets < 0].any()
    loss, dhidden, dweight = loss_and_gradients(hidden, weight, torch.full_like(targets, -100), "triton")
    assert loss == 0 and not dhidden.any() and not dweight.any()
    loss, _, dweight = loss_and_gradients(hidden[:0], weight, targets[:0], "triton")  # no position at all
    assert loss == 0 and not dweight.any()


def test_gradients_are_right_where_all_logits_are_far_below_zero():
    hidden, weight, targets = draw(20, 30, 16)  # 30 items do not fill a tile
    hidden, weight = hidden.abs() + 3, -weight.abs() - 2.5
    assert (hidden @ weight.T).max() < -120  # exp(120) is infinite in float32
    expected = loss_and_gradients(hidden.double(), weight.double(), targets, "torch")
    for ours, theirs in zip(loss_and_gradients(hidden, weight, targets, "triton"), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


def test_hidden_states_of_any_layout():
    hidden, weight, targets = draw(20, 30, 16)
    with torch.no_grad():
        expected = cross_entropy(hidden, weight, targets, implementation="triton")
        assert cross_entropy(hidden.T.contiguous().T, weight, targets, implementation="triton") == expected


def test_under_autocast_products_have_its_dtype_and_gradients_that_of_the_weights():
    hidden, weight, targets = draw(20, 30, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = loss_and_gradients(hidden, weight, targets, "triton")
    expected = loss_and_gradients(hidden.bfloat16(), weight, targets, "triton")
    assert [x.dtype for x in actual] == [torch.float32] * 3
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.float())


def test_what_the_kernels_cannot_compute_is_refused_by_name():
    hidden, weight, targets = draw(4, 5, 24)
    with pytest.raises(
        ValueError, match='`implementation` is "triton", but it has no kernels for a hidden size of 24'
    ):
        cross_entropy(hidden, weight, targets, implementation="triton")
    hidden, weight, targets = draw(4, 5, 16)
    with pytest.raises(ValueError, match="no kernels for torch.float64"):
        cross_entropy(hidden.double(), weight.double(), targets, implementation="triton")


def test_tiles_fit_the_shared_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(ops_triton_cross_entropy, "INTERPRETED", False)
    for memory in (64, 99, 163, 227):  # KiB a program may use: compute capability 7.5, 8.6 to 12.0, 8.0, 9.0
        for width in WIDTHS:
            for kernel in ("normalization", "hidden", "weight"):
                tile = _launch(kernel, width, torch.bfloat16, memory * 1024)
                kept, streamed = ("BV", "BT") if kernel == "weight" else ("BT", "BV")
                elements = (tile[kept] + tile["num_stages"] * tile[streamed]) * width + tile["BT"] * tile["BV"]
                assert elements * 2 <= memory * 1024
    assert _launch("normalization", 256, torch.bfloat16, 227 * 1024)["BT"] == 128  # what is fast stays so


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu(width, dtype, weighted):
    hidden, weight, targets = draw(random.randint(900, 1100), random.randint(700, 5000), width, "cuda")
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    options = {"loss_weights": torch.rand(len(hidden), device="cuda") if weighted else None}
    expected = loss_and_gradients(hidden.double(), weight.double(), targets, "torch", **options)
    actual, again = (loss_and_gradients(hidden, weight, targets, "auto", **options) for _ in range(2))
    for ours, repeated, theirs in zip(actual, again, expected, strict=True):
        assert torch.equal(ours, repeated)
        assert (ours.double() - theirs).abs().max() <= 1e-2 * theirs.abs().max()


@pytest.mark.gpu
def test_under_autocast_compiled_and_uncompiled_are_the_same():
    hidden, weight, targets = draw(700, 900, 128, "cuda")

    def run(function):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(*inputs, targets)
        return [loss, *torch.autograd.grad(loss, inputs)]

    plain, compiled = run(cross_entropy), run(torch.compile(cross_entropy, fullgraph=True))
    assert all(x.dtype == torch.float32 for x in plain)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_the_logits_are_never_in_memory():
    hidden, weight, targets = draw(8192, 100_000, 128, "cuda")
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 8192 * 100_000 * 2 / 4
