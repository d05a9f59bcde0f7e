"""Features of images for the functions of this package, and distances of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import normalize
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from skltl._collections import check_not_dask
from skltl._estimator import ImageEstimator, read_images_of
from skltl._nested import steps_of
from skltl.features import resolve_transformer

Features = NDArray[np.float32]


def unit_features(X: Any, transformer: Any) -> Features:
    """Return the features of images, scaled to length 1: (n, d).

    Euclidean distances of these order images as the cosine of their features does.
    Rows of NaN, of images that cannot be read, stay NaN.
    """
    features = np.asarray(fitted_to(X, transformer).transform(X), dtype=np.float32)
    readable = ~np.isnan(features).any(axis=1)
    features = features.copy()
    if readable.any():
        features[readable] = normalize(features[readable])
    return features


def fitted_to(X: Any, transformer: Any) -> Any:
    """Return a fitted transformer unchanged, or a clone that is fitted to images."""
    check_not_dask(X)
    transformer = resolve_transformer(transformer)
    try:
        _check_is_fitted(transformer)
    except NotFittedError:
        if get_tags(transformer).target_tags.required:
            raise NotFittedError(
                f"transformer={type(transformer).__name__} is fitted with targets. "
                "Fit it first."
            ) from None
        return clone(transformer).fit(X)
    return transformer


def count_images(X: Any, transformer: Any) -> int:
    """Return the number of images, of which none is decoded.

    What is no sequence of images is an error.
    """
    is_pipeline = isinstance(transformer, Pipeline)
    first = steps_of(transformer)[0] if is_pipeline else transformer
    return len(read_images_of(first, X) if isinstance(first, ImageEstimator) else X)


def _check_is_fitted(transformer: Any) -> None:
    """Raise ``NotFittedError`` for a transformer that is not fitted.

    Pipelines ask their last step, which is always fitted if it has no state.
    """
    if isinstance(transformer, Pipeline):
        with_state = (s for s in steps_of(transformer) if get_tags(s).requires_fit)
        check_is_fitted(next(with_state, transformer))
    check_is_fitted(transformer)
