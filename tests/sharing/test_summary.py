"""The summary of a run, and groups of runs."""

import json

from checkpoint_cases import error_message

from blossomrec_hf.sharing.summary import SUMMARY_FILE, group_runs, write_summary
from blossomrec_hf.training import changed_arguments


def test_the_summary_has_no_paths(tmp_path):
    configuration = {"data": "/home/ada/secret/log.csv", "titles": "/home/ada/titles.csv", "max_length": 50}
    run = {"configuration": configuration, "changed_arguments": changed_arguments(configuration), "seed": 1}
    write_summary(tmp_path, run)
    text = (tmp_path / SUMMARY_FILE).read_text()
    assert "ada" not in text and configuration["data"].startswith("/home")
    summary = json.loads(text)
    assert summary["configuration"] == {"data": "log.csv", "titles": "titles.csv", "max_length": 50}
    assert summary["changed_arguments"] == {"data": "log.csv", "max_length": 50, "titles": "titles.csv"}
    assert summary["seed"] == 1


def test_layers_of_several_kinds_are_listed_in_their_order():
    configuration = {"attention_types": ["short_term", "short_term", "blossom", "blossom", "short_term"]}
    (group,) = group_runs([{"configuration": configuration, "seed": 1, "exclude_seen": True}])
    assert group.label == "2 × short_term, then 2 × blossom, then 1 × short_term"


def test_runs_that_differ_in_an_argument_are_two_groups():
    runs = [
        {"configuration": {"attention_types": ["blossom"], "max_length": 50, "weight_decay": decay}, "seed": seed,
         "exclude_seen": True, "changed_arguments": {"weight_decay": decay} if decay != 0.01 else {}}
        for decay in (0.1, 0.01) for seed in (2, 1)
    ]  # fmt: skip
    first, second = group_runs(runs)
    assert [[run["seed"] for run in group.runs] for group in (first, second)] == [[1, 2], [1, 2]]
    assert (first.varying, second.varying) == ({"weight_decay": 0.1}, {"weight_decay": None})
    assert "without seed" in error_message(
        lambda: group_runs([{"configuration": {}, "exclude_seen": True}]), ValueError
    )
