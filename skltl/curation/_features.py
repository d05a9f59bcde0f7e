"""Features of images for the functions of this package, and distances of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_is_fitted

from skltl._collections import check_not_dask
from skltl.exceptions import shorten
from skltl.features import CNNFeatureTransformer

Features = NDArray[np.float32]


def unit_features(X: Any, transformer: Any) -> Features:
    """Return the features of images, scaled to length 1: (n, d).

    Euclidean distances of these order images as the cosine of their features does.
    Rows of NaN, of images that cannot be read, stay NaN.
    """
    features = np.asarray(features_of(X, transformer), dtype=np.float32)
    readable = ~np.isnan(features).any(axis=1)
    features = features.copy()
    if readable.any():
        features[readable] = normalize(features[readable])
    return features


def features_of(X: Any, transformer: Any) -> NDArray[Any]:
    """Return the features of images; an unfitted transformer is cloned and fitted."""
    return np.asarray(fitted_to(X, transformer).transform(X))


def check_readable(features: NDArray[Any]) -> None:
    """Raise an error that names the first image without features, if there is one."""
    bad = np.flatnonzero(np.isnan(features).any(axis=1))
    if len(bad):
        raise ValueError(
            f"Image {bad[0]} could not be read, and has no features. Leave it out: "
            "drop_bad drops such images and their labels."
        )


def fitted_to(X: Any, transformer: Any) -> Any:
    """Return a fitted transformer unchanged, or a clone that is fitted to images."""
    check_not_dask(X)
    default: Any = CNNFeatureTransformer
    transformer = default() if transformer is None else transformer
    if not hasattr(transformer, "transform"):
        raise TypeError(
            "transformer must be a CNNFeatureTransformer, or a pipeline that ends in a "
            f"transformer; got {shorten(repr(transformer))}."
        )
    try:
        check_is_fitted(transformer)
    except NotFittedError:
        return clone(transformer).fit(X)
    return transformer
