"""Labels and weights, made into what the loss takes."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import assert_all_finite, check_consistent_length
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from skltl._sklearn import check_sample_weight
from skltl.networks import nearest


def encode_labels(y: Any, n: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Give each class a number.

    Parameters
    ----------
    y : array of shape (n,)
        The labels.
    n : int
        How many images there are.

    Returns
    -------
    classes : array of shape (n_classes,)
        Sorted, and of the labels' type.
    targets : array of shape (n,)
        Number of each label among them.

    Raises
    ------
    ValueError
        If there are none, not as many as images, or they are no classes.
    """
    if y is None:
        raise ValueError(
            "The classifier requires y to be passed, but the target y is None."
        )
    labels = column_or_1d(y, warn=True)
    check_consistent_length(range(n), labels)
    if labels.dtype.kind == "O" and any(map(_is_missing, labels)):
        raise ValueError("Input y contains NaN or None.")
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"There is one class only, {classes.tolist()[0]!r}: a classifier needs at "
            "least two classes."
        )
    return classes, targets.astype(np.int64)


def example_weights(
    sample_weight: Any,
    class_weight: Any,
    classes: NDArray[Any],
    targets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the weight of each image in the loss: its own, times its class's."""
    weights = check_sample_weight(
        sample_weight, targets, dtype=np.float64, ensure_non_negative=True
    )
    # Only their ratios count, and their sum must be a number.
    weights = _scaled(weights)
    weights = weights * _scaled(compute_sample_weight(class_weight, classes[targets]))
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("class_weight must be finite numbers, none of them negative.")
    return np.asarray(weights)


def balanced(
    weights: NDArray[np.float64],
    training: NDArray[np.int64],
    validation: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Bring weights to 1 on the average of the images that are learned from.

    Then they do not change the rates, and a batch counts by what is in it.

    Raises
    ------
    ValueError
        If all that are learned from, or all that are held out, have weight 0.
    """
    if not weights[training].sum() > 0:
        raise ValueError("All images have weight 0: there is nothing to learn from.")
    if len(validation) and not weights[validation].sum() > 0:
        raise ValueError("All images that are held out have weight 0.")
    return np.asarray(weights / weights[training].mean(), dtype=np.float32)


def columns_of(classes: NDArray[Any], labels: Any) -> NDArray[np.int64]:
    """Return the number of each label among a classifier's sorted classes.

    Raises
    ------
    ValueError
        For the first label that is none of them.
    """
    labels = column_or_1d(labels)
    columns = np.searchsorted(classes, labels) if len(labels) else np.zeros(0, int)
    columns = np.minimum(columns, len(classes) - 1)
    wrong = np.flatnonzero(classes[columns] != labels)
    if len(wrong):
        (label,) = labels[wrong[:1]].tolist()  # as plain Python prints it
        known = [str(one)[:30] for one in classes]
        raise ValueError(
            f"{reprlib.repr(label)} is none of the classes of this classifier. "
            f"{nearest(str(label)[:30], known)}"
        )
    return np.asarray(columns)


def _scaled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring the largest weight to 1."""
    largest = max(float(weights.max()), float(np.finfo(np.float64).tiny))
    return np.asarray(weights / largest)


def shown(labels: NDArray[Any]) -> str:
    """Return labels as text, only the first ones if they are many."""
    some = ", ".join(repr(one)[:40] for one in labels.tolist()[:6])
    return f"[{some}{', ...' if len(labels) > 6 else ''}]"


def _is_missing(label: Any) -> bool:
    return label is None or type(label).__name__ == "NAType" or label != label
