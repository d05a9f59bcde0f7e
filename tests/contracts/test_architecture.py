"""The road of the data runs one way: a station imports only what lies upstream."""

import ast
from pathlib import Path

import pytest

import skltl

PACKAGE = Path(skltl.__file__).parent

# From the spring to the mouth.
STATIONS = [
    "exceptions",
    "_locks",
    "_caller",
    "_sklearn",
    "_parameters",
    "_random",
    "_large_arrays",
    "images",
    "networks",
    "inference",
    "_estimator",
    "cache",
    "features",
    "finetuning",
    "pretrained",
    "strategy",
    "displays",
]
SAYS_NOTHING = {"utils", "helpers", "common", "misc", "core", "base"}

FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"
)


def name_of(path):
    return str(path.relative_to(PACKAGE))


def station_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Yield every module of skltl that a file imports, wherever it does."""
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
def test_imports_point_upstream(path):
    station = STATIONS.index(station_of(path))

    for module in imported_modules(path):
        if module.startswith("skltl."):
            name = module.split(".")[1]
            if name != "__version__":
                assert STATIONS.index(name) <= station, f"{module} lies downstream"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_of_other_stations_are_reached_through_their_front_door(path):
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "skltl" and len(parts) > 2:
            assert parts[1] == station_of(path), f"{module} is private to its station"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_named_after_what_they_hold(path):
    assert path.stem.strip("_") not in SAYS_NOTHING
    assert len(path.read_text().splitlines()) <= 650  # more is hardly one idea


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                assert body[-1].end_lineno - body[0].lineno < 40, node.name


def test_private_names_of_scikit_learn_have_one_door():
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("sklearn"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(name.startswith("_") for name in names):
                    found.add(name_of(path))

    assert found == {"_sklearn.py"}
