"""Labeled images, and cross-validation of linear classifiers on their features."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from tqdm import tqdm

from skltl._estimator import read_images_of
from skltl._sklearn import check_sample_weight, take
from skltl._targets import any_number_of_classes, check_groups
from skltl.exceptions import ImageError
from skltl.features import make_feature_pipeline
from skltl.strategy._tasks import Task

# Up to this number of images the cross-validation is repeated: a fold of twenty images
# gives a coarse estimate.
FEW_IMAGES = 500
N_REPEATS = 3

Features = NDArray[np.float32]
Scores = NDArray[np.float64]  # of splits
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class LabeledImages:
    """Images with targets, and with weights and groups if there are any.

    `targets` are encoded by the `task`, `weights` have a mean of 1, and `positions` are
    those of the images in the ``X`` of the user.
    """

    X: Any
    positions: NDArray[np.int64]
    task: Task
    targets: NDArray[Any]
    weights: NDArray[np.float64] | None
    groups: NDArray[Any] | None

    @property
    def y(self) -> NDArray[Any]:
        """Targets to which estimators are fitted."""
        return self.task.decode(self.targets)

    @property
    def strata(self) -> NDArray[np.int64]:
        """Number of the stratum of each image: its class, if it has one."""
        return self.task.strata(self.targets)

    def subset(self, rows: NDArray[np.int64]) -> LabeledImages:
        """Return some of the images, in this order; `rows` are sorted."""
        if len(rows) == len(self.targets):  # arrays are not copied
            return self
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
        except ImageError as error:
            raise error.moved_to(int(self.positions[error.index])) from error.__cause__


def label_images(
    estimator: Any, X: Any, y: Any, sample_weight: Any, groups: Any, task: Task
) -> LabeledImages:
    """Check the data of a fit, and leave out images of weight 0."""
    positions = np.arange(len(read_images_of(estimator, X, reset=True)))
    targets = task.encode(y, len(positions))
    if groups is not None:
        groups = check_groups(groups)
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
    labeled = LabeledImages(X, positions, task, targets, weights, groups)
    if weights is None:
        return labeled
    rows = np.flatnonzero(weights)
    remaining = copy.copy(task)
    targets = remaining.encode(labeled.y[rows], len(rows), weights[rows])
    return replace(labeled.subset(rows), task=remaining, targets=targets)


def sample_images(
    labeled: LabeledImages, max_images: int | None, n_per_class: int, seed: int
) -> LabeledImages:
    """Sample images by class, at least `n_per_class` of each or all that there are."""
    n_images = len(labeled.targets)
    if max_images is None or n_images <= max_images:
        return labeled
    fraction = Fraction(max_images, n_images)
    return labeled.subset(sample_rows(labeled.strata, fraction, n_per_class, seed))


def sample_rows(
    strata: NDArray[np.int64],
    fraction: float | Fraction,
    n_per_class: int,
    seed: int | list[int],
) -> NDArray[np.int64]:
    """Sample a fraction of the rows of each class; return them sorted."""
    rng = np.random.default_rng(seed)
    chosen = []
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        n_wanted = max(n_per_class, round(fraction * len(members)))
        chosen.append(members[:n_wanted])
    return np.sort(np.concatenate(chosen))


def split_folds(labeled: LabeledImages, n_folds: int, seed: int) -> list[Split]:
    """Split images into stratified folds, repeatedly if there are few images.

    Folds without test images or with a single training class are left out.
    """
    rng = np.random.RandomState(seed)
    strata, groups, splits = labeled.strata, labeled.groups, []
    for _ in range(N_REPEATS if len(strata) <= FEW_IMAGES else 1):
        if groups is None:
            folds = StratifiedKFold(n_folds, shuffle=True, random_state=rng)
        else:
            fold_seed = rng.randint(2**31 - 1)
            folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=fold_seed)
        splits += [
            (train, test)
            for train, test in folds.split(strata, strata, groups)
            if is_usable(labeled.task, labeled.targets, train, test)
        ]
    if len(splits) < 2:
        raise ValueError(
            "The groups leave fewer than two folds with two classes to train on. "
            "Provide classes that occur in several groups."
        )
    return splits


def is_usable(
    task: Task,
    targets: NDArray[Any],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
) -> bool:
    """Return whether a model can be fitted to and scored on these images."""
    return len(test) > 0 and task.can_train(targets[train])


def score_linear(
    features: Features,
    labeled: LabeledImages,
    splits: list[Split],
    seed: int,
    progress: str = "",
) -> Scores:
    """Return the score of a linear model in each split.

    With `progress`, a progress bar of this name is shown.
    """
    task, y, weights = labeled.task, labeled.targets, labeled.weights
    probe = make_feature_pipeline(random_state=seed, **task.linear)[1:]
    scores = []
    for train, test in tqdm(splits, desc=progress, unit="fit", disable=not progress):
        w_train = None if weights is None else weights[train]
        w_test = None if weights is None else weights[test]
        fit_linear(probe, features[train], y[train], w_train)
        scores.append(task.score(y[test], probe.predict(features[test]), w_test))
    return np.array(scores, dtype=np.float64)


def fit_linear(
    steps: Pipeline, features: Any, y: NDArray[Any], sample_weight: Any
) -> None:
    """Fit the scaler and the classifier of a feature pipeline, both with weights."""
    weights = {f"{name}__sample_weight": sample_weight for name, _ in steps.steps}
    # With routing enabled by the user, the steps would have to request the weights.
    with config_context(enable_metadata_routing=False), any_number_of_classes():
        steps.fit(features, y, **weights)


def summarize(
    scores: dict[Any, Scores], n_folds: int
) -> tuple[dict[Any, float], dict[Any, float]]:
    """Return the means of scores, and their standard errors."""
    means, errors = {}, {}
    for name, values in scores.items():
        means[name], errors[name] = mean_and_error(values, n_folds)
    return means, errors


def mean_and_error(values: Scores, n_folds: float) -> tuple[float, float]:
    """Return the mean over splits and its standard error.

    Splits share training images, for which the error is corrected (see Notes of
    `StrategyAdvisor`).
    """
    test_per_train = 1 / (n_folds - 1)
    variance = values.var(ddof=1) * (1 / len(values) + test_per_train)
    return float(values.mean()), float(np.sqrt(variance))
