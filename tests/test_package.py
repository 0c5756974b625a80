"""What an index page and another project's type checker see of the package."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement


REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_versions_that_were_tested_are_allowed_and_the_next_ones_are_not():
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for name, allowed, refused in (
        ("torch", ("2.11.0", "2.13.0", "2.14.1"), ("2.10.0", "2.15.0")),
        ("transformers", ("5.10.1", "5.16.1", "5.24.0"), ("5.9.0", "6.0.0")),
    ):
        assert all(version in ranges[name] for version in allowed), name
        assert not any(version in ranges[name] for version in refused), name


def test_the_package_is_typed():
    assert files("blossomrec_hf").joinpath("py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_links_work_on_an_index_page():
    text = (REPOSITORY / PROJECT["readme"]).read_text()
    # Pictures of the repository have a description, which an index page shows in their place.
    for description, picture in re.findall(r"!\[([^\]]*)\]\(([^)\s]*)\)", text):
        assert len(description) > 40 and (REPOSITORY / picture).is_file(), picture
    text = re.sub(r"!\[[^\]]*\]\([^)\s]*\)", "", text)
    links = [*re.findall(r"\]\(([^)\s]*)", text), *re.findall(r"(?:href|src)=[\"']([^\"']*)", text)]
    for link in [*links, *PROJECT["urls"].values()]:
        assert link.startswith("https://"), f"{link} is relative: an index page cannot resolve it"


def test_no_file_is_longer_than_600_lines():
    for folder in ("src", "tests", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            assert len(path.read_text("utf-8").splitlines()) <= 600, path


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}, "pytest imports only one file of a name"
