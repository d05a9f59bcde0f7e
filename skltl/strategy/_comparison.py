"""Comparison of backbones: all on a subset of the images, the better ones on all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as t_distribution
from sklearn.base import clone

from skltl.exceptions import shorten
from skltl.features import cache_folder, check_readable, n_features_by_layer
from skltl.networks import Backbone, get_backbone
from skltl.strategy._cross_validation import (
    Features,
    LabeledImages,
    Scores,
    Split,
    is_usable,
    mean_and_error,
    sample_rows,
    score_linear,
)
from skltl.strategy._rules import check_layer, feature_map_layers
from skltl.strategy._tasks import Task

# Fraction of the images that all backbones are compared on, and the smallest number.
SUBSET_FRACTION = 0.25
MIN_SUBSET = 200

# A backbone is dropped if it is worse than the best one at this level (one-sided).
LEVEL = 0.025


class Candidate:
    """A backbone, and the accuracy at its main layers on the images so far."""

    def __init__(self, transformer: Any) -> None:
        check_layer(transformer)
        self.name = get_backbone(transformer.backbone).name
        self.layers = feature_map_layers(transformer)
        if not self.layers:
            raise ValueError(
                f"{self.name!r} has no layer with a feature map that pooling="
                f"{transformer.pooling!r} can pool, so there is nothing to compare."
            )
        self.transformer = transformer
        self.fitted: Any = None  # of all main layers
        self.rows = np.empty(0, np.int64)
        self.features: dict[str, Features] = {}  # by layer, of these rows
        self.scores: dict[str, Scores] = {}  # by layer, of splits of these rows
        self._seconds = 0.0  # of the network

    @property
    def best_layer(self) -> str:
        """Layer of the highest accuracy; the last one of ties."""
        return max(reversed(self.layers), key=lambda layer: self.scores[layer].mean())

    @property
    def best_scores(self) -> Scores:
        """Accuracy at the best layer, in each split."""
        return self.scores[self.best_layer]

    def seconds_per_pass(self, n_images: int) -> float | None:
        """Return the time of a forward pass over images; a cache may have saved it."""
        if cache_folder(self.transformer) is not None:
            return None
        n_passes = len(self.rows) * self.transformer.n_views
        return n_images * self._seconds / n_passes

    def fit(self, labeled: LabeledImages) -> None:
        """Load the network."""
        transformer = clone(self.transformer).set_params(layer=self.layers)
        with labeled.original_positions():
            self.fitted = transformer.fit(labeled.X)

    def evaluate(
        self,
        labeled: LabeledImages,
        rows: NDArray[np.int64],
        splits: list[Split],
        seed: int,
    ) -> None:
        """Score all layers on some of the images, which include those so far."""
        self._extract(labeled, rows)
        part = labeled.subset(rows)
        self.scores = {
            layer: score_linear(
                *(features, part, splits, seed),
                progress=f"{self.name} {layer}" if self.transformer.verbose else "",
            )
            for layer, features in self.features.items()
        }

    def release(self) -> None:
        """Release the memory of the network and of the features."""
        self.fitted, self.features = None, {}

    def _extract(self, labeled: LabeledImages, rows: NDArray[np.int64]) -> None:
        """Extract the features of the images that have none yet."""
        is_new = ~np.isin(rows, self.rows)
        images = labeled.subset(rows[is_new])
        with images.original_positions():
            # An array, even from a DataFrame after `set_output`.
            start = time.perf_counter()
            columns = np.asarray(self.fitted.transform(images.X))
            self._seconds += time.perf_counter() - start
        check_readable(columns, images.positions)
        ends = np.cumsum(n_features_by_layer(self.fitted))
        by_layer = np.split(columns, ends[:-1], axis=1)
        for layer, new in zip(self.layers, by_layer, strict=True):
            if not is_new.all():
                joined = np.empty((len(rows), new.shape[1]), new.dtype)
                joined[is_new], joined[~is_new] = new, self.features[layer]
                new = joined
            self.features[layer] = new
        self.rows = rows


def compare_backbones(
    candidates: Sequence[Candidate],
    labeled: LabeledImages,
    splits: list[Split],
    n_folds: int,
    seed: int,
) -> Candidate:
    """Evaluate candidates, and return the best one.

    Those that are clearly worse on a subset are not evaluated on the other images.
    """
    for candidate in candidates:  # weights that are missing are an error at once
        candidate.fit(labeled)
    rows = subset_rows(labeled.strata, n_folds, seed)
    parts = restrict_splits(splits, rows, labeled.task, labeled.targets)
    remaining = list(candidates)
    if len(candidates) > 1 and len(rows) < len(labeled.targets) and len(parts) > 1:
        for candidate in candidates:
            candidate.evaluate(labeled, rows, parts, seed)
        losers = find_losers([each.best_scores for each in candidates], n_folds)
        for candidate, is_loser in zip(candidates, losers, strict=True):
            if is_loser:
                candidate.release()
                remaining.remove(candidate)
    rows = np.arange(len(labeled.targets))
    for candidate in remaining:
        candidate.evaluate(labeled, rows, splits, seed)
    best = max(remaining, key=lambda candidate: candidate.best_scores.mean())
    for candidate in remaining:
        if candidate is not best:
            candidate.release()
    return best


def subset_rows(
    strata: NDArray[np.int64], n_per_class: int, seed: int
) -> NDArray[np.int64]:
    """Sample the images that all backbones are compared on, by class."""
    fraction = max(SUBSET_FRACTION, min(1, MIN_SUBSET / len(strata)))
    return sample_rows(strata, fraction, n_per_class, seed)


def restrict_splits(
    splits: Iterable[Split], rows: NDArray[np.int64], task: Task, targets: NDArray[Any]
) -> list[Split]:
    """Return splits of some of the rows, as positions among these.

    Those without test images or with a single training class are left out.
    """
    restricted = []
    for train, test in splits:
        is_train, is_test = np.isin(rows, train), np.isin(rows, test)
        if is_usable(task, targets, rows[is_train], rows[is_test]):
            restricted.append((np.flatnonzero(is_train), np.flatnonzero(is_test)))
    return restricted


def find_losers(scores: Sequence[Scores], n_folds: float) -> list[bool]:
    """Return which of the candidates are clearly worse than the best one.

    The scores of each candidate are those of the same splits. Their differences are
    compared in a t-test that is corrected for the training images that splits share
    (see Notes of `StrategyAdvisor`). Without an estimate of their variance, as for
    equal differences in all splits, nothing is dropped.
    """
    best = max(scores, key=np.mean)
    quantile = t_distribution.ppf(1 - LEVEL, len(best) - 1)
    losers = []
    for values in scores:
        lead, error = mean_and_error(best - values, n_folds)
        losers.append(bool(lead > quantile * error > 0))
    return losers


def check_backbones(backbones: Sequence[str | Backbone]) -> None:
    """Raise an error unless this is a list of backbones with different names."""
    if not isinstance(backbones, (list, tuple)):
        raise TypeError(f"backbones must be a list, got {shorten(repr(backbones))}.")
    if not backbones:
        raise ValueError("backbones=[] has no backbone to compare.")
    names = [get_backbone(backbone).name for backbone in backbones]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"backbones has {names.count(name)} backbones of the name {name!r}. "
                "Results are by name, so give each another one."
            )
