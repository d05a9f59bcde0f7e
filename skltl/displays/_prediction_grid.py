"""``PredictionGridDisplay``: images with true and predicted targets."""

from __future__ import annotations

import numpy as np
from sklearn.utils.validation import check_consistent_length

from skltl.displays._images import check_n_images, read_as, read_plainly, select_images
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
from skltl.displays._predictions import (
    is_wrong,
    predictions_from,
    predictions_of,
    targets_of,
)

# Characters of the predicted and the true class before a probability.
N_PREDICTED, N_TRUE = 20, 15

# Characters of the names of several labels, and of several values.
N_LABELS, N_VALUES = 26, 22


class PredictionGridDisplay:
    """Images with true and predicted labels or values, worst errors first.

    Create one with :meth:`from_estimator` or :meth:`from_predictions`. A title has the
    predicted class and its probability, and the true class if that is another one. The
    line below an image has its index in ``X`` and its file name.

    Parameters
    ----------
    images : list of n arrays of shape (h, w, 3)
        The images: uint8, or float in [0, 1].
    y_true : array of shape (n,), or (n, n_outputs)
        True classes or values, or indicators of labels.
    y_pred : array of shape (n,), or (n, n_outputs)
        Predicted ones.
    margins : array of shape (n,)
        Probability of the true class minus the highest probability of the other
        classes; differences of decision values for classifiers without
        `predict_proba`. For multilabel targets, the smallest one over the labels: the
        probability of the true indicator minus that of the other. For values, the
        negative absolute error, or root mean squared error of several values. NaN if
        it is unknown.
    indices : array of int of shape (n,), default=None
        Indices of the images in ``X``.
    names : list of n str or None, default=None
        Path or URL of each image, or ``None``.
    proba : array of shape (n, n_classes), default=None
        Probabilities of the classes or labels.
    classes : array of shape (n_classes,), default=None
        Class or label of each column of `proba`, or of indicators.
    targets : {"classes", "labels", "values"}, default=None
        Kind of the targets; ``None`` is labels for two columns of 0 and 1 or more,
        values for numbers with a fraction or other columns, and classes otherwise.
    summary : str, default=None
        Line above a new figure, about all images in ``X``.

    Attributes
    ----------
    n_wrong_ : int
        Number of images in the grid whose predicted labels are wrong.
    ims_ : list of matplotlib AxesImage
        The images.
    axes_ : array of matplotlib Axes of shape (n,)
        Axes of each image.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    GradCAMDisplay : Class activation maps over images.
    ImageGridDisplay : Any images with captions.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PredictionGridDisplay
    >>> images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    >>> y_true = ["cat", "dog", "cat"]
    >>> proba = [[0.3, 0.7], [0.4, 0.6], [0.8, 0.2]]  # of cat and dog
    >>> display = PredictionGridDisplay.from_predictions(y_true, proba, images)
    >>> display.summary, display.indices.tolist()
    ('1 of 3 wrong', [0, 1, 2])
    """

    __module__ = "skltl"

    def __init__(
        self,
        images,
        y_true,
        y_pred,
        margins,
        indices=None,
        names=None,
        *,
        proba=None,
        classes=None,
        targets=None,
        summary=None,
    ):
        check_consistent_length(images, y_true, y_pred, margins, indices, names, proba)
        if proba is not None and classes is None:
            raise ValueError("proba requires classes, the class of each column.")
        self.images = list(images)
        self.y_true = np.asarray(y_true)
        self.y_pred = np.asarray(y_pred)
        self.margins = np.asarray(margins)
        self.indices = None if indices is None else np.asarray(indices)
        self.names = None if names is None else list(names)
        self.proba = None if proba is None else np.asarray(proba)
        self.classes = None if classes is None else np.asarray(classes)
        self.targets = (
            targets_of(self.y_true, self.y_pred) if targets is None else targets
        )
        self.summary = summary

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        y,
        *,
        n_images=12,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Predict, and plot the images with the worst errors.

        Parameters
        ----------
        estimator : classifier or regressor
            Fitted estimator. Without `predict_proba` or `decision_function`, wrong
            predictions of a classifier are in the order of ``X``.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that the estimator accepts.
        y : array of shape (n,), or (n, n_outputs)
            True classes or values, or indicators of labels. The columns of a data frame
            are the names of the labels.
        n_images : int, default=12
            Number of images to plot.
        image_shape : tuple of 2 or 3 ints, default=None
            Shape of the image in each row of ``X``; by default that of the estimator.
        n_columns : int, default=6
            Number of columns of a new figure.
        axes : array of `n_images` matplotlib Axes, default=None
            Axes to plot on; by default those of a new figure.
        **kwargs : dict
            Keyword arguments of matplotlib's ``imshow``.

        Returns
        -------
        PredictionGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the estimator is neither a classifier nor a regressor, a label of `y` is
            none of its classes, or `axes` has another length.
        """
        import_pyplot()
        check_n_images(n_images)
        predictions = predictions_of(estimator, X, y)
        display = cls._of_worst(
            predictions, read_as(estimator, X, image_shape), n_images
        )
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        y_true,
        y_pred,
        X,
        *,
        proba=None,
        classes=None,
        n_images=12,
        reader=None,
        value_range=None,
        image_shape=None,
        n_columns=6,
        axes=None,
        **kwargs,
    ):
        """Plot the images with the worst errors of given predictions.

        Parameters
        ----------
        y_true : array of shape (n,), or (n, n_outputs)
            True classes or values, or indicators of labels.
        y_pred : array of shape (n,), (n, n_outputs) or (n, n_classes)
            Predicted classes, values or indicators, as of ``cross_val_predict``; or
            probabilities, as of its ``method="predict_proba"``, of which the highest
            one, or those above 0.5 for multilabel targets, are predicted.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `CNNFeatureTransformer` accepts.
        proba : array of shape (n, n_classes), default=None
            Probabilities, if `y_pred` is labels. Without any, wrong predictions are in
            the order of ``X``.
        classes : array of shape (n_classes,), default=None
            Class of each column of the probabilities; by default the sorted classes of
            `y_true`. For multilabel targets, names of the labels; by default the
            columns of a data frame.
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
        PredictionGridDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If shapes differ, the probabilities are those of other classes or are none,
            or `axes` has another length.
        """
        import_pyplot()
        check_n_images(n_images)
        predictions = predictions_from(y_true, y_pred, proba, classes)
        source = read_plainly(
            X, reader=reader, value_range=value_range, image_shape=image_shape
        )
        check_consistent_length(source, predictions.y_true)
        display = cls._of_worst(predictions, source, n_images)
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @classmethod
    def _of_worst(cls, predictions, source, n_images):
        """Return the display of the images with the worst errors."""
        worst = predictions.worst(n_images)
        images, names = select_images(source, worst)
        proba = predictions.proba
        return cls(
            *(images, predictions.y_true[worst], predictions.y_pred[worst]),
            predictions.margins[worst],
            worst,
            names,
            proba=None if proba is None else proba[worst],
            classes=predictions.classes,
            targets=predictions.targets,
            summary=predictions.summary(),
        )

    @property
    def n_wrong_(self):
        """Number of images in the grid whose predicted labels are wrong."""
        return int(is_wrong(self.targets, self.y_true, self.y_pred).sum())

    def plot(self, *, n_columns=6, axes=None, **kwargs):
        """Plot the images; titles of wrong predictions are red.

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
        PredictionGridDisplay
            The display itself.
        """
        axes = resolve_axes(axes, len(self.images), n_columns, PANEL_SIZE, self.summary)
        wrong = is_wrong(self.targets, self.y_true, self.y_pred)
        self.ims_ = []
        for number, (ax, image) in enumerate(zip(axes, self.images, strict=True)):
            color = ALERT if wrong[number] else PLAIN
            place = place_of(
                None if self.indices is None else self.indices[number],
                None if self.names is None else self.names[number],
            )
            title = self._title(number, wrong[number])
            self.ims_.append(draw_image(ax, image, title, color, place, **kwargs))
        self.axes_, self.figure_ = axes, axes[0].figure
        return self

    def _title(self, number, is_wrong):
        true, predicted = self.y_true[number], self.y_pred[number]
        if self.targets == "values":
            first = "predicted " * (true.ndim == 0)
            return f"{first}{_values(predicted)}\n(is {_values(true)})"
        if self.targets == "labels":
            lines = [
                as_title(self._labels(predicted), N_LABELS),
                f"(is {as_title(self._labels(true), N_LABELS - 5)})",
                self._worst_label(number),
            ]
        else:
            lines = [
                self._with_proba(number, predicted, N_PREDICTED),
                f"(is {self._with_proba(number, true, N_TRUE)})",
            ]
        return "\n".join(filter(None, lines if is_wrong else lines[:1]))

    def _worst_label(self, number):
        """Return the label with the smallest margin, and its probability."""
        if self.proba is None or self.classes is None:
            return None
        proba = self.proba[number]
        column = np.where(self.y_true[number], proba, 1 - proba).argmin()
        return f"{as_title(self.classes[column])} {proba[column]:.2f}"

    def _with_proba(self, number, label, n_characters):
        """Return a class with its probability, if that is known."""
        if self.proba is None:
            return as_title(label)
        (column,) = np.flatnonzero(self.classes == label)
        return f"{as_title(label, n_characters)} {self.proba[number, column]:.2f}"

    def _labels(self, indicators):
        """Return the names of the labels that an indicator row has."""
        columns = np.flatnonzero(indicators)
        names = columns if self.classes is None else self.classes[columns]
        return ", ".join(map(str, names)) or "no label"


def _values(values):
    """Return one or several values to be read in a title."""
    texts = [f"{one:.0f}" if abs(one) >= 1e4 else f"{one:.4g}" for one in values.flat]
    n_shown = len(texts)
    while n_shown > 1 and len(", ".join(texts[:n_shown])) > N_VALUES:
        n_shown -= 1
    more = ["..."] * (n_shown < len(texts))
    return ", ".join([*texts[:n_shown], *more])
