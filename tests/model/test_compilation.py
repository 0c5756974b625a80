"""The model compiles without graph breaks and exports, with the same results."""

import pytest
import torch
from model_cases import histories, packed, padded, recommender

from blossomrec_hf import BlossomRecModel
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


def last_states(model: BlossomRecModel, **inputs) -> torch.Tensor:
    return model.encode(pack_histories(**inputs, vocab_size=model.config.vocab_size), last_only=True)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_packed_training_step_compiles_without_graph_breaks(attention_type):
    model = recommender(attention_types=attention_type, num_hidden_layers=1, hidden_dropout_prob=0.0).train()
    rows = histories(40, 3, 150)
    inputs = packed(rows)
    inputs["labels"] = inputs["input_ids"]
    gradients, losses = [], []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = step(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attention_types", [["blossom", "full"], ["long_term", "short_term"]])
def test_padded_training_step_compiles_without_graph_breaks(attention_types):
    model = recommender(attention_types=attention_types, hidden_dropout_prob=0.0).train()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = padded(histories(40, 3, 60), "anywhere")
    labels = torch.randint(2, 60, ids.shape)  # at padding too, where they are no targets
    gradients, losses = [], []
    for function in (model, step):
        model.zero_grad()
        loss = function(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_padded_inference_compiles_without_graph_breaks():
    model = recommender()
    step = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = padded([*histories(40, 3), torch.empty(0, dtype=torch.long)], "anywhere")
    outputs = {"logits_to_keep": 2, "output_hidden_states": True, "output_selection": True}
    expected, found = (function(ids, attention_mask=mask, **outputs) for function in (model, step))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    torch.testing.assert_close(found.selections, expected.selections)
    with torch.no_grad():
        lasts = [
            torch.compile(last_states, fullgraph=compiled, backend="eager", disable=not compiled)(
                model.model, input_ids=ids, attention_mask=mask
            )[:2]
            for compiled in (False, True)
        ]
    torch.testing.assert_close(*lasts)


def test_encode_compiles_once_for_any_lengths_up_to_a_longest():
    model, num_graphs = recommender(num_hidden_layers=1).model, 0

    def backend(graph, example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    encode = torch.compile(model.encode, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for lengths in ((40, 3, 60), (7, 90), (15, 6, 70, 8, 9)):
            batch = pack_histories(
                **packed(histories(*lengths)) | {"max_length_k": 90, "max_length_q": 90}, vocab_size=60
            )
            torch.testing.assert_close(encode(batch, last_only=True), model.encode(batch, last_only=True))
    assert num_graphs == 1


def test_an_exported_program_takes_padding_of_any_kind():
    model = recommender(attention_types=["blossom", "full"])
    ids, mask = padded(histories(40, 3, 9), "left")
    program = torch.export.export(model, (ids,), {"attention_mask": mask}).module()
    for side in ("left", "right", "anywhere"):
        new, mask = padded(histories(40, 1, 22), side)
        assert new.shape == ids.shape
        found, expected = program(new, attention_mask=mask).logits, model(new, attention_mask=mask).logits
        torch.testing.assert_close(found, expected)


def test_attentions_of_padded_input_under_compilation():
    model = recommender(attn_implementation="eager", num_hidden_layers=1)
    ids, mask = padded(histories(9, 3), "anywhere")
    expected, found = (
        function(ids, attention_mask=mask, output_attentions=True).attentions
        for function in (model, torch.compile(model, backend="eager"))
    )
    torch.testing.assert_close(found, expected)
