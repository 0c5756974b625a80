"""Appending events to cached histories: the same as computing the whole histories at once, whatever is done in between."""

import copy
import random

import hypothesis
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from blossomrec_hf import BlossomRecCache, BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model import ops_torch
from blossomrec_hf.model.cache_blossomrec import _file_digest
from blossomrec_hf.model.modules_blossomrec import weights_fingerprint
from blossomrec_hf.model.ops_reference import Keys, every_position, rotate
from blossomrec_hf.model.ops_torch import TORCH_OPS
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES, packed_blocks


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 1000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


def recommender(dtype: torch.dtype = torch.float64, **kwargs) -> BlossomRecForSequentialRecommendation:
    """A small model whose importance is far from uniform; block sizes, heads and rotary embedding drawn anew."""
    stride = random.choice([1, 2, 4])
    heads, groups = random.choice([(4, 2), (4, 1), (2, 2)])
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 24,
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2, 3]) + random.choice([0, 1]),
        "selection_block_size": stride * random.choice([1, 2, 4]),
        "num_selected_blocks": random.choice([1, 2, 4]),
        "short_term_block_size": random.choice([1, 3, 4]),
        "short_term_window": random.choice([1, 2]),
        "power_law_base": random.choice([2, 3]),
        "rope_parameters": random.choice(ROPES),
        "initializer_range": 0.3,
    }
    config = BlossomRecConfig(**(settings | kwargs))
    print({name: getattr(config, name) for name in settings})
    return BlossomRecForSequentialRecommendation(config).to(dtype).eval()


def histories(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (n,)) for n in lengths]


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, on the right, or anywhere, and their mask."""
    length = max([len(row) for row in rows]) + random.choice([0, 0, 2])
    side = random.choice(["left", "right", "anywhere"])
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = torch.randperm(length)[: len(row)].sort().values
        if side != "anywhere":
            place = torch.arange(len(row)) + (length - len(row) if side == "left" else 0)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


@torch.no_grad()
def append(model, cache, rows: list[torch.Tensor], **kwargs):
    """The output for the new events `rows`, and the logits of each row's events."""
    ids, mask = padded(rows)
    mask_given = random.random() < 0.7
    out = model(ids, attention_mask=mask if mask_given else None, cache=cache, use_cache=True, **kwargs)
    return out, mask, [out.logits[i][mask[i] == 1] for i in range(len(rows))]


def whole(model, row: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(row[None]).logits[0]


def assert_continues(model, cache, rows: list[torch.Tensor], events: int = 9) -> None:
    """The cache holds `rows`: new events after them get the logits of whole histories."""
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert [cache.item_ids[i, : len(row)].tolist() for i, row in enumerate(rows)] == [row.tolist() for row in rows]
    new = histories(*(random.randint(0, events) for _ in rows))
    _, _, logits = append(model, cache, new)
    for row, events, found in zip(rows, new, logits):
        expected = whole(model, torch.cat([row, events]))[len(row) :]
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[found.dtype])


def sharp_choices(model, row: torch.Tensor) -> list[torch.Tensor | None]:
    """For each layer the positions and groups `[n, G]` where the k-th importance is 1e-5 above the next one."""
    config, inputs, sharp = model.config, [], []
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    whole(model, row)
    for handle in handles:
        handle.remove()
    n = len(row)
    for layer, x in zip(model.model.layers, inputs):
        attention, offsets = layer.self_attn, torch.tensor([0, n])
        if "long_term" not in attention.stream_names:
            sharp.append(None)
            continue
        cos_sin = model.model.rotary_embedding(torch.arange(n), x.dtype)
        q, k = (
            rotate(f(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2), *cos_sin)[0].transpose(0, 1)
            for f in (attention.q_proj, attention.k_proj)
        )
        blocks = packed_blocks(TORCH_OPS, attention, Keys(k, k, offsets[:-1]), offsets)[0]
        pi = TORCH_OPS.select(
            q,
            blocks,
            every_position(offsets, n, n),
            num_selected_blocks=config.num_selected_blocks + 1,
            block_size=config.selection_block_size,
            threshold=0.0,
            scaling=attention.scaling,
        ).importance
        sharp.append((pi[..., -2].log() - pi[..., -1].log() > 1e-5) | (pi[..., -1] == 0))
    return sharp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention_type", [*ATTENTION_TYPES, "mixed"])
@torch.no_grad()
def test_any_cut_of_histories_gives_the_logits_of_the_whole(attention_type, dtype):
    for _ in range(3):
        types = random.choices(ATTENTION_TYPES, k=3) if attention_type == "mixed" else [attention_type] * 2
        model = recommender(dtype, attention_types=types, num_hidden_layers=len(types))
        rows = histories(*(random.choice([0, 1, random.randint(2, 30), random.randint(2, 200)]) for _ in range(4)))
        cache, place = None, [0] * 4
        found = [[] for _ in rows]
        selected = [[[] for _ in types] for _ in rows]
        while place != [len(row) for row in rows]:
            # A row gets nothing, an event, some, or all that is left of it.
            take = [min(random.choice([0, 1, random.randint(1, 40), 200]), len(r) - p) for r, p in zip(rows, place)]
            events = [row[p : p + n] for row, p, n in zip(rows, place, take)]
            out, mask, logits = append(model, cache, events, output_selection=True, output_hidden_states=True)
            cache = out.cache
            assert out.cache is cache
            assert out.logits.shape[:2] == mask.shape and not out.logits[mask == 0].any()
            assert out.hidden_states[-1].shape == (*mask.shape, 16)
            for i in range(4):
                found[i].append(logits[i])
                for layer, selection in enumerate(out.selections):
                    if selection.block_indices is not None:
                        selected[i][layer].append(selection.block_indices[i][mask[i] == 1])
            place = [p + n for p, n in zip(place, take)]
            assert cache.lengths.tolist() == place and cache.get_seq_length() == max(place)
        for i, row in enumerate(rows):
            if len(row) == 0:
                continue
            expected = model(row[None], output_selection=True, output_hidden_states=True)
            sharp, clear = sharp_choices(model, row), True
            for layer, positions in enumerate(sharp):
                if positions is not None and clear:
                    blocks = torch.cat(selected[i][layer])
                    assert torch.equal(blocks[positions], expected.selections[layer].block_indices[0][positions])
                    # Behind a choice that rounding may decide, nothing must agree.
                    clear = bool(positions.all())
            if clear:
                difference = (torch.cat(found[i]) - expected.logits[0]).abs().max()
                assert difference <= TOLERANCE[dtype], (difference, len(row))
                state = cache.last_hidden_state[i]
                torch.testing.assert_close(state, expected.hidden_states[-1][0, -1], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["eager", "blossom_torch"])
def test_one_event_after_the_other_while_the_room_grows(implementation):
    model = recommender(attention_types=list(ATTENTION_TYPES), num_hidden_layers=4)
    model.set_attn_implementation(implementation)
    rows = histories(150, 150)
    out, _, logits = append(model, None, [row[:3] for row in rows])
    found, capacities = [logits], set()
    for t in range(3, 150):
        found.append(append(model, out.cache, [row[t : t + 1] for row in rows])[2])
        capacities.add(out.cache.capacity)
    assert sorted(capacities) == [64, 128, 256]
    for i, row in enumerate(rows):
        logits = torch.cat([step[i] for step in found])
        torch.testing.assert_close(logits, whole(model, row), rtol=0, atol=1e-10)


def test_tiles_and_slices_of_many_events(monkeypatch):
    monkeypatch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", 3000)
    model = recommender(attention_types=["blossom", "full"])
    rows = histories(20, 0, 33)
    _, _, _ = append(model, cache := BlossomRecCache(model.config), rows)
    assert_continues(model, cache, rows, events=170)
    model = recommender(attention_types="full")
    rows = histories(*[20] * 9)
    append(model, cache := BlossomRecCache(model.config), rows)
    _, _, logits = append(model, cache, events := histories(*[1] * 9))
    for row, event, found in zip(rows, events, logits):
        torch.testing.assert_close(found, whole(model, torch.cat([row, event]))[-1:], rtol=0, atol=1e-10)


def test_packed_histories_and_embeddings():
    model = recommender()
    rows = histories(30, 1, 12)
    offsets = torch.tensor([0, 30, 31, 43])
    cache = model(torch.cat(rows)[None], cu_seq_lens_q=offsets, use_cache=True).cache
    event = torch.tensor([[5, 6, 7]])
    logits = model(event, cu_seq_lens_q=torch.arange(4), cache=cache).logits[0]
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], whole(model, torch.cat([row, event[0, i : i + 1]]))[-1])
    x = model.get_input_embeddings()(event.T)
    logits = model(inputs_embeds=x, cache=cache).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, 0], whole(model, torch.cat([row, event[0, i].repeat(2)]))[-1])
    assert cache.item_ids[:, -1].tolist() == [0, 0, 0] and cache.item_ids[1, :3].tolist() == [rows[1][0], 6, 0]


def test_logits_to_keep_are_the_last_new_ones():
    model = recommender()
    rows = histories(20, 9)
    _, _, _ = append(model, cache := BlossomRecCache(model.config), rows)
    ids = torch.tensor([[5, 6, 7], [0, 0, 8]])
    logits = model(ids, cache=cache, logits_to_keep=2).logits
    torch.testing.assert_close(logits[0], whole(model, torch.cat([rows[0], ids[0]]))[-2:])
    torch.testing.assert_close(logits[1, 1], whole(model, torch.cat([rows[1], ids[1, 2:]]))[-1])
    assert not logits[1, 0].any()


# What can be done with the histories of a cache


@pytest.fixture
def held():
    """A model, its cache, and what that holds; every kind of layer."""
    model = recommender(attention_types=list(ATTENTION_TYPES), num_hidden_layers=4)
    rows = histories(50, 0, 7, 21)
    return model, append(model, None, rows)[0].cache, rows


def test_select_reorder_repeat_and_evict(held):
    model, cache, rows = held
    assert_continues(model, cache.select([3, 3, 1]), [rows[3], rows[3], rows[1]])
    assert_continues(model, copy.deepcopy(cache), rows)
    cache.reorder_cache(torch.tensor([3, 2, 0]))
    append(model, cache, events := histories(0, 0, 40))
    rows = [rows[3], rows[2], torch.cat([rows[0], events[2]])]
    before = cache.nbytes
    cache.evict([2])
    assert cache.batch_size == 2 and cache.nbytes < before / 2
    cache.batch_repeat_interleave(2)
    assert_continues(model, cache, [rows[0], rows[0], rows[1], rows[1]])
    cache.evict([0, 1, 2, 3])
    assert cache.batch_size == 0 and cache.get_seq_length() == 0
    cache.reset()
    assert cache.batch_size == -1 and cache.nbytes == 0
    append(model, cache, rows)
    assert_continues(model, cache, rows)


def test_several_caches_become_one(held):
    model, cache, rows = held
    more = histories(90, 3)
    other = append(model, None, more)[0].cache
    for _ in range(3):  # full rows
        append(model, other, events := histories(40, 1))
        more = [torch.cat(x) for x in zip(more, events)]
    both = BlossomRecCache.cat([cache, other])
    assert_continues(model, both, rows + more)
    assert_continues(model, cache, rows)
    assert cache.batch_size == 4 and other.batch_size == 2


@pytest.mark.parametrize("limit", [10, [50, 0, 2, 20], -3, 0])
def test_crop_takes_back_the_latest_events(held, limit):
    model, cache, rows = held
    cache.crop(limit)
    limits = limit if isinstance(limit, list) else [limit] * 4
    assert_continues(
        model, cache, [row[:n] if n >= 0 else row[: max(0, len(row) + n)] for row, n in zip(rows, limits)]
    )


def test_the_last_hidden_state_is_not_known_after_a_crop(held):
    model, cache, rows = held
    cache.crop(torch.tensor([50, 3, 7, 20]))
    with pytest.raises(ValueError, match=r"history 3.*crop.*item_ids\[3, 19\]"):
        _ = cache.last_hidden_state
    append(model, cache, [row[:0] for row in rows[:3]] + [rows[3][20:]])
    assert not cache.last_hidden_state[1].any()
    for i in (0, 2, 3):
        expected = model.model(rows[i][None]).last_hidden_state[0, -1]
        torch.testing.assert_close(cache.last_hidden_state[i], expected)


def test_save_and_load(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.crop([49, 0, 7, 21])
    rows = [rows[0][:-1], *rows[1:]]
    cache.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["cache.safetensors"]
    assert path.stat().st_size < cache.nbytes
    loaded = BlossomRecCache.load(path, model, max_length=70)
    assert loaded.capacity == 49
    torch.testing.assert_close(loaded.select([2]).last_hidden_state, cache.select([2]).last_hidden_state)
    with pytest.raises(ValueError, match="history 0"):
        _ = loaded.last_hidden_state
    assert_continues(model, loaded, rows)
    with pytest.raises(ValueError, match="max_length.*48.*49 events"):
        BlossomRecCache.load(path, model, max_length=48)


def test_a_file_that_does_not_fit_is_refused(held, tmp_path):
    model, cache, _ = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    other = recommender(
        attention_types="full", **{"rope_parameters": model.config.rope_parameters | {"rope_theta": 7.0}}
    )
    with pytest.raises(ValueError, match="num_hidden_layers` is 2 and 4") as error:
        BlossomRecCache.load(path, other)
    assert "attention_types" in str(error.value) and "rope_parameters" in str(error.value)
    assert "vocab_size" not in str(error.value)
    with pytest.raises(ValueError, match="another configuration"):
        other(torch.tensor([[5]] * 4), cache=cache)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cache.safetensors"):
        BlossomRecCache.load(path, model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors.*not written"):
        BlossomRecCache.load(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match="nothing to save"):
        BlossomRecCache(model.config).save(path)


def test_histories_of_other_weights_are_refused(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    other = copy.deepcopy(model)
    assert_continues(other, copy.deepcopy(cache), rows)
    with torch.no_grad():
        other.model.layers[1].up_proj.weight[3, 5] += 1e-4
    event = torch.tensor([[5]] * 4)
    refused = (
        lambda: BlossomRecCache.load(path, other),
        lambda: other(event, cache=cache),
        lambda: other.recommend(event, cache=cache),
        lambda: BlossomRecCache.cat([cache, append(other, None, rows)[0].cache]),
    )
    for action in refused:
        with pytest.raises(ValueError, match="weights"):
            action()
    assert_continues(model, BlossomRecCache.load(path, model), rows)


def test_a_training_step_ends_the_histories_of_a_cache(held):
    model, cache, rows = held
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(rows[0][None], labels=rows[0][None]).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="other weights.*anew"):
        append(model.eval(), cache, [row[:1] for row in rows])


def test_histories_outlive_a_vocabulary_that_grows(held, tmp_path):
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    model.resize_token_embeddings(70)
    for kept in (cache, BlossomRecCache.load(path, model)):
        append(model, kept, [torch.tensor([69])] * 4)
        assert_continues(model, kept, [torch.cat([row, torch.tensor([69])]) for row in rows])
    with torch.no_grad():
        model.get_input_embeddings().weight[69] += 1
    with pytest.raises(ValueError, match="other weights"):
        append(model, cache, rows)


def test_a_fingerprint_does_not_depend_on_memory_dtype_or_inference_mode():
    model = recommender(torch.float32).model
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == fingerprint
    with torch.inference_mode():
        assert weights_fingerprint(copy.deepcopy(model)) == fingerprint
    assert weights_fingerprint(copy.deepcopy(model).bfloat16().float()) == weights_fingerprint(model.bfloat16())


@pytest.mark.parametrize(
    "damage",
    "zeroed states, wrong length, huge length, negative length, no states, cut states, nan, other items, "
    "half the block keys, another dtype".split(", "),
)
def test_a_damaged_file_is_refused(held, tmp_path, damage):
    """Even if what was changed fits in shape: a digest of all tensors is part of the file."""
    model, cache, rows = held
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if damage == "zeroed states":
        tensors["layers.1.states"].zero_()
    elif damage.endswith("length"):
        tensors["lengths"][1] = {"wrong": 5, "huge": 2**40, "negative": -1}[damage.split()[0]]
    elif damage == "no states":
        del tensors["layers.1.states"]
    elif damage == "cut states":
        tensors["layers.1.states"] = tensors["layers.1.states"][:, :-1].contiguous()
    elif damage == "nan":
        tensors["last_hidden_state"][0, 0] = torch.nan
    elif damage == "other items":
        tensors["item_ids"][0, 0] = 2 + tensors["item_ids"][0, 0] % 50
    elif damage == "half the block keys":
        name = "layers.0.blocks.long_term"
        tensors[name] = tensors[name][..., :1].contiguous()
    else:
        tensors["last_hidden_state"] = tensors["last_hidden_state"].float()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="cache.safetensors is damaged"):
        BlossomRecCache.load(path, model)
    if damage not in (
        "no states",
        "cut states",
        "half the block keys",
        "zeroed states",
        "other items",
        "wrong length",
    ):
        # Nor does a digest that fits help: a length of 2**40 is refused before anything of this size is made.
        save_file(tensors, path, metadata | {"digest": _file_digest(tensors, metadata)})
        with pytest.raises(ValueError, match="cache.safetensors is damaged"):
            BlossomRecCache.load(path, model)


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=False,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=hypothesis.strategies.data())
def test_no_damage_of_a_file_is_silent_or_a_foreign_error(saved_cache, data):
    """Bytes changed, cut or inserted anywhere: a `ValueError` with one sentence, or the very cache that was saved."""
    path, model, tensors, original = saved_cache
    raw = bytearray(original)
    header = int.from_bytes(raw[:8], "little") + 8
    integers = hypothesis.strategies.integers
    for _ in range(data.draw(integers(1, 3))):
        place = data.draw(hypothesis.strategies.one_of(integers(0, header - 1), integers(0, len(raw) - 1)))
        kind = data.draw(hypothesis.strategies.sampled_from(["change", "cut", "insert", "truncate"]))
        if kind == "change":
            raw[place % len(raw)] = data.draw(integers(0, 255))
        elif kind == "insert":
            raw[place:place] = data.draw(hypothesis.strategies.binary(min_size=1, max_size=9))
        else:
            del raw[place : place + data.draw(integers(1, 9)) if kind == "cut" else len(raw)]
        if not raw:
            break
    path.write_bytes(raw)
    try:
        loaded = BlossomRecCache.load(path, model)
    except ValueError as error:
        assert type(error) is ValueError and path.name in str(error) or "configuration" in str(error)
        return
    torch.testing.assert_close(loaded._tensors(), tensors, rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved_cache(tmp_path_factory):
    """A file of a small cache, the model, the tensors that loading it gives, and its bytes."""
    torch.manual_seed(0)
    random.seed(0)
    model = recommender(torch.float32, attention_types=["blossom", "full"])
    path = tmp_path_factory.mktemp("cache") / "cache.safetensors"
    append(model, cache := BlossomRecCache(model.config), histories(12, 0, 3))
    cache.save(path)
    return path, model, BlossomRecCache.load(path, model)._tensors(), path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_size_in_bytes_is_as_documented(dtype):
    model = recommender(dtype, attention_types=random.choices(ATTENTION_TYPES, k=3), num_hidden_layers=3)
    cache = append(model, None, histories(30, 5))[0].cache
    for _ in range(3):
        assert cache.nbytes == BlossomRecCache.size_in_bytes(model.config, 2, cache.capacity, dtype)
        append(model, cache, histories(50, 0))
    default = BlossomRecConfig()
    assert BlossomRecCache.size_in_bytes(default, 1, 4096) == 532 * 4096 + 528


def test_half_precision_and_autocast():
    model = recommender(torch.float32)
    row = histories(40)[0]
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(row[None, :30], use_cache=True).cache
        logits = model(row[None, 30:], cache=cache).logits[0]
        expected = model(row[None]).logits[0, 30:]
    assert cache.layers[0].states.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.3)
    with pytest.raises(ValueError, match="bfloat16.*float32.*autocast"):
        model(row[None, :1], cache=cache)
    assert cache.lengths.tolist() == [40]


def test_the_code_of_the_cache_travels_with_a_checkpoint(tmp_path):
    recommender().save_pretrained(tmp_path)
    assert (tmp_path / "cache_blossomrec.py").exists()


# Nothing is half applied


def snapshot(cache) -> dict[str, torch.Tensor]:
    state = {name: x.clone() for name, x in cache._tensors().items()}
    for name, x in state.items():  # what lies behind the lengths is free room
        if x.dim() >= 2 and name != "last_hidden_state":
            for i, n in enumerate(cache.lengths.tolist()):
                n = n // cache.config.selection_block_size if ".blocks." in name else n
                x[i, n:] = 0
    return state


def test_what_fails_leaves_the_cache_as_it_was(held):
    model, cache, rows = held
    before = snapshot(cache)

    def fails(ids, match, **kwargs):
        with pytest.raises(ValueError, match=match):
            model(ids, cache=cache, **kwargs)
        torch.testing.assert_close(snapshot(cache), before, rtol=0, atol=0)

    events = torch.randint(2, 60, (4, 30))
    fails(events[:3], "3 rows.*4 histories")
    fails(torch.full((4, 1), 60), "input_ids.*60")
    fails(events, "attention_mask", attention_mask=torch.ones(4, 80))
    fails(events, "labels.*cache", labels=events)

    def broken(x):
        raise ValueError("broken on the way")

    for module in (model.model.layers[2].down_proj, model.lm_head):
        module.forward = broken
        fails(events, "broken on the way")
        del module.forward
    cache.max_length = 60
    fails(events, r"History 0.*80 events.*max_length=60.*latest items")
    cache.max_length = None
    assert_continues(model, cache, rows)


def test_a_recommendation_that_fails_appends_nothing(held):
    model, cache, rows = held
    before = snapshot(cache)
    events = [[5], [], [6, 7], [8]]
    with pytest.raises(ValueError, match="candidate_ids"):
        model.recommend(events, candidate_ids=[60], cache=cache)
    torch.testing.assert_close(snapshot(cache), before, rtol=0, atol=0)
    out = model.train().recommend(events, top_k=5, cache=cache)
    assert model.training
    model.eval()
    rows = [torch.cat([row, torch.tensor(new, dtype=torch.long)]) for row, new in zip(rows, events)]
    assert torch.equal(out.item_ids, model.recommend([row.tolist() for row in rows], top_k=5).item_ids)
    assert_continues(model, cache, rows)
    new = BlossomRecCache(model.config)
    with pytest.raises(ValueError, match="candidate_ids"):
        model.recommend(events, candidate_ids=[60], cache=new)
    assert new.batch_size == -1


def test_a_first_append_that_fails_leaves_an_empty_cache():
    model = recommender()
    cache = BlossomRecCache(model.config, max_length=5)
    with pytest.raises(ValueError, match="max_length=5"):
        model(torch.full((2, 6), 5), cache=cache)
    assert cache.batch_size == -1 and cache.get_seq_length() == 0 and not cache.is_initialized
    rows = histories(5, 3, 0)
    append(model, cache, rows)
    assert cache.capacity == 5 and cache.get_max_length() == 5
    assert_continues(model, cache, rows, events=0)


def test_events_that_are_not_to_stay(held):
    model, cache, rows = held
    before = snapshot(cache)
    event = torch.tensor([[5], [6], [7], [8]])
    logits = model(event, cache=cache, use_cache=False).logits
    torch.testing.assert_close(logits[3], whole(model, torch.cat([rows[3], event[3]]))[-1:])
    model.model(event, cache=cache, use_cache=False)
    torch.testing.assert_close(snapshot(cache), before, rtol=0, atol=0)
    torch.testing.assert_close(model(event, cache=cache).logits, logits)


def test_no_events_at_all(held):
    model, cache, rows = held
    before = cache.last_hidden_state
    for ids in (torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 2, dtype=torch.long)):
        assert model(ids, cache=cache).logits.shape == (*ids.shape, 60)
    torch.testing.assert_close(cache.last_hidden_state, before, rtol=0, atol=0)
    assert_continues(model, cache, rows)
    empty = model(torch.zeros(2, 0, dtype=torch.long), use_cache=True).cache
    assert empty.lengths.tolist() == [0, 0]
    assert_continues(model, empty, histories(0, 0))


# Bad input


def test_what_a_cache_does_not_do(held):
    model, cache, _ = held
    event = torch.full((4, 1), 5)
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train()(event, cache=cache)
    model.eval()
    with pytest.raises(ValueError, match="DynamicCache.*BlossomRecCache"):
        model(event, cache=DynamicCache())
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions"):
        model(event, cache=cache, output_attentions=True)
    with pytest.raises(ValueError, match="cache"):
        cache.update(event, event, 0)
    with pytest.raises(ValueError, match="lengths of their own"):
        cache.get_mask_sizes(1, 0)
    with pytest.raises(ValueError, match="histories.*4 histories"):
        cache.select([4])
    with pytest.raises(ValueError, match="histories.*4 histories"):
        cache.evict([-1])
    with pytest.raises(ValueError, match="max_length"):
        cache.crop([1, 2])
    with pytest.raises(ValueError, match="max_length"):
        BlossomRecCache(model.config, max_length=0)
    with pytest.raises(ValueError, match="caches"):
        BlossomRecCache.cat([cache, BlossomRecCache(model.config)])


def test_no_gradients_are_kept(held):
    model, cache, _ = held
    assert not any(x.requires_grad for x in cache._tensors().values())
    model(torch.full((4, 1), 5), cache=cache)
    assert not any(x.requires_grad for x in cache._tensors().values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_gpu(dtype):
    model = recommender(dtype, attention_types=list(ATTENTION_TYPES), num_hidden_layers=4).cuda()
    rows = [row.cuda() for row in histories(70, 1, 40)]
    cache = None
    found = [[] for _ in rows]
    for part in (slice(0, 30), slice(30, 31), slice(31, 70)):
        ids, mask = padded([row[part].cpu() for row in rows])
        with torch.no_grad():
            out = model(ids.cuda(), attention_mask=mask.cuda(), cache=cache, use_cache=True)
        cache = out.cache
        for i in range(3):
            found[i].append(out.logits[i][mask[i] == 1])
    with pytest.raises(ValueError, match="cuda.*cpu"):
        model.cpu()(torch.full((3, 1), 5), cache=cache)
    model.cuda()
    for row, logits in zip(rows, found):
        torch.testing.assert_close(torch.cat(logits), whole(model, row), rtol=0, atol=10 * TOLERANCE[dtype])
