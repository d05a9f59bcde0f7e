"""``ImageSetTransformer``: features of samples that have several images each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from skltl._collections import check_not_dask
from skltl._estimator import for_file
from skltl._sklearn import StrOptions, fit_context
from skltl.exceptions import (
    ImageError,
    shorten,
)
from skltl.features._transformer import resolve_transformer
from skltl.images import is_tensor

AGGREGATES: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max}


class ImageSetTransformer(TransformerMixin, BaseEstimator):
    """Extract the features of samples that have several images each.

    A product has several photographs, a plant its leaf and its flower, and a video its
    frames. The features of the images of a sample are averaged, so that there is one
    row per sample, as scikit-learn's estimators and cross-validation expect.

    Parameters
    ----------
    transformer : CNNFeatureTransformer, default=None
        Transformer that extracts the features of an image; it may be a pipeline, too.
        It is cloned and fitted, and ``None`` is ``CNNFeatureTransformer()``.
    aggregate : {"mean", "max"}, default="mean"
        Aggregation of each feature over the images of a sample.

    Attributes
    ----------
    transformer_ : estimator
        Fitted clone of the transformer.

    See Also
    --------
    CNNFeatureTransformer : The features of one image; its `n_views` averages over views
        of the same image.

    Notes
    -----
    The images of all samples are run through the network together, in full batches.
    With ``on_error="nan"`` of the transformer, images that cannot be read are ignored;
    a sample without any other image has features of NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, ImageSetTransformer
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    >>> samples = [[images[0], images[1]], [images[2], images[3], images[4]]]
    >>> transformer = ImageSetTransformer(CNNFeatureTransformer("tiny"))
    >>> transformer.fit_transform(samples).shape
    (2, 288)
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        "transformer": "no_validation",
        "aggregate": [StrOptions(set(AGGREGATES))],
    }

    def __init__(self, transformer=None, *, aggregate="mean"):
        self.transformer = transformer
        self.aggregate = aggregate

    @fit_context
    def fit(self, X, y=None):
        """Load the network; nothing is learned from the images.

        Parameters
        ----------
        X : sequence of n sequences of images
            Samples, with one or more images each: lists, series, or arrays of paths or
            of shape (k, h, w, channels). Images are of any kind that the transformer
            accepts, rows of pixels in lists.
        y : array of shape (n,), default=None
            Passed to the transformer, which ignores it, once for each image.

        Returns
        -------
        ImageSetTransformer
            Fitted transformer.

        Raises
        ------
        TypeError
            If a sample is not a sequence of images.
        ValueError
            If a sample has no image, or `y` has another length.
        """
        images, sizes = _flatten(X)
        if y is not None:
            check_consistent_length(sizes, y)
            y = np.repeat(np.asarray(y), sizes, axis=0)
        transformer = resolve_transformer(self.transformer)
        with _naming_samples(sizes):
            self.transformer_ = clone(transformer).fit(images, y)
        return self

    def transform(self, X):
        """Extract the features of samples.

        Parameters
        ----------
        X : sequence of n sequences of images
            Samples, with one or more images each.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            Features of the samples.

        Raises
        ------
        ImageReadError
            For the first image that cannot be read; its `index` counts the images of
            all samples, and a note names the sample.
        """
        check_is_fitted(self)
        images, sizes = _flatten(X)
        with _naming_samples(sizes):
            features = np.asarray(self.transformer_.transform(images))
        samples = np.split(features, np.cumsum(sizes)[:-1])
        return np.stack([self._aggregated(sample) for sample in samples])

    def get_feature_names_out(self, input_features=None):
        """Get output feature names: those of the transformer.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Not used.

        Returns
        -------
        ndarray of str objects
            Names such as ``resnet50_layer3_17``.
        """
        check_is_fitted(self)
        return self.transformer_.get_feature_names_out()

    def _aggregated(self, sample):
        """Return the features (d,) of a sample, given those of its images."""
        readable = sample[~np.isnan(sample).any(axis=1)]
        if not len(readable):
            return sample[0]
        return AGGREGATES[self.aggregate](readable, axis=0)

    def __getstate__(self):
        return for_file(super().__getstate__(), "transformer")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _flatten(X):
    """Return the images of all samples, and how many each of them has."""
    check_not_dask(X)
    if hasattr(X, "iloc") and X.ndim == 2:  # iterated by columns
        if X.shape[1] != 1:
            raise ValueError(
                f"X has {X.shape[1]} columns; expected one column of samples."
            )
        X = X.iloc[:, 0]
    if isinstance(X, Mapping):
        raise TypeError(
            f"X is a {type(X).__name__}; expected a sequence of samples. Pass "
            "list(X.values()) if its values are the samples."
        )
    if not hasattr(X, "__len__"):  # an iterator, which `transform` would find used up
        raise TypeError(
            f"X is a {type(X).__name__}; expected a sequence of samples. Pass list(X)."
        )
    images, sizes = [], []
    for position, sample in enumerate(_items(X)):
        if hasattr(sample, "as_py"):  # of pyarrow
            sample = sample.as_py()
        if not _is_sequence(sample):
            raise TypeError(
                f"Sample {position} must be a sequence of images, got "
                f"{shorten(repr(sample))}. Pass a single image, and gray images or "
                "rows in an array, as a list."
            )
        if not len(sample):
            raise ValueError(f"Sample {position} has no image.")
        images += _items(sample)
        sizes.append(len(sample))
    if not sizes:
        raise ValueError("X has no sample.")
    return images, sizes


def _is_sequence(sample):
    """Return whether this is a sequence of images; an array may be an image itself."""
    if isinstance(sample, (str, bytes, bytearray, dict)):
        return False
    n_dims = getattr(sample, "ndim", None)
    if n_dims is None:
        return hasattr(sample, "__len__") and hasattr(sample, "__getitem__")
    if n_dims == 1:
        is_row = isinstance(sample, np.ndarray) and sample.dtype.kind in "buifc"
        return not (is_row or is_tensor(sample))
    return n_dims >= 4


def _items(values):
    """Return a list of the items of a sequence, by its length, or of an array.

    Lazy sequences need not raise an error at their end.
    """
    if hasattr(values, "__len__") and not hasattr(values, "dtype"):
        return [values[index] for index in range(len(values))]
    return list(values)


@contextmanager
def _naming_samples(sizes):
    """Let errors of images name their samples."""
    try:
        yield
    except ImageError as error:
        ends = np.cumsum(sizes)
        sample = int(np.searchsorted(ends, error.index, side="right"))
        place = error.index - ends[sample] + sizes[sample]
        error.add_note(f"It is image {place} of sample {sample}.")
        raise
