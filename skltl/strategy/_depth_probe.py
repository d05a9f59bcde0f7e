"""Cross-validated linear classifiers on features: by layer, and by number of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

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
