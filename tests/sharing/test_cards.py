"""Cards say what the runs wrote, in a form that the Hub reads."""

import importlib
import json
import shlex
import sys
from pathlib import Path
from statistics import fmean

import pytest
from card_rules import metadata_errors
from checkpoint_cases import error_message
from huggingface_hub import ModelCard

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.sharing.cards import model_card, train_command, write_card
from blossomrec_hf.sharing.summary import group_runs, write_summary
from blossomrec_hf.training import changed_arguments


REPOSITORY = Path(__file__).parents[2]
CARDS = REPOSITORY / "model_cards"
NAMES = ["blossomrec-ml-1m", "blossomrec-ml-1m-large"]
MAKE = """blossomrec card --results model_cards/{name}.json --dataset_name MovieLens-1M
    --published model_cards/published-ml-1m.json --output"""


def run(seed=1, *, types=("blossom",), ndcg=0.2, **configuration):
    figures = {f"{name}@10{suffix}": ndcg for name in ("recall", "ndcg") for suffix in ("", "_all")}
    configuration = {"data": "logs/ring.csv", "attention_types": list(types), "max_length": 50, **configuration}
    training = {"seconds": 12.0, "epochs": 3}
    run = {"configuration": configuration, "seed": seed, "test": figures, "exclude_seen": True}
    run["changed_arguments"] = changed_arguments(configuration)
    return {**run, "training": training, "device": "a machine"}


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_card_is_the_one_that_its_command_makes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", [*shlex.split(MAKE.format(name=name))[1:], str(tmp_path / "card.md")])
    importlib.import_module("blossomrec_hf.commands.card").main()
    assert (tmp_path / "card.md").read_text() == (CARDS / f"{name}.md").read_text()


@pytest.mark.parametrize("name, groups", [(NAMES[0], 16), (NAMES[1], 30)])
def test_every_figure_of_the_committed_card_is_in_its_results(name, groups):
    runs = json.loads((CARDS / f"{name}.json").read_text())
    card = ModelCard.load(CARDS / f"{name}.md")
    assert metadata_errors(str(card), "model") == []
    assert card.data.model_name == name
    suffixes = {"items already seen masked": "", "nothing masked": "_all", "100 items drawn": "_uni100"}
    seen = set()
    for result in card.data.eval_results:
        suffix = next(suffix for words, suffix in suffixes.items() if words in result.dataset_args["protocol"])
        of_result = [
            found
            for found in runs
            if group_runs([found])[0].label == result.dataset_args["attention"]
            and found["configuration"]["max_length"] == result.dataset_args["max_length"]
            and found.get("implementation", "") in result.dataset_config
            and f"{found['configuration']['num_key_value_heads']} key/value heads" in result.dataset_config
        ]
        values = [found["test"][result.metric_type + suffix] for found in of_result]
        assert len(values) == len(result.dataset_args["seeds"]) == 3
        assert result.metric_value == pytest.approx(fmean(values), abs=1e-6)
        assert {result.dataset_args["hardware"]} == {found["device"] for found in of_result}
        assert f"{fmean(values):.4f}" in card.text
        seen.add((result.dataset_config, result.metric_type))
    assert len(seen) == len(card.data.eval_results) == groups
    for row in json.loads((CARDS / "published-ml-1m.json").read_text()):
        assert f"| {row['model']} |" in card.text and row["source"].startswith("[arXiv ")


def test_seeds_are_joined_and_baselines_stand_apart():
    runs = [run(2, ndcg=0.3), run(1, ndcg=0.2), run(1, types=["full"], ndcg=0.9), run(1, hidden_size=32)]
    groups = group_runs(runs)
    assert [(group.label[:4], len(group.runs)) for group in groups] == [("Blos", 2), ("Blos", 1), ("full", 1)]
    card = model_card(runs, name="ring")
    assert metadata_errors(str(card), "model") == []
    found = {result.metric_value for result in card.data.eval_results}
    assert found == {0.25, 0.2}
    assert "| BlossomRec | 50 | None / None | – | 2 | 0.2500 ± 0.0707 |" in card.text
    assert "| full attention" in card.text and "0.9000" in card.text
    alone = model_card([run(types=["full"])], name="ring")
    assert len(alone.data.eval_results) == 4
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_where_users_repeat_items_nothing_is_masked_and_repeats_stand_apart():
    figures = {f"{name}@10{suffix}": 0.25 for name in ("recall", "ndcg") for suffix in ("", "_repeated", "_new")}
    repeats = {**run(), "test": figures, "exclude_seen": False, "repeat_share": 0.67}
    text = model_card(repeats, name="shop").text
    assert "| Recall@10, nothing masked | NDCG@10, nothing masked | Recall@10, repeated targets |" in text
    assert "67.0% of the test items already occur in their user's history" in text and "seen items masked" not in text
    assert "cannot show both" in error_message(lambda: model_card([run(), repeats], name="shop"), ValueError)


def test_a_refit_has_the_figures_of_the_first_run_and_says_so():
    first = run()
    refit = {**first, "validation": first["test"], "refit": True}
    del refit["test"]
    text = model_card(refit, name="shop").text
    assert (
        "Validation figures on ring.csv: the target" in text and "0.2000" in text and "It has no test figures." in text
    )
    nothing = {name: value for name, value in first.items() if name != "test"}
    card = model_card(nothing, name="shop")
    assert "nothing was measured" in card.text and not card.data.eval_results
    assert metadata_errors(str(card), "model") == []


def test_the_command_names_what_differs_from_the_defaults():
    command = train_command(run(3, types=["full", "blossom"], num_key_value_heads=2, patience=20, learning_rate=0.002))
    assert " ".join(command.replace("\\\n", " ").split()) == (
        "blossomrec train --recipe none --data logs/ring.csv --attention_types full blossom --num_key_value_heads 2 "
        "--max_length 50 --learning_rate 0.002 --seed 3"
    )


def test_what_is_not_known_is_not_said(tmp_path):
    bare = {name: run()[name] for name in ("seed", "test", "exclude_seen")}
    bare["configuration"] = {"data": None, "attention_types": ["blossom"]}
    text = model_card(bare, name="x").text
    assert "Made with" not in text and "on a machine" not in text and "built-in generated log" in text
    assert "recall@20" in error_message(lambda: model_card(bare, name="x", k=20), ValueError)
    assert "no run" in error_message(lambda: model_card([], name="x"), ValueError)
    assert "training_summary.json" in error_message(lambda: write_card(tmp_path), ValueError)


def test_a_license_that_the_hub_does_not_know_is_found():
    card = model_card(run(), name="x", license="apache-2.0")
    assert metadata_errors(str(card), "model") == []
    assert metadata_errors(str(model_card(run(), name="x", license="mine")), "model") != []


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, []),
        ({"time_features": "next_gap,hour"}, ["timestamps", "now"]),
        ({"event_types": True}, ["event_types"]),
        ({"time_features": "previous_gap", "event_types": True}, ["timestamps", "now", "event_types"]),
    ],
)
def test_the_example_of_a_card_gives_the_columns_that_the_model_reads(settings, columns):
    text = str(model_card(run(**settings), name="name"))
    (line,) = [line for line in text.splitlines() if line.startswith("recommender(")]
    compile(line, "card", "exec")
    assert [name for name in ("timestamps", "now", "event_types") if f'"{name}": ' in line] == columns


def test_the_example_of_a_card_has_items_of_the_catalog(tmp_path):
    write_summary(tmp_path, run(time_features="hour"))
    BlossomRecTokenizer.from_items(["sku-1", 'a "b"', "é"]).save_pretrained(tmp_path)
    assert 'recommender({"items": ["sku-1", "a \\"b\\""], "timestamps": [' in write_card(tmp_path).read_text("utf-8")
    BlossomRecTokenizer.from_items([7]).save_pretrained(tmp_path)
    assert 'recommender({"items": [7], "timestamps": [1795680000], "now": ' in write_card(tmp_path).read_text("utf-8")
    write_summary(tmp_path, run())
    BlossomRecTokenizer.from_items(["a", "b", "c", "d", "é"]).save_pretrained(tmp_path)
    assert 'recommender(["a", "b", "c", "d"], top_k=10)' in write_card(tmp_path).read_text("utf-8")


def test_a_card_names_what_the_model_reads_besides_item_ids():
    def sentence(**settings) -> str:
        text = str(model_card(run(**settings), name="name"))
        return text[text.index(" Besides") : text.index("\n", text.index(" Besides"))] if "Besides" in text else ""

    assert sentence() == ""
    features = {"item_features": "genres,title_vector"}
    assert sentence(**features) == " Besides item ids, it reads the features of items (genres, title_vector)."
    assert sentence(time_features="hour", event_types=True, **features) == (
        " Besides item ids, it reads the times of events (hour), the types of events and the features of items "
        "(genres, title_vector)."
    )


def test_a_card_says_what_becomes_of_new_items():
    assert "has no embedding: it is never recommended" in str(model_card(run(), name="name"))
    with_features = str(model_card(run(item_features="genres"), name="name"))
    assert "recommended by its features" in with_features and "has no embedding" not in with_features


def test_a_model_with_a_stream_of_ones_own_needs_its_code():
    assert "`trust_remote_code` is not needed. Remote" in str(model_card([run()], name="m"))
    card = str(model_card([run(types=("blossom+recent", "full"))], name="m"))
    assert "`trust_remote_code` is not needed where the code that registers `recent` is imported, too. Remote" in card
