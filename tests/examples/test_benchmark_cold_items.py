"""How withheld items are measured, and that they are recommended by their features."""

import json
import re

import numpy as np
import polars as pl
import pytest
from example_cases import load_example

from blossomrec_hf.data import build_sequences
from blossomrec_hf.data.storage import export_folder


GROUPS, ITEMS = 10, 100


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An exported data set of users who stay in one group of items, which is a feature of the items."""
    folder, rng = tmp_path_factory.mktemp("cold"), np.random.default_rng(5)
    users = np.repeat(np.arange(150), 12)
    items = np.concatenate([user % GROUPS + GROUPS * rng.permutation(ITEMS // GROUPS)[:9] for user in range(150)])
    users = users.reshape(150, 12)[:, :9].ravel()
    table = pl.DataFrame({"item_id": range(ITEMS), "genre": [f"genre {item % GROUPS}" for item in range(ITEMS)]})
    build_sequences(
        pl.DataFrame({"user": users, "item": items}),
        items=table,
        item_categories="genre",
        output_dir=folder / "data",
    )
    export_folder(folder / "data", folder / "data.safetensors")
    return str(folder / "data.safetensors")


@pytest.fixture(scope="module")
def example():
    return load_example("benchmarks/cold_items.py")


def test_withheld_items_are_in_no_training_event(example, data):
    rows, features = example.read_log(data, "all")
    log = example.Log(rows, features.num_items, 0.2, seed=3)
    assert log.vocab_size - log.first_withheld == ITEMS // 5
    assert sorted(log.order.tolist()) == list(range(ITEMS))
    trained = log.training_rows(log.first_withheld)
    assert all(row["input_ids"].max() < log.first_withheld for row in trained)
    for row in log.validation_rows(log.first_withheld, 5):
        assert row["target_ids"][0] < log.first_withheld and row["seen_ids"].max() < log.first_withheld
        assert len(row["input_ids"]) <= 5
    whole = sum(len(row["train"]) for row in rows)
    assert sum(len(row["input_ids"]) for row in log.training_rows(log.vocab_size)) == whole
    assert log.counts(log.vocab_size).sum() == whole
    # The features follow their items to the new ids: all events of a user are of one genre.
    genre = features.select(log.order).columns["genre"]
    assert all(len({int(genre.codes[item - 2]) for item in history}) == 1 for history in log.past if len(history))


def test_the_figures(example, data, monkeypatch, capsys):
    arguments = f"x --data {data} --share 0.2 --seeds 1 --hidden_size 16 --layers 1 --heads 2 --key_value_heads 1"
    training = {"num_train_epochs": 12, "eval_epochs": 4, "learning_rate": 1e-2, "tokens_per_step": 300}
    overrides = ["--config_overrides", '{"hidden_dropout_prob": 0.1}', "--training", json.dumps(training)]
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--max_length", "20", *overrides])
    example.main()
    printed = capsys.readouterr().out
    figures = json.loads(re.search(r"^seed 1, \d+ s: (.*)$", printed, re.MULTILINE)[1])
    assert re.search(r"^withheld items +20.0000 +20.0000$", printed, re.MULTILINE)
    assert figures["withheld items"] == 20 and figures["withheld targets"] > 10
    # Two or three of the withheld items are of a user's genre.
    assert figures["withheld: recall@10, without training"] > 0.9 > figures["withheld: recall@10, popularity"]
    assert figures["validation: recall@10, without training"] > 0.9
    assert figures["withheld: recall@10, random order"] < 0.6
    # More candidates can only lower the rank of a target.
    for name in ("without training", "trained on them"):
        assert figures[f"warm: recall@10, {name}"] <= figures[f"warm, among the warm: recall@10, {name}"]
    assert "warm: recall@10, ids alone" not in figures and "warm, among the warm: recall@10, ids alone" in figures
    assert figures["share in the top 10, without training"] > 0.05


def test_a_draw_without_targets_is_refused_before_training(example, data, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--data", data, "--share", "0.004"])
    with pytest.raises(SystemExit) as exit_info:
        example.main()
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("`share` withholds 0 of 100 items, and no target is a withheld test target;")
