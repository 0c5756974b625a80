"""The model as users of `transformers` meet it: inputs of every form, outputs, loss, saving, recommending."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import small_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import blossomrec_hf
from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation, BlossomRecModel
from blossomrec_hf.model import ops_torch
from blossomrec_hf.model.outputs_blossomrec import LayerOutputs
from blossomrec_hf.model.packing_blossomrec import pack_histories
from blossomrec_hf.model.streams_blossomrec import ATTENTION_TYPES


BLOCKS = {"compress_block_size": 8, "compress_stride": 4, "selection_block_size": 4, "short_term_block_size": 4}


def config(**kwargs) -> BlossomRecConfig:
    settings = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24} | BLOCKS
    return BlossomRecConfig(**(settings | kwargs))


def recommender(**kwargs) -> BlossomRecForSequentialRecommendation:
    return BlossomRecForSequentialRecommendation(config(**kwargs)).double().eval()


def histories(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (n,)) for n in lengths]


def padded(rows: list[torch.Tensor], side: str, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, the right, or anywhere, and their mask."""
    length = max(map(len, rows)) + extra
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        if side == "anywhere":
            place = torch.randperm(length)[: len(row)].sort().values
        else:
            place = torch.arange(len(row)) + (length - len(row) if side == "left" else 0)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def packed(rows: list[torch.Tensor]) -> dict:
    lengths = torch.tensor([0, *map(len, rows)])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
        "cu_seq_lens_q": lengths.cumsum(0).int(),
        "cu_seq_lens_k": lengths.cumsum(0).int(),
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


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


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_logits_to_keep_gives_the_last_real_positions(side):
    model = recommender()
    rows = histories(7, 1, 30)
    inputs = packed(rows) if side == "packed" else {"input_ids": padded(rows, side)[0]}
    kept = model(**inputs, logits_to_keep=3).logits
    assert kept.shape == (3, 3, 60)
    for i, row in enumerate(rows):
        expected = model(row[None]).logits[0, -3:]
        torch.testing.assert_close(kept[i, 3 - len(expected) :], expected, rtol=0, atol=1e-10)
        assert not kept[i, : 3 - len(expected)].any()


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


# The last position alone


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
    assert not torch.isclose(loss(shift_labels=targets), loss(labels=labels))


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


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_packed_training_step_compiles_without_graph_breaks(attention_type):
    model = recommender(attention_types=attention_type, hidden_dropout_prob=0.0).train()
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
    model = recommender(attn_implementation="eager")
    ids, mask = padded(histories(9, 3), "anywhere")
    expected, found = (
        function(ids, attention_mask=mask, output_attentions=True).attentions
        for function in (model, torch.compile(model, backend="eager"))
    )
    torch.testing.assert_close(found, expected)


# Saving, growing


@pytest.mark.parametrize("tied", [True, False])
def test_item_vectors_are_those_of_the_output_side(tied):
    model = recommender(tie_word_embeddings=tied)
    x, ids = torch.randint(2, 60, (2, 9)), [5, 59, 0, 5]
    vectors = model.item_vectors()
    hidden_states = model.model(x).last_hidden_state
    assert torch.equal(vectors, model.model.item_embedding.weight) == tied
    torch.testing.assert_close(hidden_states @ vectors.T, model(x).logits)
    for chosen in (ids, torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert torch.equal(model.item_vectors(chosen), vectors[ids])
    assert model.item_vectors([]).shape == (0, 16)
    model.item_vectors([5]).sum().backward()
    assert model.lm_head.weight.grad[5].all() and not model.lm_head.weight.grad[6].any()


@pytest.mark.parametrize("ids", [[60], [-1], 5, [[5, 6]], [0.5], ["5"]])
def test_item_vectors_of_no_vocabulary_ids_are_refused(ids):
    with pytest.raises(ValueError, match="`ids`"):
        recommender().item_vectors(ids)


def test_item_weights_have_one_reader():
    """`item_vectors`; only the placement of new items, which writes rows of both tables, has the weights themselves."""
    tables, owners = {"lm_head", "item_embedding"}, {"get_input_embeddings", "get_output_embeddings"}
    package, found = Path(blossomrec_hf.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr != "weight":
                continue
            owner = node.value
            if isinstance(owner, ast.Call) and getattr(owner.func, "attr", None) in owners:
                found.add(path.name)
            elif getattr(owner, "attr", None) in tables:
                found.add(path.name)
    assert found == {"new_items.py"}


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = recommender(tie_word_embeddings=tied).float()
    model.item_counts.random_(100)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    x = torch.randint(2, 60, (2, 30))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BlossomRecForSequentialRecommendation
    assert (loaded.lm_head.weight is loaded.model.item_embedding.weight) == tied
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(loaded.item_counts, model.item_counts)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is BlossomRecModel and not info["missing_keys"]
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)


def test_the_code_travels_with_the_checkpoint(tmp_path):
    recommender().save_pretrained(tmp_path)
    auto_map = BlossomRecConfig.from_pretrained(tmp_path).auto_map
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"}
    flat = {path.name for path in Path(blossomrec_hf.__file__).parent.glob("model/[a-z]*.py")}
    assert flat <= {path.name for path in tmp_path.glob("*.py")}


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["blossomrec_hf"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert model.config._attn_implementation == "blossom"
ids = torch.load(folder + "/ids.pt")
torch.save((model(ids).logits, model.recommend(ids).item_ids), folder + "/out.pt")
# `Trainer` smooths over the next items, too.
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments(folder + "/run", label_smoothing_factor=0.1, report_to="none", use_cpu=True)
inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}
torch.save(Trainer(model, arguments).compute_loss(model, inputs).detach(), folder + "/smoothed.pt")
"""


def test_a_checkpoint_works_where_the_package_is_not_installed(tmp_path):
    model = recommender().float()
    model.save_pretrained(tmp_path / "saved")
    ids = padded(histories(40, 7), "right")[0]
    torch.save(ids, tmp_path / "saved" / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "saved")],
        check=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    smoothed = torch.load(tmp_path / "saved" / "smoothed.pt")
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    predicted = model(ids).logits[:, :-1].transpose(1, 2)
    torch.testing.assert_close(smoothed, torch.nn.functional.cross_entropy(predicted, targets, label_smoothing=0.1))
    logits, item_ids = torch.load(tmp_path / "saved" / "out.pt")
    torch.testing.assert_close(logits, model(ids).logits)
    assert torch.equal(item_ids, model.recommend(ids).item_ids)


def test_an_empty_checkpoint_folder_is_told(tmp_path):
    with pytest.raises(OSError, match="safetensors"):
        BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_new_items_leave_old_ones_alone(tied):
    model = recommender(tie_word_embeddings=tied)
    model.item_counts.random_(100)
    x = torch.randint(2, 60, (2, 30))
    before, counts, rows = model(x).logits, model.item_counts.clone(), model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model(x).logits[..., :60], before)
    torch.testing.assert_close(model.lm_head.weight[60:], rows[2:].mean(0).expand(10, -1))
    assert torch.equal(model.item_counts[:60], counts) and not model.item_counts[60:].any()
    model(torch.tensor([[69, 65]]))


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


def test_keywords_without_effect_are_accepted():
    """`None`, and what `Trainer`, `peft` and the collators of `transformers` send along."""
    model, x = recommender(), torch.tensor([[5, 6, 7, 8]])
    out = model(x, token_type_ids=None, is_causal=True, output_router_logits=False, return_dict=True)
    torch.testing.assert_close(out.logits, model(x).logits)
    model(x, position_ids=torch.tensor([[0, 1, 0, 1]]), seq_idx=torch.tensor([[0, 0, 1, 1]]))
    assert model(x, labels=x, skip_logits=True).logits is None


def test_generating_is_refused_in_a_sentence():
    model = recommender()
    assert not hasattr(model, "generate") and not model.can_generate()
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        model.generate(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        pipeline("text-generation", model=model, tokenizer=small_tokenizer())


def test_lora_for_causal_language_models():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(recommender(), lora)
    x = torch.randint(2, 60, (2, 9))
    model(input_ids=x, labels=x).loss.backward()
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "lora_B" in name)
    assert model.eval().recommend(x, top_k=3).item_ids.shape == (2, 3)
    with pytest.raises(ValueError, match="does not generate.*recommend"):
        model.generate(input_ids=x)


def test_other_bad_input_is_named():
    model, x = recommender(), torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match=r"`labels` has shape \(1, 3\)"):
        model(x, labels=x[:, 1:])
    with pytest.raises(ValueError, match="`labels` has -7"):
        model(x, labels=x - 12)
    for name, values in (("input_ids", x[0]), ("input_ids", x.double()), ("labels", x.double()), ("labels", x > 5)):
        with pytest.raises(ValueError, match=f"`{name}` has shape .* and dtype .*; it must be `\\[B, L\\]`"):
            model(**{"input_ids": x, name: values})
    for number in (-1, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="`logits_to_keep` is"):
            model(x, logits_to_keep=number)
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
