"""Kinds of targets: one of several classes, any number of labels, or values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, hamming_loss
from sklearn.utils.multiclass import type_of_target

from skltl._targets import is_multilabel
from skltl.finetuning import (
    encode_indicators,
    encode_labels,
    encode_values,
)


class Task:
    """A kind of targets: how they are encoded, and how predictions are scored.

    `classes` are the class labels, or the positions of labels or values. Targets are
    encoded for the sampling of images; `decode` returns what estimators are fitted to.
    """

    name: str
    linear: dict[str, Any] = {"classifier": "svm"}  # for `make_feature_pipeline`
    classes: NDArray[Any]

    def encode(self, y: Any, n_images: int, sample_weight: Any = None) -> NDArray[Any]:
        """Return the encoded targets of images, and set `classes`."""
        raise NotImplementedError

    def decode(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Return the targets that estimators are fitted to."""
        return targets

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Return the number of the stratum of each image: its class, if it has one."""
        return np.zeros(len(targets), np.int64)

    def can_train(self, targets: NDArray[Any]) -> bool:
        """Return whether a model can be fitted to targets."""
        return len(targets) > 0

    def count_folds(self, targets: NDArray[Any], groups: NDArray[Any] | None) -> int:
        """Return the largest number of folds."""
        n_folds = len(targets) if groups is None else len(np.unique(groups))
        if n_folds < 2:
            unit = "image" if groups is None else "group of images"
            raise ValueError(
                f"Cross-validation needs at least two images and groups; there is a "
                f"single {unit}."
            )
        return n_folds

    def count_smallest(self, targets: NDArray[Any]) -> int:
        """Count the images of the rarest class or label."""
        return len(targets)

    def score(
        self, y: NDArray[Any], predicted: NDArray[Any], sample_weight: Any
    ) -> float:
        """Return the score of predictions, at most 1."""
        raise NotImplementedError


class SingleLabel(Task):
    """Each image has one of several classes."""

    name = "classes"

    def encode(self, y: Any, n_images: int, sample_weight: Any = None) -> NDArray[Any]:
        """Return the position of each class in `classes`."""
        self.classes, targets = encode_labels(y, n_images)
        return targets

    def decode(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Return the class labels."""
        return self.classes[targets]

    def strata(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Return the targets themselves."""
        return targets

    def can_train(self, targets: NDArray[Any]) -> bool:
        """Return whether there are two classes at least."""
        return len(np.unique(targets)) > 1

    def count_folds(self, targets: NDArray[Any], groups: NDArray[Any] | None) -> int:
        """Count the images, or groups, of the class that has the fewest."""
        n_images = counts = np.bincount(targets)
        if groups is not None:
            _, numbers = np.unique(groups, return_inverse=True)
            pairs = np.unique(np.column_stack([targets, numbers]), axis=0)
            counts = np.bincount(pairs[:, 0])
        rarest = int(np.argmin(counts))
        if counts[rarest] < 2:
            unit = "image" if n_images[rarest] == 1 else "group of images"
            is_number = self.classes.dtype.kind in "iuf"
            raise ValueError(
                f"The class {repr(self.classes.tolist()[rarest])[:80]} has a single "
                f"{unit}, but cross-validation needs at least two of each class."
                + (" For values, set task='regression'." if is_number else "")
            )
        return int(counts[rarest])

    def count_smallest(self, targets: NDArray[Any]) -> int:
        """Count the images of the rarest class."""
        return int(np.bincount(targets).min())

    def score(
        self, y: NDArray[Any], predicted: NDArray[Any], sample_weight: Any
    ) -> float:
        """Return the accuracy."""
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))


class Multilabel(Task):
    """Each image has any number of labels, a row of an indicator matrix."""

    name = "labels"

    def encode(self, y: Any, n_images: int, sample_weight: Any = None) -> NDArray[Any]:
        """Return the indicator matrix."""
        indicators = encode_indicators(y, n_images).astype(np.int64)
        self.classes = np.arange(indicators.shape[1])
        return indicators

    def count_smallest(self, targets: NDArray[Any]) -> int:
        """Count the images that have, or have not, the rarest label.

        A label that all images have, or none, is nothing to be learned.
        """
        counts = targets.sum(axis=0)
        rarest = np.minimum(counts, len(targets) - counts)
        return int(rarest[rarest > 0].min(initial=len(targets)))

    def score(
        self, y: NDArray[Any], predicted: NDArray[Any], sample_weight: Any
    ) -> float:
        """Return the accuracy, averaged over the labels."""
        return 1 - float(hamming_loss(y, predicted, sample_weight=sample_weight))


class Regression(Task):
    """Each image has one or several values."""

    name = "values"
    linear = {"regressor": "ridge"}

    def encode(self, y: Any, n_images: int, sample_weight: Any = None) -> NDArray[Any]:
        """Return the values, of the dimensions of `y`, and set their variances."""
        values = encode_values(y, n_images)
        self.classes = np.arange(values.shape[1])
        mean = np.average(values, axis=0, weights=sample_weight)
        variances = np.average((values - mean) ** 2, axis=0, weights=sample_weight)
        # Rounding must not let equal values differ.
        self.variances = np.where(np.ptp(values, axis=0) > 0, variances, 0.0)
        if n_images > 1 and not self.variances.any():
            raise ValueError("y has the same value for all images.")
        return values[:, 0] if np.asarray(y).ndim == 1 else values

    def score(
        self, y: NDArray[Any], predicted: NDArray[Any], sample_weight: Any
    ) -> float:
        """Return R², averaged over several values.

        Errors are compared with the variance of all images: that of the few images of a
        fold may be close to zero.
        """
        errors = (y - predicted).reshape(len(y), -1) ** 2
        mean_errors = np.average(errors, axis=0, weights=sample_weight)
        varies = self.variances > 0  # of others, nothing is to be learned
        return float(np.mean(1 - mean_errors[varies] / self.variances[varies]))


def task_of(y: Any, kind: str = "auto") -> Task:
    """Return what is predicted, given the targets of images.

    `kind` is "classification" or "regression"; with "auto", floats that are no integers
    are values.
    """
    if kind == "auto" and y is not None:
        is_continuous = type_of_target(y).startswith("continuous")
        kind = "regression" if is_continuous else "classification"
    if kind == "regression":
        return Regression()
    return Multilabel() if y is not None and is_multilabel(y) else SingleLabel()
