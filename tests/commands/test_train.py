import json
import re

import polars as pl
import pytest
import torch
from example_cases import SMALL_MODEL
from safetensors.torch import load_file
from small_cases import small_log
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blossomrec_hf.data import build_sequences, hold_out_nothing, repeat_share
from blossomrec_hf.data.metadata import read_item_metadata
from blossomrec_hf.data.storage import load_folder
from blossomrec_hf.sharing.cards import train_command
from blossomrec_hf.training.recipes import RECIPES


def test_trains_saves_and_recommends(trained, log_file):
    folder, printed, results_file = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 62

    table = re.search(r"^ndcg, all items\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$", printed, re.MULTILINE)
    (result,) = json.loads(results_file.read_text())
    assert float(table[3]) == round(result["test"]["ndcg@10"], 4) > 0.3  # chance: 0.076
    assert result["seed"] == 42 and "seed" not in result["configuration"]
    assert result["configuration"]["hidden_size"] == 16 and result["training"]["epochs"] == 15
    # Half of the users have 20 events or more: recipe "medium", of which the options replace settings.
    settings = {**result["configuration"], "scoring": model.config.scoring}
    for name in ("hidden_dropout_prob", "ema_decay", "eval_epochs", "scoring"):
        assert settings[name] == RECIPES["medium"].settings[name], name
    assert settings["max_length"] == 20

    # Users of this log repeat items: nothing is excluded, and both kinds of targets are reported. The model knows it.
    share = repeat_share(build_sequences(log_file)[0])
    assert f"{share:.1%} of the test targets already occur in their user's history: nothing is excluded" in printed
    assert model.config.repeat_share == result["repeat_share"] == share > 0.01 and not result["exclude_seen"]
    assert {"ndcg@10_repeated", "ndcg@10_new"} <= result["test"].keys() and "ndcg@10_unseen" not in result["test"]
    assert re.search(r"^ndcg, repeated ", printed, re.MULTILINE) and re.search(r"^ndcg, new ", printed, re.MULTILINE)
    assert re.search(r"^user (\d+): the latest items \[(.*)\]$", printed, re.MULTILINE)
    assert len(set(re.findall(r"^ +(\d+) +-?[\d.]+$", printed, re.MULTILINE))) == 10


def test_three_processes_write_what_one_does(run_command, log_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # joins the processes
    # Nothing is drawn in training, and nothing is selected by scores that differ in their rounding.
    settings = [*SMALL_MODEL, "--data", log_file, "--num_train_epochs", 2, "--refit"]
    settings += ["--recipe", "none", "--hidden_dropout_prob", 0, "--attention_types", "full"]
    places, folders = {1: "cpu:0", 3: "3 processes (cpu)"}, {}
    for number, place in places.items():
        folder = folders[number] = tmp_path / f"on_{number}" / "run"
        printed = run_command("train", *settings, "--output_dir", folder, num_processes=number)
        assert re.findall(r"weights on (.*)", printed) == [place] and printed.count("A new model") == 1
    one, three = (sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders.values())
    assert [path for path in three if not re.search(r"random_states_[12]\.pkl", path.name)] == one
    for part in ("", "refit"):
        summaries = [json.loads((folder / part / "training_summary.json").read_text()) for folder in folders.values()]
        for name in {"test", "validation"} & summaries[0].keys():
            assert summaries[0][name] == pytest.approx(summaries[1][name], abs=0.02)
        weights = [load_file(folder / part / "model.safetensors") for folder in folders.values()]
        assert weights[0].keys() == weights[1].keys()
        for name, weight in weights[0].items():
            assert torch.allclose(weight, weights[1][name], atol=1e-5), name


ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu")


def test_a_second_seed_is_added_and_a_finished_run_resumes_to_the_same(run_command, trained, log_file, tmp_path):
    folder, printed, results_file = trained
    arguments = (*SMALL_MODEL, "--data", log_file, "--num_train_epochs", 15, "--results_json", results_file)
    again = run_command("train", *arguments, "--output_dir", folder, "--resume", launcher=ACCELERATE)
    assert again.splitlines()[-18:] == printed.splitlines()[-18:]
    overrides = ("--config_overrides", '{"objective": "gbce", "num_negatives": 7}')
    types = ("--attention_types", "full", "short_term")
    run_command("train", *arguments, "--output_dir", tmp_path, "--seed", 7, *types, *overrides)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.objective, config.num_negatives, config.attention_types) == ("gbce", 7, ["full", "short_term"])
    results = json.loads(results_file.read_text())
    # A run again under another commit (somebody at work in this repository) is another result.
    commits = len({result["commit"] for result in results if result["seed"] == 42})
    seeds_and_types = [(result["seed"], *result["configuration"]["attention_types"]) for result in results]
    assert seeds_and_types == [(42, "blossom")] * commits + [(7, "full", "short_term")]


def test_targets_weights_baskets_and_windows_of_prepared_data(run_command, tmp_path):
    log = small_log().with_row_index("time")
    bought = (pl.col("time") % 3 == 0).replace_strict({True: "buy", False: "view"}, return_dtype=pl.String)
    log.with_columns(event_type=bought, timestamp=pl.col("time") // 2).drop("time").write_csv(tmp_path / "log.csv")
    run_command("prepare", tmp_path / "log.csv", "--output_dir", tmp_path / "data", "--event_type", "event_type",
        "--targets", "buy", "--type_weights", "buy=2.5", "--group", "timestamp",
    )  # fmt: skip
    data = ("--data", tmp_path / "data", "--max_length", 8)
    told = run_command("train", *SMALL_MODEL, *data, "--output_dir", tmp_path / "run", "--num_train_epochs", 1,
        "--windows", "overlapping", field="stderr",
    )  # fmt: skip
    assert "no targets" not in told
    # Under nohup, or in the log of a cluster: one line per evaluation, and no bars.
    assert re.search(r"^Epoch 1, step \d+, \d+ s: loss [\d.]+, validation ndcg@10 [\d.]+ ", told, re.MULTILINE)
    assert "it/s" not in told and "\r" not in told
    dataset = load_folder(tmp_path / "data")
    # All bought items but those of a user's first basket.
    first_baskets = [next((n for n, start in enumerate(row["basket_starts"]) if n and start), None) for row in dataset]
    weights = [w for first, row in zip(first_baskets, dataset) for w in row["weights"][first : row["train_end"]]]
    assert set(weights) == {0, 2.5}
    wanted = sum(w > 0 for w in weights)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["targets"] == wanted
    assert "--windows overlapping" in (tmp_path / "run" / "README.md").read_text()
    run_command("finetune", *data, "--model", tmp_path / "run", "--output_dir", tmp_path / "tuned", "--max_steps", 10,
        "--windows", "random_crop", "--use_cpu", "true",
    )  # fmt: skip


def test_a_run_that_replaces_a_model_says_so(run_command, log_file, tmp_path):
    arguments = (*SMALL_MODEL, "--data", log_file, "--output_dir", tmp_path / "run", "--max_steps", 1)
    said = "which has a model already; this run replaces it"
    assert said not in run_command("train", *arguments, field="stderr")
    assert said not in run_command("train", *arguments, "--resume", field="stderr")
    assert said in run_command("train", *arguments, field="stderr")


def test_titles_are_printed_and_stay_beside_the_model(run_command, log_file, tmp_path):
    rows = [(item, f"Item {item}") for item in range(60) if item % 5]
    (tmp_path / "titles.csv").write_text("item,title\n99,not in the log\n" + "".join(f"{i},{t}\n" for i, t in rows))
    printed = run_command("train", *SMALL_MODEL, "--data", log_file, "--output_dir", tmp_path / "run", "--num_train_epochs", 1,
        "--titles", tmp_path / "titles.csv",
    )  # fmt: skip
    recommended = re.findall(r"^ +(\d+) +-?\d+\.\d{3}(.*)$", printed, re.MULTILINE)
    assert len(recommended) == 10 and any(title for _, title in recommended)
    assert all(title == (f"  Item {item}" if int(item) % 5 else "") for item, title in recommended)
    titles, tokenizer = read_item_metadata(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    known = {title: tokenizer.encode_items([item])[0] for item, title in rows}
    assert dict(titles.select("title", "input_id").rows()) == known


def test_drawn_items_are_ranked_too(run_command, log_file, tmp_path):
    printed = run_command("train", *SMALL_MODEL, "--data", log_file, "--output_dir", tmp_path / "run", "--num_train_epochs", 1,
        "--eval_negatives", 5, "--results_json", tmp_path / "results.json", "--refit",
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "results.json").read_text())
    test = result["test"]
    assert "\n1 epoch in " in printed and " for 1 epoch: " in printed
    assert "s per run, 1 epoch, on " in (tmp_path / "run" / "README.md").read_text()
    assert f"{'ndcg, 5 drawn':<24}{test['ndcg@1_uni5']:>9.4f}" in printed
    assert test["recall@5_uni5"] > test["recall@5"] and test["recall@10_uni5"] == 1  # of six items in all
    command = train_command(result).replace("\\\n", "").split()  # wherever its lines break
    assert command[-4:] == ["--eval_negatives", "5", "--seed", "42"]

    # The refit beside it: a model of all events, whose card has the first run's validation figures and no others.
    refitted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "refit")
    assert refitted.model.item_counts.sum() == sum(build_sequences(log_file)[0]["test_end"])
    summary = json.loads((tmp_path / "run" / "refit" / "training_summary.json").read_text())
    assert (
        summary["validation"] == result["validation"] and "test" not in summary and "--refit" in train_command(summary)
    )
    card = (tmp_path / "run" / "refit" / "README.md").read_text()
    assert "Validation figures on" in card and f"{result['validation']['ndcg@10']:.4f}" in card
    assert "new model, trained for the same number of epochs on all events" in card.replace("\n", " ")
    assert f"{test['ndcg@10']:.4f}" not in card
    assert "\n# run\n" in card  # the name of the run, not of its folder

    # It was trained on the held-out events, so that its figures on them come with a warning.
    models, report = [tmp_path / "run", tmp_path / "run" / "refit"], tmp_path / "report"
    printed = run_command("evaluate", "--models", *models, "--data", log_file, "--samples", 20, "--output_dir", report)
    assert f"{models[1]} is a refit: it was trained on the held-out events, too." in printed
    assert f"{models[0]} is a refit" not in printed
    reports = json.loads((report / "evaluation.json").read_text())["reports"]
    assert [name for name, entry in reports.items() if entry["refit"]] == [str(models[1])]


def test_a_log_of_which_nobody_has_a_held_out_item_is_trainable(run_command, log_file, tmp_path):
    dataset, tokenizer = build_sequences(log_file)
    hold_out_nothing(dataset).save_to_disk(tmp_path / "data")
    tokenizer.save_pretrained(tmp_path / "data")
    printed = run_command("train", *SMALL_MODEL, "--data", tmp_path / "data", "--output_dir", tmp_path / "run", "--num_train_epochs", 2,
    )  # fmt: skip
    assert "2 epochs in" in printed and "best" not in printed and "ndcg" not in printed
    assert "nothing was measured" in (tmp_path / "run" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.model.item_counts.sum() == sum(dataset["test_end"])
    assert model.config.repeat_share > 0.01  # of the latest events


def test_bad_arguments_are_named(run_command, log_file, tmp_path):
    misspelled = '{"objectiv": "gbce"}'
    for arguments, named in (
        (("--item", "movie"), "movie"),
        (("--tokens_per_step", 10), "`tokens_per_step` is 10, but a history has"),
        (("--config_overrides", misspelled), "objectiv"),
        (("--report_to", "no_tracker"), "`report_to` is 'no_tracker', which is unknown or not installed"),
    ):
        run = ("train", "--data", log_file, "--output_dir", tmp_path / "run", *arguments)
        error = run_command(*run, status=2, field="stderr")
        assert named in error.strip().splitlines()[-1]
        assert not (tmp_path / "run").exists()
