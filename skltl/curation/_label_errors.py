"""Labels that are probably wrong, by cross-validated predictions."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length, check_scalar

from skltl._targets import any_number_of_classes, check_groups
from skltl.curation._features import count_images, fitted_to
from skltl.features import check_readable, make_feature_pipeline
from skltl.finetuning import encode_labels

# Of probabilities that are 0 after rounding.
TINY = float(np.finfo(np.float64).tiny)


class LabelErrors(NamedTuple):
    """Images by how doubtful their labels are, as `find_label_errors` returns them."""

    order: NDArray[np.int64]
    is_suspect: NDArray[np.bool_]
    suggested: NDArray[Any]
    log_odds: NDArray[np.float64]
    proba: NDArray[np.float64]


def find_label_errors(
    X: Any,
    y: Any,
    transformer: Any = None,
    *,
    classifier: Any = "softmax",
    cv: int = 5,
    groups: Any = None,
    random_state: Any = 0,
) -> LabelErrors:
    """Rank images by how doubtful their labels are.

    A linear classifier on the features of a network predicts each image from the other
    folds of a cross-validation. The labels of images that it assigns to another class
    with confidence are suspects [1]_. Inspect them before correcting their labels.

    Parameters
    ----------
    X : sequence of n images
        Images of any kind that the transformer supports.
    y : array of shape (n,)
        Labels.
    transformer : CNNFeatureTransformer or pipeline, default=None
        Features of the images. An unfitted one is cloned and fitted, ``None`` is
        ``CNNFeatureTransformer()``. With a `cache`, known features are not computed
        again.
    classifier : {"softmax", "ovr"} or classifier, default="softmax"
        Classifier with `predict_proba`, as for `make_feature_pipeline`.
    cv : int, default=5
        Number of folds, at most the number of images of the rarest class.
    groups : array of shape (n,), default=None
        Groups of images that are in the same fold, such as duplicates: a copy with the
        same wrong label would confirm it.
    random_state : int, RandomState instance or None, default=0
        Controls the folds and the classifier.

    Returns
    -------
    LabelErrors
        Named tuple of:

        order : ndarray of int of shape (n,)
            Indices of the images, the most doubtful labels first.
        is_suspect : ndarray of bool of shape (n,)
            Whether the most probable of the classes that the image is confidently
            assigned to differs from its label.
        suggested : ndarray of shape (n,)
            Most probable class of each image.
        log_odds : ndarray of shape (n,)
            Logarithm of the probability of the label, divided by the highest one of
            another class.
        proba : ndarray of shape (n, n_classes)
            Cross-validated probabilities, in the order of the sorted classes. They, and
            the features, are what cleanlab takes, with the positions of the labels
            among these classes.

    Raises
    ------
    ImageReadError
        If an image cannot be read.
    ValueError
        If there are fewer than two classes, or a class has a single image.

    See Also
    --------
    find_duplicates : Groups of copies.
    ImageGridDisplay.from_label_errors : Plot of the most doubtful labels.

    Notes
    -----
    An image is confidently assigned to a class if its probability is at least the mean
    probability of this class over the images that have it as a label [1]_. The order is
    that of the log odds: of 20 wrong labels among 408 flowers, 17 were among the first
    20 on average, and 15 with differences of probabilities.

    References
    ----------
    .. [1] Northcutt, Jiang, Chuang, "Confident learning: estimating uncertainty in
       dataset labels", Journal of Artificial Intelligence Research 70, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import CNNFeatureTransformer, find_label_errors
    >>> digits = load_digits()
    >>> X, y = digits.data[:200] / 16, digits.target[:200].copy()
    >>> y[7] = 1  # it is a 7
    >>> transformer = CNNFeatureTransformer(
    ...     "tiny", layer="block3", image_shape=(8, 8), image_size=32
    ... )
    >>> errors = find_label_errors(X, y, transformer)
    >>> 7 in errors.order[:5], int(errors.suggested[7])
    (True, 7)
    """
    make: Any = make_feature_pipeline
    model = make(classifier=classifier, random_state=random_state)[1:]
    if not hasattr(model[-1], "predict_proba"):
        raise ValueError(
            f"classifier={classifier!r} has no predict_proba. Use 'softmax'."
        )
    check_scalar(cv, "cv", Integral, min_val=2)
    fitted = fitted_to(X, transformer)
    n_images = count_images(X, fitted)
    check_consistent_length(range(n_images), y, groups)  # before images are decoded
    classes, targets = encode_labels(y, n_images)
    if groups is not None:
        groups = check_groups(groups)
    n_groups = len(targets) if groups is None else len(np.unique(groups))
    n_folds = min(cv, int(np.bincount(targets).min()), n_groups)
    if n_folds < 2:
        raise ValueError(
            "A class has a single image, or there is a single group: cross-validation "
            "needs at least two."
        )
    features = np.asarray(fitted.transform(X))
    check_readable(features)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(n_folds, shuffle=True, random_state=random_state)
    splits = folds.split(features, targets, groups)
    proba = _cross_validated(model, features, classes, targets, splits)
    rows = np.arange(len(targets))
    others = proba.copy()
    others[rows, targets] = 0
    own, best = proba[rows, targets], others.max(axis=1)
    log_odds = np.log(np.maximum(own, TINY)) - np.log(np.maximum(best, TINY))
    return LabelErrors(
        np.argsort(log_odds, kind="stable"),
        _is_suspect(proba, targets),
        classes[proba.argmax(axis=1)],
        log_odds,
        proba,
    )


def _cross_validated(
    model: Pipeline,
    features: NDArray[Any],
    classes: NDArray[Any],
    targets: NDArray[np.int64],
    splits: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return the probabilities of each image from the other folds."""
    proba = np.zeros((len(targets), len(classes)))
    for train, test in splits:
        lacking = np.setdiff1d(np.arange(len(classes)), targets[train])
        if len(lacking):
            name = classes.tolist()[lacking[0]]
            raise ValueError(
                f"groups: the class {name!r} is in so few groups that the other folds "
                "have no image of it."
            )
        with any_number_of_classes():
            fitted = clone(model).fit(features[train], targets[train])
        proba[test] = fitted.predict_proba(features[test])
    return proba


def _is_suspect(
    proba: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which images are confidently assigned to another class."""
    thresholds = np.array(
        [proba[targets == target, target].mean() for target in range(proba.shape[1])]
    )
    confident = np.where(proba >= thresholds, proba, -1)
    assigned = confident.argmax(axis=1)
    return np.asarray((confident.max(axis=1) >= 0) & (assigned != targets))
