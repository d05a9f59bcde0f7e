"""Images that are unlike all others."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_scalar

from skltl.curation._features import unit_features

# Distances below are those of equal features.
ROUNDING = 1e-6


class Outliers(NamedTuple):
    """Images by how unlike the others they are, as `find_outliers` returns them."""

    order: NDArray[np.int64]
    scores: NDArray[np.float64]


def find_outliers(
    X: Any, transformer: Any = None, *, n_neighbors: int | None = None
) -> Outliers:
    """Rank images by their distance to the nearest other ones.

    Outliers are, for instance, images of something else, or of another kind, such as
    drawings among photographs.

    Parameters
    ----------
    X : sequence of n images
        Images of any kind that the transformer supports.
    transformer : CNNFeatureTransformer or pipeline, default=None
        Features in which images are compared. An unfitted one is cloned and fitted,
        ``None`` is ``CNNFeatureTransformer()``. With a `cache`, known features are not
        computed again.
    n_neighbors : int, default=None
        Number of neighbors. It should exceed the number of outliers of one kind, which
        are neighbors of each other. ``None`` is a tenth of the images, at least 5.

    Returns
    -------
    Outliers
        Named tuple of:

        order : ndarray of int of shape (n,)
            Indices of the images, the most unusual ones first.
        scores : ndarray of shape (n,)
            For each image of ``X`` its distance to the `n_neighbors`-th nearest one,
            divided by the median of all. Images that cannot be read (``on_error="nan"``
            of the transformer) have NaN, and are last.

    Raises
    ------
    ImageReadError
        If an image cannot be read, unless the transformer has ``on_error="nan"``.
    ValueError
        If there are not more images than neighbors.

    See Also
    --------
    find_duplicates : Images that are copies of each other.
    find_label_errors : Images whose labels are probably wrong.
    ImageGridDisplay.from_outliers : Plot of the most unusual images.

    Notes
    -----
    These are the distance-based outliers of Ramaswamy et al. [1]_, in the space of
    features that are scaled to length 1.

    References
    ----------
    .. [1] Ramaswamy, Rastogi, Shim, "Efficient algorithms for mining outliers from
       large data sets", SIGMOD, 2000.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, find_outliers
    >>> rng = np.random.default_rng(0)
    >>> X = [*rng.integers(0, 256, (20, 32, 32), dtype=np.uint8), np.eye(32) > 0]
    >>> int(find_outliers(X, CNNFeatureTransformer("tiny")).order[0])
    20
    """
    if n_neighbors is not None:
        check_scalar(n_neighbors, "n_neighbors", Integral, min_val=1)
    features = unit_features(X, transformer)
    readable = ~np.isnan(features).any(axis=1)
    if readable.sum() < 2:
        raise ValueError(f"Of {len(features)} images, fewer than 2 can be read.")
    if n_neighbors is None:
        n_neighbors = min(max(5, readable.sum() // 10), readable.sum() - 1)
    if readable.sum() <= n_neighbors:
        raise ValueError(
            f"n_neighbors={n_neighbors}: there are only {readable.sum()} images."
        )
    index = NearestNeighbors(n_neighbors=int(n_neighbors)).fit(features[readable])
    distances, _ = index.kneighbors()
    scores = np.full(len(features), np.nan)
    usual = float(np.median(distances[:, -1]))
    scores[readable] = distances[:, -1] / (usual if usual > ROUNDING else 1.0)
    order = np.argsort(-scores, kind="stable")  # NaN are last
    return Outliers(order, scores)
