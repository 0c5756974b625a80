"""The short-term stream in other decoders: its mask, padding, packing and caches."""

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="power_law").double().eval()


def logits(decoder, x, **kwargs):
    with torch.no_grad():
        return decoder(input_ids=x, **kwargs).logits


def test_power_law_masks_what_its_definition_masks():
    decoder = llama()
    x = torch.randint(2, 50, (2, 100))
    distance = torch.arange(100)[:, None] // 8 - torch.arange(100) // 8
    allowed = torch.isin(distance, torch.tensor([0, 1, 2, 4, 8])) & torch.ones(100, 100, dtype=torch.bool).tril()
    expected = decoder
    actual = logits(decoder, x)
    expected.set_attn_implementation("sdpa")
    torch.testing.assert_close(actual, logits(expected, x, attention_mask=allowed.expand(2, 1, 100, 100)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_power_law_does_not_see_padding(side):
    decoder = llama()
    alone = [torch.randint(2, 50, (1, n)) for n in (30, 100)]
    rows = slice(70, 100) if side == "left" else slice(0, 30)
    batch, mask = torch.zeros(2, 100, dtype=torch.long), torch.zeros(2, 100, dtype=torch.long)
    batch[0, rows], batch[1], mask[0, rows], mask[1] = alone[0], alone[1], 1, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = logits(decoder, batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(out[:1, rows], logits(decoder, alone[0]))
    torch.testing.assert_close(out[1:], logits(decoder, alone[1]))


def test_power_law_keeps_packed_sequences_apart():
    decoder = llama()
    alone = [torch.randint(2, 50, (1, n)) for n in (30, 1, 77)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in alone])[None]
    out = logits(decoder, torch.cat(alone, 1), position_ids=positions)
    torch.testing.assert_close(out, torch.cat([logits(decoder, x) for x in alone], 1))


@pytest.mark.parametrize("chunk", [1, 3])
def test_power_law_behind_a_cache(chunk):
    decoder = llama()
    x = torch.randint(2, 50, (2, 60))
    mask = torch.ones_like(x)
    mask[0, :13] = 0  # padded on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(decoder, x, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        out = decoder(input_ids=x[:, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"  # renamed in transformers 5.24
        cache = out[name]
        for t in range(30, 60, chunk):
            step = slice(t, t + chunk)
            out = decoder(
                input_ids=x[:, step],
                attention_mask=mask[:, : t + chunk],
                position_ids=positions[:, step],
                **{name: cache},
            )
            torch.testing.assert_close(out.logits, whole[:, step])


def test_power_law_generates():
    decoder = llama()
    x = torch.randint(2, 50, (1, 20))
    generated = decoder.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    for t in range(20, 32):
        assert (
            generated[0, t]
            == logits(decoder, generated[:, :t])[0, -1].index_fill(0, torch.tensor([2]), -torch.inf).argmax()
        )  # no end of sequence


def test_power_law_refuses_where_it_cannot_see_padding():
    decoder = llama()
    x = torch.randint(2, 50, (1, 8))
    with pytest.raises(ValueError, match="padding"):
        decoder(input_ids=x, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    layer = decoder.model.layers[0].self_attn
    with pytest.raises(ValueError, match="padding"):
        AttentionInterface()["power_law"](layer, *torch.randn(3, 1, 4, 8, 4), None)


@pytest.mark.parametrize("unknown", ["softcap", "s_aux"])
def test_power_law_refuses_what_it_does_not_have(unknown):
    heads, mask = torch.randn(3, 1, 4, 8, 4), torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match=f"`power_law` has no `{unknown}`"):
        AttentionInterface()["power_law"](llama().model.layers[0].self_attn, *heads, mask, **{unknown: 30.0})
