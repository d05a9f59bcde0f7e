"""``PredictionGridDisplay``: images with true and predicted labels."""

from __future__ import annotations

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
)

from skltl._estimator import ImageEstimator, is_fitted, read_images_of
from skltl._sklearn import take
from skltl.displays._layout import as_title, draw_image, import_pyplot, resolve_axes
from skltl.features import CNNFeatureTransformer, NetworkClassifier
from skltl.finetuning import columns_of, unwrapped


class PredictionGridDisplay:
    """Images with true and predicted labels, worst errors first.

    Create one with :meth:`from_estimator`.

    Parameters
    ----------
    images : list of n arrays of shape (h, w, 3)
        The images: uint8, or float in [0, 1].
    y_true : array of shape (n,)
        True labels.
    y_pred : array of shape (n,)
        Predicted labels.
    margins : array of shape (n,)
        Probability of the true class minus the highest probability of the other
        classes; differences of decision values for classifiers without
        `predict_proba`.

    Attributes
    ----------
    n_wrong_ : int
        Number of images whose predicted label is wrong.
    ims_ : list of matplotlib AxesImage
        The images.
    axes_ : array of matplotlib Axes of shape (n,)
        Axes of each image.
    figure_ : matplotlib Figure
        Figure containing the axes.

    See Also
    --------
    GradCAMDisplay : Class activation maps over images.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PredictionGridDisplay
    >>> image = np.zeros((8, 8, 3), dtype=np.uint8)
    >>> display = PredictionGridDisplay([image], ["cat"], ["dog"], [-0.4])
    >>> display.n_wrong_
    1
    """

    __module__ = "skltl"

    def __init__(self, images, y_true, y_pred, margins):
        check_consistent_length(images, y_true, y_pred, margins)
        self.images = list(images)
        self.y_true = np.asarray(y_true)
        self.y_pred = np.asarray(y_pred)
        self.margins = np.asarray(margins)

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
        """Predict labels, and plot the images with the worst errors.

        Parameters
        ----------
        estimator : classifier
            Fitted classifier with `predict_proba` or `decision_function`.
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that the estimator accepts.
        y : array of shape (n,)
            True labels.
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
            If the estimator is no such classifier, a label of `y` is none of its
            classes, or `axes` has another length.
        """
        import_pyplot()
        if n_images < 1:
            raise ValueError(f"n_images={n_images} must be at least 1.")
        _check_classifier(estimator)
        y = column_or_1d(y)
        y_pred, scores = _predict(estimator, X)
        check_consistent_length(y_pred, y)
        if scores.shape[1] != len(estimator.classes_):
            raise ValueError(
                f"{type(estimator).__name__} has {len(estimator.classes_)} classes, "
                f"but decision values of shape {scores.shape}; expected one column for "
                "each class."
            )
        margins = _margins(scores, columns_of(estimator.classes_, y))
        # The predicted label is not always the one with the highest score: a
        # classifier may have a decision threshold.
        worst = np.lexsort((margins, y_pred == y))[:n_images]
        images = list(_read_images(estimator, take(X, worst), image_shape))
        display = cls(images, y[worst], y_pred[worst], margins[worst])
        return display.plot(n_columns=n_columns, axes=axes, **kwargs)

    @property
    def n_wrong_(self):
        """Number of images whose predicted label is wrong."""
        return int((self.y_true != self.y_pred).sum())

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
        axes = resolve_axes(axes, len(self.images), n_columns, panel_size=(1.9, 2.15))
        self.ims_ = []
        for ax, image, true, predicted in zip(
            axes, self.images, self.y_true, self.y_pred, strict=True
        ):
            title, color = as_title(predicted), "dimgray"
            if predicted != true:
                title, color = f"{title}\n(is {as_title(true)})", "firebrick"
            self.ims_.append(draw_image(ax, image, title, color, **kwargs))
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


def _check_classifier(estimator):
    """Raise an error for an estimator that is not fitted or has no class scores."""
    check_is_fitted(estimator)
    has_scores = any(
        hasattr(estimator, name) for name in ("predict_proba", "decision_function")
    )
    if not (has_scores and hasattr(estimator, "classes_")):
        last = getattr(estimator, "steps", [(None, estimator)])[-1][1]
        raise ValueError(
            "PredictionGridDisplay needs a classifier with predict_proba or "
            f"decision_function; got {type(last).__name__}."
        )


def _predict(estimator, X):
    """Return labels (n,) and scores (n, n_classes); extract features only once."""
    estimator = unwrapped(estimator)
    if isinstance(estimator, NetworkClassifier):
        proba = estimator.predict_proba(X)
        return estimator.classes_[proba.argmax(axis=1)], proba
    if isinstance(estimator, Pipeline):
        return _predict(estimator[-1], estimator[:-1].transform(X))
    y_pred = np.asarray(estimator.predict(X))
    if hasattr(estimator, "predict_proba"):
        return y_pred, np.asarray(estimator.predict_proba(X))
    decision = np.asarray(estimator.decision_function(X))
    if decision.ndim == 1:  # of the second of two classes
        decision = np.column_stack([np.zeros_like(decision), decision])
    return y_pred, decision


def _margins(scores, columns):
    """Return the score of the true class minus the highest of the others (n,)."""
    rows = np.arange(len(scores))
    others = scores.copy()
    others[rows, columns] = -np.inf
    return scores[rows, columns] - others.max(axis=1)


def _read_images(estimator, X, image_shape):
    """Read images as the fitted estimator does, or rows of the given shape."""
    reader = _find_reader(estimator)
    if image_shape is None and reader is not None:
        return read_images_of(reader, X)
    shape = _image_shape(estimator) if image_shape is None else image_shape
    return read_images_of(CNNFeatureTransformer(image_shape=shape), X, reset=True)


def _find_reader(estimator):
    """Return the first fitted part of an estimator that reads images, or ``None``."""
    if isinstance(estimator, ImageEstimator):
        return estimator if is_fitted(estimator) else None
    names = ("best_estimator_", "estimator_", "estimator")
    parts = [
        *(step for _, step in getattr(estimator, "steps", [])),
        *(getattr(estimator, name, None) for name in names),
        *getattr(estimator, "calibrated_classifiers_", [])[:1],
    ]
    readers = [_find_reader(part) for part in parts if hasattr(part, "__dict__")]
    return next((reader for reader in readers if reader is not None), None)


def _image_shape(estimator):
    """Return the first `image_shape` among own and nested parameters, or ``None``."""
    params = unwrapped(estimator).get_params()
    shapes = [
        _image_shape(value) if isinstance(value, FrozenEstimator) else value
        for name, value in params.items()
        if isinstance(value, FrozenEstimator) or name.split("__")[-1] == "image_shape"
    ]
    return next((shape for shape in shapes if shape is not None), None)
