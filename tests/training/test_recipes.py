import json
import shlex
import sys
from dataclasses import asdict

import numpy as np
import pytest

from blossomrec_hf.commands.train import BUILT_IN, ModelArguments, new_model
from blossomrec_hf.data import EventTable
from blossomrec_hf.sharing.cards import train_command
from blossomrec_hf.training import LogArguments, LoopArguments, changed_arguments, parse_arguments
from blossomrec_hf.training.recipes import RECIPES, suitable_recipe


def parse(monkeypatch, *arguments, **options):
    monkeypatch.setattr(sys, "argv", ["train", "--data", "log.csv", *map(str, arguments)])
    return parse_arguments(LogArguments, ModelArguments, LoopArguments, recipes=RECIPES, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_reaches_the_model_or_the_loop(monkeypatch, log, name):
    _, model_args, args = parse(monkeypatch, "--recipe", name)
    table = EventTable.from_dataset(log[0])
    table.events["timestamps"] = np.arange(len(table.events["input_ids"]))
    config = new_model(model_args, 1, table, len(log[1]), 0.0).config
    for setting, value in RECIPES[name].settings.items():
        value = value.split(",") if setting == "time_features" else value
        assert getattr(args, setting, getattr(config, setting, None)) == value, setting


def test_what_the_user_gives_replaces_the_recipe(monkeypatch, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.25\nmax_length: 77\n")
    more = ("--max_length", 99, "--config_overrides", '{"temperature": 0.5, "power_law_base": 3}')
    _, model_args, args = parse(monkeypatch, "--recipe", "long", "--config", file, *more)
    assert (args.max_length, args.learning_rate, args.warmup_steps) == (99, 0.25, 500)
    overrides = json.loads(model_args.config_overrides)
    assert (overrides["temperature"], overrides["power_law_base"], overrides["scoring"]) == (0.5, 3, "cosine")

    file.write_text("recipe: long\n")
    assert parse(monkeypatch, "--config", file)[2].max_length == 1000


def test_an_unknown_recipe_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="`recipe` is 'lang'; it may be short, medium, "):
        parse(monkeypatch, "--recipe", "lang")
    with pytest.raises(ValueError, match="--recipe is no option"):
        monkeypatch.setattr(sys, "argv", ["train", "--data", "log.csv", "--recipe", "long"])
        parse_arguments(LogArguments, ModelArguments, LoopArguments)


def test_without_a_recipe_nothing_changes(monkeypatch):
    assert parse(monkeypatch)[2] == LoopArguments()


def test_there_are_as_many_key_value_heads_as_query_heads_unless_some_are_named(monkeypatch):
    assert parse(monkeypatch)[1].num_key_value_heads == 8
    assert parse(monkeypatch, "--num_attention_heads", 4)[1].num_key_value_heads == 4
    assert parse(monkeypatch, "--num_attention_heads", 4, "--num_key_value_heads", 2)[1].num_key_value_heads == 2


def test_the_suitable_recipe_is_that_of_the_median_user():
    assert suitable_recipe(np.array([3, 19, 5000])) == "short"
    assert suitable_recipe(np.array([3, 20, 5000])) == "medium"


def test_the_suitable_recipe_has_no_average_of_sharded_weights(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = parse(monkeypatch, suitable="medium")[2]
    assert (args.ema_decay, args.num_train_epochs) == (0, RECIPES["medium"].settings["num_train_epochs"])
    assert "without `ema_decay`: a sharded model (FSDP) has no average" in caplog.text
    assert parse(monkeypatch, "--ema_decay", 0.9, suitable="medium")[2].ema_decay == 0.9  # refused by the loop
    assert parse(monkeypatch, "--recipe", "medium", suitable="short")[2].ema_decay == 0.99


def test_the_suitable_recipe_is_used_unless_one_or_a_file_is_named(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    _, model_args, args = parse(monkeypatch, "--learning_rate", 0.5, suitable="medium")
    assert (args.max_length, args.learning_rate) == (1000, 0.5)
    assert json.loads(model_args.config_overrides)["scoring"] == "cosine"
    assert caplog.messages == ["Recipe medium: most users have 20 events or more. --recipe names another, or none."]
    assert parse(monkeypatch, "--recipe", "long", suitable="medium")[1].num_hidden_layers == 6
    assert parse(monkeypatch, "--recipe", "none", suitable="medium")[2] == LoopArguments()

    file = tmp_path / "run.yaml"  # of an earlier run, with all its settings
    file.write_text("learning_rate: 0.25\n")
    _, model_args, args = parse(monkeypatch, "--config", file, suitable="medium")
    assert args == LoopArguments(learning_rate=0.25) and model_args.config_overrides == "{}"

    monkeypatch.setattr(sys, "argv", ["train"])
    classes = (LogArguments, ModelArguments, LoopArguments)
    args = parse_arguments(*classes, built_in=BUILT_IN, recipes=RECIPES, suitable="medium")[2]
    assert args.max_length == LoopArguments().max_length


@pytest.mark.parametrize("name", [*RECIPES, "none"])
def test_the_command_of_a_card_repeats_the_run(monkeypatch, name):
    """Whatever recipe suits the log."""
    log_args, model_args, args = parse(monkeypatch, "--recipe", name, "--weight_decay", 0.02, "--seed", 3)
    configuration = {**asdict(log_args), **asdict(model_args), **args.resume_critical_args()}
    run = {"seed": configuration.pop("seed"), "changed_arguments": changed_arguments(configuration)}
    words = shlex.split(train_command(run).replace("\\\n", ""))
    assert words[:2] == ["blossomrec", "train"]
    assert parse(monkeypatch, *words[2:], suitable="medium") == (log_args, model_args, args)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_suit_the_built_in_data_and_other_numbers_of_heads(monkeypatch, name):
    for words in ([], ["--num_attention_heads", "2"], ["--data", "log.csv", "--num_attention_heads", "4"]):
        monkeypatch.setattr(sys, "argv", ["train", "--recipe", name, *words])
        classes = (LogArguments, ModelArguments, LoopArguments)
        model_args = parse_arguments(*classes, built_in=BUILT_IN, recipes=RECIPES)[1]
        assert model_args.num_attention_heads % model_args.num_key_value_heads == 0, (words, model_args)
    if name != "tiny":
        assert parse(monkeypatch, "--recipe", name)[1].num_key_value_heads == 8
