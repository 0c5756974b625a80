"""The results in `examples/studies` are what their tables say, and are called current only while the code is."""

import re

import pytest
from example_cases import REPOSITORY, load_example

from blossomrec_hf.commands import study as command
from blossomrec_hf.training.recipes import RECIPES
from blossomrec_hf.training.studies import Study, changed_code
from blossomrec_hf.utils.files import read_json


FOLDER = REPOSITORY / "examples" / "studies"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MEASURED = sorted(path.stem for path in FOLDER.glob("*.json"))
SCRIPTS = ("attention", "operations")  # studies with a script of their own
ROWS = re.findall(
    r"^\| \[(\w+)\]\(\1\.md\) \| [^|]+ \| (current|earlier) \|$", (FOLDER / "README.md").read_text("utf-8"), re.M
)


@pytest.mark.parametrize("name", MEASURED)
def test_tables_are_those_of_the_results(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    results = read_json(FOLDER / f"{name}.json")
    study = load_example(f"studies/{name}.py") if name in SCRIPTS else command
    assert (FOLDER / f"{name}.md").read_text("utf-8") == study.report(results)


@pytest.mark.parametrize("name", STUDIES)
def test_results_have_the_settings_of_their_study(name):
    study = Study.load(FOLDER / f"{name}.yaml")
    if name not in MEASURED:
        return
    runs = study.runs(dict.fromkeys(study.data, ""), "")
    settings = {(run.data, run.configuration): run.settings for run in runs}
    for record in read_json(FOLDER / f"{name}.json")["records"].values():
        assert settings[record["data"], record["configuration"]] == record["settings"]
        assert {test: entry["settings"] for test, entry in record["evaluations"].items()} == study.evaluations


@pytest.mark.parametrize(
    ("recipe", "name", "configuration"),
    [
        ("long", "quality", "blossom, 90 epochs"),
        ("medium", "recipes", "tuned, cosine scores, masked items, 1000 items, dropout 0.3"),
        ("short", "recipes", "tuned, cosine scores and masked items"),
    ],
)
def test_recipes_are_configurations_that_were_measured(recipe, name, configuration):
    study = Study.load(FOLDER / f"{name}.yaml")
    run = next(run for run in study.runs(dict.fromkeys(study.data, ""), "") if run.configuration == configuration)
    settings, arguments, config = RECIPES[recipe].settings, run.loop_arguments("runs"), run.model_config(3418, None)
    for setting, value in settings.items():
        assert getattr(arguments, setting, getattr(config, setting, None)) == value, setting
    assert run.settings.keys() - settings.keys() == {"num_key_value_heads", "mixed_precision", "torch_compile"}


def test_every_result_is_listed():
    assert sorted(name for name, _ in ROWS) == MEASURED


@pytest.mark.parametrize(("name", "code"), ROWS)
def test_results_are_current_only_if_the_code_has_not_changed(name, code, monkeypatch):
    if name in SCRIPTS:
        monkeypatch.syspath_prepend(FOLDER)
        imports = load_example(f"studies/{name}.py").MEASURING
    else:
        imports = Study.load(FOLDER / f"{name}.yaml").imports
    changed = changed_code(read_json(FOLDER / f"{name}.json"), imports)
    assert code == "earlier" or not changed, (
        f"{name} was measured before {', '.join(changed)} changed: run the study again, see examples/studies/README.md, or "
        'write "earlier" into its row there'
    )
