"""Logs that grow: every event counts once, new ones continue the old, whatever the ids look like."""

import numpy as np
import polars as pl
import pytest

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.data import build_sequences, item_counts
from blossomrec_hf.data.growth import add_item_counts, join_logs, read_histories, recode


def events(*rows: tuple, timed: bool = True) -> pl.DataFrame:
    """(user, items, times) per user; without times where the log has none."""
    frames = [
        pl.DataFrame({"user": [user] * len(items), "item": list(items), "timestamp": list(times)})
        for user, items, times in rows
    ]
    log = pl.concat(frames, how="vertical_relaxed")
    return log if timed else log.drop("timestamp")


VOCABULARY = BlossomRecTokenizer.from_items(list("abcdefghij"))


def built(*rows: tuple, timed: bool = True):
    return build_sequences(events(*rows, timed=timed), tokenizer=VOCABULARY)[0]


def described(dataset) -> dict:
    """{user: (items, where the new ones begin, the end of training, the end of the test)}"""
    columns = ("past_end", "train_end", "test_end")
    return {
        row["user_id"]: ("".join(VOCABULARY.decode_items(row["input_ids"])), *(row[name] for name in columns))
        for row in dataset
    }


OLD = (("u", "abcde", range(5)), ("v", "fgh", range(3)), ("w", "aaab", range(4)))


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_week_and_the_whole_log_with_the_week_are_the_same(timed, whole):
    """u has four new events, of which two are held out; v has one, and x is new with two: all are training."""
    week = {"u": ("fghi", range(10, 14)), "v": ("a", [10]), "x": ("bc", [10, 11])}
    if whole:
        earlier = {user: (items, list(times)) for user, items, times in OLD}
        week = {
            user: (earlier[user][0] + items, [*earlier[user][1], *times]) if user in earlier else (items, times)
            for user, (items, times) in week.items()
        }
    joined = join_logs(built(*OLD, timed=timed), built(*((u, i, t) for u, (i, t) in week.items()), timed=timed))
    assert described(joined) == {
        "u": ("abcdefghi", 5, 7, 9),
        "v": ("fgha", 3, 4, 4),
        "x": ("bc", 0, 2, 2),
        "w": ("aaab", 4, 2, 2),  # nothing new: its training part stays as it was, and nothing is evaluated
    }


def test_a_third_log_continues_the_first_two():
    joined = join_logs(built(*OLD), built(("w", "cdef", range(4, 8))))
    joined = join_logs(joined, built(("w", "gh", (8, 9)), ("u", "b", (2.5,))))
    assert described(joined)["w"] == ("aaabcdefgh", 8, 10, 10)
    assert described(joined)["u"] == ("abcbde", 3, 6, 6)  # a late arrival: what comes after it is learned again


def test_a_log_alone_is_all_new():
    assert described(join_logs(None, built(*OLD))) == {
        "u": ("abcde", 0, 3, 5),
        "v": ("fgh", 0, 3, 3),
        "w": ("aaab", 0, 2, 4),
    }


def test_users_are_the_same_as_numbers_and_as_text():
    joined = join_logs(built((7, "abc", range(3))), built(("7", "d", [3]), ("x", "a", [3])))
    assert described(joined) == {"7": ("abcd", 3, 4, 4), "x": ("a", 0, 1, 1)}


@pytest.mark.parametrize("scales", [(1, 1000), (1000, 1), (1, 10**6)])
def test_logs_with_times_in_different_units_are_joined(scales):
    """Seconds in one log and milliseconds or microseconds in the other: the order stays, and d and e count once."""
    old, new = (
        built(("u", items, [(1_704_067_200 + first + place) * scale for place in range(len(items))]))
        for items, first, scale in (("abcde", 0, scales[0]), ("defgh", 3, scales[1]))
    )
    joined = join_logs(old, new)
    assert described(joined) == {"u": ("abcdefgh", 5, 8, 8)}
    assert joined["timestamps"][0] == list(range(1_704_067_200, 1_704_067_208))


def test_digits_become_the_ids_of_a_vocabulary_of_text():
    text = BlossomRecTokenizer.from_items(["0-306-X", "12", "7", "5"])
    dataset, digits = build_sequences(events(("u", (5, 7, 12, 7), range(4)), ("v", (5, 9), range(2))))
    assert digits.item_type == "int"
    recoded = recode(dataset, digits, text)
    assert [history.tolist() for history in read_histories(recoded)] == [[5, 4, 3, 4], [5, text.unk_token_id]]
    assert recoded["timestamps"][:] == dataset["timestamps"][:] and recoded["user_id"][:] == dataset["user_id"][:]
    grown = BlossomRecTokenizer.from_items(digits.decode_items(range(2, len(digits))))
    grown.add_items([1000])
    assert recode(dataset, digits, grown) is dataset


@pytest.mark.parametrize("old_log_known", [True, False])
def test_no_event_is_counted_twice(old_log_known):
    """The same counts after a week, after the whole log with the week, and after the same log again."""
    seed = int(np.random.default_rng().integers(2**32))
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    histories = {user: rng.choice(list("abcdefghij"), 12) for user in range(30)}

    def part(start, stop):
        return built(*((user, items[start:stop], range(start, stop)) for user, items in histories.items()))

    first, week, whole = part(0, 8), part(8, 12), part(0, 12)
    learned = item_counts(first, len(VOCABULARY))
    if old_log_known:
        joined = join_logs(first, week)
        counts = add_item_counts(learned, joined, first)
        np.testing.assert_array_equal(counts, item_counts(whole, len(VOCABULARY)))
        np.testing.assert_array_equal(add_item_counts(learned, join_logs(first, whole), first), counts)
    else:
        counts = add_item_counts(learned, join_logs(None, whole), None)
        np.testing.assert_array_equal(counts, item_counts(whole, len(VOCABULARY)))
    np.testing.assert_array_equal(add_item_counts(counts, join_logs(None, whole), None), counts)


def test_counts_of_another_log_are_added():
    old, new = built(("u", "aab", range(3))), built(("v", "bc", range(2)))
    counts = item_counts(join_logs(None, old), len(VOCABULARY))
    assert add_item_counts(counts, join_logs(None, new), None)[2:6].tolist() == [2, 2, 1, 0]


def test_a_log_with_targets_does_not_continue_one_without():
    log = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "kind": ["a", "b", "b"]})
    old, new = (build_sequences(log, event_type="kind", **targets)[0] for targets in ({}, {"targets": "b"}))
    with pytest.raises(ValueError, match="Only one .* has weights; prepare both with the same targets"):
        join_logs(old, new)


def test_baskets_of_a_log_that_grows():
    """A new event of the second of an earlier one joins its basket; whole baskets are held out."""
    old = build_sequences(events(("u", "abc", [0, 0, 5])), tokenizer=VOCABULARY, group="timestamp")[0]
    week = events(("u", "cdefghij", [5, 5, 6, 6, 7, 8, 9, 9]))
    joined = join_logs(old, build_sequences(week, tokenizer=VOCABULARY, group="timestamp")[0])
    assert described(joined) == {"u": ("abcdefghij", 3, 7, 10)}
    starts = read_histories(joined, "basket_starts")[0]
    assert [n for n, start in enumerate(starts) if start] == [0, 2, 4, 6, 7, 8]
    assert joined["validation_end"][:] == [8]
    plain = build_sequences(week, tokenizer=VOCABULARY)[0]
    with pytest.raises(ValueError, match="Only one of the earlier log and the new one has baskets; .* the same group"):
        join_logs(old, plain)


def test_the_last_targets_of_a_log_that_grows_are_held_out():
    """Bought items are targets: the last two of u, but not of v, whose last but one is an earlier event."""
    options = {"event_type": "kind", "event_types": "view,buy", "targets": "buy"}

    def typed(*rows: tuple):
        log = events(*((user, items.lower(), times) for user, items, times in rows))
        bought = [item.isupper() for _, items, _ in rows for item in items]
        log = log.with_columns(kind=pl.Series(["buy" if buy else "view" for buy in bought]))
        return build_sequences(log, tokenizer=VOCABULARY, **options)[0]

    old = typed(("u", "aBc", range(3)), ("v", "aBC", range(3)))
    joined = join_logs(old, typed(("u", "defGhIj", range(10, 17)), ("v", "defGh", range(10, 15))))
    assert described(joined) == {"u": ("abcdefghij", 3, 6, 9), "v": ("abcdefgh", 3, 8, 8)}
    assert joined["validation_end"][:] == [8, 8]
