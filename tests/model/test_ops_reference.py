"""The oracle itself, against the definition spelled out query by query in plain Python."""

import math

import pytest
import torch
from ops_cases import Case, random_case

from blossomrec_hf.model.ops_reference import (
    REFERENCE_OPS,
    Blocks,
    Keys,
    attend_selected,
    power_law_distances,
    straight_through,
)


def select_by_hand(case: Case, compressed: list[torch.Tensor], start: int, t: int, group: int):
    """The definition of the selection for query t of one history: [(block, π)], the most important first."""
    per_group = case.heads // case.groups
    scores = []
    for m in range(t // case.block):
        windows = range(m * case.windows_per_block, (m + 1) * case.windows_per_block)
        heads = range(group * per_group, (group + 1) * per_group)
        dots = [
            float(case.tensors["q"].detach()[start + t, h] @ compressed[j][group]) / math.sqrt(case.width)
            for j in windows
            for h in heads
        ]
        scores.append(sum(dots) / len(dots))
    top = max([*scores, -1000.0])
    total = sum(math.exp(s - top) for s in [*scores, -1000.0])
    ranked = sorted(((-s, m) for m, s in enumerate(scores)))[: case.num_selected]
    pairs = [(m, math.exp(-s - top) / total) for s, m in ranked]
    return [(m, pi) for m, pi in pairs if pi > 1e-10]


def attend_by_hand(case: Case, start: int, t: int, head: int, keys: list[int]) -> torch.Tensor:
    """Softmax attention of one query of one head over the listed positions of its history."""
    group = head // (case.heads // case.groups)
    q, k, v = (case.tensors[name].detach() for name in "qkv")
    keys = [start + u for u in keys]
    weights = (k[keys, group] @ q[start + t, head] / math.sqrt(case.width)).softmax(0)
    return weights @ v[keys, group]


@pytest.mark.parametrize("trial", range(4))
def test_reference_follows_the_definition_query_by_query(trial):
    case = random_case(max_length=50)
    outputs = run_reference(case)
    selection = outputs["selection"]
    window = 0
    for start, n in zip(case.cu_seqlens.tolist(), case.lengths):
        compressed = []
        for j in range(n // case.block * case.windows_per_block):
            places = range((j + 1) * case.stride - case.compress_block_size, (j + 1) * case.stride)
            keys = [case.tensors["k"][start + p] if p >= 0 else torch.zeros(case.groups, case.width) for p in places]
            inputs = torch.stack(keys, 1).double() + case.tensors["position"]
            compressed.append(case.mlp(inputs.flatten(1)).detach())
            torch.testing.assert_close(outputs["compressed"][window], compressed[-1])
            window += 1
        for t in range(n):
            for head in range(case.heads):
                group = head // (case.heads // case.groups)
                chosen = select_by_hand(case, compressed, start, t, group)
                k = case.num_selected
                blocks = [m for m, _ in chosen] + [-1] * (k - len(chosen))
                assert selection.block_indices[start + t, group].tolist() == blocks
                pi = torch.tensor([pi for _, pi in chosen] + [0.0] * (k - len(chosen)), dtype=torch.float64)
                torch.testing.assert_close(selection.importance[start + t, group].detach(), pi)

                own = t // case.block
                keys = [u for u in range(t + 1) if u // case.block == own or u // case.block in blocks]
                torch.testing.assert_close(
                    outputs["long"][start + t, head], attend_by_hand(case, start, t, head, keys)
                )

                powers = {case.base**i for i in range(20)}
                distance = [t // case.short_block - u // case.short_block for u in range(t + 1)]
                keys = [u for u, delta in enumerate(distance) if delta < case.window or delta in powers]
                torch.testing.assert_close(
                    outputs["short"][start + t, head], attend_by_hand(case, start, t, head, keys)
                )


def run_reference(case: Case) -> dict:
    t, scaling = case.tensors, case.width**-0.5
    windows, first = case.windows()
    compressed = REFERENCE_OPS.compress(t["k"], case.compressor, windows, case.cu_seqlens[:-1])
    blocks = Blocks(compressed.unflatten(0, (-1, case.windows_per_block)).mean(1), first)
    long = {"block_size": case.block, "scaling": scaling}
    selection = REFERENCE_OPS.select(
        t["q"], blocks, case.every, num_selected_blocks=case.num_selected, threshold=1e-10, **long
    )
    at = t["q"], case.keys, case.every
    short = {"block_size": case.short_block, "window": case.window, "base": case.base, "scaling": scaling}
    return {
        "compressed": compressed,
        "selection": selection,
        "long": REFERENCE_OPS.attend_selected(*at, selection.block_indices, None, **long).detach(),
        "short": REFERENCE_OPS.attend_short(*at, **short).detach(),
    }


def test_ties_go_to_the_lower_block():
    case = random_case(lengths=[64], stride=4, windows_per_block=1, num_selected=3)
    with torch.no_grad():
        case.tensors["q"].zero_()  # every candidate has the same importance
    blocks = run_reference(case)["selection"].block_indices
    assert blocks[63].tolist() == [[0, 1, 2]] * case.groups


def test_blocks_of_no_importance_are_dropped():
    case = random_case(lengths=[32], stride=4, windows_per_block=1, num_selected=4, heads=2, groups=1, width=4)
    compressed = torch.zeros(8, 1, 4, dtype=torch.float64)
    compressed[1] = 100.0  # e⁻¹⁰⁰ and below for all the others
    with torch.no_grad():
        case.tensors["q"].fill_(1.0)
    selection = REFERENCE_OPS.select(
        case.tensors["q"],
        Blocks(compressed, torch.tensor([0])),
        case.every,
        num_selected_blocks=4,
        block_size=4,
        threshold=1e-10,
        scaling=0.5,
    )
    assert selection.block_indices[31].tolist() == [[1, -1, -1, -1]]
    assert selection.importance[31].tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_the_straight_through_factor_is_one_with_the_gradient_of_the_importance():
    importance = torch.rand(5, 2, 3, dtype=torch.float64, requires_grad=True)
    factor = straight_through(importance)
    torch.testing.assert_close(factor.detach(), torch.ones_like(factor))
    (gradient,) = torch.autograd.grad(factor.sum(), importance)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_gradients_against_finite_differences_with_the_factor_as_an_input():
    case = random_case(max_length=40, num_selected=2, heads=4, groups=2, width=4)
    selection = run_reference(case)["selection"].block_indices
    factor = torch.rand(selection.shape, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, factor):
        keys = Keys(k, v, case.cu_seqlens[:-1])
        return attend_selected(q, keys, case.every, selection, factor, block_size=case.block, scaling=0.5)

    inputs = (case.tensors["q"], case.tensors["k"], case.tensors["v"], factor)
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_distances_of_the_short_term_stream():
    assert power_law_distances(100, 1, 2).tolist() == [0, 1, 2, 4, 8, 16, 32, 64]
    assert power_law_distances(100, 4, 3).tolist() == [0, 1, 2, 3, 9, 27, 81]
    assert power_law_distances(1, 3, 2).tolist() == [0]
