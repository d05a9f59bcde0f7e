"""Shape and type of what a method of a fitted estimator returns."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from skltl._estimator import ImageEstimator, n_channels_of
from skltl._sklearn import output_config
from skltl.exceptions import shorten
from skltl.features import FeatureEstimator, n_features_by_layer, no_features

# Sides of the blank image that shows what a method returns.
SIDE = 32


def no_results(estimator: Any, method: str) -> Any:
    """Return the results of a method for no images: an array, or pandas' data frame."""
    if isinstance(estimator, FeatureEstimator) and method == "transform":
        return no_features(estimator)
    result = result_of_one(estimator, method)
    if not isinstance(result, np.ndarray) and not hasattr(result, "iloc"):
        raise TypeError(
            f"{type(estimator).__name__}.{method} returns a {type(result).__name__}, "
            "not an array or a data frame of pandas."
        )
    return result[:0]


def result_of_one(estimator: Any, method: str) -> Any:
    """Return the result of a method for a blank image.

    Of a pipeline, only the steps after the features run.
    """
    if isinstance(estimator, FeatureEstimator) and method == "transform":
        return _features_of_one(estimator)
    try:
        if _begins_with_features(estimator):
            row = _features_of_one(estimator[0])
            return getattr(estimator[1:], method)(row)
        if isinstance(estimator, ImageEstimator):
            return getattr(_for_blank(estimator), method)(_blank(estimator))
        blank = np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8)
        return getattr(estimator, method)(blank)
    except Exception as error:
        raise ValueError(
            f"The shape of the results of {type(estimator).__name__}.{method} is "
            "unknown, because it failed for a blank image. Pass an array of this "
            f"shape, without rows, as meta. ({shorten(str(error), 200)})"
        ) from error


def _begins_with_features(estimator: Any) -> bool:
    is_pipeline = isinstance(estimator, Pipeline) and len(estimator) > 1
    return is_pipeline and isinstance(estimator[0], FeatureEstimator)


def _features_of_one(transformer: Any) -> Any:
    """Return features of one image, zeros; with names, if `set_output` gives some."""
    row = np.zeros((1, sum(n_features_by_layer(transformer))), dtype=np.float32)
    if output_config("transform", transformer)["dense"] == "default":
        return row
    return _table(row, transformer.get_feature_names_out())


def _for_blank(estimator: Any) -> Any:
    """Return an estimator that takes an array, whatever its `reader` takes.

    It stores nothing, and shows no progress.
    """
    plain = {"reader": None, "cache": None, "verbose": 0}
    parameters = {
        f"{prefix}{name}": value
        for prefix in ("", "transformer__")
        for name, value in plain.items()
    }
    known = estimator.get_params().keys() & parameters.keys()
    changed = {name: parameters[name] for name in known}
    return copy.deepcopy(estimator).set_params(**changed)


def _blank(estimator: Any) -> Any:
    """Return one black image, or a row of black pixels."""
    n_columns = getattr(estimator, "n_features_in_", None)
    if n_columns is None:
        return np.zeros((1, SIDE, SIDE, n_channels_of(estimator)), dtype=np.uint8)
    row = np.zeros((1, n_columns))
    names = getattr(estimator, "feature_names_in_", None)
    return row if names is None else _table(row, names)


def _table(row: Any, names: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(row, columns=names)
