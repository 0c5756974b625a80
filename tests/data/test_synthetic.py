"""The generated log: what it plants can be found in it by counting, near and far."""

from collections import Counter, defaultdict
from functools import partial

import polars as pl
import pytest

from blossomrec_hf.data import generate_log, generate_titles


LAG, OPENING, FAR = 4, 8, 30


def shares(counts: Counter) -> dict[int, float]:
    total = sum(counts.values())
    return {item: count / total for item, count in counts.items()}


class Oracle:
    """Counts of what follows what in the events before the last two, and predictions from parts of them."""

    def __init__(self, users: list[list[int]]) -> None:
        self.lag, self.previous, self.opening = (defaultdict(Counter) for _ in range(3))
        self.popularity = Counter(item for events in users for item in events[FAR:])
        for events in users:
            for t in range(FAR, len(events) - 2):
                self.lag[events[t - LAG]][events[t]] += 1
                self.previous[events[t - 1]][events[t]] += 1
                for first in events[:OPENING]:
                    self.opening[first][events[t]] += 1

    def near(self, events: list[int]) -> Counter:
        return Counter(shares(self.lag[events[-LAG]])) + Counter(shares(self.previous[events[-1]]))

    def last_only(self, events: list[int]) -> Counter:
        return self.previous[events[-1]]

    def far(self, events: list[int]) -> Counter:
        counts = sum((self.opening[first] for first in events[:OPENING]), Counter())
        return Counter({item: count / (self.popularity[item] + 10) for item, count in counts.items()})

    def both(self, events: list[int]) -> Counter:
        far = self.far(events)
        after_last = Counter({item: n * far[item] for item, n in self.previous[events[-1]].items()})
        return Counter(shares(self.lag[events[-LAG]])) + Counter(shares(after_last))


@pytest.fixture(scope="module")
def recall():
    users = pl.DataFrame(generate_log()).group_by("user", maintain_order=True).agg("item")["item"].to_list()
    oracle = Oracle(users)

    def recall_at_10(predictor: str, target: int, kind: int | None = None) -> float:
        asked = [events for number, events in enumerate(users) if kind is None or number % 3 == kind]
        hits = 0
        for events in asked:
            history = events[: len(events) + target]
            hits += events[target] in dict(getattr(oracle, predictor)(history).most_common(10))
        return hits / len(asked)

    return recall_at_10


@pytest.mark.parametrize("target", [-1, -2], ids=["test", "validation"])
def test_each_signal_alone_loses(recall, target):
    of = partial(recall, target=target)
    near, far, last_only, both = of("near"), of("far"), of("last_only"), of("both")
    assert both >= 0.8
    assert near <= both - 0.2
    assert far <= both - 0.2
    assert last_only <= both - 0.2


def test_the_item_after_a_door_is_told_by_the_opening_alone(recall):
    assert recall("near", -1, kind=1) <= 0.2
    assert recall("both", -1, kind=1) >= 0.8


def test_same_seed_same_log():
    assert generate_log(50, seed=3).equals(generate_log(50, seed=3))
    assert not generate_log(50, seed=3).equals(generate_log(50, seed=4))


def test_shape_and_order():
    log = generate_log(60, 240, min_history=100, max_history=150)
    lengths = log.group_by("user").len()["len"]
    assert len(lengths) == 60 and lengths.min() >= 100 and lengths.max() <= 150
    assert log.equals(log.sort("user", "timestamp"))
    assert 1 <= log["item"].min() and log["item"].max() <= 240


@pytest.mark.parametrize(
    "arguments, named",
    [({"num_items": 60}, "num_items"), ({"min_history": 50}, "min_history"), ({"max_history": 60}, "max")],
)
def test_impossible_sizes_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        generate_log(10, **arguments)


def test_titles_tell_what_an_item_is():
    sizes = {"num_items": 300, "seed": 5, "num_genres": 6, "num_rings": 4}
    titles = dict(generate_titles(**sizes).rows())
    log = generate_log(40, noise=0, **sizes)
    assert set(log["item"]) <= set(titles)
    for (events,) in log.group_by("user").agg("item").select("item").iter_rows():
        words = [titles[event].split() for event in events]
        home = words[0][1]
        assert all(word[:3] == ["Genre", home, "classic"] for word in words[:OPENING])
        for last, word in zip(words[OPENING:], words[OPENING + 1 :]):
            assert (word[:3] == ["Genre", home, "novelty"]) == (last == ["The", "door"])
        starts = [word for word in words[OPENING : OPENING + LAG] if word[0] == "Ring"]
        nexts = [word for word in words[OPENING + LAG : OPENING + 2 * LAG] if word[0] == "Ring"]
        for (_, ring, _, stop), (_, same, _, after) in zip(starts, nexts):
            assert (same, int(after)) == (ring, int(stop) + 1)
