"""Grids of images fit into their figure, and matplotlib is optional."""

import sys
from itertools import combinations, pairwise

import numpy as np
import pytest

from skltl import (
    GradCAMDisplay,
    ImageGridDisplay,
    PredictionGridDisplay,
    TrainingHistoryDisplay,
)


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


@pytest.mark.parametrize("n_images", [1, 3, 7])
@pytest.mark.parametrize("shape", [(8, 8, 3), (60, 20, 3), (20, 60, 3)])
def test_all_text_of_a_grid_is_in_the_figure(n_images, shape):
    images = np.zeros((n_images, *shape), dtype=np.uint8)
    names = ["/folder/a_long_name_of_an_image_file.jpeg"] * n_images
    known = {"indices": [12345] * n_images, "names": names}
    summary = "mean absolute error 0.123, 12,345 images"
    label = "soft-coated wheaten terrier"
    proba = np.full((n_images, 2), 0.5)
    displays = [
        ImageGridDisplay(images, [f"{label}\n{label}"] * n_images, **known),
        PredictionGridDisplay(
            *(images, [label] * n_images, ["b" * 30] * n_images, proba[:, 0]),
            proba=proba,
            classes=["b" * 30, label],
            **known,
        ),
        GradCAMDisplay(images, images[..., 0], [label] * n_images, None, proba[:, 0]),
    ]

    for display in displays:
        display.summary = summary
        figure = display.plot().figure_
        figure.canvas.draw()
        texts = [ax.title for ax in display.axes_] + figure.texts
        texts += [ax.xaxis.label for ax in display.axes_]
        extents = [one.get_window_extent() for one in texts if one.get_text()]
        assert min(one.x0 for one in extents) > -2
        assert max(one.x1 for one in extents) < figure.bbox.x1 + 2
        assert min(one.y0 for one in extents) >= 0
        assert max(one.y1 for one in extents) <= figure.bbox.y1
        for one, other in combinations(extents, 2):
            assert not one.padded(-1).overlaps(other.padded(-1))


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
