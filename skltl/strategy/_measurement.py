"""Measurements of `StrategyAdvisor`: cross-validated linear classifiers by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import column_or_1d

from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import check_sample_weight, take
from skltl.exceptions import ImageReadError, ImageTypeError, WeightsError
from skltl.features import CNNFeatureTransformer
from skltl.finetuning import encode_labels
from skltl.networks import block_shapes, get_backbone, resolve_layer, resolve_weights
from skltl.pretrained import PretrainedCNNClassifier, map_by_names
from skltl.strategy._rules import (
    Strategy,
    map_layers,
    recommend_strategy,
    similarity_of,
)

# As in `make_feature_pipeline`.
PROBE_C = 0.01
PROBE_MAX_ITER = 10_000

# Up to so many images, the folds are drawn anew so many times: a fold of twenty images
# tells little.
FEW_IMAGES = 500
N_REPEATS = 3

# Shares of the training images of each fold, for the learning curve; besides all.
SHARES = (0.25, 0.5)

Split = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Data:
    """What the probes learn from.

    Parameters
    ----------
    targets : array of shape (n,)
        Number of the class of each image.
    weights : array of shape (n,), or None
        Weights of the images, all positive.
    splits : list of (array, array)
        Training and test images of each fold.
    n_folds : int
        In how many parts the images were divided, each time.
    seed : int
        Of everything random.
    """

    targets: NDArray[np.int64]
    weights: NDArray[np.float64] | None
    splits: list[Split]
    n_folds: int
    seed: int

    @property
    def n_repeats(self) -> int:
        """How often the images were divided."""
        return -(-len(self.splits) // self.n_folds)

    def score(
        self, features: NDArray[np.float32], train: NDArray[Any], test: NDArray[Any]
    ) -> float:
        """Return the accuracy on some images of a classifier that others trained."""
        scaler = StandardScaler()
        probe = LinearSVC(C=PROBE_C, max_iter=PROBE_MAX_ITER, random_state=self.seed)
        of_train, of_test = (
            None if self.weights is None else self.weights[rows]
            for rows in (train, test)
        )
        scaled = scaler.fit_transform(features[train], sample_weight=of_train)
        probe.fit(scaled, self.targets[train], of_train)
        scaled = scaler.transform(features[test])
        return float(probe.score(scaled, self.targets[test], of_test))


@dataclass(frozen=True)
class FoldScores:
    """Accuracies, fold by fold, of several classifiers on the same folds.

    Parameters
    ----------
    names : tuple
        Of the classifiers.
    scores : array of shape (n_classifiers, n_splits)
        Accuracies.
    n_folds : int
        Of the cross-validation.
    """

    names: tuple[Any, ...]
    scores: NDArray[np.float64]
    n_folds: int

    @property
    def means(self) -> dict[Any, float]:
        """The mean accuracy of each."""
        means = self.scores.mean(axis=1).tolist()
        return dict(zip(self.names, means, strict=True))

    @property
    def errors(self) -> dict[Any, float]:
        """The standard error of each mean."""
        errors = [self.error_of(line) for line in self.scores]
        return dict(zip(self.names, errors, strict=True))

    def error_of(self, values: NDArray[np.float64]) -> float:
        """Return the standard error of the mean of one value for each fold.

        Folds share training images, for which it is corrected [1]_.

        References
        ----------
        .. [1] Nadeau, Bengio, "Inference for the generalization error", Machine
           Learning, 2003.
        """
        share = 1 / (self.n_folds - 1)  # test images for each training image
        return float(np.sqrt(values.var(ddof=1) * (1 / len(values) + share)))

    @property
    def best(self) -> Any:
        """The one with the best mean; the later one of two."""
        means = self.scores.mean(axis=1)
        return self.names[len(means) - 1 - int(means[::-1].argmax())]

    def lead(self) -> tuple[float, float]:
        """Return by how much the best of the earlier ones is ahead of the last one.

        And the standard error of this, from the differences fold by fold: what a fold
        has of luck, both have. That the best of several is looked at, it leaves out.
        """
        if len(self.names) == 1:
            return 0.0, 0.0
        earlier = self.scores[:-1]
        best = earlier[earlier.mean(axis=1).argmax()]
        differences = best - self.scores[-1]
        return float(differences.mean()), self.error_of(differences)

    def gain_per_doubling(self) -> tuple[float, float]:
        """Return what the last doubling of the number of images added, and its error.

        Of scores by number of training images; 0 and 0 if there is one number only.
        """
        if len(self.names) == 1:
            return 0.0, 0.0
        doublings = np.log2(self.names[-1] / self.names[-2])
        gains = (self.scores[-1] - self.scores[-2]) / doublings
        return float(gains.mean()), self.error_of(gains)


def split_folds(
    targets: NDArray[np.int64], groups: NDArray[Any] | None, n_folds: int, seed: int
) -> list[Split]:
    """Divide images into folds, stratified by class; repeatedly if they are few.

    Parameters
    ----------
    targets : array of shape (n,)
        Number of the class of each image.
    groups : array of shape (n,), or None
        Which images belong together: all in one fold.
    n_folds : int
        How many, at least 2.
    seed : int
        Of the folds.

    Returns
    -------
    list of (array, array)
        Training and test images of each fold.

    Raises
    ------
    ValueError
        If the groups leave fewer than two folds with two classes to train on.
    """
    n_repeats = N_REPEATS if len(targets) <= FEW_IMAGES else 1
    if groups is None:
        folds = RepeatedStratifiedKFold(
            n_splits=n_folds, n_repeats=n_repeats, random_state=seed
        )
        return list(folds.split(targets, targets))
    rng = np.random.RandomState(seed)
    splits = [
        split
        for _ in range(n_repeats)
        for split in StratifiedGroupKFold(
            n_folds, shuffle=True, random_state=rng.randint(2**31 - 1)
        ).split(targets, targets, groups)
    ]
    useful = [
        (train, test)
        for train, test in splits
        if len(test) and len(np.unique(targets[train])) > 1
    ]
    if len(useful) < 2:
        raise ValueError(
            "The groups leave fewer than two folds with two classes to train on: the "
            "advice needs classes that occur in several groups."
        )
    return useful


def probe_depths(features: Mapping[str, NDArray[np.float32]], data: Data) -> FoldScores:
    """Cross-validate a linear support vector machine at each layer.

    Parameters
    ----------
    features : mapping of str to array of shape (n, d)
        At each layer, from the image on.
    data : Data
        Their labels and folds.

    Returns
    -------
    FoldScores
        The accuracies, by layer.
    """
    scores = [
        [data.score(rows, train, test) for train, test in data.splits]
        for rows in features.values()
    ]
    return FoldScores(tuple(features), np.array(scores), data.n_folds)


def probe_sizes(
    features: NDArray[np.float32], data: Data, full: NDArray[np.float64]
) -> FoldScores:
    """Cross-validate at one layer with parts of the training images.

    Parameters
    ----------
    features : array of shape (n, d)
        At this layer.
    data : Data
        Their labels and folds.
    full : array of shape (n_splits,)
        What `probe_depths` has found there, with all training images of the same folds.

    Returns
    -------
    FoldScores
        The accuracies, by number of training images.
    """
    by_size: dict[int, list[float]] = {}
    for share in SHARES:
        parts = [
            _stratified_part(train, data.targets, share, [data.seed, number])
            for number, (train, _) in enumerate(data.splits)
        ]
        tests = [test for _, test in data.splits]
        size = round(np.mean([len(part) for part in parts]))
        by_size[size] = [
            data.score(features, part, test)
            for part, test in zip(parts, tests, strict=True)
        ]
    by_size[round(np.mean([len(train) for train, _ in data.splits]))] = full.tolist()
    sizes = tuple(sorted(by_size))
    scores = np.array([by_size[size] for size in sizes])
    return FoldScores(sizes, scores, data.n_folds)


def _stratified_part(
    train: NDArray[np.int64], targets: NDArray[np.int64], share: float, seed: list[int]
) -> NDArray[np.int64]:
    """Return a share of some images, of each class at least one."""
    rng = np.random.default_rng(seed)
    part = []
    for number in np.unique(targets[train]):
        members = rng.permutation(train[targets[train] == number])
        part.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(part))


# What the estimators that are advised have in common with the advisor.
SHARED_PARAMETERS = (
    "weights",
    "image_size",
    "image_shape",
    "device",
    "precision",
    "engine",
    "decode",
    "cache",
    "n_jobs",
    "random_state",
    "verbose",
)

# On how many of the images the pretrained classifier is evaluated.
SHARE_AS_IS = 0.2


@dataclass(frozen=True)
class Labelled:
    """Labelled images, those of weight 0 left out.

    Parameters
    ----------
    X : sequence of n images, or array of shape (n, d)
        The images.
    positions : array of shape (n,)
        Where they stand in what was given.
    classes : array of shape (n_classes,)
        The labels that there are, sorted.
    targets : array of shape (n,)
        Number of the class of each.
    weights, groups : array of shape (n,), or None
        Of the images; the weights are 1 on the average.
    """

    X: Any
    positions: NDArray[np.int64]
    classes: NDArray[Any]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64] | None
    groups: NDArray[Any] | None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors of images say where these stand in what was given."""
        try:
            yield
        except ImageReadError as error:
            position = int(self.positions[error.index])
            raise ImageReadError(position, error.path, error.reason) from error
        except ImageTypeError as error:
            position = int(self.positions[error.index])
            raise ImageTypeError(position, error.reason) from error

    def part(self, rows: NDArray[np.int64]) -> Labelled:
        """Return some of them."""
        if len(rows) == len(self.positions):
            return self
        return Labelled(
            take(self.X, rows),
            self.positions[rows],
            self.classes,
            self.targets[rows],
            None if self.weights is None else self.weights[rows],
            None if self.groups is None else self.groups[rows],
        )


@dataclass(frozen=True)
class Measurement:
    """What was measured, and what follows from it.

    Parameters
    ----------
    labelled, evaluated : Labelled
        All images, and those that were evaluated on.
    data : Data
        Labels and folds of these.
    features : dict of str to array of shape (n, d)
        Theirs, by layer.
    depths, sizes : FoldScores
        Accuracies by layer, and at one of them by number of images.
    as_is : tuple of two floats, or None
        Accuracy of the pretrained classifier, and its standard error.
    class_map : dict or None
        Which of the network's categories the classes are.
    similarity : str
        The word for it.
    strategy : Strategy
        The advice.
    """

    labelled: Labelled
    evaluated: Labelled
    data: Data
    features: dict[str, NDArray[np.float32]]
    depths: FoldScores
    sizes: FoldScores
    as_is: tuple[float, float] | None
    class_map: dict[Any, Any] | None
    similarity: str
    strategy: Strategy

    @property
    def layer(self) -> str:
        """The layer whose accuracies by number of images were measured."""
        return _chosen(self.depths, self.similarity)

    def features_of(self, estimator: Any) -> tuple[Any, ...]:
        """Return features for a pipeline, and of which of the labelled images."""
        if not isinstance(estimator, Pipeline):
            return ()
        layer = resolve_layer(get_backbone(estimator[0].backbone), estimator[0].layer)
        if layer.name not in self.features:
            return ()
        which = np.searchsorted(self.labelled.positions, self.evaluated.positions)
        return self.features[layer.name], which

    def attributes(self) -> dict[str, Any]:
        """Return what `fit` of a `StrategyAdvisor` sets."""
        score, error = self.as_is or (None, None)
        counts = np.bincount(self.labelled.targets)
        return {
            "n_images_": len(self.labelled.positions),
            "n_classes_": len(self.labelled.classes),
            "n_smallest_": int(counts.min()),
            "n_looked_at_": len(self.evaluated.positions),
            "n_folds_": self.data.n_folds,
            "n_repeats_": self.data.n_repeats,
            "layer_scores_": self.depths.means,
            "layer_errors_": self.depths.errors,
            "best_layer_": self.depths.best,
            "lead_": self.depths.lead(),
            "layer_": self.layer,
            "size_scores_": self.sizes.means,
            "size_errors_": self.sizes.errors,
            "gain_": self.sizes.gain_per_doubling(),
            "as_is_score_": score,
            "as_is_error_": error,
            "class_map_": self.class_map,
            "similarity_": self.similarity,
            "strategy_": self.strategy,
        }


def measure(
    advisor: Any, X: Any, y: Any, sample_weight: Any = None, groups: Any = None
) -> Measurement:
    """Do what `fit` of a `StrategyAdvisor` does, but change nothing of it."""
    n_given = len(clone(advisor)._read_images(X, reset=True))
    labelled = label(X, y, n_given, sample_weight, groups)
    seed = draw_seed(advisor.random_state)
    shared = {name: getattr(advisor, name) for name in SHARED_PARAMETERS}
    if seed is not None:
        shared["random_state"] = seed  # of a generator, what it gave
    seed = fresh_seed() if seed is None else seed
    evaluated, data = _divide(labelled, advisor.cv, advisor.max_images, seed)
    with evaluated.named():
        features = _features_by_layer(advisor.backbone, shared, evaluated.X)
    depths = probe_depths(features, data)
    class_map = map_of_classes(advisor.backbone, advisor.weights, labelled.classes)
    as_is = _score_as_is(advisor.backbone, shared, evaluated, class_map, seed)
    similarity = _judge(depths, as_is)
    layer = _chosen(depths, similarity)
    full = depths.scores[depths.names.index(layer)]
    sizes = probe_sizes(features[layer], data, full)
    counts = np.bincount(labelled.targets)
    strategy = recommend_strategy(
        len(labelled.positions),
        len(counts),
        similarity,
        backbone=advisor.backbone,
        layer=depths.best,
        n_smallest=int(counts.min()),
        class_map=class_map,
        **shared,
    )
    measured = (features, depths, sizes, as_is, class_map, similarity, strategy)
    return Measurement(labelled, evaluated, data, *measured)


def _divide(
    labelled: Labelled, cv: int, max_images: int | None, seed: int
) -> tuple[Labelled, Data]:
    """Choose the images to evaluate on, and divide them into folds."""
    n_folds = min(cv, _count_smallest(labelled))
    rows = _stratified(labelled.targets, max_images, n_folds, seed)
    evaluated = labelled.part(rows)
    splits = split_folds(evaluated.targets, evaluated.groups, n_folds, seed)
    return evaluated, Data(evaluated.targets, evaluated.weights, splits, n_folds, seed)


def label(X: Any, y: Any, n: int, sample_weight: Any, groups: Any) -> Labelled:
    """Check labels, weights and groups of n images; nothing is decoded.

    Raises
    ------
    ValueError
        If they are of different lengths, or there are less than two classes.
    """
    classes, targets = encode_labels(y, n)
    positions = np.arange(n)
    weights = None
    if groups is not None:
        groups = column_or_1d(groups)
        check_consistent_length(positions, groups)
    if sample_weight is not None:
        weights = check_sample_weight(
            sample_weight, targets, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError(
                "All images have weight 0: there is nothing to learn from."
            )
        # As in fine-tuning, only their ratios count: strategies are compared.
        weights = weights / weights[weights > 0].mean()
    everything = Labelled(X, positions, classes, targets, weights, groups)
    if weights is None or weights.all():
        return everything
    some = np.flatnonzero(weights)
    remaining, _ = encode_labels(classes[targets[some]], len(some))
    part = everything.part(some)
    targets = np.searchsorted(remaining, classes[part.targets])
    return Labelled(
        part.X, part.positions, remaining, targets, part.weights, part.groups
    )


def map_of_classes(backbone: Any, weights: Any, classes: NDArray[Any]) -> Any:
    """Return which categories the classes are, if all of them are some."""
    record = get_backbone(backbone)
    known = resolve_weights(record, weights)
    if known is None:
        return None
    return map_by_names(classes, known.categories or record.weights[0].categories)


def _count_smallest(labelled: Labelled) -> int:
    """Count the images, or groups, of the class that has the fewest."""
    counts = np.bincount(labelled.targets)
    what = "image"
    if counts.min() > 1 and labelled.groups is not None:
        what = "group of images"
        counts = np.array(
            [
                len(np.unique(labelled.groups[labelled.targets == number]))
                for number in range(len(labelled.classes))
            ]
        )
    if counts.min() < 2:
        rarest = repr(labelled.classes.tolist()[counts.argmin()])[:80]
        raise ValueError(
            f"The class {rarest} has a single {what}; advice is cross-validated, and "
            "needs at least two of each class."
        )
    return int(counts.min())


def _features_by_layer(
    backbone: Any, shared: dict[str, Any], X: Any
) -> dict[str, NDArray[np.float32]]:
    """Send images through the network, once; return the features of each layer."""
    names = map_layers(backbone, shared["image_size"])
    if not names:
        raise ValueError(
            f"{get_backbone(backbone).name!r} has no layer with a feature map: there "
            "are no depths to compare."
        )
    make: Any = CNNFeatureTransformer
    transformer = make(backbone, layer=names, **shared)
    rows = np.asarray(transformer.fit(X).transform(X))
    shapes = block_shapes(transformer.backbone_, transformer.preprocessing_.crop_size)
    widths = [shapes[cut_point.block][0] for cut_point in transformer.cut_points_]
    ends = np.cumsum(widths)[:-1]
    return dict(zip(names, np.split(rows, ends, axis=1), strict=True))


def _score_as_is(
    backbone: Any,
    shared: dict[str, Any],
    labelled: Labelled,
    class_map: Any,
    seed: int,
) -> tuple[float, float] | None:
    """Return the accuracy of the pretrained classifier, and its standard error.

    On a part of the images, and only if it knows the classes.
    """
    if class_map is None:
        return None
    targets, classes = labelled.targets, labelled.classes
    n_most = max(len(classes), round(SHARE_AS_IS * len(targets)))
    some = labelled.part(_stratified(targets, min(n_most, len(targets) // 2), 1, seed))
    known = {name: one for name, one in shared.items() if name != "cache"}
    make: Any = PretrainedCNNClassifier
    as_is = make(backbone, **known)
    with some.named():
        try:
            categories = as_is.fit(some.X).categories_.tolist()
        except WeightsError:  # there is no head
            return None
        if map_by_names(classes, categories) is None:  # a file with another head
            return None
        predicted = as_is.set_params(class_map=class_map).fit(some.X).predict(some.X)
    is_right = predicted == classes[some.targets]
    score = float(np.average(is_right, weights=some.weights))
    return score, float(np.sqrt(score * (1 - score) / len(is_right)))


def _judge(depths: FoldScores, as_is: tuple[float, float] | None) -> str:
    """Return the word for what was measured."""
    if as_is is not None and sum(as_is) >= max(depths.means.values()):
        return "contained"
    return similarity_of(depths.lead()[0])


def _chosen(depths: FoldScores, similarity: str) -> str:
    """Return the layer that a strategy for such images takes features from."""
    return str(depths.best if similarity == "different" else depths.names[-1])


def _stratified(
    targets: NDArray[np.int64], n_most: int | None, n_least: int, seed: int
) -> NDArray[np.int64]:
    """Return the positions of about so many images, of each class its share.

    But of each class at least `n_least`, or all that there are.
    """
    if n_most is None or len(targets) <= n_most:
        return np.arange(len(targets))
    rng = np.random.default_rng(seed)
    chosen = []
    for number, count in enumerate(np.bincount(targets)):
        n_wanted = max(n_least, round(n_most * count / len(targets)))
        members = np.flatnonzero(targets == number)
        chosen.append(rng.permutation(members)[:n_wanted])
    return np.sort(np.concatenate(chosen))
