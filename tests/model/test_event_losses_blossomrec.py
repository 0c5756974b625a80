"""Losses of events in baskets and with weights, against the scores of one history after the other."""

import pytest
import torch
from small_cases import make_model

from blossomrec_hf import register_objective
from blossomrec_hf.batches import HistoryStore, PackingCollator, PaddingCollator
from blossomrec_hf.model import packing_blossomrec
from blossomrec_hf.model.objectives_blossomrec import BUILT_IN_OBJECTIVES, mean_over_targets
from blossomrec_hf.training.graphs import StaticPass


COLLATORS = [
    PackingCollator(),
    PackingCollator(max_tokens=150),
    PaddingCollator(),
    PaddingCollator(padding_side="left"),
]


def draw_rows(num_rows: int = 6, longest: int = 20, share: float = 0.5) -> list[dict]:
    """Histories of 1 to `longest` events, of which about `share` begin a basket; the first history has a target."""
    lengths = torch.randint(1, longest + 1, (num_rows - 1,)).tolist()
    first = {"input_ids": [5, 9, 7], "basket_starts": [True, True, share > 1]}
    return [
        first,
        *(
            {"input_ids": torch.randint(2, 62, (n,)).tolist(), "basket_starts": (torch.rand(n) < share).tolist()}
            for n in lengths
        ),
    ]


def exact_model(**changes):
    return make_model(hidden_dropout_prob=0.0, **changes).double()


def loss_by_hand(model, rows: list[dict]) -> tuple[torch.Tensor, int]:
    """
    The summed cross-entropy of all targets, and their number: an event is predicted from the events before its basket, and
    those of weight 0 are no targets.
    """
    total, number = 0.0, 0
    for row in rows:
        begin, length = 0, len(row["input_ids"])
        starts, weights = row.get("basket_starts", [True] * length), row.get("weights", [1.0] * length)
        for place, (item, start, weight) in enumerate(zip(row["input_ids"], starts, weights)):
            begin = place if start else begin
            if begin and weight:
                before = torch.tensor([row["input_ids"][:begin]])
                scores = model(before).logits[0, -1, 2:]
                total, number = total - weight * scores.log_softmax(-1)[item - 2], number + 1
    return total, number


def gradients_of(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("collate", COLLATORS, ids=["packed", "filled", "right", "left"])
def test_items_of_a_basket_are_scored_after_the_events_before_it(collate):
    model, rows = exact_model(), draw_rows()
    total, number = loss_by_hand(model, rows)
    loss = model(**collate(rows)).loss
    torch.testing.assert_close(loss, total / number)
    torch.testing.assert_close(gradients_of(model, loss), gradients_of(model, total / number))
    torch.testing.assert_close(model(**collate(rows), num_items_in_batch=100).loss, total / 100)


@pytest.mark.parametrize("baskets", [False, True])
@pytest.mark.parametrize("collate", COLLATORS, ids=["packed", "filled", "right", "left"])
def test_each_loss_has_the_weight_of_its_target(collate, baskets):
    model, rows = exact_model(), []
    for row in draw_rows():
        weights = torch.randint(0, 4, (len(row["input_ids"]),)) / 2
        rows.append(row | {"weights": weights.tolist()})
        if not baskets:
            del rows[-1]["basket_starts"]
    total, number = loss_by_hand(model, rows)
    loss = model(**collate(rows)).loss
    torch.testing.assert_close(loss, total / number)
    torch.testing.assert_close(gradients_of(model, loss), gradients_of(model, total / number))


def test_weights_of_1_are_no_weights_and_equal_ones_a_factor():
    model, rows = exact_model(), draw_rows()
    for collate in COLLATORS:
        plain = collate(rows)
        ones = collate([row | {"weights": [1.0] * len(row["input_ids"])} for row in rows])
        assert plain.keys() == ones.keys()  # so the loss is the same to the last bit
        halves = collate([row | {"weights": [0.5] * len(row["input_ids"])} for row in rows])
        torch.testing.assert_close(model(**halves).loss, model(**plain).loss / 2)


def test_shifted_labels_have_the_weights_of_their_positions():
    model, ids, weights = exact_model(), torch.randint(2, 62, (2, 7)), torch.rand(2, 7)
    moved = {"shift_labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100), "weights": weights.roll(-1, 1)}
    torch.testing.assert_close(model(ids, **moved).loss, model(ids, labels=ids, weights=weights).loss)


def test_a_basket_per_event_is_no_basket():
    model, rows = exact_model(), draw_rows(share=1.1)
    without = [{"input_ids": row["input_ids"]} for row in rows]
    for collate in COLLATORS:
        losses = [model(**collate(given)).loss for given in (rows, without)]
        torch.testing.assert_close(*losses, rtol=1e-14, atol=0)


def by_hand(hidden_states, item_vectors, targets, num_items_in_batch, weights=None, **kwargs):
    losses = (1 - hidden_states @ item_vectors.T).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return mean_over_targets(losses, targets, num_items_in_batch, weights)


@pytest.mark.parametrize("objective", [*BUILT_IN_OBJECTIVES, register_objective("test_event_losses", by_hand)])
def test_every_objective_sees_one_row_per_target(objective):
    """As if each target were the next item of a history of its own, of the events before its basket."""
    model, rows = exact_model(objective=objective, num_negatives=4, shared_negatives=False), draw_rows()
    baskets = PackingCollator()(rows)
    apart = []
    for row in rows:
        begins = [n if start or n == 0 else 0 for n, start in enumerate(row["basket_starts"])]
        for n, item in enumerate(row["input_ids"]):
            apart.append([*row["input_ids"][: max(begins[: n + 1])], item])
    one_by_one = PackingCollator()([{"input_ids": ids, "num_known": len(ids) - 1} for ids in apart])
    number = int((baskets["labels"] >= 0).sum())
    assert number == (one_by_one["labels"] >= 0).sum()
    mean, spread = [], []
    for batch in (baskets, one_by_one):
        drawn = torch.stack([model(**batch).loss.detach() for _ in range(40)])
        mean.append(drawn.mean())
        spread.append(drawn.std(unbiased=False))
    assert (mean[0] - mean[1]).abs() <= 1e-9 + 4 * max(spread) / 40**0.5 * 2**0.5


def randomize(model) -> None:
    """Vectors of times and types start at zero, where they change nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)


FEATURES = [
    {"event_types": ["view", "buy"]},
    {"time_features": ["next_gap", "hour"]},
    {"event_types": ["view", "buy"], "time_features": ["previous_gap", "next_gap_input", "next_gap"]},
]


@pytest.mark.parametrize("features", FEATURES, ids=["types", "times", "both"])
def test_items_of_a_basket_are_predicted_with_their_own_types(features):
    """The type of the event to be predicted and the time of its basket are known to the state that predicts it."""
    model, rows = exact_model(time_dropout_prob=0.0, **features), draw_rows(num_rows=3, longest=9)
    randomize(model)
    for row in rows:
        starts = torch.tensor(row["basket_starts"])
        times = 10**9 + (torch.randint(1, 10**5, starts.shape) * starts).cumsum(0)
        row |= {"timestamps": times.tolist(), "event_type_ids": torch.randint(0, 2, starts.shape).tolist()}
    columns = {"time_features": "timestamps", "event_types": "event_type_ids"}
    names, total, number = [columns[feature] for feature in features], 0.0, 0
    for row in rows:
        begin = 0
        for place, start in enumerate(row["basket_starts"]):
            begin = place if start else begin
            if begin:
                before = {name: torch.tensor([row[name][:begin]]) for name in ("input_ids", *names)}
                known = {
                    "prediction_time": row["timestamps"][begin],
                    "target_event_type": row["event_type_ids"][place],
                }
                scores = model(**before, **known, logits_to_keep=1).logits[0, -1, 2:]
                total, number = total - scores.log_softmax(-1)[row["input_ids"][place] - 2], number + 1
    for collate in (
        PackingCollator(columns=names),
        PackingCollator(max_tokens=50, columns=names),
        PaddingCollator(padding_side="left", columns=names),
    ):
        torch.testing.assert_close(model(**collate(rows)).loss, total / number)


def test_static_and_compiled_batches_have_the_loss_of_the_batch():
    model = exact_model()
    rows = [row | {"weights": torch.rand(len(row["input_ids"])).tolist()} for row in draw_rows()]
    store = HistoryStore.from_rows(rows)
    sizes = {"max_tokens": 200, "max_length": int(store.lengths.max())}
    static = StaticPass(lambda arguments: model(**arguments).loss, **sizes)
    for chosen in ([0, 1, 2, 3, 4, 5], [2], [5, 3]):
        batch, number = store.pack(chosen, labels=True), max(1, int(store.num_targets[chosen].sum()))
        losses = model(**batch, num_items_in_batch=number).loss, static(batch, number)
        torch.testing.assert_close(*(gradients_of(model, loss) for loss in losses), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for collate in COLLATORS[1::2]:  # compiling takes seconds
            batch = collate(rows)
            torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_refusals():
    model, batch = exact_model(), PaddingCollator()([{"input_ids": [2, 3, 4], "basket_starts": [True, True, False]}])
    starts = batch.pop("basket_starts")
    for wrong in (starts.long(), starts[:, :2]):
        with pytest.raises(ValueError, match="`basket_starts` has shape .* it must be bool, and have the shape"):
            model(**batch, basket_starts=wrong)
    for wrong in (torch.ones(1, 3, dtype=torch.long), torch.ones(3)):
        with pytest.raises(ValueError, match="`weights` has shape .* it must be float, and have the shape"):
            model(**batch, weights=wrong)
    for value in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="`weights` has 1 values below 0 or not finite"):
            model(**batch, weights=torch.tensor([[1.0, value, 0.5]]))
        with pytest.raises(ValueError, match=f"`weights` has the value {value:g}"):
            PackingCollator()([{"input_ids": [2, 3], "weights": [1.0, value]}])
    batch["shift_labels"] = batch.pop("labels")
    with pytest.raises(ValueError, match="`basket_starts` cannot be combined with `shift_labels`"):
        model(**batch, basket_starts=starts)


def test_labels_of_a_first_basket_are_reported_as_counted_in_vain(caplog):
    """A collator of the user's own, whose labels `Trainer` counts."""
    model, starts = exact_model(), torch.tensor([[True, False, True, False]])
    ids = torch.tensor([[2, 3, 4, 5]])
    for packing in ({}, {"position_ids": torch.arange(4)[None]}):
        for labels, told in ((ids, True), (torch.tensor([[-100, -100, 4, 5]]), False)):
            caplog.clear()
            packing_blossomrec.logger.warning_once.cache_clear()
            with caplog.at_level("WARNING", logger="blossomrec_hf"):
                model(ids, labels=labels, basket_starts=starts, num_items_in_batch=3, **packing)
            assert ("first item or basket" in caplog.text) == told, (packing, labels)
