"""Weights of the authors' layer shapes, in a model written here for the eye, score as our conversion of them does."""

import pytest
import torch
from authors_cases import AuthorsModel, scores_agree
from checkpoint_cases import error_message, small_model

from blossomrec_hf import BlossomRecForSequentialRecommendation
from blossomrec_hf.sharing.conversion import AUTHORS_CONSTANTS, from_authors, to_authors


@pytest.fixture
def authors():
    return AuthorsModel(30, 16, 4).double().eval()


@pytest.mark.parametrize("act", ["gelu", "relu", "swish"])
def test_the_authors_weights_score_the_same(act):
    theirs = AuthorsModel(30, 16, 4, act=act).double().eval()
    scores_agree(theirs, from_authors(theirs.state_dict(), num_attention_heads=4, hidden_act=act))


def test_there_and_back():
    theirs = AuthorsModel(30, 16, 4).double().eval()
    ours = from_authors(theirs.state_dict(), num_attention_heads=4)
    again = AuthorsModel(30, 16, 4).double().eval()
    again.load_state_dict(to_authors(ours))
    scores_agree(again, ours)

    settings = {**AUTHORS_CONSTANTS, "compress_block_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = small_model(num_items=30, **settings).double()
    back = AuthorsModel(30, 16, 4, inner=32).double().eval()
    back.load_state_dict(to_authors(model))
    scores_agree(back, model)


def test_a_converted_model_is_a_checkpoint_like_any_other(authors, tmp_path):
    from_authors(authors.float().state_dict(), num_attention_heads=4).save_pretrained(tmp_path)
    model = BlossomRecForSequentialRecommendation.from_pretrained(tmp_path)
    history = torch.randint(1, 31, (40,))
    with torch.no_grad():
        logits = model(history[None] + 1).logits[0, :, 2:]
    torch.testing.assert_close(logits, authors(history)[:, 1:], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_the_same_function_is_refused(authors):
    state = authors.state_dict()
    assert "must be 4" in error_message(lambda: from_authors(state), ValueError)
    extra = {**state, "trm_encoder.layer.0.adapter.weight": torch.ones(1)}
    assert "adapter.weight" in error_message(lambda: from_authors(extra, num_attention_heads=4), ValueError)
    learned = {**state, "position_embedding.weight": torch.ones(50, 16)}
    assert "learned positions" in error_message(lambda: from_authors(learned, num_attention_heads=4), ValueError)
    gsasrec = {"item_embedding.weight": torch.ones(9, 4), "position_embedding.weight": torch.ones(5, 4)}
    gsasrec |= {"transformer_blocks.0.first_norm.weight": torch.ones(4)}
    message = error_message(lambda: from_authors(gsasrec), ValueError)
    assert "learned positions" in message and "normalizes before" in message and "'full'" in message
    assert "no weights of the authors'" in error_message(lambda: from_authors({"a": torch.ones(1)}), ValueError)
    for changes, named in (({}, "short_term_block_size"), ({"attention_types": "full"}, "attention_types")):
        assert named in error_message(lambda changes=changes: to_authors(small_model(**changes)), ValueError)


def test_weights_with_parts_missing_or_of_other_shapes_are_refused_in_a_sentence(authors):
    state = authors.state_dict()
    for name, value in state.items():
        for other in (None, value[:0], value.flatten(), torch.zeros(3, 5, 7, dtype=value.dtype)):
            changed = {key: item for key, item in state.items() if key != name}
            if other is not None:
                changed[name] = other
            try:
                from_authors(changed, num_attention_heads=4)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
