"""Axes, titles and images of all displays.

matplotlib is imported when something is drawn. Labels are the user's text: written with
``parse_math=False``, a dollar is a dollar.
"""

from __future__ import annotations

import numpy as np
from sklearn.base import clone

from skltl.exceptions import shorten
from skltl.images import read_images


def axes_library():
    """Import and return matplotlib's ``pyplot``; call it before work that it shows.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Displays are drawn with matplotlib: pip install 'skltl[plot]'."
        ) from error
    return plt


def axes_to_draw_on(ax=None, figsize=None):
    """Return the given axes, or those of a new figure."""
    if ax is None:
        _, ax = axes_library().subplots(figsize=figsize, layout="constrained")
    return ax


def grid_of_axes(n, n_columns, height):
    """Make a figure with n axes in rows of so many, each of a height in inches."""
    if n < 1 or n_columns < 1:
        raise ValueError(f"{n} images in {n_columns} columns cannot be drawn.")
    n_columns = min(n, n_columns)
    n_rows = -(-n // n_columns)
    figure, axes = axes_library().subplots(
        n_rows,
        n_columns,
        figsize=(1.9 * n_columns, height * n_rows),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[n:]:
        figure.delaxes(ax)
    return axes.ravel()[:n]


def draw_image(ax, image):
    """Draw one image (h, w, 3), without ticks."""
    pixels = image if image.dtype == np.uint8 else np.clip(image, 0, 1)
    ax.imshow(pixels)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def as_title(label):
    """Return a label so short that it fits above its image."""
    return shorten(str(label), 22)


def read_like(estimator, X, image_shape=None):
    """Read images as the first part of an estimator does that reads images."""
    reader = _reader_of(estimator)
    if image_shape is None and reader is not None:
        if hasattr(reader, "_fitted_image_shape"):
            return reader._read_images(X, reset=False)
        return clone(reader)._read_images(X, reset=True)  # what others are made like
    return read_images(X, image_shape=image_shape)


def _reader_of(estimator):
    """Return the first part of an estimator that reads images, or ``None``."""
    if hasattr(estimator, "_read_images"):
        return estimator
    parts = [step for _, step in getattr(estimator, "steps", [])]
    names = ("best_estimator_", "estimator_", "estimator")
    parts += [getattr(estimator, name, None) for name in names]
    parts += getattr(estimator, "calibrated_classifiers_", [])[:1]
    readers = [_reader_of(part) for part in parts if hasattr(part, "__dict__")]
    return next((reader for reader in readers if reader is not None), None)
