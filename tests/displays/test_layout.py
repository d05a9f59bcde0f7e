"""Grids of images fit into their figure, and matplotlib is optional."""

import sys
from itertools import pairwise

import numpy as np
import pytest

from skltl import GradCAMDisplay, PredictionGridDisplay, TrainingHistoryDisplay


@pytest.mark.parametrize(
    "name", ["$10-$20", r"a$\b_$", "soft-coated wheaten terrier" * 2]
)
def test_any_label_is_a_title_that_fits(name):
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    grid = PredictionGridDisplay(images, [name] * 3, [name, "a", name], [0.1] * 3)
    maps = GradCAMDisplay(images, np.ones((3, 8, 8)), [name] * 3)

    for display in (grid.plot(), maps.plot()):
        display.figure_.canvas.draw()  # an error if a dollar begins a formula
        extents = [ax.title.get_window_extent() for ax in display.axes_]
        for left, right in pairwise(extents):
            assert left.x1 < right.x0
        assert extents[0].x0 >= 0
        if len(name) < 22:
            assert display.axes_[0].get_title() == name


def test_last_row_of_a_grid_may_be_incomplete():
    images = np.zeros((5, 8, 8, 3), dtype=np.uint8)

    display = GradCAMDisplay(images, images[..., 0], list("abcde")).plot(n_columns=3)

    assert display.figure_.axes == display.axes_.tolist()
    assert display.axes_[0].get_gridspec().get_geometry() == (2, 3)


def test_missing_matplotlib_names_the_package_to_install(monkeypatch):
    display = TrainingHistoryDisplay([{"stage": "head", "loss": 0.9, "score": 0.6}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ImportError, match=r"pip install 'skltl\[plot\]'"):
        display.plot()
