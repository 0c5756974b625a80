"""Studies: what a YAML file asks for, and records that change with whatever figures depend on."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from blossomrec_hf.data import EventTable, split
from blossomrec_hf.data.event_table import FEATURES_FILE
from blossomrec_hf.data.item_features import save_item_features
from blossomrec_hf.evaluation import HeldOutItems, rank_held_out_items
from blossomrec_hf.model.features_blossomrec import ItemFeatures
from blossomrec_hf.model.streams_blossomrec import STREAMS
from blossomrec_hf.training.loop import TrainingLoop
from blossomrec_hf.training.studies import Study, changed_code, code_entry, data_checksum, expand_grid, models_to_time
from blossomrec_hf.training.study_runs import execute, measure_cost


STUDY = """
description: Two kinds
  of attention.
data:
  small: small.safetensors
  other: {path: other.safetensors, settings: {max_length: 7}}
seeds: [1, 2]
settings: {hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1, max_length: 20}
configurations:
  blossom: {}
  full: {attention_types: full, learning_rate: 0.01}
grid: {learning_rate: [0.001, 0.002]}
comparisons: [{first: "blossom, learning_rate 0.001", second: full}]
"""
STUDY_MODEL = ("hidden_size", "num_attention_heads", "num_key_value_heads")


def write_study(tmp_path, text=STUDY):
    path = tmp_path / "pair.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_multiplied_out_and_settings_replace_each_other(tmp_path):
    study = Study.load(write_study(tmp_path))
    assert (study.name, study.description) == ("pair", "Two kinds of attention.")
    runs = study.runs({"small": "1", "other": "2"}, code="c")
    # All with the first seed come first. The grid does not vary what a configuration sets itself.
    assert [run.seed for run in runs] == [1] * 6 + [2] * 6
    names = ["blossom, learning_rate 0.001", "blossom, learning_rate 0.002", "full"]
    assert [run.configuration for run in runs[:3]] == names
    by_name = {(run.data, run.configuration): run for run in runs if run.seed == 1}
    assert by_name["small", "full"].loop_arguments("out").learning_rate == 0.01
    assert by_name["small", names[1]].loop_arguments("out").learning_rate == 0.002
    assert by_name["small", "full"].loop_arguments("out").max_length == 20
    assert by_name["other", "full"].loop_arguments("out").max_length == 7  # of the data set
    config = by_name["other", "full"].model_config(100, 0.25)
    assert (config.attention_types, config.vocab_size, config.repeat_share) == (["full"] * 2, 100, 0.25)


def test_two_settings_of_a_grid_are_combined():
    assert expand_grid({"a": None}, {"x": [1, 2], "y": [3]}) == {
        "a, x 1, y 3": {"x": 1, "y": 3},
        "a, x 2, y 3": {"x": 2, "y": 3},
    }


def test_a_run_has_another_key_if_anything_that_figures_depend_on_is_another(tmp_path):
    run = Study.load(write_study(tmp_path)).runs({"small": "1", "other": "2"}, code="c")[0]
    changes = {"seed": 3, "settings": {}, "evaluations": {"x": {}}, "checksum": "3", "code": "d"}
    keys = {replace(run, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {run.key}) == 6
    assert replace(run, configuration="renamed").key == run.key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seeds: [1, 2]", "seeds: one"), "has the seeds 'one'; they must be a list"),
        (("seeds: [1, 2]", ""), "has no seeds"),
        (("seeds: [1, 2]", "seeds: 1"), "has the seeds 1; they must be a list of integers"),
        (("small.safetensors\n", "\n"), "has None for the data set 'small'; give its path"),
        (
            ("path: other.safetensors, ", ""),
            "for the data set 'other'; give its path, or a mapping with path and settings",
        ),
        (("blossom: {}", "blossom: 3"), "has 3 for the configuration 'blossom', which must be a mapping"),
        (("[0.001, 0.002]", "0.001"), "has 0.001 for learning_rate in the grid; it must be a list of values"),
        (
            ("seeds:", "evaluations: {test: {max_lenth: 5}}\nseeds:"),
            "for the evaluation 'test'; it may set max_length, now",
        ),
        (("seeds:", "evaluations: {test: {max_length: 0}}\nseeds:"), "has the max_length 0 for the evaluation 'test'"),
        (("data:", "imports: gone.py\ndata:"), "has the imports 'gone.py'; they must be a list of paths"),
        (("grid: {", "grids: {"), "has grids; a study may have description, imports, data"),
        (
            ("hidden_size: 16", "hiden_size: 16"),
            "configuration blossom, learning_rate 0.001: hiden_size is no setting",
        ),
        (("hidden_size: 16", "hidden_size: 17"), "configuration blossom, learning_rate 0.001: "),
        (
            ("hidden_size: 16", "item_features: [genre]"),
            "`item_features` is ['genre']; name columns of the item table",
        ),
        (("max_length: 20", "max_length: 0"), "`max_length` must be at least 1, got 0."),
        (
            ("second: full", "second: fool"),
            "the comparison {'first': 'blossom, learning_rate 0.001', 'second': 'fool'} names no",
        ),
        (("data:", "data: []\nx:"), "has x"),
        (("blossom: {}", "blossom: {attention_types: blosom}"), "no stream is registered as 'blosom'"),
        (("blossom: {}", "blossom: {time_features: hour}"), "`time_features` is 'hour'; it must be a list"),
        (
            ("blossom: {}", "blossom: {time_features: [our]}"),
            "`time_features` is 'our'; it must be one of 'previous_gap'",
        ),
        (("data:", "imports: [gone.py]\ndata:"), "gone.py, which cannot be imported"),
        (("data:", "imports: [json.py]\ndata:"), "json.py, but another module has its name; rename"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_it_does(tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        Study.load(write_study(tmp_path, STUDY.replace(*change)))
    assert words in str(error.value)


STREAM = """
from blossomrec_hf import register_stream
from blossomrec_hf.model.streams_blossomrec import FullStream
class Everything(FullStream):
    pass
register_stream("everything", Everything)
"""


def test_a_study_imports_files_whose_code_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("blossomrec_hf.model.streams_blossomrec.STREAMS", STREAMS.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    (tmp_path / "everything.py").write_text(STREAM)
    text = STUDY.replace("data:", "imports: [everything.py]\ndata:", 1)
    study = Study.load(write_study(tmp_path, text.replace("attention_types: full", "attention_types: everything")))
    code = code_entry(study.imports)
    assert changed_code({"code": [code]}, study.imports) == []
    (tmp_path / "everything.py").write_text("# A comment\n" + STREAM)
    assert code_entry(study.imports) == code
    (tmp_path / "everything.py").write_text(STREAM + "more = 1\n")
    assert changed_code({"code": [code]}, study.imports) == ["everything.py"]
    assert code_entry(study.imports)["hash"] != code["hash"]


def test_a_model_is_timed_once_at_all_lengths_at_which_it_is_tested(tmp_path):
    text = STUDY.replace("learning_rate: [0.001, 0.002]", "max_length: [20, 30]")
    text = text.replace(", settings: {max_length: 7}", "").replace(
        '"blossom, learning_rate 0.001"', '"blossom, max_length 20"'
    )
    text = text.replace("second: full", 'second: "full, max_length 20"')
    study = Study.load(write_study(tmp_path, text + "evaluations: {test: {}, all: {max_length: 50}}\n"))
    runs = study.runs({"small": "1", "other": "2"}, code="c")
    models = models_to_time(runs)
    timed = [(run.data, run.configuration, sorted(lengths)) for run, lengths in models.values()]
    names = ("blossom, max_length 20", "full, max_length 20")
    assert timed == [(data, name, [20, 30, 50]) for data in ("small", "other") for name in names]
    assert all(name.startswith(f"cost-{run.data}-") for name, (run, _) in models.items())
    elsewhere = [replace(run, data="logs/small") for run in runs]
    assert not any("/" in name for name in (elsewhere[0].name, *models_to_time(elsewhere)))


def test_the_checksum_is_that_of_events_splits_and_item_features(log):
    table = EventTable.from_dataset(log[0])
    checksum = data_checksum(table)
    assert data_checksum(EventTable.from_dataset(log[0])) == checksum
    for part, name in (("events", "input_ids"), ("users", "test_end")):
        columns = {key: values.copy() for key, values in getattr(table, part).items()}
        columns[name][-1] += 1
        assert data_checksum(replace(table, **{part: columns})) != checksum
    features = [
        ItemFeatures.from_columns({"genre": genres}) for genres in (["a", "a", "b", "b"], ["b", "a", "a", "b"])
    ]
    assert len({checksum, *(data_checksum(table, [read]) for read in features)}) == 3


def test_a_record_has_the_metrics_and_the_ranks_of_the_trained_model(log, tmp_path, monkeypatch, seed):
    dataset, tokenizer = log
    table = replace(EventTable.from_dataset(dataset), repeat_share=0.0)
    monkeypatch.setattr("blossomrec_hf.training.study_runs.LogArguments.read_table", lambda log: (table, tokenizer))
    text = STUDY.replace("max_length: 20}", "max_length: 20, num_train_epochs: 2, tokens_per_step: 300}")
    text += "evaluations: {test: {}, latest 3: {max_length: 3}}\n"
    run = Study.load(write_study(tmp_path, text)).runs({"small": "1", "other": "2"}, code="c")[0]
    models = []
    monkeypatch.setattr(
        "blossomrec_hf.training.study_runs.rank_held_out_items",
        lambda model, *arguments, **settings: (
            models.append(model),
            rank_held_out_items(model, *arguments, **settings),
        )[1],
    )
    execute(run, "small", tmp_path / f"{run.name}.json")

    record = json.loads((tmp_path / f"{run.name}.json").read_text())
    assert record["settings"] == run.settings and record["training"]["epochs"] == 2
    assert sorted(path.suffix for path in tmp_path.glob(f"{run.name}*")) == [
        ".json",
        ".npz",
    ]  # no checkpoints are left
    for name, max_length in (("test", 20), ("latest 3", 3)):
        held_out = HeldOutItems.from_rows(split(table, "test"), max_length=max_length)
        ranks = rank_held_out_items(models[0], held_out)
        with np.load(tmp_path / f"{run.name}.npz") as arrays:
            np.testing.assert_array_equal(arrays[f"ranks.{name}"], ranks.unseen)
            np.testing.assert_array_equal(arrays["lengths"], held_out.history_lengths)
        assert record["evaluations"][name]["metrics"]["ndcg@10"] == pytest.approx(ranks.metrics(ks=[10])["ndcg@10"])


def test_a_run_reads_the_item_features_that_it_names(log, tmp_path, monkeypatch):
    dataset, tokenizer = log
    table = EventTable.from_dataset(dataset)
    genres = [f"genre {item % 3}" for item in range(tokenizer.num_items)]
    features = ItemFeatures.from_columns({"genre": genres, "plot": np.eye(tokenizer.num_items)})
    table.files[FEATURES_FILE] = save_item_features(features)
    monkeypatch.setattr("blossomrec_hf.training.study_runs.LogArguments.read_table", lambda log: (table, tokenizer))
    models = []
    monkeypatch.setattr(
        "blossomrec_hf.training.study_runs.TrainingLoop",
        lambda model, *views, **settings: (models.append(model), TrainingLoop(model, *views, **settings))[1],
    )
    text = STUDY.replace("max_length: 20}", "max_length: 20, num_train_epochs: 1, tokens_per_step: 300}")
    study = Study.load(write_study(tmp_path, text.replace("blossom: {}", "blossom: {item_features: genre}")))
    assert study.item_features("small") == ("genre",)
    run = study.runs({"small": "1", "other": "2"}, code="c")[0]
    execute(run, "small", tmp_path / "record.json")
    assert models[0].config.item_features == ItemFeatures({"genre": features.columns["genre"]}).config()
    assert torch.equal(models[0].model.item_features.columns[0].codes.cpu(), features.columns["genre"].codes)
    assert json.loads((tmp_path / "record.json").read_text())["settings"]["item_features"] == "genre"


def test_inference_is_timed_at_each_length(log, tmp_path, monkeypatch):
    dataset, tokenizer = log
    table = EventTable.from_dataset(dataset)
    monkeypatch.setattr("blossomrec_hf.training.study_runs.LogArguments.read_table", lambda log: (table, tokenizer))
    run = Study.load(write_study(tmp_path)).runs({"small": "1", "other": "2"}, code="c")[0]
    measure_cost(run, "small", tmp_path / "cost.json", lengths=[20, 3])
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["model"] == {name: run.settings[name] for name in STUDY_MODEL} and record["code"] == "c"
    assert list(record["microseconds_per_user"]) == ["3", "20"] and min(record["microseconds_per_user"].values()) > 0


def test_changed_code_is_named():
    entry = code_entry()
    assert changed_code({"code": [entry]}) == []
    files = {**entry["files"], "training/loop.py": "0", "gone.py": "1"}
    assert changed_code({"code": [entry, {"files": files}]}) == ["gone.py", "training/loop.py"]


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("model/events_blossomrec.py", "event_types"),
        ("model/time_blossomrec.py", "time_features"),
        ("model/features_blossomrec.py", "item_features"),
    ],
)
def test_code_of_features_counts_in_studies_of_them(file, setting):
    entry = code_entry()
    assert file in entry["files"]
    code, others = {"files": {**entry["files"], file: "0"}}, {"plain": {"settings": {"hidden_size": 8}}}
    assert changed_code({"code": [code], "records": others}) == []
    assert changed_code({"code": [code], "records": others | {"more": {"settings": {setting: []}}}}) == [file]
