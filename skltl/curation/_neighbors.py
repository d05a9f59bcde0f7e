"""The images most like a given one."""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted

from skltl._collections import check_not_dask
from skltl._estimator import for_file
from skltl._sklearn import AT_LEAST_ONE, fit_context
from skltl.curation._features import unit_features
from skltl.features import check_readable, resolve_transformer


class ImageNeighbors(BaseEstimator):
    """Find the images most like given ones.

    An index over the features of a network, in which ``NearestNeighbors`` of
    scikit-learn searches.

    Parameters
    ----------
    transformer : CNNFeatureTransformer, default=None
        Features in which images are compared; it may be a pipeline, too. It is cloned
        and fitted, and ``None`` is ``CNNFeatureTransformer()``.
    n_neighbors : int, default=5
        Number of neighbors.

    Attributes
    ----------
    transformer_ : estimator
        Fitted clone of the transformer.
    index_ : NearestNeighbors
        Fitted index over the features, scaled to length 1.

    See Also
    --------
    find_duplicates : Pairs of copies.
    ImageGridDisplay.from_neighbors : Plot of images and their neighbors.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, ImageNeighbors
    >>> rng = np.random.default_rng(0)
    >>> X = rng.integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    >>> neighbors = ImageNeighbors(CNNFeatureTransformer("tiny"), n_neighbors=2).fit(X)
    >>> distances, indices = neighbors.kneighbors([X[4][:, ::-1]])
    >>> int(indices[0, 0])
    4
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        "transformer": "no_validation",
        "n_neighbors": [AT_LEAST_ONE],
    }

    def __init__(self, transformer=None, *, n_neighbors=5):
        self.transformer = transformer
        self.n_neighbors = n_neighbors

    @fit_context
    def fit(self, X, y=None):
        """Extract the features of the images to search in.

        Parameters
        ----------
        X : sequence of n images
            Images of any kind that the transformer supports.
        y : None
            Ignored.

        Returns
        -------
        ImageNeighbors
            Fitted index.
        """
        check_not_dask(X)
        self.transformer_ = clone(resolve_transformer(self.transformer)).fit(X)
        features = unit_features(X, self.transformer_)
        check_readable(features)
        self.index_ = NearestNeighbors(n_neighbors=self.n_neighbors).fit(features)
        return self

    def kneighbors(self, X=None, n_neighbors=None):
        """Return the nearest of the fitted images.

        Parameters
        ----------
        X : sequence of m images, default=None
            Images to search for. ``None`` are the fitted ones, none of which is its own
            neighbor.
        n_neighbors : int, default=None
            Number of neighbors; ``None`` is that of the estimator.

        Returns
        -------
        distances : ndarray of shape (m, n_neighbors)
            Distances of features scaled to length 1, in [0, 2], in ascending order.
        indices : ndarray of int of shape (m, n_neighbors)
            Indices of the fitted images.
        """
        check_is_fitted(self)
        n_neighbors = self.n_neighbors if n_neighbors is None else n_neighbors
        features = None if X is None else unit_features(X, self.transformer_)
        if features is not None:
            check_readable(features)
        distances, indices = self.index_.kneighbors(features, n_neighbors)
        return distances, np.asarray(indices)

    def __getstate__(self):
        return for_file(super().__getstate__(), "transformer")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        transformer = self.transformer
        has_rows = getattr(transformer, "image_shape", None) is not None
        tags.input_tags.two_d_array = has_rows
        tags.input_tags.three_d_array = not has_rows
        tags.input_tags.string = not has_rows
        return tags
