"""The chunked full softmax, the objectives against drawn items, and those that users register."""

import importlib.util
import logging
import math
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, register_objective
from blossomrec_hf.model import loss_blossomrec, objectives_blossomrec
from blossomrec_hf.model.loss_blossomrec import cross_entropy, sampled_loss
from blossomrec_hf.model.objectives_blossomrec import BUILT_IN_OBJECTIVES, mean_over_targets


SAMPLED = ("sampled_softmax", "bce", "gbce", "bpr")
SAMPLINGS = ("uniform", "popularity", "in_batch")


def problem(positions=12, items=20, width=4):
    hidden = torch.randn(positions, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(items + 2, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(2, items + 2, (positions,))
    targets[::5] = -100
    return hidden, weight, targets, torch.randint(0, 9, (items + 2,))


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("number", [None, 31])
def test_chunks_do_not_change_value_or_gradients(monkeypatch, rows, number):
    hidden, weight, targets, _ = problem()
    plain = cross_entropy(hidden, weight, targets, number)
    expected = torch.autograd.grad(plain * 3, (hidden, weight))
    monkeypatch.setitem(loss_blossomrec.MAX_LOGITS, "cpu", rows * 22)
    chunked = cross_entropy(hidden, weight, targets, number)
    assert (rows == 12) == (type(chunked.grad_fn.next_functions[0][0]) is type(plain.grad_fn.next_functions[0][0]))
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(torch.autograd.grad(chunked * 3, (hidden, weight)), expected)
    torch.testing.assert_close(torch.autograd.grad(cross_entropy(hidden, weight.detach(), targets), hidden)[0].ne(0).any(1),
                               targets >= 0)  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets, number), plain.detach())


def test_chunks_under_autocast_are_near(monkeypatch):
    hidden, weight, targets, _ = (x.float() if x.is_floating_point() else x for x in problem(width=16))
    exact = cross_entropy(hidden, weight, targets)
    monkeypatch.setitem(loss_blossomrec.MAX_LOGITS, "cpu", 22 * 5)
    with torch.autocast("cpu", torch.bfloat16):
        chunked = cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(chunked, (hidden, weight)) if hidden.requires_grad else ()
    assert chunked.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(chunked, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_the_fused_kernel_gives_the_same(monkeypatch, needed):
    pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    hidden, weight, targets, _ = problem()
    expected = cross_entropy(hidden, weight, targets, 31)
    inputs = [x for x, need in zip((hidden, weight), needed) if need]
    gradients = torch.autograd.grad(expected * 3, inputs) if inputs else ()
    hidden, weight = (x.detach().float().requires_grad_(need) for x, need in zip((hidden, weight), needed))
    if torch.cuda.is_available():
        hidden, weight, targets = (
            x.detach().cuda().requires_grad_(x.requires_grad) for x in (hidden, weight, targets)
        )
    monkeypatch.setitem(loss_blossomrec.MAX_LOGITS, hidden.device.type, 5 * 22)  # several chunks
    fused = cross_entropy(hidden, weight, targets, 31, implementation="liger")
    torch.testing.assert_close(fused.cpu(), expected.float(), atol=1e-5, rtol=1e-5)
    for _ in range(2):  # a second pass backward gives the same
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(fused * 3, inputs, retain_graph=True) if inputs else (), gradients
        ):
            torch.testing.assert_close(ours.cpu(), theirs.float(), atol=1e-5, rtol=1e-5)


def test_the_fused_kernel_in_bfloat16_is_as_near_as_the_chunks(monkeypatch):
    pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, targets, _ = (x.detach().to(device) for x in problem(positions=60, items=40, width=16))
    monkeypatch.setitem(loss_blossomrec.MAX_LOGITS, device, 42 * 7)
    errors = []
    for implementation, dtype in (("torch", torch.float64), ("torch", torch.float32), ("liger", torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            loss = cross_entropy(*inputs, targets, implementation=implementation)
        result = torch.cat([loss[None], *(x.flatten() for x in torch.autograd.grad(loss, inputs))]).double()
        errors.append((result - errors[0][1]).abs().max() if errors else (0.0, result))
    assert errors[2] < 2 * errors[1] + 1e-5 and errors[1] < 0.05


def test_the_fused_kernel_is_taken_where_it_is_there(monkeypatch):
    hidden, weight, targets, _ = (x.detach().float() if x.is_floating_point() else x for x in problem())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ValueError, match="cannot be imported .* `pip install"):
        cross_entropy(hidden, weight, targets, implementation="liger")
    on_gpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    kernel = loss_blossomrec._fused_kernel
    assert kernel(on_gpu, "auto") is None
    function = object()
    there = SimpleNamespace(liger_fused_linear_cross_entropy=function)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", there)
    assert kernel(on_gpu, "auto") is kernel(hidden, "liger") is function
    assert kernel(on_gpu, "torch") is kernel(hidden, "auto") is None
    with pytest.raises(ValueError, match="no float64"):
        cross_entropy(hidden.double(), weight.double(), targets, implementation="liger")


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_weighted_losses_have_the_value_and_gradients_of_the_weighted_sum(monkeypatch, rows):
    hidden, weight, targets, _ = problem()
    loss_weights = torch.rand(12)
    losses = [cross_entropy(hidden[t : t + 1], weight, targets[t : t + 1]) for t in range(12)]
    expected = sum(factor * loss for factor, loss in zip(loss_weights, losses)) / 31
    monkeypatch.setitem(loss_blossomrec.MAX_LOGITS, "cpu", rows * 22)
    weighted = cross_entropy(hidden, weight, targets, 31, loss_weights=loss_weights)
    torch.testing.assert_close(weighted, expected)
    gradients = [torch.autograd.grad(loss * 3, (hidden, weight)) for loss in (weighted, expected)]
    torch.testing.assert_close(*gradients)
    default = cross_entropy(hidden, weight, targets, loss_weights=loss_weights)
    torch.testing.assert_close(default, expected * 31 / (targets >= 0).sum())  # the divisor counts targets
    if rows < 12:
        with pytest.raises(ValueError, match='`implementation` is "liger", but it has no weights of events'):
            cross_entropy(hidden.float(), weight.float(), targets, loss_weights=loss_weights, implementation="liger")


@pytest.mark.parametrize("objective", SAMPLED)
@pytest.mark.parametrize("shared", [True, False])
def test_weights_of_losses_against_drawn_items(objective, shared, seed):
    hidden, weight, targets, counts = problem()
    options = {"item_counts": counts, "num_negatives": 6, "negative_sampling": "in_batch", "shared_negatives": shared}

    def loss(loss_weights):
        torch.manual_seed(seed)
        return sampled_loss(objective, hidden, weight, targets, 31, loss_weights=loss_weights, **options)

    loss_weights = torch.rand(12)
    alone = torch.stack([loss(torch.eye(12)[t]) for t in range(12)])
    torch.testing.assert_close(loss(loss_weights), (alone * loss_weights).sum())
    torch.testing.assert_close(loss(torch.ones(12)), loss(None), rtol=1e-14, atol=0)
    assert (alone[targets < 0] == 0).all()


def test_a_large_catalog_never_has_all_its_logits():
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight = torch.randn(200_002, 8, requires_grad=True)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel()) if isinstance(out, torch.Tensor) else largest
            return out

    with Largest():
        cross_entropy(hidden, weight, torch.randint(2, 200_002, (1000,))).backward()
    assert largest <= loss_blossomrec.MAX_LOGITS["cpu"] < hidden.shape[0] * weight.shape[0]


@pytest.mark.parametrize("shared", [True, False])
def test_a_sampled_loss_computes_one_tensor_as_large_as_the_catalog(shared):
    hidden, weight, targets, counts = problem(items=5000)
    large = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= weight.numel() and not out._is_view():
                large.append(func)
            return out

    options = {"item_counts": counts, "num_negatives": 6, "shared_negatives": shared}
    with Large():
        sampled_loss("sampled_softmax", hidden, weight, targets, **options).backward()
    computed = [func for func in large if func is not torch.ops.aten.detach.default]
    assert computed == [torch.ops.aten.embedding_dense_backward.default]


@pytest.mark.parametrize("objective", SAMPLED)
@pytest.mark.parametrize("shared", [True, False])
def test_values_are_those_of_the_formulas(monkeypatch, objective, shared):
    hidden, weight, targets, counts = problem()
    drawn = torch.randint(2, 22, (6,) if shared else (12, 6))
    drawn.view(-1)[0] = targets[1]  # an accidental hit
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn)
    loss = sampled_loss(
        objective, hidden, weight, targets, 7, item_counts=counts, num_negatives=6, shared_negatives=shared
    )
    total = 0.0
    rate = 6 / 19
    beta = rate * (0.75 * (1 - 1 / rate) + 1 / rate)
    for position, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        negatives = [i for i in (drawn if shared else drawn[position]).tolist() if i != target]
        positive = hidden[position] @ weight[target]
        scores = torch.stack([hidden[position] @ weight[i] for i in negatives])
        if objective == "sampled_softmax":
            others = torch.exp(scores - math.log(6 / 20)).sum()
            total = total - positive + torch.log(torch.exp(positive) + others)
        elif objective == "bpr":
            total = total - logsigmoid(positive - scores).sum() / 6
        else:
            weighted = logsigmoid(positive) * (beta if objective == "gbce" else 1.0)
            total = total - (weighted + torch.log(1 - torch.sigmoid(scores)).sum()) / 7
    torch.testing.assert_close(loss, total / 7)
    gradients, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, total / 7))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_items_are_drawn_by_their_chance(monkeypatch, sampling):
    hidden, weight, targets, counts = problem(positions=4000, items=6, width=2)
    seen = []
    original = torch.Tensor.__eq__
    monkeypatch.setattr(
        torch.Tensor, "__eq__", lambda self, other: (seen.append(self.clone()), original(self, other))[1]
    )
    sampled_loss("bpr", hidden, weight, targets, item_counts=counts, num_negatives=4000, negative_sampling=sampling)
    monkeypatch.undo()
    drawn = next(tensor for tensor in seen if tensor.shape == (4000,) and not tensor.is_floating_point())
    share = torch.bincount(drawn, minlength=8) / 4000
    known = torch.bincount(targets[targets >= 0], minlength=8)
    expected = {"uniform": torch.ones(8), "popularity": counts + 1.0, "in_batch": known.float()}[sampling]
    expected[:2] = 0
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.05, rtol=0)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_the_correction_makes_the_sample_stand_for_the_catalog(sampling):
    hidden, weight, targets, counts = problem(positions=40)
    full = cross_entropy(hidden, weight, targets)
    sampled = sampled_loss(
        "sampled_softmax",
        hidden,
        weight,
        targets,
        item_counts=counts,
        num_negatives=100_000,
        negative_sampling=sampling,
    )
    torch.testing.assert_close(sampled, full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("objective", SAMPLED)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shared", [True, False])
def test_every_objective_finds_what_follows(objective, sampling, shared):
    hidden, weight = torch.nn.Parameter(torch.randn(28, 16)), torch.nn.Parameter(torch.randn(30, 16))
    targets = torch.randperm(28) + 2
    optimizer = torch.optim.Adam([hidden, weight], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = sampled_loss(
            objective, hidden, weight, targets, item_counts=torch.full((30,), 10), num_negatives=8,
            negative_sampling=sampling, shared_negatives=shared,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
    best = (hidden @ weight[2:].T).argmax(1) + 2
    assert (best == targets).float().mean() > 0.9


@pytest.mark.parametrize("objective", SAMPLED)
def test_the_model_trains_on_its_objective(seed, objective):
    config = BlossomRecConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        objective=objective, num_negatives=8, negative_sampling="popularity", shared_negatives=False, gbce_calibration=0.3,
    )  # fmt: skip
    model = BlossomRecForSequentialRecommendation(config).eval()
    model.item_counts.copy_(torch.randint(0, 50, (30,)))
    input_ids = torch.randint(2, 30, (1, 12))
    torch.manual_seed(seed)
    loss = model(input_ids, labels=input_ids, num_items_in_batch=40).loss
    hidden = model.model(input_ids).last_hidden_state[0]
    torch.manual_seed(seed)
    expected = sampled_loss(
        objective, hidden, model.lm_head.weight, torch.cat([input_ids[0, 1:], torch.tensor([-100])]), 40,
        item_counts=model.item_counts, num_negatives=8, negative_sampling="popularity", shared_negatives=False,
        gbce_calibration=0.3,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)

    empty = model(input_ids, labels=torch.full_like(input_ids, -100)).loss
    assert empty.item() == 0.0
    empty.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "bce", "num_negatives": 29}, "`num_negatives` is 29; it must be from 1 to 28"),
        ({"negative_sampling": "hard"}, "`negative_sampling` is 'hard'"),
        ({"cross_entropy_implementation": "apex"}, "`cross_entropy_implementation` is 'apex'"),
        ({"gbce_calibration": 1.5}, "`gbce_calibration` is 1.5"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        BlossomRecConfig(vocab_size=30, **changes)


# Objectives from outside the package

HINGE = """
from blossomrec_hf import mean_over_targets, register_objective


def hinge(hidden_states, item_vectors, targets, num_items_in_batch, *, weights=None, **kwargs):
    scores = hidden_states @ item_vectors[2:].T
    positive = scores.gather(1, (targets - 2).clamp(min=0)[:, None])
    return mean_over_targets((1 + scores - positive).clamp(min=0).mean(1), targets, num_items_in_batch, weights)


register_objective("hinge", hinge)
"""
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def hinge(tmp_path, monkeypatch):
    """The function of a file of its own that registers it when it is imported."""
    monkeypatch.setattr(objectives_blossomrec, "_REGISTERED", dict(objectives_blossomrec._REGISTERED))
    path = tmp_path / "hinge.py"
    path.write_text(HINGE)
    spec = importlib.util.spec_from_file_location("hinge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hinge


def trained(model, steps=30):
    input_ids = torch.arange(2, 30).repeat(2)[None, :40]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(steps):
        losses.append(model(input_ids, labels=input_ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, input_ids


def test_a_registered_objective_trains_saves_and_loads(hinge, tmp_path):
    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(objective="hinge", **SIZES))
    losses, input_ids = trained(model)
    assert losses[-1] < 0.5 * losses[0]
    expected = model.eval()(input_ids, labels=input_ids)
    scores = expected.logits[0, :-1, 2:]
    positive = scores.gather(1, input_ids[0, 1:, None] - 2)
    torch.testing.assert_close(expected.loss, (1 + scores - positive).clamp(min=0).mean())

    model.save_pretrained(tmp_path / "model")
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path / "model")
    assert loaded.config.objective == "hinge"
    assert torch.equal(loaded(input_ids, labels=input_ids).loss, expected.loss)


def test_an_objective_may_be_a_function(hinge, tmp_path):
    config = BlossomRecConfig(objective=hinge, **SIZES)
    assert config.objective == "hinge" and config.to_dict()["objective"] == "hinge"
    BlossomRecForSequentialRecommendation(config).save_pretrained(tmp_path / "model")
    del objectives_blossomrec._REGISTERED["hinge"]  # as in another process
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path / "model", objective=hinge)
    trained(loaded, steps=1)


def test_an_unknown_objective_is_refused_when_the_model_is_built(hinge, tmp_path):
    BlossomRecForSequentialRecommendation(BlossomRecConfig(objective="hinge", **SIZES)).save_pretrained(tmp_path / "m")
    del objectives_blossomrec._REGISTERED["hinge"]
    config = BlossomRecConfig(objective="hinge", **SIZES)
    for build in (
        lambda: BlossomRecForSequentialRecommendation(config),
        lambda: BlossomRecForSequentialRecommendation.from_pretrained(tmp_path / "m"),
    ):
        with pytest.raises(
            ValueError, match="`objective` is 'hinge'.*'bce', 'bpr', 'cross_entropy'.*register_objective"
        ):
            build()
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path / "m", objective="cross_entropy")
    trained(loaded, steps=1)


@pytest.mark.parametrize(
    ("name", "function", "named"),
    [
        (None, print, "`name` is None"),
        ("<lambda>", print, "`name` is '<lambda>'"),
        *((name, print, f"`name` is '{name}', an objective of the package") for name in BUILT_IN_OBJECTIVES),
        ("mine", "bce", "`function` is 'bce'"),
    ],
)
def test_what_cannot_be_registered_is_named(name, function, named):
    with pytest.raises(ValueError, match=named):
        register_objective(name, function)


@pytest.mark.parametrize("function", [lambda *args, **kwargs: 0.0, partial(print, sep="")])
def test_a_function_without_a_name_is_refused(function):
    with pytest.raises(ValueError, match="`objective` is .*no name to save; call `register_objective"):
        BlossomRecConfig(objective=function)


def test_a_replaced_objective_is_reported(hinge, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def scaled(*args, **kwargs):
        return 2 * hinge(*args, **kwargs)

    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(objective=hinge, **SIZES)).eval()
    ids = torch.arange(2, 20)[None]
    before = model(ids, labels=ids).loss
    assert not caplog.records
    register_objective("hinge", scaled)
    assert "The objective 'hinge' is replaced" in caplog.text
    assert model(ids, labels=ids).loss == 2 * before


@pytest.mark.parametrize(("loss", "shape"), [(1.5, "float of shape []"), (torch.ones(3), "Tensor of shape [3]")])
def test_a_loss_that_is_no_scalar_tensor_is_refused(hinge, loss, shape):
    register_objective("mine", lambda *args, **kwargs: loss)
    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(objective="mine", **SIZES))
    ids = torch.arange(2, 20)[None]
    with pytest.raises(ValueError, match=re.escape(f"'mine' returned a {shape}; it must return a scalar tensor")):
        model(ids, labels=ids)


def test_a_registered_objective_gets_weights_or_is_refused(hinge, caplog):
    model = BlossomRecForSequentialRecommendation(BlossomRecConfig(objective="hinge", **SIZES)).eval()
    input_ids, weights = torch.randint(2, 30, (1, 9)), torch.rand(1, 9)
    scores = model(input_ids).logits[0, :-1, 2:]
    positive = scores.gather(1, input_ids[0, 1:, None] - 2)
    losses = (1 + scores - positive).clamp(min=0).mean(1)
    weighted = model(input_ids, labels=input_ids, weights=weights).loss
    torch.testing.assert_close(weighted, (losses * weights[0, 1:]).mean())

    register_objective("hinge", lambda *args, **kwargs: hinge(*args))
    torch.testing.assert_close(model(input_ids, labels=input_ids).loss, losses.mean())
    with pytest.raises(ValueError, match="the objective 'hinge' has no parameter `weights` and would ignore them"):
        model(input_ids, labels=input_ids, weights=weights)


def test_the_mean_over_targets_takes_losses_or_their_sum():
    losses, targets = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([5, -100, 2])
    assert mean_over_targets(losses, targets) == mean_over_targets(torch.tensor(4.0), targets) == 2
    assert mean_over_targets(losses, targets, 8) == mean_over_targets(losses, targets, torch.tensor(8)) == 0.5
    assert mean_over_targets(losses, targets, 8, torch.tensor([1.0, 5.0, 0.5])) == (losses[0] + losses[2] / 2) / 8
    assert mean_over_targets(losses, torch.full((3,), -100)) == 0
