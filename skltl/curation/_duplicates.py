"""Exact and near duplicates of images, and groups for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_scalar

from skltl.curation._features import Features, fitted_to, unit_features

# The nearest neighbor at which the usual distance of different images is measured: few
# images have as many copies.
USUAL_NEIGHBOR = 5

# Of the usual distance. With features of SqueezeNet, all copies of 40 of 408 flowers
# that were resized, recompressed, cropped by 5 % or mirrored are nearer, and no
# photographs but those that are in the data set twice.
MAX_RATIO = 0.4

# Error of distances in float32, which are computed as products.
ROUNDING = 1e-2


class DuplicatePair(NamedTuple):
    """Two images, by their indices, and the distance of their features."""

    first: int
    second: int
    distance: float


class Duplicates(NamedTuple):
    """Duplicates among images, as `find_duplicates` returns them.

    `pairs` are sorted by distance. `groups` (n,) are the numbers of groups of images
    that are copies of each other, directly or not; ``None`` between two sets.
    """

    pairs: list[DuplicatePair]
    groups: NDArray[np.int64] | None
    max_distance: float


def find_duplicates(
    X: Any,
    transformer: Any = None,
    *,
    other: Any = None,
    max_distance: float | None = None,
) -> Duplicates:
    """Find exact and near duplicates of images by the features of a network.

    Near duplicates are, for instance, resized, recompressed, slightly cropped or
    mirrored copies. If one of them is used for training and another one for testing,
    scores are too high. As groups, they stay together in cross-validation.

    Parameters
    ----------
    X : sequence of n images
        Images of any kind that the transformer supports.
    transformer : CNNFeatureTransformer or pipeline, default=None
        Features in which images are compared. An unfitted one is cloned and fitted,
        ``None`` is ``CNNFeatureTransformer()``. With a `cache`, known features are not
        computed again.
    other : sequence of m images, default=None
        Other images, such as test images. If given, only pairs of an image of ``X`` and
        one of `other` are found: leaks from one set to the other.
    max_distance : float, default=None
        Largest distance of duplicates: that of features scaled to length 1, in [0, 2].
        ``None`` is 0.4 times the usual distance, the median over all images of the
        distance to the fifth nearest one.

    Returns
    -------
    Duplicates
        Named tuple of:

        pairs : list of DuplicatePair
            Named tuples (first, second, distance), sorted by distance. The second index
            is in `other` if that is given. Identical images have distance 0.
        groups : ndarray of int of shape (n,), or None
            Group of each image, for the `groups` of scikit-learn's ``GroupKFold`` and
            other splitters: images in a chain of duplicates have the same number.
        max_distance : float
            The distance that was used.

    Raises
    ------
    ImageReadError
        If an image cannot be read, unless the transformer has ``on_error="nan"``. Such
        images have no duplicates.

    See Also
    --------
    find_outliers : Images that are unlike all others.
    ImageGridDisplay.from_duplicates : Plot of the pairs.
    sklearn.model_selection.GroupKFold : Cross-validation that does not divide groups.

    Notes
    -----
    All pairs of images are compared, so that the time grows with the square of their
    number.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_image
    >>> from skltl import CNNFeatureTransformer, find_duplicates
    >>> photograph = load_sample_image("china.jpg")
    >>> X = [photograph[300:, left : left + 120] for left in range(0, 600, 80)]
    >>> X += [X[5], X[3][:, ::-1]]  # a copy, and a mirrored one
    >>> duplicates = find_duplicates(X, CNNFeatureTransformer("tiny"))
    >>> [(pair.first, pair.second) for pair in duplicates.pairs]
    [(5, 8), (3, 9)]
    >>> duplicates.groups
    array([0, 1, 2, 3, 4, 5, 6, 7, 5, 3])
    """
    if max_distance is not None:
        check_scalar(max_distance, "max_distance", Real, min_val=0, max_val=2)
        if np.isnan(max_distance):  # which comparisons let through
            raise ValueError("max_distance is NaN; it must be in [0, 2].")
    transformer = fitted_to(X, transformer)  # of both sets
    features = unit_features(X, transformer)
    reference = features if other is None else unit_features(other, transformer)
    if max_distance is None:
        everything = features if other is None else np.vstack([features, reference])
        # Not less than rounding, where most images are copies.
        max_distance = max(ROUNDING, MAX_RATIO * _usual_distance(everything))
    pairs = _pairs_within(features, reference, float(max_distance), other is None)
    groups = _groups(len(features), pairs) if other is None else None
    return Duplicates(pairs, groups, float(max_distance))


def _usual_distance(features: Features) -> float:
    """Return the median distance of images to one of their nearest neighbors."""
    readable = features[~np.isnan(features).any(axis=1)]
    if len(readable) < 2:
        return 0.0
    n_neighbors = min(USUAL_NEIGHBOR, len(readable) - 1)
    distances, _ = NearestNeighbors(n_neighbors=n_neighbors).fit(readable).kneighbors()
    return float(np.median(distances[:, -1]))


def _pairs_within(
    features: Features, reference: Features, max_distance: float, is_same: bool
) -> list[DuplicatePair]:
    """Return the pairs of two sets, or of one set if they are the same."""
    rows, columns = (
        np.flatnonzero(~np.isnan(one).any(axis=1)) for one in (features, reference)
    )
    if not (len(rows) and len(columns)):
        return []
    index = NearestNeighbors(radius=max_distance + ROUNDING).fit(reference[columns])
    neighbors = index.radius_neighbors(features[rows], return_distance=False)
    found = []
    for row, near in zip(rows, neighbors, strict=True):
        others = columns[near]
        others = others[others > row] if is_same else others
        # Differences, unlike products, are 0 for equal features.
        distances = np.linalg.norm(reference[others] - features[row], axis=1)
        found += [
            DuplicatePair(int(row), int(other), float(distance))
            for other, distance in zip(others, distances, strict=True)
            if distance <= max_distance
        ]
    return sorted(found, key=lambda pair: (pair.distance, pair.first, pair.second))


def _groups(n: int, pairs: Sequence[DuplicatePair]) -> NDArray[np.int64]:
    """Return the number of the group of each image."""
    # Old releases of SciPy take indices of 32 bits only.
    ends = np.array([pair[:2] for pair in pairs], dtype=np.int32).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    _, groups = connected_components(graph, directed=False)
    return np.asarray(groups, dtype=np.int64)
