"""``ImageSetTransformer``: features of samples that have several images each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from skltl._collections import check_not_dask
from skltl._sklearn import StrOptions, fit_context
from skltl.exceptions import (
    ImageReadError,
    ImageTypeError,
    NonFiniteFeaturesError,
    shorten,
)
from skltl.features._transformer import CNNFeatureTransformer

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
            Samples, with one or more images each, of any kind that the transformer
            accepts.
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
        transformer = self.transformer
        if transformer is None:
            transformer = CNNFeatureTransformer()
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
        try:
            features = np.asarray(self.transformer_.transform(images))
        except (ImageReadError, ImageTypeError, NonFiniteFeaturesError) as error:
            error.add_note(_place(error.index, sizes))
            raise
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

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _flatten(X):
    """Return the images of all samples, and how many each of them has."""
    check_not_dask(X)
    sizes = []
    for position, sample in enumerate(X):
        if not _is_sequence(sample):
            raise TypeError(
                f"Sample {position} must be a sequence of images, got "
                f"{shorten(repr(sample))}. Pass a single image as a list of it."
            )
        if not len(sample):
            raise ValueError(f"Sample {position} has no image.")
        sizes.append(len(sample))
    if not sizes:
        raise ValueError("X has no sample.")
    return list(chain.from_iterable(X)), sizes


def _place(index, sizes):
    """Return which image of which sample the image of an index is."""
    ends = np.cumsum(sizes)
    sample = int(np.searchsorted(ends, index, side="right"))
    return f"It is image {index - ends[sample] + sizes[sample]} of sample {sample}."


def _is_sequence(sample):
    """Return whether this is a sequence of images; an array may be an image itself."""
    if isinstance(sample, (str, bytes, bytearray, dict)):
        return False
    n_dims = getattr(sample, "ndim", None)
    if n_dims is None:
        return hasattr(sample, "__len__") and hasattr(sample, "__getitem__")
    return n_dims >= 4 or (n_dims == 1 and not np.issubdtype(sample.dtype, np.number))
