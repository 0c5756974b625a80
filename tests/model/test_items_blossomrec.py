"""Cosine scores, item dropout, and item vectors that are kept while no weight changes."""

import copy
import pickle

import pytest
import torch
from model_cases import config, histories, packed, padded, recommender
from torch.nn.functional import cross_entropy, normalize

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation
from blossomrec_hf.model.items_blossomrec import unit_vectors
from blossomrec_hf.model.objectives_blossomrec import find_objective
from blossomrec_hf.model.packing_blossomrec import pack_histories


def cosine(**kwargs) -> BlossomRecForSequentialRecommendation:
    return recommender(scoring="cosine", **kwargs)


@pytest.mark.parametrize("tied", [True, False])
def test_cosine_scores_are_cosines_over_the_temperature(tied):
    model = cosine(temperature=0.2, tie_word_embeddings=tied)
    x = torch.randint(2, 60, (3, 21))
    states, weight = model.model(x).last_hidden_state, model.lm_head.weight
    expected = normalize(states, dim=-1) @ normalize(weight, dim=-1).T / 0.2
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, expected[:, -2:], rtol=0, atol=1e-10)
    states = model.model.encode(pack_histories(x, vocab_size=60), last_only=True)
    torch.testing.assert_close(states @ model.item_vectors().T, expected[:, -1], rtol=0, atol=1e-10)


def test_alone_padded_packed_and_cached_are_equal():
    model, rows = cosine(), histories(1, 40, 17, 3)
    alone = [model(row[None]).logits[0] for row in rows]
    torch.testing.assert_close(model(**packed(rows)).logits[0], torch.cat(alone), rtol=0, atol=1e-10)
    for side in ("left", "right", "anywhere"):
        ids, mask = padded(rows, side, extra=2)
        logits = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], torch.cat(alone), rtol=0, atol=1e-10)
    expected = model.recommend([row.tolist() for row in rows], top_k=58, exclude_seen=False)
    scores = torch.stack([logits[-1] for logits in alone])
    torch.testing.assert_close(expected.scores, scores.gather(1, expected.item_ids), rtol=0, atol=1e-10)
    out = model(ids, attention_mask=mask, use_cache=True)
    none = model.recommend([[]] * 4, top_k=58, exclude_seen=False, cache=out.cache)  # no new event: the cached states
    states = model.recommend_from_states(out.cache.last_hidden_state, top_k=58)
    for found in (none, states):
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-10)
    event = torch.randint(2, 60, (4, 1))
    appended = model(event, cache=out.cache).logits
    longer = [model(torch.cat([row, item])[None]).logits[0, -1] for row, item in zip(rows, event)]
    torch.testing.assert_close(appended[:, 0], torch.stack(longer), rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", ["cross_entropy", "sampled_softmax", "bce", "gbce", "bpr"])
@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_every_loss_compares_cosines(objective, implementation):
    """The gradients of the weights are those of the same loss on vectors that are normalized by hand."""
    settings = {"objective": objective, "cross_entropy_implementation": implementation, "num_negatives": 20}
    model = cosine(hidden_dropout_prob=0.0, temperature=0.3, **settings)
    plain = recommender(hidden_dropout_prob=0.0, tie_word_embeddings=False, **settings)
    plain.model.load_state_dict(model.model.state_dict())
    x = torch.randint(2, 60, (3, 21))
    torch.manual_seed(1)
    loss = model(x, labels=x).loss
    loss.backward()
    hidden, table = plain.model(x).last_hidden_state, plain.model.item_embedding.weight
    torch.manual_seed(1)
    targets = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100).flatten()
    by_hand = find_objective(objective)(
        normalize(hidden, dim=-1).flatten(0, 1) / 0.3,
        normalize(table, dim=-1),
        targets,
        None,
        config=plain.config,
        item_counts=plain.item_counts,
    )
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand)
    for (name, weight), other in zip(model.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)
    if objective == "cross_entropy":
        logits = (normalize(hidden, dim=-1) / 0.3) @ normalize(table, dim=-1)[2:].T
        torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), (targets - 2).clamp(min=-100)))


def test_half_precision_normalizes_in_float32():
    vectors = torch.randn(50, 64) * 200  # whose squares do not fit in float16
    for dtype in (torch.float16, torch.bfloat16):
        half = vectors.to(dtype)
        expected = (normalize(half.float(), dim=-1) * 20).to(dtype)  # equal but for the order of two factors
        torch.testing.assert_close(unit_vectors(half, 20.0), expected, rtol=torch.finfo(dtype).eps, atol=0)
    model = cosine().to(torch.bfloat16)
    x = torch.randint(2, 60, (2, 30))
    assert model(x).logits.abs().max() <= 1.02 / model.config.temperature


def test_a_vector_of_zeros_has_no_score_and_no_gradient():
    vectors = torch.zeros(3, 4, dtype=torch.double)
    vectors[1] = torch.randn(4)
    vectors.requires_grad_(True)
    unit = unit_vectors(vectors)
    unit.sum().backward()
    assert not unit[[0, 2]].any() and not vectors.grad[[0, 2]].any() and vectors.grad[1].any()


def test_a_change_of_weights_changes_the_kept_vectors():
    model, x = cosine(), torch.randint(2, 60, (2, 9))
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=0.1, **how) for how in ({}, {"foreach": True}, {"fused": True})
    ]

    def check():
        with torch.no_grad():
            expected = normalize(model.lm_head.weight, dim=-1)
            for _ in range(2):
                torch.testing.assert_close(model.item_vectors(), expected, rtol=0, atol=1e-12)
            assert model.item_vectors() is model.item_vectors()

    check()
    for optimizer in optimizers:  # in evaluation mode, too
        model(x, labels=x).loss.backward()
        optimizer.step()
        check()
    with torch.no_grad():
        torch._foreach_lerp_([model.lm_head.weight], [torch.randn_like(model.lm_head.weight)], 0.5)
    check()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    check()
    model.load_state_dict({name: value * 2 - 1 for name, value in model.state_dict().items()}, assign=True)
    model.tie_weights()
    check()
    model.resize_token_embeddings(70)
    check()
    model.float()
    assert model.item_vectors().dtype == torch.float32
    kept = model._unit_vectors
    model.train()
    assert kept._kept is None
    model(x, labels=x).loss.backward()
    with torch.no_grad():
        assert model.item_vectors() is not model.item_vectors() and kept._kept is None


def test_copies_and_pickles_have_vectors_of_their_own():
    model = cosine()
    with torch.no_grad():
        before = model.item_vectors()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.lm_head.weight.add_(torch.randn_like(twin.lm_head.weight))
            torch.testing.assert_close(twin.item_vectors(), normalize(twin.lm_head.weight, dim=-1))
            assert model.item_vectors() is before


def test_cosine_models_are_saved_and_resumed(tmp_path):
    model, x = cosine(temperature=0.1).float(), torch.randint(2, 60, (2, 9))
    model.save_pretrained(tmp_path)
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    assert loaded.config.scoring == "cosine" and loaded.config.temperature == 0.1
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(loaded.recommend(x).item_ids, model.recommend(x).item_ids)


def test_dropped_items_are_one_learned_vector_in_training_alone(tmp_path):
    torch.manual_seed(0)
    model = recommender(item_dropout_prob=0.4, hidden_dropout_prob=0.0)
    x, seen = torch.randint(2, 60, (50, 40)), []
    model.model.embedding_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()
    model(x, labels=x).loss.backward()
    vectors, replaced = model.model.item_embedding(x).flatten(0, 1), model.model.replaced_item
    is_replaced = (seen[0] == replaced).all(1)
    torch.testing.assert_close(seen[0][~is_replaced], vectors[~is_replaced])
    assert 0.37 < is_replaced.double().mean() < 0.43 and replaced.grad.any()
    model.eval()
    model(x)
    assert torch.equal(seen[1], vectors)
    model.save_pretrained(tmp_path)
    loaded = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.model.replaced_item, replaced)


def test_without_options_nothing_is_added():
    """Old configurations load unchanged, and weights have the same names."""
    model = recommender()
    assert not {"replaced_item", "item_features"} & {name.split(".")[1] for name in model.state_dict()}
    assert model.item_vectors() is model.lm_head.weight
    states = torch.randn(3, 16)
    assert model.model.prediction_states(states) is states


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scoring": "cos"}, "`scoring` is 'cos'; it must be one of 'dot', 'cosine'"),
        ({"temperature": 0}, r"`temperature` is 0; it must be a number in \(0, 1000\]"),
        ({"item_dropout_prob": 1.0}, r"`item_dropout_prob` is 1.0; it must be a number in \[0, 1\)"),
        ({"id_dropout_prob": -0.1}, "`id_dropout_prob`"),
        ({"item_features": {}}, "dictionary of features by name"),
        ({"item_features": {"a b": {}}}, "names must be identifiers"),
        ({"item_features": {"genres": {"kind": "numbers"}}}, "genres.*kind"),
        ({"item_features": {"genres": {"kind": "categories", "names": ["x", "x"], "num_values": 3}}}, "genres"),
        ({"item_features": {"title": {"kind": "vectors", "size": 0}}}, "title"),
        (
            {"item_features": {"title": {"kind": "vectors", "size": 3}}, "tie_word_embeddings": False},
            "`tie_word_embeddings` is False; with `item_features`",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
    with pytest.raises(ValueError, match=message):
        BlossomRecConfig(**settings)
