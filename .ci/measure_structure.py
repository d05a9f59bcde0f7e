"""Measure what a reader of the package has to keep in mind, and print it.

Usage: ``python .ci/measure_structure.py [ROOT]``, with the root of a checkout whose
``skltl`` is measured (default: this one).
"""

import ast
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
PACKAGE = ROOT / "skltl"
MAX_FUNCTION_LINES = 40

Documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_docstring_lines(tree):
    """Count the lines of all docstrings of a module."""
    found = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, Documented) and ast.get_docstring(node)
    ]
    return sum(one.end_lineno - one.lineno + 1 for one in found)


def count_code_lines(path):
    """Count the lines of a file that are neither docstring, comment nor empty."""
    text = path.read_text()
    lines = [line.strip() for line in text.splitlines()]
    others = sum(not line or line.startswith("#") for line in lines)
    blank_in_docstrings = sum(
        not line.strip()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Documented) and ast.get_docstring(node)
        for line in ast.get_source_segment(text, node.body[0]).splitlines()
    )
    docstrings = count_docstring_lines(ast.parse(text)) - blank_in_docstrings
    return len(lines) - others - docstrings


def private_classes(files, public):
    """Name the classes that users do not see."""
    return [
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name not in public
    ]


def long_functions(files):
    """Name the functions whose body, without the docstring, is too long."""
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    n_lines = body[-1].end_lineno - body[0].lineno + 1
                    if n_lines > MAX_FUNCTION_LINES:
                        found.append(f"{path.relative_to(PACKAGE)}:{node.name}")
    return found


def module_name(path):
    """Return the dotted name of a file of the package."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def import_graph(files):
    """Return, for each module, the modules of the package that it imports at load."""
    names = {module_name(path) for path in files}
    graph = {}
    for path in files:
        tree = ast.parse(path.read_text())
        wanted = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module}
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        graph[module_name(path)] = wanted & names - {module_name(path)}
    return graph


def cycles(graph):
    """Return the modules that import one another, directly or not."""

    def reached(start):
        seen, todo = set(), list(graph[start])
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += graph[one]
        return seen

    return sorted(name for name in graph if name in reached(name))


def called_during(run):
    """Return the modules and classes of the package whose functions a call runs."""
    modules, classes = set(), set()

    def note(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        name = frame.f_code.co_name
        if name == "<module>" or Path(frame.f_code.co_filename).name == "__init__.py":
            return
        modules.add(module_name(Path(frame.f_code.co_filename)))
        qualified = frame.f_code.co_qualname.split(".")
        if len(qualified) > 1 and qualified[-2] != "<locals>":
            classes.add(qualified[-2])

    import threading

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sorted(modules), sorted(classes)


def write_images(folder, n):
    """Write small image files of two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = [Path(folder) / f"{number}.png" for number in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return paths, np.arange(n) % 2


def measure_paths(public):
    """Print which modules a cached `transform` and a fine-tuning `fit` pass."""
    from skltl import CNNFeatureTransformer, FineTunedCNNClassifier

    with tempfile.TemporaryDirectory() as folder:
        X, y = write_images(folder, 12)
        transformer = CNNFeatureTransformer("tiny", cache=folder).fit(X)
        transformer.transform(X)
        modules, _ = called_during(lambda: transformer.transform(X))
        print(f"{len(modules):6} modules passed by a cached transform")
        print("      ", ", ".join(one.removeprefix("skltl.") for one in modules))
        classifier = FineTunedCNNClassifier("tiny", head_epochs=1, finetune_epochs=1)
        modules, classes = called_during(lambda: classifier.fit(X, y))
        print(f"{len(modules):6} modules passed by a fine-tuning fit")
        print("      ", ", ".join(one.removeprefix("skltl.") for one in modules))
        private = [one for one in classes if one not in public]
        print(f"{len(private):6} private classes in it: {', '.join(private)}")


def main():
    """Print the table."""
    sys.path.insert(0, str(ROOT))
    import skltl

    files = sorted(PACKAGE.rglob("*.py"))
    public = set(skltl.__all__) | set(dir(skltl.exceptions))
    classes, long = private_classes(files, public), long_functions(files)
    n_lines = sum(len(path.read_text().splitlines()) for path in files)
    print(f"{len(files):6} modules")
    print(f"{n_lines:6} lines")
    print(f"{sum(map(count_code_lines, files)):6} lines of code")
    print(f"{len(classes):6} private classes")
    print(f"{len(long):6} functions over {MAX_FUNCTION_LINES} lines {' '.join(long)}")
    print(f"{len(cycles(import_graph(files))):6} modules in import cycles")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure_paths(public)


if __name__ == "__main__":
    main()
