"""Data flows one way: a subpackage imports only from those before it."""

import ast
from pathlib import Path

import pytest

import skltl

PACKAGE = Path(skltl.__file__).parent

# In the order of the data flow.
SUBPACKAGES = [
    "exceptions",
    "_locks",
    "_caller",
    "_sklearn",
    "_targets",
    "_parameters",
    "_random",
    "_large_arrays",
    "_code",
    "_collections",
    "images",
    "networks",
    "inference",
    "_estimator",
    "_nested",
    "_dask",
    "cache",
    "features",
    "distributed",
    "finetuning",
    "pretrained",
    "strategy",
    "curation",
    "export",
    "displays",
]
MEANINGLESS = {"utils", "helpers", "common", "misc", "core", "base"}

MAX_LINES = 700  # more is hardly one idea
MAX_FUNCTION_LINES = 40

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
)


def name_of(path):
    return str(path.relative_to(PACKAGE))


def subpackage_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Yield every module that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "skltl":
                yield from (f"skltl.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_files_are_found():
    assert len(FILES) >= 25


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_order(path):
    index = SUBPACKAGES.index(subpackage_of(path))

    for module in imported_modules(path):
        if module.startswith("skltl."):
            name = module.split(".")[1]
            if name != "__version__":
                assert SUBPACKAGES.index(name) <= index, f"{module} comes later"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_other_subpackages_are_imported_from_their_init(path):
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "skltl" and len(parts) > 2:
            assert parts[1] == subpackage_of(path), (
                f"{module} is private to its subpackage"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_have_a_meaningful_name_and_one_idea(path):
    assert path.stem.strip("_") not in MEANINGLESS
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        # A constructor of an estimator has a line for each of its parameters.
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert body[-1].end_lineno - body[0].lineno < MAX_FUNCTION_LINES, (
                    node.name
                )


def test_private_names_of_scikit_learn_are_imported_in_one_module():
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("sklearn"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(name.startswith("_") for name in names):
                    found.add(name_of(path))

    assert found == {"_sklearn.py"}


def test_each_module_is_described():
    """The displays, one module each, have one entry together."""
    text = (PACKAGE.parent / "docs" / "development.rst").read_text()
    for path in PACKAGE.glob("**/_*.py"):
        is_display = path.parent.name == "displays"
        assert is_display or path.stem == "__init__" or f"``{path.stem}``" in text, path
