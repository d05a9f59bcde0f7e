"""Axes, images and styles that the displays share; matplotlib is imported lazily."""

from __future__ import annotations

import textwrap
from pathlib import PurePath

import numpy as np

from skltl.exceptions import shorten

# Colors of text.
PLAIN = "dimgray"
ALERT = "firebrick"

# Width and height of an image with a title of two lines and a line below, in inches.
PANEL_SIZE = (1.9, 2.5)

# Of text above a figure, in inches.
LINE_HEIGHT = 0.3
LETTERS_PER_INCH = 13


def import_pyplot():
    """Import and return ``matplotlib.pyplot``.

    Displays call it before any computation, so that a missing package costs no time.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Displays require matplotlib: pip install 'skltl[plot]'."
        ) from error
    return plt


def resolve_ax(ax=None, figsize=None):
    """Return the given Axes, or that of a new figure."""
    if ax is None:
        _, ax = import_pyplot().subplots(figsize=figsize, layout="constrained")
    return ax


def resolve_axes(axes, n, n_columns, panel_size, summary=None):
    """Return an array of n Axes: the given ones, or those of a new figure.

    `panel_size` is the width and height of each panel in inches. `summary` is written
    above a new figure, wrapped to its width.
    """
    if n < 1:
        raise ValueError("There is no image to plot.")
    if n_columns < 1:
        raise ValueError(f"n_columns={n_columns} must be at least 1.")
    if axes is not None:
        axes = np.ravel(axes)
        if len(axes) != n:
            raise ValueError(f"Expected axes to have {n} axes, got {len(axes)}.")
        return axes
    n_columns = min(n, n_columns)
    n_rows = -(-n // n_columns)
    width, height = panel_size[0] * n_columns, panel_size[1] * n_rows
    lines = textwrap.wrap(summary or "", int(LETTERS_PER_INCH * width))
    figure, axes = import_pyplot().subplots(
        n_rows,
        n_columns,
        figsize=(width, height + LINE_HEIGHT * len(lines)),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[n:]:
        figure.delaxes(ax)
    if lines:
        figure.suptitle("\n".join(lines), fontsize="medium")
    return axes.ravel()[:n]


def to_rgb_pixels(image):
    """Return the pixels of an image (h, w, c) as matplotlib shows them.

    Of more than three channels, the first three are shown as red, green and blue, and
    of two channels the first one in gray.
    """
    pixels = image if image.dtype == np.uint8 else np.clip(image, 0, 1)
    if pixels.ndim == 3:
        is_gray = pixels.shape[2] < 3
        pixels = np.repeat(pixels[..., :1], 3, axis=2) if is_gray else pixels[..., :3]
    return pixels


def draw_image(ax, image, title, color=PLAIN, place=None, **kwargs):
    """Draw one image (h, w, c) without ticks, under its title; return the artist.

    `place` is a line below it.
    """
    artist = ax.imshow(to_rgb_pixels(image), **kwargs)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    # A label is any text: a dollar sign does not begin a formula.
    ax.set_title(title, fontsize="small", color=color, parse_math=False)
    if place:
        ax.set_xlabel(place, fontsize="x-small", color=PLAIN, parse_math=False)
    return artist


def draw_beside(ax, image):
    """Draw an image once more, on the right of itself; return its extent."""
    height, width = image.shape[:2]
    left = 1.04 * width - 0.5
    extent = (left, left + width, height - 0.5, -0.5)
    ax.imshow(to_rgb_pixels(image), extent=extent)
    return extent


def as_title(label, n_characters=22):
    """Return a label shortened to the width of one image."""
    return shorten(str(label), n_characters)


def place_of(index, name):
    """Return the index and the file name of an image, as far as they are known."""
    file_name = None if name is None else PurePath(str(name)).name
    known = [None if index is None else str(index), file_name]
    return " · ".join(as_title(part) for part in known if part)


def line_style(defaults, given):
    """Return the style of a line: the defaults, updated with the given one."""
    from matplotlib.cbook import normalize_kwargs
    from matplotlib.lines import Line2D

    return {**defaults, **normalize_kwargs(given, Line2D)}
