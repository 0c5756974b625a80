"""`compile_for_inference`: batches of one shape give the states, recommendations and ranks of the batches themselves."""

import copy
import threading

import numpy as np
import pytest
import torch
from small_cases import make_model


@pytest.fixture
def uncompiled(monkeypatch):
    """`torch.compile` that does not compile, and counts."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function)
    return compiled


def histories(number, longest, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 62, size=rng.integers(1, longest + 1)).tolist() for _ in range(number)]


def count_calls(model):
    calls = []
    encoder = model.base_model._static_encoders[0]
    run = encoder._run
    encoder._run = lambda: calls.append(1) or run()
    return calls


def test_recommends_what_it_recommended_before(uncompiled):
    model = make_model().double().eval()
    model.compile_for_inference(max_tokens=200, max_histories=20, max_length=25)
    model.compile_for_inference(max_tokens=200, max_histories=20, max_length=25)  # nothing more to do
    assert uncompiled == [False] and len(model.base_model._static_encoders) == 1
    calls, plain = count_calls(model), copy.deepcopy(model)
    assert plain.base_model._static_encoders == []
    # Fits; too few items; too many histories; too long a history.
    for number, longest, used in ((12, 25, True), (5, 10, False), (40, 5, False), (8, 40, False)):
        batch = histories(number, longest, seed=number)
        batch[0] = (batch[0] * longest)[:longest]
        calls.clear()
        ours, expected = model.recommend(batch), plain.recommend(batch)
        assert bool(calls) == used
        assert torch.equal(ours.item_ids, expected.item_ids)
        torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-12, atol=1e-12)


def test_training_caches_and_other_outputs_take_no_part(uncompiled):
    model = make_model().double()
    model.compile_for_inference(max_tokens=60, max_histories=4, max_length=30)
    calls = count_calls(model)
    ids = torch.randint(2, 62, (2, 30))
    model.train()(ids, labels=ids).loss.backward()
    model.eval()(ids, output_hidden_states=True, use_cache=True)
    assert not calls
    before = model.recommend(ids).scores
    with torch.no_grad():
        model.base_model.layers[0].up_proj.weight.add_(1.0)
    assert len(calls) == 1 and not torch.equal(model.recommend(ids).scores, before)


def test_threads_take_turns(uncompiled):
    model = make_model().double().eval()
    model.compile_for_inference(max_tokens=40, max_histories=4, max_length=30)
    batches = [torch.randint(2, 62, (2, 15)) for _ in range(8)]
    expected = [model.recommend(batch).scores for batch in batches]
    found = [None] * len(batches)

    def work(place):
        for _ in range(5):
            found[place] = model.recommend(batches[place]).scores

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="`max_histories` is 0; it must be at least 1"):
        make_model().compile_for_inference(max_histories=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_states_are_the_states(precision):
    """Needs a C++ compiler."""
    model = make_model(num_hidden_layers=1).to(precision).eval()
    batch = histories(12, 25, seed=1)
    batch[0] = (batch[0] * 25)[:25]
    expected = model.recommend(batch, top_k=60)
    model.compile_for_inference(max_tokens=300, max_histories=20, max_length=25)
    calls = count_calls(model)
    ours = model.recommend(batch, top_k=60)
    tolerance = 1e-5 if precision == torch.float32 else 1e-2
    assert calls
    torch.testing.assert_close(
        ours.scores.sort().values, expected.scores.sort().values, rtol=tolerance, atol=tolerance
    )
