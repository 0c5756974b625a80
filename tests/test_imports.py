"""Imports run one way, and the files that travel to the Hub import only what they find there."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import blossomrec_hf


PACKAGE = Path(blossomrec_hf.__file__).parent
# The packages that each package may import.
MAY_IMPORT = {
    "commands": {"serving", "training", "sharing", "evaluation", "batches", "data", "model", "utils"},
    "serving": {"sharing", "evaluation", "batches", "data", "model", "utils"},
    "training": {"sharing", "evaluation", "batches", "data", "model", "utils"},
    "sharing": {"evaluation", "batches", "data", "model", "utils"},
    "evaluation": {"batches", "data", "model", "utils"},
    "batches": {"data", "model", "utils"},
    "data": {"model", "utils"},
    "model": set(),
    "utils": set(),
}
# Atomic writes are in a file that travels with a checkpoint, which may import only its own folder.
SHARED_FILES = {("utils", "blossomrec_hf.model.files_blossomrec")}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported_modules(path: Path) -> list[tuple[ast.AST, str]]:
    """Every import of a file, also inside functions and under `TYPE_CHECKING`, as an absolute name."""
    here = ["blossomrec_hf", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            if node.module:
                found.append((node, ".".join([*base, node.module])))
            else:
                found += [(node, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, node.module))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    package = path.relative_to(PACKAGE).parts[0]
    for _, name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "blossomrec_hf" or (package, name) in SHARED_FILES:
            continue
        # `from .. import BlossomRecConfig`: the names that the package itself exports are for commands alone.
        of = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else None
        assert of == package or (package == "commands" if of is None else of in MAY_IMPORT[package]), (
            f"{path.name} imports {name}"
        )


def test_no_module_imports_itself_through_others():
    files = {".".join(["blossomrec_hf", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in FILES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}

    def imports(name: str) -> set[str]:
        found = (other for _, other in imported_modules(files[name]))
        # `blossomrec_hf.data.split` is a name in the module `blossomrec_hf.data`.
        return {other if other in files else other.rpartition(".")[0] for other in found} & files.keys()

    try:
        tuple(TopologicalSorter({name: imports(name) for name in files}).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "model"], ids=lambda path: path.name)
def test_files_that_travel_import_their_own_folder_torch_and_transformers(path):
    allowed = {
        "torch",
        "transformers",
        "triton",
        "liger_kernel",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "numpy",
        "peft",
    }
    for node, name in imported_modules(path):
        root = name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"{path.name}:{node.lineno}"
        else:
            assert root in allowed | sys.stdlib_module_names, f"{path.name} imports {name}"
