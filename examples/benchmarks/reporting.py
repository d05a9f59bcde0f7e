"""Output of the benchmarks: figures, and the conditions of the measurement."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ["skltl", "torch", "torchvision", "scikit-learn", "numpy", "pillow"]


def conditions():
    """Return the machine and the versions on which the figures depend."""
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def print_table(rows):
    """Print a list of dictionaries with equal keys as a table."""
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        first, *others = zip(line, widths, strict=True)
        print(f"{first[0]:<{first[1]}}", *(f"{text:>{n}}" for text, n in others))


def write_json(path, figures):
    """Write the figures and the conditions of the measurement as JSON."""
    content = {"conditions": conditions(), "figures": figures}
    Path(path).write_text(json.dumps(content, indent=2))


def _text(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)
