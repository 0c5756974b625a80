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


def test_quality_has_the_recipe_long():
    """The figures of "90 epochs" are those that users of the recipe get."""
    study = Study.load(FOLDER / "quality.yaml")
    run = next(run for run in study.runs({"ml-1m": ""}, "") if run.configuration == "blossom, 90 epochs")
    recipe, arguments, config = RECIPES["long"].settings, run.loop_arguments("runs"), run.model_config(3418, None)
    for name, value in recipe.items():
        assert getattr(arguments, name, getattr(config, name, None)) == value, name
    assert run.settings.keys() - recipe.keys() == {"num_key_value_heads", "mixed_precision", "torch_compile"}


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
