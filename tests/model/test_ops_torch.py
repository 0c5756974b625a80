"""The sub-quadratic functions against the reference, and their promise of linear memory."""

import random

import pytest
import torch
from ops_cases import random_case, run
from torch.utils._python_dispatch import TorchDispatchMode

from blossomrec_hf.model import ops_torch, ops_torch_tiles
from blossomrec_hf.model.ops_reference import REFERENCE_OPS, Blocks, Keys, Queries, last_positions
from blossomrec_hf.model.ops_torch import TORCH_OPS


def assert_equal(case, actual: dict, expected: dict, values: float, gradients: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        tolerance = gradients if name.startswith("grad") else values
        scale = max(1.0, expected[name].abs().max().item()) if expected[name].numel() else 1.0
        message = f"{name} of {case}"
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance * scale, msg=message)


@pytest.mark.parametrize("slice_elements", [2**25, 3000], ids=["whole", "sliced"])
@pytest.mark.parametrize("trial", range(10))
def test_same_values_and_gradients_as_the_reference(monkeypatch, slice_elements, trial):
    monkeypatch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", slice_elements)
    monkeypatch.setitem(ops_torch_tiles.SLICE_LOGITS, "cpu", slice_elements)
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


def some_positions(case, number: int = 5) -> Queries:
    """Up to `number` positions of every history but the empty ones, some of them next to each other."""
    places = [(i, p) for i, n in enumerate(case.lengths) for p in sorted(random.sample(range(n), min(n, number)))]
    history, position = torch.tensor(places).unbind(1)
    most = int(history.bincount().max())
    return Queries(history.contiguous(), position, case.max_seqlen + random.choice([0, 3]), most)


def cached(case) -> Keys:
    """The same keys and values in rows of one capacity with anything behind the lengths, as in a cache."""
    capacity = case.max_seqlen + random.choice([0, 7])
    states = torch.randn(len(case.lengths), capacity, case.groups, 2 * case.width, dtype=case.dtype)
    rows = torch.cat([case.tensors["k"], case.tensors["v"]], -1)
    for state, start, n in zip(states, case.cu_seqlens.tolist(), case.lengths):
        state[:n] = rows[start : start + n].detach()
    states = states.flatten(0, 1)
    return Keys(*states.chunk(2, -1), capacity * torch.arange(len(case.lengths)), states)


@pytest.mark.parametrize("slice_elements", [2**25, 3000], ids=["whole", "sliced"])
@pytest.mark.parametrize("which", ["some", "last", "few"])
@pytest.mark.parametrize("trial", range(4))
def test_any_queries_are_answered_as_all_of_them(monkeypatch, which, slice_elements, trial):
    monkeypatch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", slice_elements)
    case = random_case(max_length=250)
    if which == "last":  # of a history that is empty there is none
        case = random_case(lengths=[n for n in case.lengths if n])
        queries = last_positions(case.cu_seqlens, case.max_seqlen)
    elif which == "few":  # of one history, as an append computes them
        case = random_case(lengths=[random.randint(1, 250)])
        queries = some_positions(case, random.choice([1, ops_torch.FEW]))
    else:
        queries = some_positions(case)
    every = run(REFERENCE_OPS, case)
    expected, actual = run(REFERENCE_OPS, case, queries=queries), run(TORCH_OPS, case, queries=queries)
    assert_equal(case, actual, expected, 1e-10, 1e-8)
    rows = case.rows(queries)
    for name in ("long", "short", "full", "importance", "block_indices"):
        torch.testing.assert_close(expected[name], every[name][rows], rtol=0, atol=1e-10, msg=f"{name} of {case}")


@pytest.mark.parametrize("slice_logits", [2**17, 40], ids=["whole", "sliced"])
@pytest.mark.parametrize("trial", range(6))
def test_one_query_of_each_history_selects_as_the_reference(monkeypatch, slice_logits, trial):
    """As an append to many histories does. Blocks occur twice: of equal ones, the lower is selected."""
    monkeypatch.setitem(ops_torch_tiles.SLICE_LOGITS, "cpu", slice_logits)
    number, groups, width, size = random.randint(2, 9), random.choice([1, 2]), 4, random.choice([2, 8])
    lengths = torch.randint(1, 150, (number,))
    numbers = lengths // size
    rows = torch.randn(int(numbers.sum()) + 1, groups, width, dtype=torch.float64)
    rows[1::2] = rows[: len(rows) - 1 : 2]
    blocks = Blocks(rows, torch.cat([torch.zeros(1, dtype=torch.long), numbers.cumsum(0)[:-1]]))
    history = torch.randperm(number)[: random.randint(2, number)].sort().values
    queries = Queries(history, lengths[history] - 1, int(lengths.max()), 1)
    q = torch.randn(len(history), 2 * groups, width, dtype=torch.float64)
    settings = {"num_selected_blocks": 3, "block_size": size, "threshold": random.choice([0.0, 0.1]), "scaling": 0.5}
    with torch.no_grad():
        expected = REFERENCE_OPS.select(q, blocks, queries, **settings)
        found = TORCH_OPS.select(q, blocks, queries, **settings)
    assert torch.equal(found.block_indices, expected.block_indices)
    torch.testing.assert_close(found.importance, expected.importance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("trial", range(4))
def test_rows_of_a_cache_are_read_as_packed_ones(trial):
    case = random_case(max_length=250)
    t, queries = case.tensors, some_positions(case)
    q, scaling = t["q"][case.rows(queries)].detach(), case.width**-0.5
    place = torch.stack(
        [queries.position.clamp(max=3), queries.position + 1, torch.full_like(queries.position, -1)], 1
    )
    short = {"block_size": case.short_block, "window": case.window, "base": case.base, "scaling": scaling}
    selected = run(REFERENCE_OPS, case, queries=queries)["block_indices"]
    windows, _ = case.windows()
    results = []
    for ops, keys in ((REFERENCE_OPS, case.keys), (REFERENCE_OPS, cached(case)), (TORCH_OPS, cached(case))):
        at = q, keys, queries
        results.append(
            [
                ops.attend_selected(*at, selected, None, block_size=case.block, scaling=scaling),
                ops.attend_short(*at, **short),
                ops.attend_full(*at, scaling=scaling),
                ops.attend_places(*at, place[:, None], scaling=scaling),
                ops.compress(keys.k, case.compressor, windows, keys.first)[: case.num_blocks * case.windows_per_block],
            ]
        )
    for actual in results[1:]:
        torch.testing.assert_close(actual, results[0], rtol=0, atol=1e-10, msg=lambda m: f"{m}\n{case}")


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 333])
def test_the_last_position_of_one_history(length):
    for _ in range(4):
        case = random_case(lengths=[length])
        t, scaling, (windows, first) = case.tensors, case.width**-0.5, case.windows()
        short = {"block_size": case.short_block, "window": case.window, "base": case.base, "scaling": scaling}
        settings = {"num_selected_blocks": case.num_selected, "threshold": 1e-10}
        long = {"block_size": case.block, "scaling": scaling}
        results = []
        for ops, queries in ((REFERENCE_OPS, case.every), (TORCH_OPS, last_positions(case.cu_seqlens, length))):
            q = t["q"][-queries.position.shape[0] :]
            c = ops.compress(t["k"], case.compressor, windows, case.cu_seqlens[:-1])
            blocks = Blocks(c.unflatten(0, (-1, case.windows_per_block)).mean(1), first)
            selected = ops.select(q, blocks, queries, **settings, **long)
            at = q, case.keys, queries
            outs = [ops.attend_selected(*at, selected.block_indices, None, **long), ops.attend_short(*at, **short)]
            outs.append(ops.attend_full(*at, scaling=scaling))
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
