"""The images of ``X`` that a display shows, read as an estimator reads them."""

from __future__ import annotations

import numpy as np
from sklearn.frozen import FrozenEstimator

from skltl._estimator import read_images_of
from skltl._nested import image_estimator_of, unwrapped
from skltl.features import CNNFeatureTransformer


def read_as(estimator, X, image_shape=None):
    """Return the images of ``X`` as a fitted estimator reads them, or of rows.

    None of them is decoded yet.
    """
    fitted = image_estimator_of(estimator)
    if image_shape is None and fitted is not None:
        return read_images_of(fitted, X)
    shape = _image_shape(estimator) if image_shape is None else image_shape
    return read_plainly(X, image_shape=shape)


def read_plainly(X, *, reader=None, value_range=None, image_shape=None):
    """Return the images of ``X`` as an unfitted transformer reads them."""
    transformer = CNNFeatureTransformer(
        reader=reader, value_range=value_range, image_shape=image_shape
    )
    transformer._validate_params()
    return read_images_of(transformer, X, reset=True)


def select_images(source, indices):
    """Decode some images; return them, and the path or URL of each, or ``None``."""
    indices = [int(index) for index in indices]
    return [source[index] for index in indices], [source.name(i) for i in indices]


def resolve_indices(indices, n_images):
    """Return indices of images as an array of ints; a mask selects where it is true."""
    if indices is None:
        return np.arange(n_images)
    indices = np.asarray(indices)
    if indices.ndim != 1:
        raise ValueError(f"indices must be 1-D, got an array of shape {indices.shape}.")
    if indices.dtype == bool:
        if len(indices) != n_images:
            raise ValueError(
                f"indices is a mask of {len(indices)} images, and X has {n_images}."
            )
        return np.flatnonzero(indices)
    if len(indices) and indices.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers, got {indices.dtype}.")
    outside = indices[(indices < 0) | (indices >= n_images)]
    if len(outside):
        raise ValueError(
            f"indices: {outside[0]} is no index of the {n_images} images in X, which "
            f"are 0 to {n_images - 1}."
        )
    return indices.astype(np.int64)


def check_n_images(n_images, name="n_images"):
    """Raise an error for a number of images that is not positive."""
    if n_images < 1:
        raise ValueError(f"{name}={n_images} must be at least 1.")


def _image_shape(estimator):
    """Return the first `image_shape` among own and nested parameters, or ``None``."""
    params = unwrapped(estimator).get_params()
    shapes = [
        _image_shape(value) if isinstance(value, FrozenEstimator) else value
        for name, value in params.items()
        if isinstance(value, FrozenEstimator) or name.split("__")[-1] == "image_shape"
    ]
    return next((shape for shape in shapes if shape is not None), None)
