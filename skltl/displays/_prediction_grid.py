"""``PredictionGridDisplay``: images with their true and predicted labels."""

from __future__ import annotations

import numpy as np
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
)

from skltl._sklearn import take
from skltl.displays._layout import (
    as_title,
    axes_library,
    draw_image,
    grid_of_axes,
    read_like,
)
from skltl.finetuning import columns_of


class PredictionGridDisplay:
    """Images with true and predicted labels, the worst mistakes first.

    Make one with :meth:`from_estimator`.

    Parameters
    ----------
    images : list of arrays of shape (h, w, 3)
        With dtype uint8, or float32 in [0, 1].
    y_true, y_pred : array of shape (n,)
        Labels.
    margins : array of shape (n,)
        How far the true class is ahead of the best other one, in probability, or in
        decision values where there are no probabilities; negative if it is behind.

    Attributes
    ----------
    axes_ : array of matplotlib Axes
        After a plot.
    figure_ : matplotlib Figure
        Likewise.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import PredictionGridDisplay
    >>> image = np.zeros((8, 8, 3), dtype=np.uint8)
    >>> display = PredictionGridDisplay([image], ["cat"], ["dog"], [-0.4])
    >>> display.n_wrong
    1
    """

    def __init__(self, images, y_true, y_pred, margins):
        check_consistent_length(images, y_true, y_pred, margins)
        self.images = list(images)
        self.y_true, self.y_pred = np.asarray(y_true), np.asarray(y_pred)
        self.margins = np.asarray(margins)

    @classmethod
    def from_estimator(
        cls, estimator, X, y, *, n_images=12, image_shape=None, n_columns=6
    ):
        """Predict, and draw the images that went worst.

        Parameters
        ----------
        estimator : classifier
            Fitted, with `predict_proba` or `decision_function`.
        X : sequence of n images, or array of shape (n, d)
            Of any kind that it takes.
        y : array of shape (n,)
            True labels.
        n_images : int, default=12
            How many to draw.
        image_shape : tuple of int, default=None
            Of rows of numbers; ``None`` is what the estimator says.
        n_columns : int, default=6
            How many side by side.

        Returns
        -------
        PredictionGridDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If the estimator is no classifier of this kind, or a label of `y` is none of
            its classes.
        """
        axes_library()
        if n_images < 1:
            raise ValueError(f"n_images={n_images} must be at least 1.")
        _check_classifier(estimator)
        y, predicted = column_or_1d(y), np.asarray(estimator.predict(X))
        check_consistent_length(predicted, y)
        scores = _scores(estimator, X)
        if scores.shape[1] != len(estimator.classes_):
            raise ValueError("The classifier's decisions are not one for each class.")
        margins = _margins(scores, columns_of(estimator.classes_, y))
        is_right = predicted == y  # by a threshold of its own, perhaps
        worst = np.lexsort((margins, is_right))[:n_images]
        images = read_like(estimator, take(X, worst), image_shape)
        display = cls(list(images), y[worst], predicted[worst], margins[worst])
        return display.plot(n_columns=n_columns)

    @property
    def n_wrong(self):
        """How many of the images have another label than predicted."""
        return int((self.y_true != self.y_pred).sum())

    def plot(self, *, n_columns=6):
        """Draw the images.

        Parameters
        ----------
        n_columns : int, default=6
            How many side by side.

        Returns
        -------
        PredictionGridDisplay
            The display itself.
        """
        axes = grid_of_axes(len(self.images), n_columns, height=2.15)
        for ax, image, true, predicted in zip(
            axes, self.images, self.y_true, self.y_pred, strict=True
        ):
            is_right = true == predicted
            draw_image(ax, image)
            true, predicted = as_title(true), as_title(predicted)
            title = true if is_right else f"{predicted}\n(is {true})"
            color = "dimgray" if is_right else "firebrick"
            ax.set_title(title, fontsize="small", color=color, parse_math=False)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


def _check_classifier(estimator):
    """Refuse what is not fitted, or does not give scores by class."""
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


def _scores(estimator, X):
    """Return a score (n, n_classes) of each image and class."""
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(X))
    decision = np.asarray(estimator.decision_function(X))
    if decision.ndim == 1:  # of the second class against the first
        return np.column_stack([np.zeros_like(decision), decision])
    return decision


def _margins(scores, columns):
    """Return how far the true class is ahead of the best other one."""
    rows = np.arange(len(scores))
    of_true = scores[rows, columns]
    others = scores.copy()
    others[rows, columns] = -np.inf
    return of_true - others.max(axis=1)
