"""The overview of a data set, and the command that prepares one."""

import base64
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import make_model

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.commands import prepare
from blossomrec_hf.data import build_sequences, choose_fold, generate_log, split
from blossomrec_hf.data.overview import describe, describe_folder, summary, warnings, write_report
from blossomrec_hf.training import LogArguments


pytest.importorskip("matplotlib", reason="the extra report is not installed")


@pytest.fixture
def log() -> pl.DataFrame:
    """Users of 1, 2, 3 … 100 events; the last two of the longest repeat."""
    users = np.repeat(np.arange(100), np.arange(1, 101))
    items = np.concatenate([np.arange(length) for length in range(1, 101)])
    items[-2:] = items[-3]
    return pl.DataFrame({"user": users, "item": items, "timestamp": 1_600_000_000 + np.arange(users.size)})


def test_figures(log):
    figures = describe(build_sequences(log)[0])
    assert (figures["users"], figures["items"], figures["interactions"]) == (100, 99, 5050)
    assert figures["density"] == 5050 / 9900
    assert figures["repeated_share"] == 2 / 5050
    assert figures["time_span"] == (1_600_000_000, 1_600_005_049)
    assert figures["item_frequencies"].tolist() == sorted([*range(4, 101), 5, 1], reverse=True)
    lengths = np.arange(1, 101)
    for percent, length in figures["covering_length"].items():
        assert np.minimum(lengths, length).sum() >= 5050 * percent / 100 > np.minimum(lengths, length - 1).sum()


def test_ties_types_and_warnings():
    """Three events of u share a second, and u has 5 of 7 events."""
    log = pl.DataFrame(
        {
            "user": list("uuuuuvv"), "item": range(7), "timestamp": [10**9 + second for second in (5, 5, 5, 6, 7, 7, 8)],
            "event": ["view", "buy", "view", "view", "buy", "view", "view"],
        }
    )  # fmt: skip
    figures = describe(build_sequences(log, event_type="event")[0])
    assert figures["tied_share"] == 2 / 7 and figures["event_types"] == {"view": 5, "buy": 2}
    rows = summary(figures, None)
    assert ("Event types", "view 5, buy 2") in rows and (
        "Events in the same second as the one before",
        "28.6%",
    ) in rows
    said = [value for name, value in rows if name == "Warning"]
    assert said[0] == "one user has 71% of the events" and said[1].startswith(
        "29% of the events are in the second of the one"
    )
    grouped = warnings(describe(build_sequences(log, event_type="event", group="timestamp")[0]))
    assert not any("the events are in the second of the one" in sentence for sentence in grouped)  # they are baskets
    figures = describe(build_sequences(log, timestamp="")[0])
    assert warnings(figures)[0].startswith("the order of time is unknown") and "tied_share" not in figures


EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 500)), min_size=1, max_size=60)


@settings(max_examples=30, deadline=None)
@given(events=EVENTS)
def test_months_cold_items_and_unseen_targets(events):
    """Against plain Python, on events of a user with an item on one of 500 days."""
    begin = datetime(2023, 1, 1, tzinfo=UTC)
    events = [(user, item, begin + timedelta(days=day)) for user, item, day in events]
    log = pl.DataFrame(events, ["user", "item", "timestamp"], orient="row")
    dataset, tokenizer = build_sequences(log)
    figures = describe(dataset, tokenizer)

    months = sorted({f"{time:%Y-%m}" for _, _, time in events})
    first = {item: min(time for _, other, time in events if other == item) for _, item, _ in events}
    assert figures["months"] == [
        (
            month,
            sum(f"{time:%Y-%m}" == month for _, _, time in events),
            sum(f"{time:%Y-%m}" == month for time in first.values()),
        )
        for month in months
    ]
    histories = [
        [item for _, item, _ in sorted((event for event in events if event[0] == user), key=lambda event: event[2])]
        for user in {user for user, _, _ in events}
    ]
    trained = {item for history in histories for item in history[:-2]}
    tests = [history[-1] for history in histories if len(history) >= 2]
    assert figures["unseen_targets"] == (sum(item not in trained for item in tests), len(tests))


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("order, ordered", [("ascending", 90), ("descending", 0), ("shuffled", None)])
def test_ties_that_are_sorted_by_item_id(order, ordered, as_text):
    """Ten users with ten events each in one second; 9 is before 10 as a number, and after it as a text."""
    rng = np.random.default_rng(0)
    histories = [rng.choice(np.arange(1, 200), 10, replace=False) for _ in range(10)]
    if order != "shuffled":
        histories = [np.sort(items)[:: 1 if order == "ascending" else -1] for items in histories]
    log = pl.DataFrame(
        {"user": np.repeat(np.arange(10), 10), "item": np.concatenate(histories), "timestamp": [1_600_000_000] * 100}
    )
    log = log.cast({"item": pl.String}) if as_text else log
    dataset, tokenizer = build_sequences(log)
    figures = describe(dataset, tokenizer)
    if ordered is None:
        ordered = sum(int(a < b) for items in histories for a, b in pairwise(items))
    assert figures["ordered_ties"] == (ordered, 90)
    said = [sentence for sentence in warnings(figures) if "sorted by item id" in sentence]
    assert len(said) == (order != "shuffled")
    assert all(sentence.startswith("100% of the 90 ties are sorted by item id") for sentence in said)
    assert "ordered_ties" not in describe(dataset)


def test_a_warning_counts_the_test_items_that_never_occur_in_training():
    log = pl.DataFrame({"user": list("aaabbbccc"), "item": list("xyzxyzzyx"), "timestamp": range(9)})
    figures = describe(build_sequences(log)[0])
    assert figures["unseen_targets"] == (0, 3)  # x and z are trained
    assert not any("never occur" in sentence for sentence in warnings(figures))
    figures = describe(build_sequences(log.filter(pl.col("user") != "c"))[0])
    assert warnings(figures)[-1].startswith("2 of 2 test targets (100%) are items that never occur in training")
    assert ("Test targets that never occur in training", "2 of 2") in summary(figures, None)


def test_a_page_holds_everything(log, tmp_path):
    titles = pl.DataFrame({"item_id": [0, 1], "title": ["A <b>", "B"]})
    build_sequences(log, k_core=5, items=titles, output_dir=tmp_path / "out")
    write_report(tmp_path / "page.html", tmp_path / "out")
    page = (tmp_path / "page.html").read_text()
    for text in (
        "k-core 5, 5",
        "2020-09-13 12:26",
        "<td>2020-09</td><td>5,035</td><td>97</td>",
        "A &lt;b&gt;",
        "Bad rows skipped: 0",
    ):
        assert text in page
    assert "http" not in page  # self-contained
    image = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    write_report(tmp_path / "page.png", tmp_path / "out")
    assert image.startswith(b"\x89PNG") and (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "page.html", "page.png"}
    with pytest.raises(ValueError, match="an .html page or a .png"):
        write_report(tmp_path / "page.pdf", tmp_path / "out")


def test_the_command_builds_all(log, tmp_path, capsys):
    log.write_csv(tmp_path / "log.csv")
    out = tmp_path / "runs" / "out"
    prepare.main(
        [str(tmp_path / "log.csv"), "--output_dir", str(out), "--k_core", "5", "--report", str(tmp_path / "page.html")]
    )
    assert "Users: 96" in capsys.readouterr().out
    assert len(load_from_disk(out)) == 96 and len(BlossomRecTokenizer.from_pretrained(out)) > 2
    assert {"README.md", "filters.json"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(out)])
    assert "--overwrite" in capsys.readouterr().err
    prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(out), "--overwrite"])
    assert len(load_from_disk(out)) == 100


@pytest.mark.parametrize("how", ["time", "user"])
def test_the_command_splits(log, tmp_path, how):
    log.write_parquet(tmp_path / "log.parquet")
    options = {
        "time": ["--validation_from", "1600004000", "--test_from", "1600004500"],
        "user": ["--validation_users", "0.2", "--test_users", "0.2"],
    }[how]
    out = tmp_path / "out"
    prepare.main([str(tmp_path / "log.parquet"), "--output_dir", str(out), "--split", how, *options])
    dataset = load_from_disk(out)
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()
    if how == "time":
        times = [time for row in dataset for time in row["timestamps"][: row["train_end"]]]
        assert max(times) == 1_600_003_999
    else:
        assert len(split(dataset, "train")) + len(split(dataset, "validation")) + len(split(dataset, "test")) >= 98
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "out"}


def test_the_command_builds_with_the_ids_of_a_model(tmp_path, capsys, caplog):
    """A week of digits for a text catalog."""
    tokenizer = BlossomRecTokenizer.from_items(["a-1", "12", "7"])
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "week.csv").write_text("user,item\nu,7\nu,12\nu,5\n")
    arguments = [str(tmp_path / "week.csv"), "--output_dir", str(tmp_path / "out"), "--tokenizer"]
    prepare.main([*arguments, str(tmp_path / "model")])
    assert load_from_disk(tmp_path / "out")["input_ids"][:] == [[4, 3, tokenizer.unk_token_id]]
    assert "1 of 3 items of the log are not in the tokenizer's vocabulary" in caplog.text
    assert BlossomRecTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(SystemExit, match="2"):
        prepare.main([*arguments, str(tmp_path / "nothing"), "--overwrite"])
    assert "--tokenizer is" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_and_leaves_nothing(log, tmp_path, capsys):
    log.write_csv(tmp_path / "log.csv")
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(tmp_path / "log.csv"), "--output_dir", str(tmp_path / "out"), "--k_core", "500"])
    assert "k-core 500, 500" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_the_command_splits_into_folds_and_training_chooses_one(tmp_path):
    generate_log(60).with_columns(pl.col("timestamp") - 1_600_000_000).write_parquet(tmp_path / "log.parquet")
    last = generate_log(60)["timestamp"].max() - 1_600_000_000
    options = ["--split", "folds", "--test_from", "0.6", "--fold_width", f"{last // 10}s", "--folds", "3"]
    prepare.main([str(tmp_path / "log.parquet"), "--output_dir", str(tmp_path / "out"), *options])
    ends = [LogArguments(data=str(tmp_path / "out"), fold=fold).build()[0]["train_end"] for fold in (0, 1, 2, None)]
    sums = [sum(end) for end in ends]
    assert sums[0] < sums[1] < sums[2] == sums[3]
    with pytest.raises(ValueError, match="fold is 0, but the data set has 0 folds; prepare it with `--split folds`"):
        choose_fold(build_sequences(generate_log(20))[0], 0)
    with pytest.raises(ValueError, match="fold is 3, but the data set has 3 folds; it may be from 0 to 2"):
        LogArguments(data=str(tmp_path / "out"), fold=3).build()
    with pytest.raises(ValueError, match="`fold` is 1, but `data` is not prepared"):
        LogArguments(data=str(tmp_path / "log.parquet"), fold=1).build()


def test_a_page_of_items_without_titles(tmp_path):
    log = pl.DataFrame({"user": [1, 1, 2], "item": [1, 2, 3]})
    items = pl.DataFrame({"item": [1, 2], "title": ["One", None], "genre": ["a", "b"]})
    build_sequences(log, items=items, item_categories="genre", output_dir=tmp_path / "out")
    write_report(tmp_path / "page.html", tmp_path / "out")
    page = (tmp_path / "page.html").read_text()
    assert "<ol>\n<li>One</li>\n</ol>" in page and "<li>1 of 3 items have no genre</li>" in page


@pytest.mark.parametrize("first, counters", [(10, True), (1_000_000_000, False)])
def test_counters_in_place_of_dates_are_named(first, counters):
    log = pl.DataFrame({"user": [1, 1, 2, 2], "item": [1, 2, 1, 2], "time": [first, first + 1, first + 2, first + 3]})
    dataset, tokenizer = build_sequences(log)
    said = [text for text in warnings(describe(dataset, tokenizer)) if "may be no dates but counters" in text]
    assert len(said) == counters


def test_months_are_named_first_and_last(tmp_path):
    log = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "time": [1_600_000_000, 1_600_000_001, 1_610_000_000]})
    for number, rows in enumerate((log, log[:2])):
        build_sequences(rows, output_dir=tmp_path / str(number))
        said = dict(summary(describe_folder(tmp_path / str(number)), None))["Interactions per month"]
        assert said == (
            "2 in 2020-09" if number else "first 2 in 2020-09, last 1 in 2021-01, median 2, most 2 in 2020-09"
        )
