"""Every example that needs no download runs, and the README names existing files."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))


def test_examples_are_found():
    assert EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path):
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_the_training_script_lists_its_arguments(monkeypatch, capsys):
    script = ROOT / "examples" / "train_tiny_backbone.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])

    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")

    assert "--epochs" in capsys.readouterr().out


def test_files_named_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()

    named = re.findall(r"\b(?:examples|docs|tests)/[\w/.]+\w", readme)

    assert named
    for path in named:
        assert (ROOT / path).exists() or "_build" in path, path
