"""What a linear classifier makes of the features at each depth of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    StratifiedKFold,
    cross_val_score,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

# As in `make_feature_pipeline`.
PROBE_C = 0.01

# Up to so many pictures, the folds are drawn anew so many times: a fold of twenty
# pictures tells little.
FEW_IMAGES = 500
N_REPEATS = 3

# Shares of the training pictures of each fold, for the learning curve.
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class DepthScores:
    """Cross-validated accuracies along a network.

    Parameters
    ----------
    layers : tuple of str
        The cut points, from the picture on.
    scores : array of shape (n_layers, n_splits)
        Accuracies.
    n_folds : int
        Of the cross-validation.
    """

    layers: tuple[str, ...]
    scores: NDArray[np.float64]
    n_folds: int

    @property
    def best(self) -> str:
        """The cut point with the best mean; the later one of two."""
        means = self.scores.mean(axis=1)
        return self.layers[len(means) - 1 - int(means[::-1].argmax())]

    @property
    def means(self) -> dict[str, float]:
        """The mean accuracy at each cut point."""
        means = self.scores.mean(axis=1).tolist()
        return dict(zip(self.layers, means, strict=True))

    def lead(self) -> tuple[float, float]:
        """Return by how much the best earlier cut is ahead of the last one.

        And the standard error of this, from the differences fold by fold: what a fold
        has of luck, both cuts have. Folds share training pictures, for which the error
        is corrected [1]_; that the best of several cuts is looked at, it leaves out.

        References
        ----------
        .. [1] Nadeau, Bengio, "Inference for the generalization error", Machine
           Learning, 2003.
        """
        if len(self.layers) == 1:
            return 0.0, 0.0
        earlier = self.scores[:-1]
        best = earlier[earlier.mean(axis=1).argmax()]
        differences = best - self.scores[-1]
        share = 1 / (self.n_folds - 1)  # test pictures for each training picture
        error = np.sqrt(differences.var(ddof=1) * (1 / len(differences) + share))
        return float(differences.mean()), float(error)


def probe_depths(
    features: Mapping[str, NDArray[np.float32]],
    targets: NDArray[Any],
    n_folds: int,
    seed: int,
) -> DepthScores:
    """Cross-validate a linear support vector machine at each cut point.

    Parameters
    ----------
    features : mapping of str to array of shape (n, d)
        At each cut point, from the picture on.
    targets : array of shape (n,)
        The labels.
    n_folds : int
        Of the cross-validation, at least 2.
    seed : int
        Of the folds.

    Returns
    -------
    DepthScores
        The accuracies.
    """
    n_repeats = N_REPEATS if len(targets) <= FEW_IMAGES else 1
    folds = RepeatedStratifiedKFold(
        n_splits=n_folds, n_repeats=n_repeats, random_state=seed
    )
    scores = [
        cross_val_score(_probe(), rows, targets, cv=folds) for rows in features.values()
    ]
    return DepthScores(tuple(features), np.array(scores), n_folds)


def probe_sizes(
    features: NDArray[np.float32], targets: NDArray[Any], n_folds: int, seed: int
) -> dict[int, float]:
    """Return the cross-validated accuracy by number of training pictures."""
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    n_all = len(targets) * (n_folds - 1) // n_folds
    n_least = 2 * len(np.unique(targets))
    sizes = sorted({max(round(share * n_all), min(n_least, n_all)) for share in SHARES})
    sizes, _, scores = learning_curve(
        _probe(),
        features,
        targets,
        cv=folds,
        train_sizes=sizes,
        shuffle=True,
        random_state=seed,
        error_score=np.nan,
    )
    return dict(zip(sizes.tolist(), scores.mean(axis=1).tolist(), strict=True))


def _probe() -> Any:
    return make_pipeline(StandardScaler(), LinearSVC(C=PROBE_C))
