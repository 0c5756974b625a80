"""The kernels that append events to cached histories, against PyTorch's operations and whole histories computed anew."""

import copy
import random

import pytest
import torch

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model import append_blossomrec
from blossomrec_hf.model.ops_triton_launch import INTERPRETED, triton


if triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WIDE = {"heads": 8, "groups": 4, "width": 64, "selection_block_size": 32, "short_term_block_size": 16}


def recommender(heads=4, groups=2, width=16, dtype=torch.float32, **kwargs) -> BlossomRecForSequentialRecommendation:
    """One layer whose importance is far from uniform; block sizes drawn anew, of any ratio."""
    stride = random.choice([1, 2, 4, 8, 16])
    settings = {
        "vocab_size": 60,
        "hidden_size": heads * width,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 24,
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2, 3]) + random.choice([0, 1]),
        "selection_block_size": stride * random.choice([1, 2, 4]),
        "num_selected_blocks": random.choice([1, 2, 3, 4, 7]),
        "short_term_block_size": random.choice([1, 2, 5, 8]),
        "short_term_window": random.choice([1, 2, 3]),
        "power_law_base": random.choice([2, 3]),
        "initializer_range": 0.2,
    } | kwargs
    if "selection_block_size" in kwargs:
        settings |= {"compress_stride": 16, "compress_block_size": 20}
    config = BlossomRecConfig(**settings)
    print(settings)
    return BlossomRecForSequentialRecommendation(config).to(DEVICE, dtype).eval()


def filled(model, lengths: list[int], room: int = 64) -> BlossomRecCache:
    """A cache of histories of these lengths, of random keys, values and block keys."""
    config, dtype = model.config, model.dtype
    cache = BlossomRecCache(config)
    capacity, rows = -(-(max(lengths) + room) // 64) * 64, len(lengths)
    cache.lengths = torch.tensor(lengths)
    cache._columns["item_ids"] = torch.randint(2, 60, (rows, capacity), device=DEVICE, dtype=torch.int32)
    cache._last, cache._last_length = torch.zeros(rows, config.hidden_size, device=DEVICE), cache.lengths
    groups, width = config.num_key_value_heads, config.head_dim
    for layer, attention_type in zip(cache.layers, config.attention_types):
        layer.states = torch.randn(rows, capacity, groups, 2 * width, device=DEVICE, dtype=dtype)
        if attention_type in ("blossom", "long_term"):
            blocks = capacity // config.selection_block_size
            layer.blocks["long_term"] = 4 * torch.randn(rows, blocks, groups, width, device=DEVICE)
    return cache


def events(counts: list[int]) -> torch.Tensor:
    """New events, padded on the left."""
    ids = torch.zeros(len(counts), max(counts), dtype=torch.long)
    for row, count in zip(ids, counts):
        row[len(row) - count :] = torch.randint(2, 60, (count,))
    return ids.to(DEVICE)


@torch.no_grad()
def appended(model, cache: BlossomRecCache, ids: torch.Tensor, implementation: str):
    """The output of `model` and the cache after the events, of which the given one knows nothing."""
    model.set_attn_implementation(implementation)
    cache = copy.deepcopy(cache)
    return model(ids, cache=cache, output_selection=True, output_hidden_states=True), cache


def same_choices(actual, expected, gap: float = 1e-5) -> torch.Tensor:
    """Where `[B, L]` the selections are the same; elsewhere they are of blocks whose scores differ by less than `gap`."""
    same = actual.block_indices == expected.block_indices
    difference = (actual.importance / expected.importance).log().abs()
    assert (same | (difference < gap)).all(), difference[~same]
    return same.flatten(2).all(2)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if expected.numel():
        difference = (actual.double() - expected.double()).abs().max().item()
        assert difference <= tolerance * max(1.0, expected.double().abs().max().item()), difference


def assert_the_same(model, cache: BlossomRecCache, ids: torch.Tensor, tolerance: float, gap: float = 1e-5) -> None:
    """
    One layer: events appended by the kernels and by PyTorch's operations have one output, and leave one cache. Blocks
    whose scores differ by less than `gap` may be selected in place of one another.
    """
    (actual, kept), (expected, kept_expected) = (
        appended(model, cache, ids, implementation) for implementation in ("blossom_triton", "blossom_torch")
    )
    selection, expected_selection = actual.selections[0], expected.selections[0]
    same = torch.ones_like(ids, dtype=torch.bool)
    if expected_selection.block_indices is not None:
        assert selection.block_indices.dtype == torch.int64
        # Block keys, and so scores, are four times as large as states, and err four times as much.
        same = same_choices(selection, expected_selection, gap if model.dtype == torch.float32 else 4 * tolerance)
        assert same.float().mean() > (0.99 if model.dtype == torch.float32 else 0.5)
        importance = [x.importance[same] for x in (selection, expected_selection)]
        torch.testing.assert_close(*importance, rtol=10 * tolerance, atol=tolerance)
    assert_close(actual.hidden_states[-1][same], expected.hidden_states[-1][same], tolerance)
    for name, tensor in kept_expected._tensors().items():
        if name != "last_hidden_state" or bool(same.all()):
            assert_close(kept._tensors()[name], tensor, tolerance)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels' wrappers that an append called."""
    names = []
    for name in ("store_events", "attend_events", "compress"):

        def noted(*args, function=getattr(append_blossomrec, name), name=name, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(append_blossomrec, name, noted)
    return names


@pytest.mark.parametrize("attention_type", ["blossom", "long_term", "short_term"])
@pytest.mark.parametrize("heads_groups_width", [(4, 2, 16), (3, 1, 16), (2, 2, 32)], ids=str)
def test_events_get_what_pytorch_gives_them(attention_type, heads_groups_width, launches):
    for counts in ([1, 1, 1, 1], [0, 1, 21, 2], [1, 0, 0, 0]):
        model = recommender(*heads_groups_width, attention_types=attention_type)
        lengths = [random.choice([0, 1, random.randint(2, 40), random.randint(2, 300)]) for _ in range(3)] + [65]
        assert_the_same(model, filled(model, lengths, room=random.choice([0, 64])), events(counts), 1e-4)
    assert launches.count("store_events") == launches.count("attend_events") == 3


@pytest.mark.parametrize("attention_type", ["blossom", "long_term", "short_term"])
def test_events_get_what_whole_histories_give_them(attention_type, launches):
    model = recommender(attention_types=attention_type)
    model.set_attn_implementation("blossom_torch")
    lengths, counts = [77, 0, 1, 30], [3, 18, 1, 0]
    ids = [torch.randint(2, 60, (n + m,), device=DEVICE) for n, m in zip(lengths, counts)]
    before, new = torch.zeros(4, 77, dtype=torch.long, device=DEVICE), torch.zeros(4, 18, dtype=torch.long).to(DEVICE)
    for i, (n, m) in enumerate(zip(lengths, counts)):
        before[i, :n], new[i, :m] = ids[i][:n], ids[i][n:]
    cache = model(before, use_cache=True).cache
    out, cache = appended(model, cache, new, "blossom_triton")
    assert "attend_events" in launches
    model.set_attn_implementation("blossom_torch")
    for i, (n, m) in enumerate(zip(lengths, counts)):
        expected = model(ids[i][None], output_selection=True)
        same = torch.ones(1, m, dtype=torch.bool, device=DEVICE)
        if attention_type != "short_term":
            parts = [s.selections[0]._replace(gates=None) for s in (out, expected)]
            found = parts[0]._replace(**{x: getattr(parts[0], x)[i : i + 1, :m] for x in parts[0]._fields[:2]})
            wanted = parts[1]._replace(**{x: getattr(parts[1], x)[:, n:] for x in parts[1]._fields[:2]})
            same = same_choices(found, wanted)
        assert_close(out.logits[i, :m][same[0]], expected.logits[0, n:][same[0]], 1e-4)
        if attention_type != "short_term":
            block = model.config.selection_block_size
            whole = model(ids[i][None], use_cache=True).cache.layers[0].blocks["long_term"][0, : (n + m) // block]
            assert_close(cache.layers[0].blocks["long_term"][i, : (n + m) // block], whole, 1e-4)


def test_several_layers_and_several_appends(launches):
    types = ["blossom", "full", "long_term", "short_term"]
    # Blocks of every size that the kernels for whole histories have, too.
    model = recommender(attention_types=types, num_hidden_layers=4, selection_block_size=16)
    ids = torch.randint(2, 60, (1, 32), device=DEVICE)
    found, expected = [], []
    for outputs, implementation in ((found, "blossom_triton"), (expected, "blossom_torch")):
        model.set_attn_implementation(implementation)
        cache = None
        for part in ids.split([18, 1, 1, 12], 1):
            with torch.no_grad():
                out = model(part, cache=cache, use_cache=True, output_selection=True)
            cache = out.cache
            outputs.append(out)
    assert launches.count("attend_events") == 3 * 3 and launches.count("compress") == 2 * 2
    for a, b in zip(found, expected):
        for layer in (0, 2):
            if not torch.equal(a.selections[layer].block_indices, b.selections[layer].block_indices):
                return  # behind a choice that rounding may decide, nothing must agree
        assert_close(a.logits, b.logits, 1e-4)


# bfloat16 alone has no arithmetic in the interpreter; here it is only stored.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention_type", ["blossom", "long_term", "short_term"])
def test_half_precision(attention_type, dtype):
    model = recommender(attention_types=attention_type, dtype=dtype)
    assert_the_same(model, filled(model, [130, 1, 0, 47]), events([1, 5, 3, 1]), TOLERANCE[dtype])


def test_a_history_of_65536_events():
    model = recommender(heads=2, groups=1, selection_block_size=16, num_selected_blocks=4)
    assert_the_same(model, filled(model, [65_536, 100]), events([1, 1]), 1e-4)


def test_among_equals_the_lower_block_is_selected():
    number = random.choice([1, 3, 4])
    model = recommender(num_selected_blocks=number, attention_types="long_term")
    cache = filled(model, [1300, 500])
    rows = cache.layers[0].blocks["long_term"]
    kind = torch.randint(0, 2, (rows.shape[1],), device=DEVICE)
    kind[:8] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    rows[:] = rows[:, kind]
    out, _ = appended(model, cache, events([1, 2]), "blossom_triton")
    # Blocks that the new events complete have keys of their own, which no other equals; below β there is none.
    for row, column, length in ((0, 1, 1300), (1, 0, 500), (1, 1, 500)):
        of_equals = kind[: length // model.config.selection_block_size]
        for chosen in out.selections[0].block_indices[row, column]:
            assert chosen[0] >= 0
            chosen = chosen[(chosen >= 0) & (chosen < len(of_equals))]
            for best in chosen[:1]:
                expected = (of_equals != kind[best]).sort(stable=True).indices  # that kind, then the other
                assert torch.equal(chosen, expected[: len(chosen)])


def test_every_element_is_written_and_twice_the_same_is_the_same(monkeypatch):
    model = recommender()
    cache, ids = filled(model, [100, 0, 3]), events([1, 9, 0])
    first, kept = appended(model, cache, ids, "blossom_triton")
    for name in ("empty", "empty_like"):

        def poisoned(*args, make=getattr(torch, name), **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        monkeypatch.setattr(torch, name, poisoned)
    second, kept_again = appended(model, cache, ids, "blossom_triton")
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(a, b) for a, b in zip(first.selections[0], second.selections[0]))
    assert all(torch.equal(a, b) for a, b in zip(kept._tensors().values(), kept_again._tensors().values()))


def test_where_there_are_no_kernels_pytorch_computes(launches):
    for kwargs, implementation in (
        ({"width": 12}, "blossom_triton"),
        ({"dtype": torch.float64}, "blossom_triton"),
        ({"num_selected_blocks": 17}, "blossom_triton"),
        ({}, "eager"),
        ({}, "blossom_torch"),
    ):
        model = recommender(**kwargs)
        cache = filled(model, [20, 3])
        for layer in cache.layers:
            wide = torch.promote_types(model.dtype, torch.float32)
            layer.blocks = {name: rows.to(wide) for name, rows in layer.blocks.items()}
        appended(model, cache, events([1, 1]), implementation)
    assert launches == []


def test_the_code_travels_with_a_checkpoint(tmp_path):
    recommender().save_pretrained(tmp_path)
    assert (tmp_path / "ops_triton_append.py").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"selection_block_size": 16, "num_selected_blocks": 4}, WIDE], ids=["default", "wide"]
)
def test_real_sizes_on_a_gpu(sizes, dtype):
    model = recommender(dtype=dtype, **({"heads": 8} | sizes))
    for counts in ([1] * 64, [random.randint(0, 40) for _ in range(64)]):
        lengths = [4096] * 63 + [random.randint(0, 4096)]
        assert_the_same(model, filled(model, lengths), events(counts), TOLERANCE[dtype], gap=1e-4)
    first, _ = appended(model, filled(model, [4096] * 64), events([1] * 64), "blossom")
    assert first.selections[0].block_indices.device.type == "cuda"
