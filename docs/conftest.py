"""The code of the guide is tested in new folders, in which it may write."""

import doctest
import os
from pathlib import Path

import matplotlib as mpl
import pytest

from skltl import register_backbone

GUIDE = Path(__file__).parent / "guide"
FIRST_PAGE = GUIDE / "folder_to_model.rst"

mpl.use("agg")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """The folder of images that the first page creates and the others use."""
    examples = doctest.DocTestParser().get_examples(FIRST_PAGE.read_text())
    creation = [one.source for one in examples if "skltl" not in one.source]
    before, folder = Path.cwd(), tmp_path_factory.mktemp("guide")
    os.chdir(folder)
    names = {}
    for source in creation[: 1 + find(creation, "image.save")]:
        exec(source, names)
    os.chdir(before)
    return folder / "photographs"


def find(sources, text):
    """Return the position of the first source with a text."""
    return next(number for number, source in enumerate(sources) if text in source)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Not by the name of its module, which doctest may have imported once more.
    monkeypatch.setitem(register_backbone.__globals__, "_REGISTERED", {})
    if request.path != FIRST_PAGE:
        (tmp_path / "photographs").symlink_to(request.getfixturevalue("photographs"))
