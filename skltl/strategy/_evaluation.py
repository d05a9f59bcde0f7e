"""Labeled images, and the evaluation of strategies by cross-validation on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import column_or_1d

from skltl._estimator import read_images_of
from skltl._random import fresh_seed
from skltl._sklearn import check_sample_weight, take
from skltl.exceptions import (
    ImageReadError,
    ImageTypeError,
    NonFiniteFeaturesError,
    WeightsError,
)
from skltl.features import make_feature_pipeline, n_features_by_layer
from skltl.finetuning import encode_labels
from skltl.networks import get_backbone
from skltl.pretrained import PretrainedCNNClassifier, map_by_names
from skltl.strategy._rules import (
    feature_map_layers,
    find_class_map,
    find_early_layer,
    recommend_strategy,
    shared_parameters,
    similarity_of,
)

# Up to this number of images the cross-validation is repeated: a fold of twenty images
# gives a coarse estimate.
FEW_IMAGES = 500
N_REPEATS = 3

# Subsets of the training images of each fold, for the learning curve.
TRAIN_FRACTIONS = (0.25, 0.5)

# Fraction of the images that the pretrained classifier is evaluated on.
PRETRAINED_FRACTION = 0.2

Features = NDArray[np.float32]
Scores = NDArray[np.float64]  # of splits
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class LabeledImages:
    """Images with labels, and with weights and groups if there are any.

    `targets` index `classes`, `weights` have a mean of 1, and `positions` are those of
    the images in the ``X`` of the user.
    """

    X: Any
    positions: NDArray[np.int64]
    classes: NDArray[Any]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64] | None
    groups: NDArray[Any] | None

    def subset(self, rows: NDArray[np.int64]) -> LabeledImages:
        """Return some of the images."""
        return replace(
            self,
            X=take(self.X, rows),
            positions=self.positions[rows],
            targets=self.targets[rows],
            weights=None if self.weights is None else self.weights[rows],
            groups=None if self.groups is None else self.groups[rows],
        )

    @contextmanager
    def original_positions(self) -> Iterator[None]:
        """Let errors of images name their positions in the ``X`` of the user."""
        try:
            yield
        except (ImageReadError, ImageTypeError, NonFiniteFeaturesError) as error:
            position = int(self.positions[error.index])
            raise type(error)(position, *error.args[1:]) from error


def label_images(
    estimator: Any, X: Any, y: Any, sample_weight: Any, groups: Any
) -> LabeledImages:
    """Check the data of a fit, and leave out images of weight 0."""
    positions = np.arange(len(read_images_of(estimator, X, reset=True)))
    classes, targets = encode_labels(y, len(positions))
    if groups is not None:
        groups = column_or_1d(groups)
        check_consistent_length(positions, groups)
    weights = None
    if sample_weight is not None:
        weights = check_sample_weight(
            sample_weight, targets, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError("sample_weight is zero for all training samples.")
        # As in fine-tuning, only their ratios matter: strategies are compared. A power
        # of two changes no digit, and sums of what remains are finite.
        weights = np.ldexp(weights, -np.frexp(weights.max())[1])
        weights = weights / weights[weights > 0].mean()
    labeled = LabeledImages(X, positions, classes, targets, weights, groups)
    if weights is None or weights.all():
        return labeled
    rows = np.flatnonzero(weights)
    classes, targets = encode_labels(classes[targets[rows]], len(rows))
    return replace(labeled.subset(rows), classes=classes, targets=targets)


def evaluate_strategies(
    advisor: Any, labeled: LabeledImages, transformer: Any, seed: int | None
) -> tuple[Any, LabeledImages, dict[str, Features]]:
    """Set the measurements and the recommendation of an advisor.

    Return the fitted transformer of all main layers, the images that were evaluated and
    their features by layer.
    """
    find_early_layer(transformer)  # raises if there is no such layer
    seed = fresh_seed() if seed is None else seed
    n_folds = min(advisor.cv, _count_smallest(labeled))
    evaluated = _sample_images(labeled, advisor.max_images, n_folds, seed)
    splits = _split_folds(evaluated.targets, evaluated.groups, n_folds, seed)
    with evaluated.original_positions():
        fitted, features = _extract_layers(transformer, evaluated.X)
    advisor.n_images_, advisor.n_classes_ = len(labeled.targets), len(labeled.classes)
    advisor.n_smallest_ = int(np.bincount(labeled.targets).min())
    advisor.n_evaluated_, advisor.n_folds_ = len(evaluated.targets), n_folds
    advisor.n_repeats_ = -(-len(splits) // n_folds)
    advisor.class_map_ = find_class_map(transformer, labeled.classes)
    advisor.as_is_score_, advisor.as_is_error_ = _score_pretrained(
        transformer, evaluated, advisor.class_map_, seed
    )
    by_layer = {
        layer: _score_linear(columns, evaluated, splits, seed)
        for layer, columns in features.items()
    }
    _compare_layers(advisor, by_layer)
    layer = advisor.layer_
    by_size = _score_sizes(features[layer], evaluated, splits, seed, by_layer[layer])
    _compare_sizes(advisor, by_size)
    if transformer.layer == "last":
        transformer = clone(transformer).set_params(layer=advisor.best_layer_)
    advisor.strategy_ = recommend_strategy(
        *(advisor.n_images_, advisor.n_classes_, advisor.similarity_),
        transformer=transformer,
        n_smallest=advisor.n_smallest_,
        class_map=advisor.class_map_,
    )
    return fitted, evaluated, features


def _compare_layers(advisor: Any, by_layer: dict[str, Scores]) -> None:
    """Set the fitted attributes that follow from the scores by layer."""
    scores, errors = _summarize(by_layer, advisor.n_folds_)
    *earlier, last = scores
    best = max(reversed(scores), key=lambda layer: scores[layer])  # the last of ties
    lead = 0.0, 0.0
    if earlier:
        best_earlier = max(earlier, key=lambda layer: scores[layer])
        leads = by_layer[best_earlier] - by_layer[last]
        lead = _mean_and_error(leads, advisor.n_folds_)
    similarity, as_is_score = similarity_of(lead[0]), advisor.as_is_score_
    if as_is_score is not None and as_is_score + advisor.as_is_error_ >= scores[best]:
        similarity = "contained"
    advisor.layer_scores_, advisor.layer_errors_ = scores, errors
    advisor.best_layer_, advisor.lead_ = best, lead
    advisor.similarity_ = similarity
    advisor.layer_ = best if similarity == "different" else last


def _compare_sizes(advisor: Any, by_size: dict[int, Scores]) -> None:
    """Set the fitted attributes that follow from the scores by size."""
    advisor.size_scores_, advisor.size_errors_ = _summarize(by_size, advisor.n_folds_)
    advisor.gain_ = 0.0, 0.0
    if len(by_size) > 1:
        smaller, larger = list(by_size)[-2:]
        gains = (by_size[larger] - by_size[smaller]) / np.log2(larger / smaller)
        advisor.gain_ = _mean_and_error(gains, advisor.n_folds_)


def _count_smallest(labeled: LabeledImages) -> int:
    """Count the images, or groups, of the class that has the fewest."""
    n_images = counts = np.bincount(labeled.targets)
    if labeled.groups is not None:
        _, groups = np.unique(labeled.groups, return_inverse=True)
        pairs = np.unique(np.column_stack([labeled.targets, groups]), axis=0)
        counts = np.bincount(pairs[:, 0])
    rarest = int(np.argmin(counts))
    if counts[rarest] < 2:
        unit = "image" if n_images[rarest] == 1 else "group of images"
        raise ValueError(
            f"The class {repr(labeled.classes.tolist()[rarest])[:80]} has a single "
            f"{unit}, but cross-validation needs at least two of each class."
        )
    return int(counts[rarest])


def _sample_images(
    labeled: LabeledImages, max_images: int | None, n_per_class: int, seed: int
) -> LabeledImages:
    """Sample images by class, at least `n_per_class` of each or all that there are."""
    n_images = len(labeled.targets)
    if max_images is None or n_images <= max_images:
        return labeled
    fraction = Fraction(max_images, n_images)
    return labeled.subset(_sample_rows(labeled.targets, fraction, n_per_class, seed))


def _sample_rows(
    targets: NDArray[np.int64],
    fraction: float | Fraction,
    n_per_class: int,
    seed: int | list[int],
) -> NDArray[np.int64]:
    """Sample a fraction of the rows of each class; return them sorted."""
    rng = np.random.default_rng(seed)
    chosen = []
    for target in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == target))
        n_wanted = max(n_per_class, round(fraction * len(members)))
        chosen.append(members[:n_wanted])
    return np.sort(np.concatenate(chosen))


def _split_folds(
    targets: NDArray[np.int64], groups: NDArray[Any] | None, n_folds: int, seed: int
) -> list[Split]:
    """Split images into stratified folds, repeatedly if there are few images.

    Folds without test images or with a single training class are left out.
    """
    rng = np.random.RandomState(seed)
    splits = []
    for _ in range(N_REPEATS if len(targets) <= FEW_IMAGES else 1):
        if groups is None:
            folds = StratifiedKFold(n_folds, shuffle=True, random_state=rng)
        else:
            fold_seed = rng.randint(2**31 - 1)
            folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=fold_seed)
        splits += [
            (train, test)
            for train, test in folds.split(targets, targets, groups)
            if len(test) and len(np.unique(targets[train])) > 1
        ]
    if len(splits) < 2:
        raise ValueError(
            "The groups leave fewer than two folds with two classes to train on. "
            "Provide classes that occur in several groups."
        )
    return splits


def _extract_layers(transformer: Any, X: Any) -> tuple[Any, dict[str, Features]]:
    """Extract the features of all main layers; return the fitted transformer, too."""
    layers = feature_map_layers(
        transformer.backbone, transformer.image_size, transformer.pooling
    )
    if not layers:
        name = get_backbone(transformer.backbone).name
        raise ValueError(f"{name!r} has no layer with a feature map to compare.")
    fitted = clone(transformer).set_params(layer=layers).fit(X)
    features = np.asarray(fitted.transform(X))  # from a DataFrame after `set_output`
    ends = np.cumsum(n_features_by_layer(fitted))
    by_layer = np.split(features, ends[:-1], axis=1)
    return fitted, dict(zip(layers, by_layer, strict=True))


def _score_linear(
    features: Features, labeled: LabeledImages, splits: list[Split], seed: int
) -> Scores:
    """Return the accuracy of a linear classifier in each split."""
    probe = make_feature_pipeline(classifier="svm", random_state=seed)[1:]
    y, weights = labeled.targets, labeled.weights
    scores = []
    for train, test in splits:
        w_train = None if weights is None else weights[train]
        w_test = None if weights is None else weights[test]
        fit_linear(probe, features[train], y[train], w_train)
        predicted = probe.predict(features[test])
        scores.append(accuracy_score(y[test], predicted, sample_weight=w_test))
    return np.array(scores, dtype=np.float64)


def _score_sizes(
    features: Features,
    labeled: LabeledImages,
    splits: list[Split],
    seed: int,
    full_scores: Scores,
) -> dict[int, Scores]:
    """Return the accuracy by number of training images, in each split.

    `full_scores` are those with all training images of a split.
    """
    by_size = {}
    for fraction in TRAIN_FRACTIONS:
        smaller = [
            (train[_sample_rows(labeled.targets[train], fraction, 1, [seed, n])], test)
            for n, (train, test) in enumerate(splits)
        ]
        by_size[_mean_size(smaller)] = _score_linear(features, labeled, smaller, seed)
    by_size[_mean_size(splits)] = full_scores
    return dict(sorted(by_size.items()))


def _mean_size(splits: list[Split]) -> int:
    """Return the mean number of training images."""
    return round(np.mean([len(train) for train, _ in splits]))


def fit_linear(
    steps: Pipeline, features: Any, y: NDArray[Any], sample_weight: Any
) -> None:
    """Fit the scaler and the classifier of a feature pipeline, both with weights."""
    weights = {f"{name}__sample_weight": sample_weight for name, _ in steps.steps}
    # With routing enabled by the user, the steps would have to request the weights.
    with config_context(enable_metadata_routing=False):
        steps.fit(features, y, **weights)


def _score_pretrained(
    transformer: Any, labeled: LabeledImages, class_map: Any, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Return the accuracy of the pretrained classifier and its standard error.

    It is evaluated on a sample of the images, and only if all classes are among its
    categories.
    """
    if class_map is None:
        return None, None
    targets, classes = labeled.targets, labeled.classes
    n_most = max(len(classes), round(PRETRAINED_FRACTION * len(targets)))
    sample = _sample_images(labeled, min(n_most, len(targets) // 2), 1, seed)
    classifier: Any = PretrainedCNNClassifier()
    classifier.set_params(**shared_parameters(transformer, classifier))
    with sample.original_positions():
        try:
            categories = classifier.fit(sample.X).categories_.tolist()
        except WeightsError:  # the network has no head
            return None, None
        if map_by_names(classes, categories) is None:  # a file with another head
            return None, None
        classifier.set_params(class_map=class_map).fit(sample.X)
        predicted = classifier.predict(sample.X)
    is_right = predicted == classes[sample.targets]
    score = float(np.average(is_right, weights=sample.weights))
    return score, float(np.sqrt(score * (1 - score) / len(is_right)))


def _summarize(
    scores: dict[Any, Scores], n_folds: int
) -> tuple[dict[Any, float], dict[Any, float]]:
    """Return the means of scores, and their standard errors."""
    means, errors = {}, {}
    for name, values in scores.items():
        means[name], errors[name] = _mean_and_error(values, n_folds)
    return means, errors


def _mean_and_error(values: Scores, n_folds: int) -> tuple[float, float]:
    """Return the mean over splits and its standard error.

    Splits share training images, for which the error is corrected (see Notes of
    `StrategyAdvisor`).
    """
    test_per_train = 1 / (n_folds - 1)
    variance = values.var(ddof=1) * (1 / len(values) + test_per_train)
    return float(values.mean()), float(np.sqrt(variance))
