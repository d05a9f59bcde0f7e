"""Predictions of classes, labels or values, and how wrong each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from skltl._nested import unwrapped
from skltl._targets import is_multilabel_classifier
from skltl.features import NetworkClassifier
from skltl.finetuning import columns_of

# Of probabilities, in float32.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Predictions:
    """True and predicted targets of n images.

    `targets` is "classes", "labels" (indicator matrices) or "values" (of regression).
    The `margins` are those of `PredictionGridDisplay`, NaN if they are unknown.
    """

    targets: str
    y_true: NDArray[Any]
    y_pred: NDArray[Any]
    margins: NDArray[Any]
    proba: NDArray[Any] | None = None
    classes: NDArray[Any] | None = None

    def worst(self, n_images):
        """Return the indices of the worst predictions: errors first, by margin.

        The predicted label is not always the one with the highest score: a classifier
        may have a decision threshold.
        """
        is_right = ~is_wrong(self.targets, self.y_true, self.y_pred)
        return np.lexsort((self.margins, is_right))[:n_images]

    def summary(self):
        """Return the quality of all predictions, in words."""
        n = len(self.y_true)
        if self.targets != "values":
            n_wrong = int(is_wrong(self.targets, self.y_true, self.y_pred).sum())
            return f"{n_wrong:,} of {n:,} wrong"
        if self.y_true.ndim == 1:
            return f"mean absolute error {-self.margins.mean():.3g}, {n:,} images"
        error = np.sqrt((self.margins**2).mean())
        return f"root mean squared error {error:.3g}, {n:,} images"


def is_wrong(targets, y_true, y_pred):
    """Return which predictions differ (n,); values are neither right nor wrong."""
    if targets == "values":
        return np.zeros(len(y_true), dtype=bool)
    differs = np.asarray(y_true != y_pred)
    return differs.any(axis=1) if differs.ndim == 2 else differs


def targets_of(y_true, y_pred):
    """Return the kind of two arrays of targets."""
    if any(_is_real(y) for y in (y_true, y_pred)):
        return "values"
    if y_true.ndim == y_pred.ndim == 1:
        return "classes"
    is_indicator = all(np.isin(y, (0, 1)).all() for y in (y_true, y_pred))
    return "labels" if is_indicator else "values"


def predict(estimator, X):
    """Return predictions, scores and whether these are probabilities.

    Features are extracted only once. Scores are (n, n_classes) or (n, n_labels), or
    ``None`` if the estimator has none.
    """
    estimator = unwrapped(estimator)
    if isinstance(estimator, NetworkClassifier):
        proba = estimator.predict_proba(X)
        if is_multilabel_classifier(estimator):
            return (proba > 0.5).astype(int), proba, True
        return estimator.classes_[proba.argmax(axis=1)], proba, True
    if isinstance(estimator, Pipeline):
        return predict(estimator[-1], estimator[:-1].transform(X))
    y_pred = _as_targets(estimator.predict(X))
    if hasattr(estimator, "predict_proba"):
        return y_pred, _stacked(estimator.predict_proba(X)), True
    if not hasattr(estimator, "decision_function"):
        return y_pred, None, False
    decision = np.asarray(estimator.decision_function(X))
    if decision.ndim == 1:  # of the second of two classes
        decision = np.column_stack([np.zeros_like(decision), decision])
    return y_pred, decision, False


def predictions_of(estimator, X, y):
    """Return the predictions of a fitted classifier or regressor."""
    check_is_fitted(estimator)
    if not (is_classifier(estimator) or is_regressor(estimator)):
        last = getattr(estimator, "steps", [(None, estimator)])[-1][1]
        raise ValueError(
            "PredictionGridDisplay needs a classifier or a regressor; got "
            f"{type(last).__name__}."
        )
    y_true = _as_targets(y)
    y_pred, scores, is_proba = predict(estimator, X)
    _check_shapes(y_true, y_pred)
    if is_regressor(estimator):
        return Predictions("values", y_true, y_pred, _value_margins(y_true, y_pred))
    classes: Any = getattr(estimator, "classes_", None)
    if y_pred.ndim == 2:  # of which some classifiers have pairs of classes
        classes = _label_names(y, None)
    elif scores is not None and scores.shape[1] != len(classes):
        raise ValueError(
            f"{type(estimator).__name__} has {len(classes)} classes, but decision "
            f"values of shape {scores.shape}; expected one column for each class."
        )
    return _of_labels(y_true, y_pred, scores, is_proba, classes)


def predictions_from(y_true, y_pred, proba=None, classes=None):
    """Return predictions that are given: labels, indicators, values or probabilities.

    Instead of labels or indicators, `y_pred` may be their probabilities.
    """
    targets, y_true = y_true, _as_targets(y_true)
    y_pred = _as_targets(_stacked(y_pred))
    proba = None if proba is None else _as_targets(_stacked(proba))
    if y_pred.ndim == 0 or (proba is not None and proba.ndim != 2):
        raise ValueError(
            "Expected predictions of each image, and probabilities of shape (n, "
            "n_classes); those of a constant label are missing in a list of pairs."
        )
    if proba is None and _are_probabilities(y_true, y_pred):
        proba, y_pred = y_pred, None
    if y_true.ndim == 2:
        classes = _label_names(targets, classes)
    elif proba is not None:
        classes = np.unique(y_true) if classes is None else np.asarray(classes)
    if proba is not None:
        _check_proba(proba, (len(y_true), len(classes)))
        if y_true.ndim == 1:  # in the order of scikit-learn
            order = np.argsort(classes)
            classes, proba = classes[order], proba[:, order]
    if y_pred is None and y_true.ndim == 2:
        y_pred = (proba > 0.5).astype(int)
    elif y_pred is None:
        y_pred = classes[proba.argmax(axis=1)]
    _check_shapes(y_true, y_pred)
    _check_types(y_true, y_pred)
    if targets_of(y_true, y_pred) == "values":
        return Predictions("values", y_true, y_pred, _value_margins(y_true, y_pred))
    return _of_labels(y_true, y_pred, proba, True, classes)


def _of_labels(y_true, y_pred, scores, is_proba, classes):
    """Return predictions of classes or labels with their margins."""
    targets = "classes" if y_true.ndim == 1 else "labels"
    if scores is None:
        margins = np.full(len(y_true), np.nan)
    elif targets == "classes":
        columns_of(classes, y_pred)  # raises an error for other classes
        margins = _class_margins(scores, columns_of(classes, y_true))
    else:
        # A probability minus that of not having the label.
        signed = 2 * scores - 1 if is_proba else scores
        margins = np.where(y_true, signed, -signed).min(axis=1)
    proba = scores if is_proba else None
    return Predictions(targets, y_true, y_pred, margins, proba, classes)


def _class_margins(scores, columns):
    """Return the score of the true class minus the highest of the others (n,)."""
    rows = np.arange(len(scores))
    others = scores.copy()
    others[rows, columns] = -np.inf
    return scores[rows, columns] - others.max(axis=1)


def _value_margins(y_true, y_pred):
    """Return the negative errors (n,), the root mean square of several values."""
    errors = np.abs(np.asarray(y_true, dtype=float) - y_pred)
    return -np.sqrt((errors**2).mean(axis=1)) if errors.ndim == 2 else -errors


def _as_targets(y):
    """Return targets as an array (n,), or (n, m) for several labels or values."""
    y = y.toarray() if issparse(y) else np.asarray(y)
    return y.ravel() if y.ndim == 2 and y.shape[1] == 1 else y


def _stacked(proba):
    """Return the probabilities of labels as an array: scikit-learn has a list of pairs.

    They are ``None`` if a label has no pair, since it is constant.
    """
    if not (isinstance(proba, list) and proba and np.ndim(proba[0]) == 2):
        return proba
    is_pair = all(np.shape(pair)[1] == 2 for pair in proba)
    return np.column_stack([pair[:, 1] for pair in proba]) if is_pair else None


def _is_real(y):
    """Return whether targets have values with a fraction."""
    return y.dtype.kind == "f" and bool((y != np.floor(y)).any())


def _are_probabilities(y_true, y_pred):
    """Return whether predictions of labels or indicators are their probabilities."""
    is_indicator = np.isin(y_true, (0, 1)).all()
    is_hard = y_true.ndim == 2 and np.isin(y_pred, (0, 1)).all()
    return y_pred.ndim == 2 and (y_true.ndim == 1 or is_indicator) and not is_hard


def _label_names(y, classes):
    """Return the names of labels: those given, the columns of a frame, or numbers."""
    numbers = np.arange(np.shape(y)[1])
    if classes is None or np.array_equal(classes, numbers):
        return np.asarray(getattr(y, "columns", numbers))
    if len(classes) != len(numbers):
        raise ValueError(
            f"classes has {len(classes)} names, and there are {len(numbers)} labels."
        )
    return np.asarray(classes)


def _check_shapes(y_true, y_pred):
    check_consistent_length(y_true, y_pred)
    if y_true.shape != y_pred.shape or y_true.ndim > 2:
        raise ValueError(
            f"The true targets have shape {y_true.shape}, and the predictions "
            f"{y_pred.shape}."
        )


def _check_types(y_true, y_pred):
    """Raise an error for numbers and text, of which all would be wrong."""
    kinds = y_true.dtype.kind + y_pred.dtype.kind
    if set(kinds) & set("US") and set(kinds) & set("biuf"):
        raise ValueError(
            f"The true targets are {y_true.dtype}, and the predictions {y_pred.dtype}."
        )


def _check_proba(proba, shape):
    """Raise an error for probabilities of other classes, or decision values."""
    check_consistent_length(proba, np.empty(shape))
    if proba.shape != shape:
        raise ValueError(
            f"The probabilities have shape {proba.shape}, but there are {shape[1]} "
            "classes. Pass the class of each column as `classes`."
        )
    if proba.min() < -ROUNDING or proba.max() > 1 + ROUNDING:
        raise ValueError(
            "Probabilities must be in [0, 1]; pass those of predict_proba, or labels."
        )
