"""Training data: targets, weights, batches, and which images are held out."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import DataConversionWarning
from sklearn.model_selection import (
    GroupKFold,
    StratifiedGroupKFold,
    train_test_split,
)
from sklearn.utils import assert_all_finite, check_array, check_consistent_length
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from skltl._caller import user_stacklevel
from skltl._sklearn import check_sample_weight
from skltl._targets import check_groups, check_indicators
from skltl.exceptions import nearest
from skltl.images import (
    ImageSource,
    JoinedSource,
)

# The fraction that early stopping holds out by default.
DEFAULT_FRACTION = 0.1

# Groups are distributed over this many folds, some of which are held out; over fewer if
# there are not as many groups, and over more for a smaller fraction.
N_FOLDS = 20

Positions: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """Images of a fit, and what is known of each; the last ones may be for validation.

    `groups` are those of the other images.
    """

    source: ImageSource
    targets: NDArray[Any]
    sample_weight: Any
    groups: Any
    validation_weight: Any = None
    n_validation: int = 0

    @property
    def n_training(self) -> int:
        """Number of images that are not those of a validation set."""
        return len(self.targets) - self.n_validation

    def followed_by(
        self, source: ImageSource, targets: NDArray[Any], sample_weight: Any
    ) -> TrainingData:
        """Return these data with a validation set."""
        return replace(
            self,
            source=JoinedSource(self.source, source),
            targets=np.concatenate([self.targets, targets]),
            validation_weight=sample_weight,
            n_validation=len(targets),
        )

    def join_weights(
        self, training_weights: Callable[[Any, NDArray[Any]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Return the weight of each image.

        A function of sample weights and targets returns those of the training images;
        a validation set is weighted by its own sample weights alone.
        """
        training, validation = np.split(self.targets, [self.n_training])
        weights = training_weights(self.sample_weight, training)
        if not self.n_validation:
            return weights
        more = example_weights(self.validation_weight, validation)
        return np.concatenate([weights, more])

    def digests(self) -> dict[str, Any]:
        """Return what is known of the data, to compare with those of other processes.

        Images are compared by the names of their files, whose folders may differ.
        """
        paths = [self.source.path(position) for position in range(len(self.source))]
        values = {
            "y": self.targets,
            "sample_weight": self.sample_weight,
            "groups": self.groups,
            "sample_weight_val": self.validation_weight,
            "names of files": [path and Path(path).name for path in paths],
        }
        sizes = {"numbers of images": (len(paths), self.n_validation)}
        return {**sizes, **{name: _digest(one) for name, one in values.items()}}


def _digest(values: Any) -> str:
    content = None if values is None else np.asarray(values).tolist()
    return blake2b(repr(content).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Examples:
    """Targets and weights of all images, and which of them are for validation."""

    targets: NDArray[Any]  # as an `Objective` takes them
    weights: NDArray[np.float32]  # (n,) 1 on average over the training images
    training: Positions
    validation: Positions


def encode_indicators(y: Any, n: int) -> NDArray[np.float32]:
    """Return the indicator matrix (n, n_labels) of the labels of `n` images."""
    indicators = check_array(y, accept_sparse="csr", dtype=np.float32)
    if issparse(indicators):
        indicators = indicators.toarray()
    check_consistent_length(range(n), indicators)
    check_indicators(indicators)
    return np.asarray(indicators)


def encode_values(y: Any, n: int) -> NDArray[np.float64]:
    """Return the values (n, n_outputs) of a regression for `n` images."""
    if y is None:
        raise ValueError(
            "The regressor requires y to be passed, but the target y is None."
        )
    values = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
    check_consistent_length(range(n), values)
    if values.ndim > 2:
        raise ValueError(
            f"y has shape {values.shape}; expected (n,) or (n, n_outputs)."
        )
    return np.asarray(values).reshape(len(values), -1)


def encode_labels(y: Any, n: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the sorted classes, and the position of each of `n` labels among them."""
    if y is None:
        raise ValueError(
            "The classifier requires y to be passed, but the target y is None."
        )
    labels = column_or_1d(y)
    if np.asarray(y).ndim == 2:
        warnings.warn(
            "A column-vector y was passed when a 1d array was expected. Please change "
            "the shape of y to (n_samples, ), for example using ravel().",
            DataConversionWarning,
            stacklevel=user_stacklevel(),
        )
    check_consistent_length(range(n), labels)
    if labels.dtype.kind == "O" and any(map(_is_missing, labels)):
        raise ValueError("Input y contains NaN or None.")
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class only, {classes.tolist()[0]!r}: a classifier needs "
            "at least two classes."
        )
    return classes, targets.astype(np.int64)


def _is_missing(label: Any) -> bool:
    return label is None or type(label).__name__ == "NAType" or label != label


def columns_of(classes: NDArray[Any], labels: Any) -> NDArray[np.int64]:
    """Return the position of each label among a classifier's sorted classes."""
    labels = column_or_1d(labels)
    if any(map(_is_missing, labels)):
        raise ValueError("The labels contain NaN or None.")
    if (labels.dtype.kind in "buif") != (classes.dtype.kind in "buif"):
        raise ValueError(
            f"{reprlib.repr(labels.tolist()[0])} is none of the classes of this "
            f"classifier, such as {reprlib.repr(classes.tolist()[0])}."
        )
    columns = np.searchsorted(classes, labels) if len(labels) else np.zeros(0, int)
    columns = np.minimum(columns, len(classes) - 1)
    wrong = np.flatnonzero(classes[columns] != labels)
    if len(wrong):
        (label,) = labels[wrong[:1]].tolist()  # as plain Python prints it
        names = [str(name)[:30] for name in classes]
        raise ValueError(
            f"{reprlib.repr(label)} is none of the classes of this classifier. "
            f"{nearest(str(label)[:30], names)}"
        )
    return np.asarray(columns)


def abbreviate(labels: NDArray[Any]) -> str:
    """Format labels for a message, the first six if there are many."""
    shown = ", ".join(repr(label)[:40] for label in labels.tolist()[:6])
    return f"[{shown}{', ...' if len(labels) > 6 else ''}]"


def example_weights(
    sample_weight: Any,
    targets: NDArray[Any],
    class_weight: Any = None,
    classes: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Return the product of sample weight and class weight for each image."""
    weights = check_sample_weight(
        sample_weight, targets, dtype=np.float64, ensure_non_negative=True
    )
    # Only ratios count. Scaled first, so that products and sums do not overflow.
    weights = _scale_to_one(weights)
    if classes is not None:
        # An image of weight 0 counts for none of the classes.
        used = np.flatnonzero(_is_used(weights, targets))
        indices = used if class_weight == "balanced" else None
        of_classes = compute_sample_weight(
            class_weight, classes[targets], indices=indices
        )
        weights = weights * _scale_to_one(of_classes)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("class_weight must be finite and non-negative.")
    return np.asarray(weights)


def _scale_to_one(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide weights by the largest one."""
    largest = max(float(weights.max()), float(np.finfo(np.float64).tiny))
    return np.asarray(weights / largest)


def split_examples(
    estimator: Any, data: TrainingData, weights: NDArray[np.float64], seed: int
) -> Examples:
    """Hold out validation images, and scale the training weights to a mean of 1.

    None are held out if there is a validation set. So scaled, weights do not change the
    effective learning rate. Images of weight 0 are left out.
    """
    targets, groups = data.targets, data.groups
    fraction = estimator.validation_fraction
    if fraction is None and estimator.early_stopping:
        fraction = DEFAULT_FRACTION
    training, validation = np.split(np.arange(len(targets)), [data.n_training])
    if groups is not None:
        check_consistent_length(training, groups)
        groups = check_groups(groups)
    for name, positions in (("training", training), ("validation", validation)):
        if len(positions) and not weights[positions].any():
            raise ValueError(f"The weights of all {name} images are zero.")
    used = training[_is_used(weights[training], targets[training])]
    if data.n_validation:
        training = used
    else:
        groups = None if groups is None else groups[used]
        parts = hold_out(targets[used], groups, fraction, seed)
        training, validation = (used[part] for part in parts)
    of_training = weights[training]
    weights = weights / of_training[of_training > 0].mean()
    return Examples(targets, weights.astype(np.float32), training, validation)


def _is_used(weights: NDArray[np.float64], targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which images are used: those of weight 0 only if their class has no other.

    As in scikit-learn, such a class remains one of the classes.
    """
    is_used = weights > 0
    if targets.ndim == 1:
        is_used |= ~np.isin(targets, targets[is_used])
    return is_used


def hold_out(
    targets: NDArray[Any], groups: Any, fraction: float | None, seed: int
) -> tuple[Positions, Positions]:
    """Return the positions of training and validation images.

    They are stratified by class where each image has one. Groups are never split; the
    validation set is then as close to the fraction as whole groups allow. Without a
    fraction, nothing is held out.
    """
    everything = np.arange(len(targets))
    if fraction is None:
        return everything, everything[:0]
    if groups is not None:
        return _hold_out_groups(targets, groups, fraction, seed)
    if targets.ndim > 1:
        # At least two, since R² is not defined for one.
        n_held_out = min(max(round(fraction * len(targets)), 2), len(targets) - 1)
        if n_held_out < 1:
            raise ValueError(
                f"validation_fraction={fraction} cannot hold out an image and leave "
                "one for training: there is a single image."
            )
        training, validation = train_test_split(
            everything, test_size=n_held_out, random_state=seed
        )
        return training, validation
    counts = np.bincount(targets)
    n_held_out = max(round(fraction * len(targets)), len(counts))
    if counts.min() < 2 or len(targets) - n_held_out < len(counts):
        raise ValueError(
            f"validation_fraction={fraction} cannot hold out images of each class and "
            f"leave some for training: there are {len(targets)} images of "
            f"{len(counts)} classes, {counts.min()} of the rarest."
        )
    training, validation = train_test_split(
        everything, test_size=n_held_out, stratify=targets, random_state=seed
    )
    return training, validation


def _hold_out_groups(
    targets: NDArray[Any], groups: NDArray[Any], fraction: float, seed: int
) -> tuple[Positions, Positions]:
    """Hold out whole groups: those of some of several folds, stratified if possible.

    Classes with fewer images than folds are not in all of them, and must be in others
    than those that are held out.
    """
    is_stratified = targets.ndim == 1
    n_groups = len(np.unique(groups))
    counts = np.unique(targets, return_counts=True)[1] if is_stratified else [n_groups]
    if min(n_groups, *counts) < 2:
        counted = (
            f" and {min(counts)} images of the rarest class" if is_stratified else ""
        )
        raise ValueError(
            f"groups: too few to hold some out, with a total of {n_groups}{counted}."
        )
    n_folds = min(max(N_FOLDS, round(1 / fraction)), n_groups, max(counts))
    # As many folds as come closest to the fraction, but neither none nor all.
    n_held_out = min(max(round(fraction * n_folds), 1), n_folds - 1)
    kind = StratifiedGroupKFold if is_stratified else GroupKFold
    splitter = kind(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Of classes with fewer images than folds, which cannot be in all of them.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        folds = [fold for _, fold in splitter.split(targets, targets, groups)]
    for first in range(n_folds):
        held_out = np.roll(np.arange(n_folds), -first)[:n_held_out]
        validation = np.sort(np.concatenate([folds[number] for number in held_out]))
        training = np.setdiff1d(np.arange(len(targets)), validation)
        has_all = len(np.unique(targets[training])) == len(counts)
        if len(validation) and (has_all or not is_stratified):
            return training, validation
    raise ValueError(
        f"groups: with validation_fraction={fraction} the training groups do not "
        "contain all classes. Groups must not be the classes themselves."
    )


def batches(n: int, batch_size: int) -> list[slice]:
    """Divide a range into batches; a last one of one item joins the one before."""
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [
        slice(start, end) for start, end in zip(starts, [*starts[1:], n], strict=True)
    ]
