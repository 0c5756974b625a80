"""Random logs of events, and their histories in plain Python."""

import math

from hypothesis import strategies as st


TYPES = ["view", "cart", "buy"]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),  # user
        st.integers(0, 4),  # item
        st.sampled_from(TYPES),
        st.integers(0, 40).map(lambda quarter: quarter / 4),  # seconds
        st.sampled_from([0.0, 0.5, 2.0]),  # weight
    ),
    min_size=1,
    max_size=50,
)


def history_of(rows: list[tuple], options: dict) -> list[dict]:
    """The events of one user in order, as dictionaries of the columns."""
    events = sorted(rows, key=lambda row: row[3])
    if options.get("collapse_repeats"):
        repeats = [n and events[n - 1][1:3] == events[n][1:3] for n in range(len(events))]
        events = [event for event, repeat in zip(events, repeats) if not repeat]
    given = dict(entry.split("=") for entry in options.get("type_weights", "").split(",") if entry)
    targets = options["targets"].split(",") if "targets" in options else TYPES
    result = []
    for n, (_, item, kind, time, weight) in enumerate(events):
        before = events[n - 1] if n else None
        result.append({
            "item": item,
            "timestamps": math.floor(time),
            "event_type_ids": kind,
            "weights": float(given.get(kind, 1)) * (kind in targets) * (weight if "weight" in options else 1),
            "session_starts": before is None or time - before[3] > 2.5,
            "basket_starts": before is None or math.floor(time) > math.floor(before[3]),
        })  # fmt: skip
    return result


def ends_of(history: list[dict], options: dict) -> list[int]:
    """The ends of leave-one-out: the baskets of the last two targets, found by looking at every event."""
    grouped = options.get("group") == "timestamp"
    baskets, seen = [], 0
    for n, event in enumerate(history):
        seen = n if event["basket_starts"] or not grouped else seen
        baskets.append(seen)
    with_target = sorted({baskets[n] for n, event in enumerate(history) if event["weights"] > 0})
    if not with_target:
        return [0, 0, 0]
    test_end = 1 + max(n for n in range(len(history)) if baskets[n] == with_target[-1])
    return [with_target[-2] if len(with_target) > 1 else with_target[-1], with_target[-1], test_end]
