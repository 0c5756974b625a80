"""The model as users of `transformers` meet it: inputs of every form, outputs, loss, saving, recommending."""

import random

import pytest
import torch
from model_cases import config, histories, packed, padded, recommender

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


# One history, one answer


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_a_history_alone_padded_or_packed_has_the_same_logits(attention_type, side):
    model = recommender(attention_types=attention_type)
    rows = histories(1, random.randint(2, 40), 200, 33)
    alone = [model(row[None]).logits[0] for row in rows]

    ids, mask = padded(rows, side, extra=3)
    for logits in (model(ids, attention_mask=mask).logits, model(ids).logits):
        for i, expected in enumerate(alone):
            torch.testing.assert_close(logits[i][mask[i] == 1], expected, rtol=0, atol=1e-10)
        assert not logits[mask == 0].any()

    everything = packed(rows)
    by_positions = {name: everything[name] for name in ("input_ids", "position_ids")}
    by_offsets = {name: everything[name] for name in ("input_ids", "cu_seq_lens_q")}
    for inputs in (everything, by_positions, by_offsets):
        torch.testing.assert_close(model(**inputs).logits[0], torch.cat(alone), rtol=0, atol=1e-10)

    full = torch.stack(histories(33, 33, 33))  # several rows without padding
    expected = torch.cat([model(row[None]).logits for row in full])
    torch.testing.assert_close(model(full).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_logits_to_keep_gives_the_last_real_positions(side, number):
    model = recommender()
    rows = histories(7, 1, 30, 0)
    inputs = packed(rows) if side == "packed" else {"input_ids": padded(rows, side)[0]}
    kept = model(**inputs, logits_to_keep=number).logits
    assert kept.shape == (4, number, 60)
    for i, row in enumerate(rows):
        expected = model(row[None]).logits[0, -number:]
        torch.testing.assert_close(kept[i, number - len(expected) :], expected, rtol=0, atol=1e-10)
        assert not kept[i, : number - len(expected)].any()


def test_embeddings_in_place_of_ids():
    model = recommender()
    x = torch.randint(2, 60, (2, 20))
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)


@pytest.mark.parametrize("implementation", ["blossom", "eager"])
def test_selection_and_hidden_states_have_the_shape_of_the_input(implementation):
    model = recommender(attention_types=["blossom", "long_term", "short_term", "full"], num_hidden_layers=4)
    model.set_attn_implementation(implementation)
    rows = histories(9, 50)
    ids, mask = padded(rows, "left")
    out = model(ids, output_selection=True, output_hidden_states=True)
    assert [x.shape for x in out.hidden_states] == [(2, 50, 16)] * 5
    both, long_term, short_term, full = out.selections
    assert both.gates.shape == (2, 50, 4, 2)
    assert long_term.gates is None and short_term == full == (None, None, None)
    for selection in (both, long_term):
        assert selection.block_indices.shape == selection.importance.shape == (2, 50, 2, 4)
        assert (selection.block_indices[mask == 0] == -1).all()
        block = (mask.cumsum(1) - 1)[..., None, None] // 4
        assert (selection.block_indices < block.clamp(min=0)).all()
        assert ((selection.block_indices >= 0) == (selection.importance > 1e-10)).all()


def test_attentions_are_the_references_to_give():
    model = recommender(attention_types=list(ATTENTION_TYPES), num_hidden_layers=4)
    ids, mask = padded(histories(9, 30), "left")
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(2, 4, 30, 30)] * 4
    for probs, attention_type in zip(attentions, ATTENTION_TYPES):
        assert not probs.triu(1).any()
        assert not probs[0, :, :, :21].any() and not probs[0, :, :21].any()  # padding
        rows = probs.sum(-1).transpose(1, 2)[mask == 1]
        bound = torch.tensor([-2.0, 2.0]).sigmoid().sum().item() if attention_type == "blossom" else 1.0
        torch.testing.assert_close(rows, torch.full_like(rows, bound), rtol=0, atol=1e-6)


def test_hidden_states_keep_their_gradients():
    model = recommender()
    x = padded(histories(9, 4), "left")[0]
    out = model(x, labels=x, output_hidden_states=True)
    for state in out.hidden_states:
        state.retain_grad()
    out.loss.backward()
    for state in out.hidden_states:
        assert state.grad[x > 0].any() and not state.grad[x == 0].any()


# The loss


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_loss_is_next_item_cross_entropy_at_every_position(side):
    model = recommender()
    rows = histories(6, 1, 25)
    rows[2][4] = 1  # an unknown item is no target
    terms = []
    for row in rows:
        probs = model(row[None]).logits[0, :, 2:].log_softmax(-1)
        terms += [-probs[t, row[t + 1] - 2] for t in range(len(row) - 1) if row[t + 1] != 1]
    inputs = packed(rows) if side == "packed" else {"input_ids": padded(rows, side)[0]}
    labels = inputs["input_ids"]
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    torch.testing.assert_close(
        model(**inputs, labels=labels, num_items_in_batch=100).loss, torch.stack(terms).sum() / 100
    )
    assert out.logits.shape == (*labels.shape, 60)
    assert model.train()(**inputs, labels=labels).logits is None


@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.parametrize("objective", ["cross_entropy", "bce"])
def test_shift_labels_are_the_targets_themselves(seed, side, objective):
    model = recommender(objective=objective, num_negatives=5)
    rows = histories(6, 1, 25)
    inputs = packed(rows) if side == "packed" else {"input_ids": padded(rows, side)[0]}
    labels = inputs["input_ids"]
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    if side == "packed":
        targets[:, inputs["cu_seq_lens_q"][1:] - 1] = -100  # a history's last item has no next one
    targets[labels == 0] = -100

    def loss(**kwargs):
        torch.manual_seed(seed)  # the negatives of "bce" are drawn
        return model(**inputs, **kwargs).loss

    torch.testing.assert_close(loss(shift_labels=targets), loss(labels=labels))
    torch.testing.assert_close(loss(shift_labels=targets, labels=labels.flip(1)), loss(labels=labels))
    # In sequence parallelism, the last position of a shard has a target: the first item of the next one.
    targets[0, -1 if side == "left" else len(rows[0]) - 1] = 7
    whole = {"num_items_in_batch": 1}  # sums, which one more target increases
    assert loss(shift_labels=targets, **whole) > loss(labels=labels, **whole) + 0.1


def test_a_step_without_targets_has_loss_zero():
    x = torch.randint(2, 60, (3, 1))
    assert recommender()(x, labels=x, num_items_in_batch=torch.tensor(0)).loss == 0


def test_training_lowers_the_loss():
    model = BlossomRecForSequentialRecommendation(config(hidden_dropout_prob=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randint(2, 60, (4, 50))
    losses = []
    for _ in range(60):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = recommender(hidden_dropout_prob=0.0).train()
    x = torch.randint(2, 60, (2, 60))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(x, labels=x).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = recommender(attention_types=["blossom", "full"])
    x = torch.randint(2, 60, (2, 60))
    expected = model(x, labels=x)
    with torch.autocast("cpu", dtype):
        mixed = model.float()(x, labels=x)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss.double(), expected.loss, rtol=0.02, atol=0)
    pure = model.to(dtype)(x, labels=x)
    assert pure.logits.dtype == dtype
    torch.testing.assert_close(pure.loss.double(), expected.loss, rtol=0.02, atol=0)
    assert model.item_counts.dtype == torch.long


# Bad input


@pytest.mark.parametrize("inputs", [torch.zeros(2, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long)])
def test_rows_of_padding_alone_give_zeros(inputs):
    model = recommender(attention_types=list(ATTENTION_TYPES), num_hidden_layers=4).train()
    out = model(inputs, labels=inputs)
    assert out.loss == 0
    out.loss.backward()
    assert not model.eval()(inputs).logits.any()


@pytest.mark.parametrize("bad", [60, -1])
def test_ids_outside_the_vocabulary_are_named(bad):
    model = recommender()
    x = torch.tensor([[5, bad, 7]])
    with pytest.raises(ValueError, match=f"input_ids.*{bad}.*59"):
        model(x)


def test_ids_and_labels_of_any_integer_type():
    model, x = recommender(), torch.tensor([[5, 6, 7]])
    assert model(x.int(), labels=x.short()).loss == model(x, labels=x).loss


def test_labels_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="labels.*60"):
        recommender()(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 60]]))


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 3, 2, 4], [0, 5]])
def test_offsets_that_do_not_describe_the_input(offsets):
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        recommender()(torch.tensor([[5, 6, 7, 8]]), cu_seq_lens_q=torch.tensor(offsets))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("token_type_ids", torch.zeros(1, 4)),
        ("timestamp", torch.zeros(1, 4)),
        ("is_causal", False),
        ("seq_idx", torch.zeros(1, 4)),
    ],
)
def test_unknown_keywords_are_refused(keyword, value):
    model, x = recommender(), torch.tensor([[5, 6, 7, 8]])
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"`{keyword}` is not an input of BlossomRec"):
            part(x, **{keyword: value})
    with pytest.raises(ValueError, match="`labels` is not an input"):
        model.model(x, labels=x)


@pytest.mark.parametrize(
    ("name", "value"), [("pad_token_id", 3), ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 10000.0})]
)
def test_what_was_set_after_the_configuration_was_made_is_checked(name, value):
    changed = config()
    setattr(changed, name, value)
    with pytest.raises(ValueError, match=f"`{name}"):
        BlossomRecForSequentialRecommendation(changed)


def test_a_cache_is_passed_as_cache():
    model = recommender()
    cache = model(torch.tensor([[5, 6]]), use_cache=True).cache
    with pytest.raises(ValueError, match="pass the `BlossomRecCache` as `cache`"):
        model(torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="`cache` is a dict; it must be a `BlossomRecCache`"):
        model(torch.tensor([[7]]), cache={})
    assert cache.lengths.tolist() == [2]


def test_keywords_without_effect_are_accepted():
    """`None`, and what `Trainer`, `peft` and the collators of `transformers` send along."""
    model, x = recommender(), torch.tensor([[5, 6, 7, 8]])
    out = model(x, token_type_ids=None, is_causal=True, output_router_logits=False, return_dict=True)
    torch.testing.assert_close(out.logits, model(x).logits)
    model(x, position_ids=torch.tensor([[0, 1, 0, 1]]), seq_idx=torch.tensor([[0, 0, 1, 1]]))
    assert model(x, labels=x, skip_logits=True).logits is None


def test_other_bad_input_is_named():
    model, x = recommender(), torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match=r"`labels` has shape \(1, 3\)"):
        model(x, labels=x[:, 1:])
    with pytest.raises(ValueError, match="`labels` contains -7"):
        model(x, labels=x - 12)
    for name, values in (("input_ids", x[0]), ("input_ids", x.double()), ("labels", x.double()), ("labels", x > 5)):
        with pytest.raises(ValueError, match=f"`{name}` has shape .* and dtype .*; it must be `\\[B, L\\]`"):
            model(**{"input_ids": x, name: values})
    for number in (-1, 1.5, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="`logits_to_keep` is"):
            model(x, logits_to_keep=number)
    for name in ("input_ids", "attention_mask", "position_ids", "labels", "weights", "basket_starts", "cu_seq_lens_q"):
        for values, kind in ((x.tolist(), "list"), (x.numpy(), "numpy.ndarray"), (7, "int")):
            with pytest.raises(ValueError, match=f"`{name}` is of {kind}; it must be a tensor"):
                model(**{"input_ids": x, name: values})
    for positions in (torch.arange(3)[None], torch.arange(4), torch.arange(4).repeat(2, 1)):
        with pytest.raises(ValueError, match="`position_ids` has shape"):
            model(x, position_ids=positions)
    offsets = torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        model(x, cu_seq_lens_q=offsets, cu_seq_lens_k=torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        model(x, cu_seq_lens_k=offsets)
    with pytest.raises(ValueError, match="max_length_k"):
        model(x, cu_seq_lens_q=offsets, max_length_q=2, max_length_k=3)
    with pytest.raises(ValueError, match="position_ids"):
        model(x, position_ids=torch.tensor([[0, 1, 3, 4]]))
    with pytest.raises(ValueError, match="position_ids"):
        model(x, position_ids=torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="rows"):
        model(x.expand(2, -1), cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="max_length_q"):
        model(x, cu_seq_lens_q=torch.tensor([0, 4]), max_length_q=3)
    with pytest.raises(ValueError, match="attention_mask"):
        model(x, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model()
