"""Kinds of targets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import column_or_1d


def is_multilabel(y: Any) -> bool:
    """Return whether targets are an indicator matrix of several labels."""
    try:
        n_dimensions = y.ndim if issparse(y) else np.asarray(y).ndim
    except ValueError:  # lists of labels, to which scikit-learn has an answer
        n_dimensions = 2
    return n_dimensions == 2 and type_of_target(y) == "multilabel-indicator"


def is_multilabel_classifier(classifier: Any) -> bool:
    """Return whether a fitted classifier predicts any number of labels."""
    return bool(getattr(classifier, "multilabel_", False))


def check_groups(groups: Any) -> NDArray[Any]:
    """Return groups as an array (n,); refuse those that cannot be sorted."""
    groups = column_or_1d(groups)
    if groups.dtype.kind == "f" and np.isnan(groups).any():
        raise ValueError("groups contains NaN.")
    try:
        np.unique(groups)
    except TypeError as error:
        raise ValueError(
            f"groups must be of one type, without missing values: {error}."
        ) from error
    return np.asarray(groups)


@contextmanager
def any_number_of_classes() -> Iterator[None]:
    """Let scikit-learn fit a classifier to classes of one or two images each.

    It warns that such targets could be values to regress on, even if they are names.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The number of unique classes is greater", UserWarning
        )
        yield


def check_indicators(y: NDArray[Any]) -> None:
    """Raise an error for an indicator matrix of other values than 0 and 1."""
    values = np.unique(y)
    if not np.isin(values, (0, 1)).all():
        raise ValueError(
            "An indicator matrix has the values 0 and 1; y has "
            f"{', '.join(map(str, values.tolist()))}."
        )
