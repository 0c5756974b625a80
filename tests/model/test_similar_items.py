"""`similar_items` beside cosines computed and sorted with plain Python."""

import math

import pytest
import torch
from ranking_cases import draw_ids, padded, sorted_with_python
from torch import nn

from blossomrec_hf import BlossomRecConfig, BlossomRecForSequentialRecommendation


VOCAB_SIZE = 60


def model_of(vectors: torch.Tensor) -> BlossomRecForSequentialRecommendation:
    """A model with these item vectors `[VOCAB_SIZE, 16]`, in their dtype."""
    config = BlossomRecConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = BlossomRecForSequentialRecommendation(config).to(vectors.dtype).eval()
    model.get_input_embeddings().weight.data.copy_(vectors)
    return model


def random_vectors(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Vectors of very different lengths: the highest dot products are not the highest cosines."""
    return (torch.randn(VOCAB_SIZE, 16) * torch.rand(VOCAB_SIZE, 1) * 4).to(dtype)


def cosines(vectors: torch.Tensor, item: int) -> list[float]:
    """The cosine of `item` with each vector, 0 for a vector of zeros."""

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b))

    rows = vectors.double().tolist()
    lengths = [math.sqrt(dot(row, row)) or 1.0 for row in rows]
    return [dot(rows[item], row) / (lengths[item] * length) for row, length in zip(rows, lengths)]


@pytest.mark.parametrize("candidates", ["all", "shared", "own", "own padded"])
def test_similar_items_agree_with_plain_python(candidates):
    vectors = random_vectors()
    model = model_of(vectors)
    items = torch.randint(2, VOCAB_SIZE, (6,)).tolist()
    exclude = draw_ids(6, 10, VOCAB_SIZE)
    own = draw_ids(6, 40, VOCAB_SIZE)
    given = {"all": None, "shared": own[0], "own": own, "own padded": padded(own, padding=-1)}[candidates]
    for top_k in (1, 7, 58):
        for min_score in (None, 0.1):
            out = model.similar_items(items, top_k, exclude_ids=exclude, candidate_ids=given, min_score=min_score)
            assert out.item_ids.dtype == torch.long and out.scores.dtype == torch.float64
            for i, item in enumerate(items):
                allowed = {"all": None, "shared": own[0]}.get(candidates, own[i])
                expected, scores = sorted_with_python(
                    cosines(vectors, item), top_k, [item, *exclude[i]], allowed, min_score
                )
                assert out.item_ids[i].tolist() == expected
                assert out.scores[i].tolist() == pytest.approx(scores, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    vectors = random_vectors(dtype)
    out = model_of(vectors).similar_items(range(2, VOCAB_SIZE), 57)
    assert out.scores.dtype == torch.float32
    for item, found, scores in zip(range(2, VOCAB_SIZE), out.item_ids.tolist(), out.scores.tolist()):
        expected = cosines(vectors, item)
        assert sorted([item, *found]) == list(range(2, VOCAB_SIZE))
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([expected[other] for other in found], abs=1e-5)


def test_equal_similarities_are_ordered_by_id():
    """The vectors are multiples of four directions, by powers of two: cosines are exact."""
    direction = torch.randint(4, (VOCAB_SIZE,))
    vectors = nn.functional.one_hot(direction, 16) * 2.0 ** torch.randint(-3, 4, (VOCAB_SIZE, 1))
    model = model_of(vectors.double())
    for item, found in zip(range(2, VOCAB_SIZE), model.similar_items(range(2, VOCAB_SIZE), 57).item_ids.tolist()):
        others = [other for other in range(2, VOCAB_SIZE) if other != item]
        assert found == sorted(others, key=lambda other: bool(direction[other] != direction[item]))


def test_a_batch_gives_what_each_item_gives():
    model = model_of(random_vectors())
    items = torch.randint(2, VOCAB_SIZE, (5,))
    out = model.similar_items(items)
    alone = [model.similar_items([item], top_k=10) for item in items.tolist()]
    assert out.item_ids.shape == (5, 10)
    assert torch.equal(out.item_ids, torch.cat([one.item_ids for one in alone]))
    torch.testing.assert_close(out.scores, torch.cat([one.scores for one in alone]))
    assert model.similar_items([], top_k=3).item_ids.shape == (0, 3)


def test_short_answers_are_padded_and_a_vector_of_zeros_has_similarity_0():
    vectors = random_vectors()
    vectors[7] = 0
    model = model_of(vectors)
    out = model.similar_items([7, 9], top_k=3, candidate_ids=[0, 1, 9, 7])
    assert out.item_ids.tolist() == [[9, -1, -1], [7, -1, -1]]
    assert out.scores.tolist() == [[0.0, -math.inf, -math.inf]] * 2


def test_an_adapted_output_embedding_is_read_through_item_vectors():
    """As with an adapter: the stored weight is not what the layer multiplies with."""
    model = model_of(random_vectors())
    rotation = torch.randn(16, 16).double()
    expected = model_of(model.item_vectors().detach() @ rotation).similar_items([5, 9, 20])

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ rotation.T @ self.weight.T

    head = Adapted(16, VOCAB_SIZE, bias=False).double().eval()
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    out = model.similar_items([5, 9, 20])
    assert torch.equal(out.item_ids, expected.item_ids)
    torch.testing.assert_close(out.scores, expected.scores, atol=1e-5, rtol=0)  # its scores are read in float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_ids": [0]}, "item_ids.*contains 0, which is .PAD. or .UNK."),
        ({"item_ids": [5, 1]}, "item_ids.*contains 1, which"),
        ({"item_ids": [60]}, "item_ids.*60.*59"),
        ({"item_ids": [-1]}, "item_ids.*-1"),
        ({"item_ids": [[5]]}, "item_ids.*one list"),
        ({"item_ids": [2.5]}, "item_ids.*whole numbers"),
        ({"item_ids": 5}, "item_ids.*list or tensor"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 59}, "top_k.*1 … 58"),
        ({"candidate_ids": [60]}, "candidate_ids.*60.*59"),
        ({"candidate_ids": [[3], [4], [5]]}, "candidate_ids.*one list an item"),
        ({"exclude_ids": [2.5]}, "exclude_ids.*whole numbers"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(random_vectors()).similar_items(**({"item_ids": [5, 6]} | arguments))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_an_error(value):
    vectors = random_vectors()
    vectors[30, 2] = value
    with pytest.raises(ValueError, match="NaN"):
        model_of(vectors).similar_items([5, 6])
