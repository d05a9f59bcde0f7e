"""``FeatureMapDisplay``: images at the positions of their features."""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
)

from skltl._nested import unwrapped
from skltl.curation import fitted_to
from skltl.displays._images import read_as, read_plainly
from skltl.displays._layout import as_title, import_pyplot, resolve_ax, to_rgb_pixels
from skltl.exceptions import shorten
from skltl.features import check_readable
from skltl.finetuning import FineTunedCNN

# Classes that have a color of their own and are in the legend.
MAX_CLASSES = 20

# t-SNE's own default, which must be less than the number of images.
PERPLEXITY = 30

# Pixels of a thumbnail per point (1/72 inch), so that it is sharp when it is printed.
PIXELS_PER_POINT = 3

# Width of the frame of a thumbnail, and the gap between two of them, in points.
FRAME = 2
GAP = 1


class FeatureMapDisplay:
    """Images at the positions of their features, reduced to two dimensions.

    Create one with :meth:`from_estimator` or :meth:`from_features`. Each image is a
    point, and as many as possible are thumbnails that do not overlap, the most distant
    ones first. Images whose features are similar are near each other.

    Parameters
    ----------
    coordinates : array of shape (n, 2)
        Positions of the images.
    images : sequence of n arrays of shape (h, w, 3), default=None
        The images: uint8, or float in [0, 1]. Those of thumbnails are fetched by
        their index when they are plotted.
    y : array of shape (n,), default=None
        Classes or values, which are the colors. Numbers with a fraction, or with more
        than 20 different values, are values.
    axis_names : tuple of 2 str, default=None
        Labels of the axes.

    Attributes
    ----------
    indices_ : array of int
        Indices of the images with thumbnails.
    thumbnails_ : list of matplotlib AnnotationBbox
        The thumbnails, in the order of `indices_`.
    scatter_ : matplotlib PathCollection
        The points.
    ax_ : matplotlib Axes
        Axes with the images.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    find_outliers : Images whose features are far from all others.
    sklearn.manifold.TSNE : One of the methods.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import CNNFeatureTransformer, FeatureMapDisplay
    >>> digits = load_digits()
    >>> X, y = digits.data[:50] / 16, digits.target[:50]
    >>> transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    >>> display = FeatureMapDisplay.from_estimator(transformer, X, y)
    >>> display.coordinates.shape
    (50, 2)
    """

    __module__ = "skltl"

    def __init__(self, coordinates, images=None, y=None, axis_names=None):
        self.coordinates = np.asarray(coordinates, dtype=float)
        if self.coordinates.ndim != 2 or self.coordinates.shape[1] != 2:
            raise ValueError(
                f"coordinates must have shape (n, 2), got {self.coordinates.shape}."
            )
        check_consistent_length(self.coordinates, images, y)
        self.images = images
        self.y = None if y is None else column_or_1d(y)
        self.axis_names = axis_names

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y=None,
        *,
        method="pca",
        max_images=60,
        random_state=0,
        image_shape=None,
        thumbnail_size=36,
        ax=None,
        **kwargs,
    ):
        """Extract features, reduce them to two dimensions, and plot the images.

        Parameters
        ----------
        estimator : CNNFeatureTransformer, pipeline or fine-tuned network
            Features of the images. Of a pipeline that ends in a classifier or a
            regressor, these are the features that it is trained on. An unfitted
            transformer is cloned and fitted.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that the estimator accepts.
        y : array of shape (n,), default=None
            Classes or values, which are the colors.
        method : {"pca", "tsne"} or transformer, default="pca"
            Reduction to two dimensions: the first principal components, t-SNE, or a
            transformer, which is cloned and fitted, with `y` if it is given.
        max_images : int, default=60
            Largest number of thumbnails.
        random_state : int, RandomState instance or None, default=0
            Controls t-SNE.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``; by default that of the estimator.
        thumbnail_size : float, default=36
            Longer side of thumbnails in points, of which 72 are an inch.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``scatter``.

        Returns
        -------
        FeatureMapDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If an image cannot be read, or `method` returns other than two dimensions.
        """
        import_pyplot()
        transformer = fitted_to(X, _features_part(estimator))
        source = read_as(transformer, X, image_shape)
        _check_labels(source, y)
        reducer = _resolve_method(method, len(source), random_state)
        features = np.asarray(transformer.transform(X))
        display = cls._of_features(features, source, y, reducer)
        return display.plot(
            max_images=max_images, thumbnail_size=thumbnail_size, ax=ax, **kwargs
        )

    @classmethod
    def from_features(
        cls,
        features,
        X,
        y=None,
        *,
        method="pca",
        max_images=60,
        random_state=0,
        reader=None,
        value_range=None,
        image_shape=None,
        thumbnail_size=36,
        ax=None,
        **kwargs,
    ):
        """Reduce features to two dimensions, and plot the images.

        Parameters
        ----------
        features : array of shape (n, n_features)
            Features of the images.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        y : array of shape (n,), default=None
            Classes or values, which are the colors.
        method : {"pca", "tsne"} or transformer, default="pca"
            Reduction to two dimensions: the first principal components, t-SNE, or a
            transformer, which is cloned and fitted, with `y` if it is given.
        max_images : int, default=60
            Largest number of thumbnails.
        random_state : int, RandomState instance or None, default=0
            Controls t-SNE.
        reader : callable, default=None
            Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
        value_range : tuple of 2 floats, default=None
            Values of black and white, as for `CNNFeatureTransformer`.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``, if that is a table.
        thumbnail_size : float, default=36
            Longer side of thumbnails in points, of which 72 are an inch.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``scatter``.

        Returns
        -------
        FeatureMapDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If lengths differ, or `method` returns other than two dimensions.
        """
        import_pyplot()
        source = read_plainly(
            X, reader=reader, value_range=value_range, image_shape=image_shape
        )
        features = np.asarray(features)
        check_consistent_length(features, source)
        _check_labels(source, y)
        reducer = _resolve_method(method, len(source), random_state)
        display = cls._of_features(features, source, y, reducer)
        return display.plot(
            max_images=max_images, thumbnail_size=thumbnail_size, ax=ax, **kwargs
        )

    @classmethod
    def _of_features(cls, features, source, y, reducer):
        check_readable(features)
        coordinates, names = _reduce(reducer, features, y)
        return cls(coordinates, source, y, names)

    def plot(self, *, max_images=60, thumbnail_size=36, ax=None, **kwargs):
        """Plot the points and the thumbnails.

        Parameters
        ----------
        max_images : int, default=60
            Largest number of thumbnails.
        thumbnail_size : float, default=36
            Longer side of thumbnails in points, of which 72 are an inch.
        ax : matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``scatter``.

        Returns
        -------
        FeatureMapDisplay
            The display itself.
        """
        ax = resolve_ax(ax, figsize=(9, 6.5))
        self.ax_, self.figure_ = ax, ax.figure
        colors = self._draw_points(kwargs)
        ax.margins(0.08)
        ax.set(xticks=[], yticks=[])
        if self.axis_names is not None:
            ax.set(xlabel=self.axis_names[0], ylabel=self.axis_names[1])
        self._draw_thumbnails(max_images, thumbnail_size, colors)
        return self

    def _draw_points(self, kwargs):
        """Draw the points, with a legend or a color bar; return the color of each."""
        style, n = {"s": 12, **kwargs}, len(self.coordinates)
        if self.y is not None and _has_values(self.y):
            self.scatter_ = self.ax_.scatter(*self.coordinates.T, c=self.y, **style)
            self.figure_.colorbar(self.scatter_, ax=self.ax_, pad=0.01, aspect=40)
            return self.scatter_.to_rgba(self.y)
        classes, codes = np.zeros(1), np.zeros(n, dtype=int)
        if self.y is not None:
            classes, codes = np.unique(self.y, return_inverse=True)
        palette = _palette(len(classes))
        colors = palette[codes]
        if not {"c", "color"} & style.keys():
            style["color"] = colors
        self.scatter_ = self.ax_.scatter(*self.coordinates.T, **style)
        if self.y is not None and len(classes) <= MAX_CLASSES:
            self._draw_legend(classes, palette)
        return colors

    def _draw_legend(self, classes, palette):
        """Name the colors of the classes, on the right of the axes."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=color, marker="o", linestyle="", label=as_title(name))
            for name, color in zip(classes, palette, strict=True)
        ]
        legend = self.ax_.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)

    def _draw_thumbnails(self, max_images, size, colors):
        """Draw thumbnails over the points that are far enough from each other."""
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        if max_images < 0:
            raise ValueError(f"max_images={max_images} must not be negative.")
        self.indices_, self.thumbnails_ = np.zeros(0, dtype=int), []
        if self.images is None:
            return
        # Positions in the figure are known when it has its layout.
        root = self.figure_.figure  # of a subfigure, too
        root.draw_without_rendering()
        positions = self.ax_.transData.transform(self.coordinates) * 72 / root.dpi
        self.indices_ = _spread(positions, size + 2 * FRAME + GAP, max_images)
        for index in self.indices_.tolist():
            pixels = _thumbnail(self.images[index], size)
            image = OffsetImage(pixels, zoom=size / max(pixels.shape[:2]))
            box = AnnotationBbox(
                *(image, self.coordinates[index]),
                pad=FRAME / 2,
                fontsize=1,  # the unit of `pad`
                bboxprops={"edgecolor": colors[index], "linewidth": FRAME},
            )
            box.set_in_layout(False)  # which would move the points
            self.thumbnails_.append(self.ax_.add_artist(box))


def _features_part(estimator):
    """Return the transformer of an estimator, without a model on its features."""
    estimator = unwrapped(estimator)
    is_pipeline = isinstance(estimator, Pipeline)
    last = unwrapped(estimator[-1]) if is_pipeline else estimator
    if isinstance(last, FineTunedCNN):  # which has features of its own
        check_is_fitted(last)
    elif is_pipeline and (is_classifier(estimator) or is_regressor(estimator)):
        return estimator[:-1]
    return estimator


def _check_labels(source, y):
    """Raise if there is not one label for each image."""
    check_consistent_length(source, y)
    if any(one is None for one in ([] if y is None else np.asarray(y))):
        raise ValueError("y contains None.")


def _resolve_method(method, n, random_state):
    """Return the transformer of a parameter that reduces `n` rows to two dimensions."""
    if n < 2:
        raise ValueError(f"A map needs at least two images, got {n}.")
    if isinstance(method, str) and method == "pca":
        return PCA(2, random_state=random_state)
    if isinstance(method, str) and method == "tsne":
        perplexity = min(PERPLEXITY, (n - 1) / 3)
        return TSNE(perplexity=perplexity, random_state=random_state)
    if not hasattr(method, "fit_transform"):
        raise ValueError(
            "method must be 'pca', 'tsne' or a transformer, got "
            f"{shorten(repr(method))}."
        )
    return clone(method)


def _reduce(reducer, features, y):
    """Return coordinates (n, 2), and names of the axes if they have a meaning."""
    with np.errstate(invalid="ignore"):  # of equal images, without variance
        coordinates = np.asarray(reducer.fit_transform(features, y))
    if coordinates.shape != (len(features), 2):
        raise ValueError(
            f"{type(reducer).__name__} returned an array of shape {coordinates.shape}; "
            f"expected two dimensions, ({len(features)}, 2)."
        )
    if not isinstance(reducer, PCA):
        return coordinates, None
    parts = enumerate(np.nan_to_num(reducer.explained_variance_ratio_), start=1)
    return coordinates, tuple(
        f"principal component {number} ({part:.0%} of variance)"
        for number, part in parts
    )


def _has_values(y):
    """Return whether `y` is values, and not classes."""
    if y.dtype.kind not in "iuf":
        return False
    has_fraction = y.dtype.kind == "f" and (y != np.floor(y)).any()
    return bool(has_fraction) or len(np.unique(y)) > MAX_CLASSES


def _palette(n_classes):
    """Return a color for each class, shape (n_classes, 4)."""
    colormaps = import_pyplot().colormaps
    if n_classes > MAX_CLASSES:
        return colormaps["turbo"](np.linspace(0, 1, n_classes))
    return colormaps["tab10" if n_classes <= 10 else "tab20"](np.arange(n_classes))


def _spread(positions, distance, n_max):
    """Return indices of points of which none are nearer than a distance.

    That is in the direction of an axis, as squares of this size overlap. Each point is
    the one that is farthest from those before it.
    """
    offsets = np.abs(positions - positions.mean(axis=0)).max(axis=1)
    chosen: list[int] = []
    nearest = np.full(len(positions), np.inf)
    for _ in range(min(n_max, len(positions))):
        index = int(nearest.argmax()) if chosen else int(offsets.argmax())
        if nearest[index] < distance:
            break
        chosen.append(index)
        to_it = np.abs(positions - positions[index]).max(axis=1)
        nearest = np.minimum(nearest, to_it)
    return np.array(chosen, dtype=int)


def _thumbnail(image, size):
    """Return the pixels (h, w, 3) of a thumbnail; small images keep their own."""
    pixels = to_rgb_pixels(image)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * 255).astype(np.uint8)
    thumbnail = Image.fromarray(pixels)
    n_pixels = round(PIXELS_PER_POINT * size)
    thumbnail.thumbnail((n_pixels, n_pixels))
    return np.asarray(thumbnail.convert("RGB"))
