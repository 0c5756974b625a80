"""The last position alone is computed with the same result as in the whole history."""

import random

import pytest
import torch
from model_cases import config, histories, packed, padded

from blossomrec_hf import BlossomRecModel
from blossomrec_hf.model import ops_torch
from blossomrec_hf.model.outputs_blossomrec import LayerOutputs
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


def random_model(**kwargs) -> BlossomRecModel:
    """A model of random sizes, with weights so large that the importance is far from uniform."""
    stride = random.choice([1, 2, 4, 8])
    settings = {
        "num_key_value_heads": random.choice([1, 2, 4]),
        "compress_stride": stride,
        "compress_block_size": stride * random.choice([1, 2]) + random.choice([0, 3]),
        "selection_block_size": stride * random.choice([1, 2, 4]),
        "num_selected_blocks": random.choice([1, 2, 5]),
        "short_term_block_size": random.choice([1, 3, 8]),
        "short_term_window": random.choice([1, 2, 3]),
        "power_law_base": random.choice([2, 3]),
    }
    model = BlossomRecModel(config(**(settings | kwargs))).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def random_lengths() -> list[int]:
    """Of histories of which some are empty, at the start, at the end and in between, and not all."""
    lengths = [random.choice([0, 1, 2, 15, 16, 17, random.randint(1, 60), random.randint(1, 300)]) for _ in range(6)]
    return [random.choice([0, 1]), *lengths, random.randint(1, 300), random.choice([0, 9])]


def last_states(model: BlossomRecModel, **inputs) -> torch.Tensor:
    return model.encode(pack_histories(**inputs, vocab_size=model.config.vocab_size), last_only=True)


def last_of_whole(model: BlossomRecModel, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Which histories have a last position, and the hidden states there."""
    offsets = inputs["cu_seq_lens_q"].long()
    some = offsets.diff() > 0
    return some, model(**inputs).last_hidden_state[0][offsets[1:][some] - 1]


@pytest.mark.parametrize("slice_elements", [2**21, 300], ids=["whole", "sliced"])
@pytest.mark.parametrize("attention_type", [*ATTENTION_TYPES, "mixed"])
def test_last_only_is_the_last_position_of_the_whole(monkeypatch, attention_type, slice_elements):
    for _ in range(4):
        layers = random.choice([1, 2, 3])
        types = random.choices(ATTENTION_TYPES, k=layers) if attention_type == "mixed" else attention_type
        model = random_model(attention_types=types, num_hidden_layers=layers)
        inputs = packed(histories(*random_lengths()))
        some, expected = last_of_whole(model, inputs)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setitem(ops_torch.SLICE_ELEMENTS, "cpu", slice_elements)
            actual = last_states(model, **inputs)
        assert actual.shape == (len(some), 16) and actual.isfinite().all()
        torch.testing.assert_close(actual[some], expected, rtol=0, atol=1e-10, msg=lambda m: f"{m}\n{model.config}")


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 301])
def test_last_only_of_one_history(attention_type, length):
    for layers in (1, 2):
        model = random_model(attention_types=attention_type, num_hidden_layers=layers)
        row = histories(length)[0][None]
        with_padding = padded([row[0]], "anywhere", extra=3)[0]
        given_longer = {"cu_seq_lens_q": torch.tensor([0, length]), "max_length_q": length + 40}
        with torch.no_grad():
            actual = [
                last_states(model, **inputs)
                for inputs in ({"input_ids": row}, {"input_ids": row, **given_longer}, {"input_ids": with_padding})
            ]
            model.set_attn_implementation("eager")
            expected = model(row).last_hidden_state[:, -1]
        for state in actual:
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-10, msg=lambda m: f"{m}\n{model.config}")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "blossom_torch"])
@pytest.mark.parametrize("lengths", [(40, 1, 0, 75), (75,)], ids=["several", "one"])
def test_last_only_with_the_reference_and_with_gradients(implementation, gradients, lengths):
    model = random_model()
    model.set_attn_implementation(implementation)
    inputs = packed(histories(*lengths))
    some, expected = last_of_whole(model, inputs)
    with torch.set_grad_enabled(gradients):
        actual = last_states(model, **inputs)[some]
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=1e-10)
    if gradients:
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours, theirs = (torch.autograd.grad(x.pow(3).sum(), parameters) for x in (actual, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_last_only_of_padded_rows_and_of_no_items_at_all():
    model = random_model()
    rows = histories(9, 50)
    with torch.no_grad():
        actual = last_states(model, input_ids=padded(rows, "left")[0])
        expected = torch.stack([model(row[None]).last_hidden_state[0, -1] for row in rows])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        nothing = last_states(model, input_ids=torch.zeros(3, 5, dtype=torch.long))
    assert nothing.shape == (3, 16) and not nothing.any()


def test_last_only_of_new_events_and_next_to_the_outputs_of_every_layer():
    model, rows = random_model(), histories(9, 50)
    events, cache = padded(histories(3, 1), "right")[0], model(padded(rows, "left")[0], use_cache=True).cache
    new = pack_histories(events, vocab_size=60)
    kept = model.encode(new, cache=cache, last_only=True, use_cache=False)
    assert cache.lengths.tolist() == [9, 50]
    appended = model.encode(new, cache=cache, last_only=True)
    assert cache.lengths.tolist() == [12, 51]
    assert torch.equal(kept, appended) and torch.equal(appended, cache.last_hidden_state)
    outputs = LayerOutputs(hidden_states=[], selections=[])
    histories_of_both = pack_histories(padded(rows, "left")[0], vocab_size=60)
    states = model.encode(histories_of_both, last_only=True, layer_outputs=outputs)
    torch.testing.assert_close(states, model.encode(histories_of_both, last_only=True), rtol=0, atol=1e-10)
    assert len(outputs.hidden_states) == 3 and len(outputs.selections) == 2 and outputs.attentions is None
