"""Shape and type of what a method of a fitted estimator returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from skltl._estimator import ImageEstimator
from skltl.exceptions import shorten
from skltl.features import FeatureEstimator, n_features_by_layer, no_features

# Sides of the blank image that shows what a method returns.
SIDE = 32


def no_results(estimator: Any, method: str, row: Any = None) -> Any:
    """Return the results of a method for no images, by those for a blank one.

    Of a pipeline, only the steps behind the features run. `row` is a row of pixels, for
    estimators with an `image_shape`.
    """
    if isinstance(estimator, FeatureEstimator) and method == "transform":
        return no_features(estimator)
    try:
        if _begins_with_features(estimator):
            head, row = estimator[1:], _features_of_one(estimator[0])
            result = getattr(head, method)(row)
        else:
            is_row = getattr(estimator, "image_shape", None) is not None
            result = getattr(estimator, method)(row if is_row else _blank(estimator))
    except Exception as error:
        raise ValueError(
            f"The shape of the results of {type(estimator).__name__}.{method} is "
            "unknown, because it failed for a blank image. Pass an array of this "
            f"shape, without rows, as meta. ({shorten(str(error), 200)})"
        ) from error
    if not hasattr(result, "shape"):
        raise TypeError(
            f"{type(estimator).__name__}.{method} returns a {type(result).__name__}, "
            "not an array."
        )
    return result[:0]


def _begins_with_features(estimator: Any) -> bool:
    is_pipeline = isinstance(estimator, Pipeline) and len(estimator) > 1
    return is_pipeline and isinstance(estimator[0], FeatureEstimator)


def _features_of_one(transformer: Any) -> Any:
    """Return features of one image, zeros."""
    empty = no_features(transformer)
    n_features = sum(n_features_by_layer(transformer))
    row = np.zeros((1, n_features), dtype=np.float32)
    if isinstance(empty, np.ndarray):
        return row
    return type(empty)(row, columns=empty.columns)


def _blank(estimator: Any) -> Any:
    """Return one black image."""
    n_channels = 3
    if isinstance(estimator, ImageEstimator):
        n_channels = vars(estimator)["preprocessing_"].n_channels
    return np.zeros((1, SIDE, SIDE, n_channels), dtype=np.uint8)
