"""Appending events to cached histories: the same as computing the whole histories at once, whatever is done in between."""

import copy
import random

import pytest
import torch
from cache_cases import TOLERANCE, append, assert_continues, padded_anywhere, recommender, whole
from model_cases import histories
from transformers import DynamicCache

from blossomrec_hf import BlossomRecCache, BlossomRecConfig
from blossomrec_hf.model import ops_torch
from blossomrec_hf.model.modules_blossomrec import weights_fingerprint
from blossomrec_hf.model.ops_reference import Keys, every_position, rotate
from blossomrec_hf.model.ops_torch import TORCH_OPS
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES, packed_blocks


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


def test_histories_are_continued_in_any_mode():
    """PyTorch refuses to write to a tensor of `torch.inference_mode` elsewhere."""
    model, rows = recommender(attention_types=["blossom", "full"]), histories(0, 0)
    cache = BlossomRecCache(model.config)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            append(model, cache, events := histories(1, 20))
            best = model.recommend([[5], []], top_k=3, cache=cache.select([0, 1]))
        rows = [torch.cat(pair) for pair in zip(rows, events)]
        expected = model.recommend([torch.cat([rows[0], torch.tensor([5])]), rows[1]], top_k=3)
        torch.testing.assert_close(best.scores.clone(), expected.scores, rtol=0, atol=1e-10)
        assert_continues(model, cache.select([0, 1]), rows)
    assert_continues(model, cache, rows)


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


def test_a_training_step_ends_the_histories_of_a_cache(held):
    model, cache, rows = held
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(rows[0][None], labels=rows[0][None]).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="other weights.*anew"):
        append(model.eval(), cache, [row[:1] for row in rows])


def test_a_fingerprint_does_not_depend_on_memory_dtype_or_inference_mode():
    model = recommender(torch.float32).model
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == fingerprint
    with torch.inference_mode():
        assert weights_fingerprint(copy.deepcopy(model)) == fingerprint
    assert weights_fingerprint(copy.deepcopy(model).bfloat16().float()) == weights_fingerprint(model.bfloat16())


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
        ids, mask = padded_anywhere([row[part].cpu() for row in rows])
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
