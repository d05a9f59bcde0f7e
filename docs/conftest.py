"""The code of the guide is tested in new folders, in which it may write."""

import matplotlib as mpl
import pytest
from guide_code import FIRST_PAGE, create_photographs

from skltl import register_backbone

mpl.use("agg")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """The folder of images that the first page creates and the others use."""
    return create_photographs(tmp_path_factory.mktemp("guide"))


@pytest.fixture(autouse=True)
def _as_in_a_new_process(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Not by the name of its module, which doctest may have imported once more.
    monkeypatch.setitem(register_backbone.__globals__, "_REGISTERED", {})
    if request.path != FIRST_PAGE:
        (tmp_path / "photographs").symlink_to(request.getfixturevalue("photographs"))
