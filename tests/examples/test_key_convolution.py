"""The stream of `examples/studies/key_convolution.py`: the long-term stream whose compressor reads convolved keys."""

import random
import sys

import pytest
import torch
from example_cases import REPOSITORY

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.streams_blossomrec import STREAMS
from blossomrec_hf.training.studies import import_files


FILE = REPOSITORY / "examples" / "studies" / "key_convolution.py"
WIDTH, HEADS, GROUPS, TAPS = 4, 4, 2, 4


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The stream, without consequences for other tests."""
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.STREAMS", STREAMS.copy())
    import_files([FILE])
    yield
    del sys.modules["key_convolution"]


def recommender(types="convolved_long_term+short_term", **kwargs) -> BlossomRecForSequentialRecommendation:
    """A model in double precision whose keys are mixed at random; sizes drawn anew."""
    stride = random.choice([1, 2, 4])
    settings = {
        "vocab_size": 60,
        "hidden_size": WIDTH * HEADS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "intermediate_size": 24,
        "attention_types": types,
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2]) + random.choice([0, 1]),
        "selection_block_size": stride * random.choice([1, 2]),
        "num_selected_blocks": 2,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0,
    }
    config = BlossomRecConfig(**(settings | kwargs))
    print(config.compress_stride, config.compress_block_size, config.selection_block_size)
    model = BlossomRecForSequentialRecommendation(config).double().eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.compressor.taps)
    return model


def attend_one_query(layer, config, q, k, v, t: int, head: int) -> torch.Tensor:
    """The definition: the output of one head at position `t`, from the rows of one history."""
    stride, length, size = config.compress_stride, config.compress_block_size, config.selection_block_size
    group, compressor, none = head // (HEADS // GROUPS), layer.compressor, torch.zeros(WIDTH, dtype=q.dtype)

    def window(end: int) -> torch.Tensor:
        places = range(end - length - TAPS + 2, end + 1)
        keys = [k[p, group] if p >= 0 else none for p in places]
        keys = [key + compressor.position[group, i] for i, key in enumerate(keys)]
        mixed = [sum(compressor.taps[j, group, 0] * keys[i + j] for j in range(TAPS)) for i in range(length)]
        return compressor.mlp(torch.cat(mixed))

    def importance(block: int) -> torch.Tensor:
        ends = range(block * size + stride - 1, (block + 1) * size, stride)
        heads = [h for h in range(HEADS) if h // (HEADS // GROUPS) == group]
        return torch.stack([q[t, h] @ window(end) / WIDTH**0.5 for h in heads for end in ends]).mean()

    factors = {t // size: 1.0}
    if blocks := range(t // size):
        logits = torch.stack([importance(block) for block in blocks] + [torch.tensor(-1000.0, dtype=q.dtype)])
        pi = logits.softmax(0)[:-1]
        for block in pi.topk(min(config.num_selected_blocks, len(blocks))).indices.tolist():
            factors[block] = pi[block] + (1 - pi[block]).detach()
    places = [p for p in range(t + 1) if p // size in factors]
    logits = torch.stack([factors[p // size] * (q[t, head] @ k[p, group]) / WIDTH**0.5 for p in places])
    return logits.softmax(0) @ torch.stack([v[p, group] for p in places])


@pytest.mark.parametrize("implementation", ["eager", "blossom"])
def test_values_and_gradients_are_those_of_the_definition(implementation):
    model = recommender("convolved_long_term", num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    layer, n = model.model.layers[0].self_attn, random.randint(1, 22)
    x = torch.randn(1, n, WIDTH * HEADS, dtype=torch.float64)
    unrotated = (torch.ones(1, n, WIDTH, dtype=torch.float64), torch.zeros(1, n, WIDTH, dtype=torch.float64))
    seen = []
    layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    layer(x, position_embeddings=unrotated, cu_seqlens=torch.tensor([0, n]), max_seqlen=n)
    q, k, v = (f(x)[0].unflatten(-1, (-1, WIDTH)) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    rows = [[attend_one_query(layer, model.config, q, k, v, t, head) for head in range(HEADS)] for t in range(n)]
    expected = torch.stack([torch.cat(row) for row in rows])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-10)
    weights = [p for name, p in layer.named_parameters() if not name.startswith("o_proj")]
    upstream = torch.randn_like(expected)
    given = torch.autograd.grad(seen[0], weights, upstream, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, weights, upstream, allow_unused=True, materialize_grads=True)
    for actual, reference in zip(given, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-9 * max(1.0, reference.abs().max().item()))


@torch.no_grad()
def test_a_new_stream_is_the_long_term_stream():
    model = recommender("convolved_long_term")
    for layer in model.model.layers:
        compressor = layer.self_attn.compressor
        compressor.taps.zero_()[-1] = 1  # as at the start
        compressor.position[:, : TAPS - 1] = 0
    config = BlossomRecConfig.from_dict({**model.config.to_dict(), "attention_types": "long_term"})
    plain = BlossomRecForSequentialRecommendation(config).double().eval()
    weights = {name: weight for name, weight in model.state_dict().items() if not name.endswith(".taps")}
    weights = {n: w[:, TAPS - 1 :] if n.endswith("compressor.position") else w for n, w in weights.items()}
    plain.load_state_dict(weights)
    ids = torch.randint(2, 60, (2, 90))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 3, 200])
def test_padding_and_packing_change_nothing(length):
    model = recommender()
    rows = [torch.randint(2, 60, (n,)) for n in (length, random.randint(1, 60))]
    alone = [model(row[None]).logits[0] for row in rows]
    longest = max(map(len, rows))
    for left in (True, False):
        ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
        places = [slice(longest - len(row), None) if left else slice(len(row)) for row in rows]
        for i, (row, place) in enumerate(zip(rows, places)):
            ids[i, place], mask[i, place] = row, 1
        logits = model(ids, attention_mask=mask).logits
        for i, place in enumerate(places):
            torch.testing.assert_close(logits[i, place], alone[i], rtol=0, atol=1e-10)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    packed = model(torch.cat(rows)[None], cu_seq_lens_q=offsets, max_length_q=longest).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-10)


@torch.no_grad()
def test_appended_events_get_the_logits_of_whole_histories():
    model = recommender()
    ids, place = torch.randint(2, 60, (2, 100)), random.randint(1, 90)
    whole = model(ids).logits
    cache = model(ids[:, :place], use_cache=True).cache
    while place < 100:
        new = ids[:, place : place + random.choice([1, 1, 2, 30])]
        logits = model(new, cache=cache).logits
        torch.testing.assert_close(logits, whole[:, place : place + new.shape[1]], rtol=0, atol=1e-10)
        place += new.shape[1]
    assert cache.nbytes == BlossomRecCache.size_in_bytes(model.config, 2, cache.capacity, torch.float64)


@torch.no_grad()
def test_it_is_saved_with_its_code(tmp_path):
    model = recommender()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "key_convolution.py").read_text() == FILE.read_text()
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path).eval()
    ids = torch.randint(2, 60, (1, 50))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
