"""``ImageGridDisplay``: any images of a data set, with captions."""

from __future__ import annotations

import numpy as np
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from skltl.displays._images import (
    check_n_images,
    read_as,
    read_plainly,
    resolve_indices,
    select_images,
)
from skltl.displays._layout import (
    ALERT,
    PANEL_SIZE,
    PLAIN,
    as_title,
    draw_image,
    import_pyplot,
    place_of,
    resolve_axes,
)
from skltl.finetuning import columns_of

# A figure of more images is too large to be read, and takes minutes.
MAX_IMAGES = 200

# Characters of a line above an image.
N_CAPTION = 26


class ImageGridDisplay:
    """Images of a data set with captions, their indices and their file names.

    Create one with :meth:`from_images`, or from what the functions of curation return:
    with :meth:`from_label_errors`, :meth:`from_duplicates`, :meth:`from_outliers` and
    :meth:`from_neighbors`.

    Parameters
    ----------
    images : list of n arrays of shape (h, w, 3)
        The images: uint8, or float in [0, 1].
    captions : sequence of n str or None, default=None
        Text above each image.
    indices : array of int of shape (n,), default=None
        Indices of the images in ``X``.
    names : list of n str or None, default=None
        Path or URL of each image, or ``None``.
    highlight : array of bool of shape (n,), default=None
        Images whose captions are red.
    summary : str, default=None
        Line above a new figure.

    Attributes
    ----------
    ims_ : list of matplotlib AxesImage
        The images.
    axes_ : array of matplotlib Axes of shape (n,)
        Axes of each image.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    PredictionGridDisplay : Images with true and predicted labels.
    FeatureMapDisplay : Images at the positions of their features.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import ImageGridDisplay
    >>> X = np.zeros((20, 8, 8, 3), dtype=np.uint8)
    >>> display = ImageGridDisplay.from_images(X, [3, 14], captions=["cat", "dog"])
    >>> [ax.get_title() for ax in display.axes_]
    ['cat', 'dog']
    >>> [ax.get_xlabel() for ax in display.axes_]
    ['3', '14']
    """

    __module__ = "skltl"

    def __init__(
        self,
        images,
        captions=None,
        *,
        indices=None,
        names=None,
        highlight=None,
        summary=None,
    ):
        lengths = {"captions": captions, "indices": indices, "names": names}
        for name, values in (lengths | {"highlight": highlight}).items():
            if values is not None and len(values) != len(images):
                raise ValueError(
                    f"{name} has {len(values)} items for {len(images)} images."
                )
        self.images = list(images)
        self.captions = None if captions is None else list(captions)
        self.indices = None if indices is None else np.asarray(indices)
        self.names = None if names is None else list(names)
        self.highlight = None if highlight is None else np.asarray(highlight)
        self.summary = summary

    @classmethod
    def from_images(
        cls,
        X,
        indices=None,
        *,
        captions=None,
        highlight=None,
        reader=None,
        value_range=None,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Plot images.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        indices : array of int of shape (m,) or of bool of shape (n,), default=None
            Images to plot, in this order; ``None`` is all of them, at most 200.
        captions : sequence of m str, default=None
            Text above each image that is plotted.
        highlight : array of bool of shape (m,), default=None
            Images whose captions are red.
        reader : callable, default=None
            Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
        value_range : tuple of 2 floats, default=None
            Values of black and white, as for `CNNFeatureTransformer`.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``, if that is a table.
        n_columns : int, default=6
            Number of columns of a new figure.
        axes : array of m matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If an index is none of ``X``, or `captions`, `highlight` or `axes` have
            another length.
        """
        import_pyplot()
        source = read_plainly(
            X, reader=reader, value_range=value_range, image_shape=image_shape
        )
        display = cls._of_source(source, indices, captions, highlight)
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def from_label_errors(
        cls,
        X,
        y,
        errors,
        *,
        n_images=12,
        reader=None,
        value_range=None,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Plot the images with the most doubtful labels.

        A caption has the suggested class and the label, with their probabilities. It is
        red if the label is a suspect.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        y : array of shape (n,)
            Labels.
        errors : LabelErrors
            Result of `find_label_errors` for ``X`` and `y`.
        n_images : int, default=12
            Number of images to plot.
        reader : callable, default=None
            Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
        value_range : tuple of 2 floats, default=None
            Values of black and white, as for `CNNFeatureTransformer`.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``, if that is a table.
        n_columns : int, default=6
            Number of columns of a new figure.
        axes : array of `n_images` matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If ``X``, `y` and `errors` have different lengths.
        """
        import_pyplot()
        check_n_images(n_images)
        source = read_plainly(
            X, reader=reader, value_range=value_range, image_shape=image_shape
        )
        y = np.asarray(y)
        check_consistent_length(source, y, errors.order)
        indices = errors.order[:n_images]
        captions = _doubts(y, errors, indices)
        display = cls._of_source(source, indices, captions, errors.is_suspect[indices])
        n_suspects = int(errors.is_suspect.sum())
        display.summary = f"{n_suspects:,} of {len(y):,} labels are suspects"
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def from_duplicates(
        cls,
        X,
        duplicates,
        *,
        other=None,
        n_pairs=6,
        reader=None,
        value_range=None,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Plot pairs of duplicates side by side, the nearest ones first.

        A caption has the number of the pair and the distance.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        duplicates : Duplicates
            Result of `find_duplicates` for ``X``.
        other : sequence of m images, default=None
            The other images, if duplicates are those of two sets.
        n_pairs : int, default=6
            Number of pairs to plot.
        reader : callable, default=None
            Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
        value_range : tuple of 2 floats, default=None
            Values of black and white, as for `CNNFeatureTransformer`.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``, if that is a table.
        n_columns : int, default=6
            Number of columns of a new figure, an even one.
        axes : array of 2 x `n_pairs` matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If there are no duplicates, or they are not of these images.
        """
        import_pyplot()
        check_n_images(n_pairs, "n_pairs")
        if n_columns % 2:
            raise ValueError(
                f"n_columns={n_columns} must be even: images are in pairs."
            )
        sources = [
            read_plainly(
                images, reader=reader, value_range=value_range, image_shape=image_shape
            )
            for images in ([X] if other is None else [X, other])
        ]
        pairs = _pairs_of(duplicates, sources)
        panels = []
        for number, pair in enumerate(pairs[:n_pairs], start=1):
            captions = [f"pair {number}, distance {pair.distance:.3f}"] * 2
            if other is not None:
                captions[1] = f"pair {number}, in other"
            ends = zip(pair[:2], captions, strict=True)
            panels += [
                (source, *end)
                for source, end in zip((sources[0], sources[-1]), ends, strict=True)
            ]
        display = cls._of_panels(panels)
        display.summary = f"{len(pairs):,} pair{'s' * (len(pairs) > 1)} of duplicates"
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def from_outliers(
        cls,
        X,
        outliers,
        *,
        n_images=12,
        reader=None,
        value_range=None,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Plot the most unusual images, with their scores.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        outliers : Outliers
            Result of `find_outliers` for ``X``.
        n_images : int, default=12
            Number of images to plot.
        reader : callable, default=None
            Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
        value_range : tuple of 2 floats, default=None
            Values of black and white, as for `CNNFeatureTransformer`.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``, if that is a table.
        n_columns : int, default=6
            Number of columns of a new figure.
        axes : array of `n_images` matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If ``X`` and `outliers` have different lengths.
        """
        import_pyplot()
        check_n_images(n_images)
        source = read_plainly(
            X, reader=reader, value_range=value_range, image_shape=image_shape
        )
        check_consistent_length(source, outliers.order)
        is_readable = ~np.isnan(outliers.scores[outliers.order])
        indices = outliers.order[is_readable][:n_images]
        captions = [f"{score:.2f}" for score in outliers.scores[indices]]
        display = cls._of_source(source, indices, captions)
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def from_neighbors(
        cls,
        neighbors,
        X,
        queries=None,
        *,
        indices=None,
        n_neighbors=None,
        axes=None,
        **kwargs,
    ):
        """Plot images and, in the same row, those most like them with the distances.

        Parameters
        ----------
        neighbors : ImageNeighbors
            Fitted index, which has the features of the images only.
        X : sequence of n images
            The images that `neighbors` was fitted on, in the same order.
        queries : sequence of m images, default=None
            Images to search for. The number below one of them is its index in
            `queries`.
        indices : array of int of shape (m,), default=None
            Images of ``X`` to search for, if there are no `queries`; no image is its
            own neighbor. By default the first four.
        n_neighbors : int, default=None
            Number of neighbors; ``None`` is that of `neighbors`.
        axes : array of m x (1 + `n_neighbors`) matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If ``X`` has another number of images than `neighbors`, or both `queries`
            and `indices` are given.
        """
        import_pyplot()
        check_is_fitted(neighbors)
        source = read_as(neighbors.transformer_, X)
        n_fitted = neighbors.index_.n_samples_fit_
        if len(source) != n_fitted:
            raise ValueError(
                f"X has {len(source)} images, and neighbors was fitted on {n_fitted}: "
                "pass those."
            )
        if queries is None:
            indices = range(min(4, n_fitted)) if indices is None else indices
            rows, asked = resolve_indices(indices, n_fitted), source
        elif indices is None:
            asked = read_as(neighbors.transformer_, queries)
            rows = range(len(asked))
        else:
            raise ValueError("queries and indices exclude each other.")
        distances, found = neighbors.kneighbors(queries, n_neighbors)
        panels = []
        for row in rows:
            panels.append((asked, row, "query"))
            panels += [
                (source, index, f"{distance:.3f}")
                for index, distance in zip(found[row], distances[row], strict=True)
            ]
        display = cls._of_panels(panels)
        return display.plot(n_columns=1 + found.shape[1], axes=axes, **kwargs)

    @classmethod
    def _of_source(cls, source, indices, captions=None, highlight=None):
        """Return the display of some images of a source."""
        is_all = indices is None
        indices = resolve_indices(indices, len(source))
        if is_all and len(indices) > MAX_IMAGES:
            raise ValueError(
                f"X has {len(source):,} images, which is too many for one figure: pass "
                "the indices of those to plot."
            )
        images, names = select_images(source, indices)
        return cls(images, captions, indices=indices, names=names, highlight=highlight)

    @classmethod
    def _of_panels(cls, panels):
        """Return the display of (source, index, caption), of several sources."""
        return cls(
            [source[int(index)] for source, index, _ in panels],
            [caption for _, _, caption in panels],
            indices=[int(index) for _, index, _ in panels],
            names=[source.name(int(index)) for source, index, _ in panels],
        )

    def plot(self, *, n_columns=6, axes=None, **kwargs):
        """Plot the images.

        Parameters
        ----------
        n_columns : int, default=6
            Number of columns of a new figure.
        axes : array of n matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        ImageGridDisplay
            The display itself.
        """
        n = len(self.images)
        axes = resolve_axes(axes, n, n_columns, PANEL_SIZE, self.summary)
        captions, indices, names, highlight = (
            [missing] * n if values is None else values
            for values, missing in (
                (self.captions, ""),
                (self.indices, None),
                (self.names, None),
                (self.highlight, False),
            )
        )
        self.ims_ = [
            draw_image(
                *(ax, image, _lines(caption)),
                ALERT if is_red else PLAIN,
                place_of(index, name),
                **kwargs,
            )
            for ax, image, caption, index, name, is_red in zip(
                axes, self.images, captions, indices, names, highlight, strict=True
            )
        ]
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


def _lines(caption):
    """Return a caption, each line of which is shortened to the width of an image."""
    caption = "" if caption is None else caption
    return "\n".join(as_title(line, N_CAPTION) for line in str(caption).split("\n"))


def _doubts(y, errors, indices):
    """Return the suggested class of images and their labels, with probabilities."""
    classes = np.unique(y)
    labels, suggested = (
        columns_of(classes, one[indices]) for one in (y, errors.suggested)
    )
    captions = []
    for index, *both in zip(indices, labels, suggested, strict=True):
        label, other = (
            f"{as_title(classes[one], 15)} {errors.proba[index, one]:.2f}"
            for one in both
        )
        captions.append(label if both[0] == both[1] else f"{other}\nlabel {label}")
    return captions


def _pairs_of(duplicates, sources):
    """Return the pairs of duplicates that are in one or two sources."""
    is_of_two = duplicates.groups is None
    if is_of_two != (len(sources) == 2):
        advice = "pass the second one as other" if is_of_two else "leave other out"
        raise ValueError(
            f"The duplicates are those of {'two sets' if is_of_two else 'one set'}: "
            f"{advice}."
        )
    if not duplicates.pairs:
        raise ValueError("There are no duplicates to plot.")
    for end, source in enumerate((sources[0], sources[-1])):
        largest = max(pair[end] for pair in duplicates.pairs)
        if largest >= len(source):
            name = "other" if is_of_two and end else "X"
            raise ValueError(
                f"The duplicates include image {largest}, but {name} has {len(source)}."
            )
    return duplicates.pairs
