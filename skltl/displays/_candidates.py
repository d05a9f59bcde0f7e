"""Candidates of hyperparameter searches, and searches over several backbones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from sklearn.base import is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils import check_consistent_length

from skltl._sklearn import take
from skltl.strategy import find_losers, restrict_splits, subset_rows, task_of


@dataclass(frozen=True)
class Candidate:
    """Parameters of a search, and their score."""

    params: dict
    mean: float
    deviation: float
    is_chosen: bool = False
    note: str = ""


def candidates_of(search, metric):
    """Return the candidates with a score, in the last halving iteration."""
    results = search.cv_results_
    means, deviations = (results[f"{name}_test_{metric}"] for name in ("mean", "std"))
    is_scored = np.isfinite(means)
    if "iter" in results:
        iterations = np.asarray(results["iter"])
        is_scored &= iterations == iterations.max()
    if not is_scored.any():
        raise ValueError("There is no score to plot: all fits failed.")
    chosen = _chosen_index(search, metric)
    return [
        Candidate(
            results["params"][index],
            float(means[index]),
            float(deviations[index]),
            is_chosen=index == chosen,
        )
        for index in np.flatnonzero(is_scored)
    ]


def _chosen_index(search, metric):
    """Return the index of the candidate that the search chose by this metric."""
    is_single = not getattr(search, "multimetric_", False)  # then it is "score"
    if is_single or search.refit == metric:
        return getattr(search, "best_index_", None)
    return None


def resolve_metric(search, metric):
    """Return the name of a metric as in the columns of `cv_results_`."""
    prefix = "mean_test_"
    columns = [name for name in search.cv_results_ if name.startswith(prefix)]
    metrics = [name.removeprefix(prefix) for name in columns]
    if metric is None and len(metrics) == 1:
        return metrics[0]
    if metric is None and isinstance(search.refit, str):
        return search.refit
    if metric not in metrics:
        raise ValueError(f"metric={metric!r}, but the search has {', '.join(metrics)}.")
    return metric


def search_backbones(searches, X, y):
    """Return the candidates of searches, one for each backbone.

    Those of backbones that are clearly worse on a subset of the images have the scores
    on the subset.
    """
    notes = [""] * len(searches)
    if len(searches) > 1:
        notes = _drop_losers(searches, X, y)
    candidates = []
    for search, note in zip(searches, notes, strict=True):
        if not note:
            search.fit(X, y)
        metric = resolve_metric(search, None)
        scored = candidates_of(search, metric)
        candidates += [replace(each, note=note) for each in scored]
    best = max(each.mean for each in candidates if not each.note)
    return [
        replace(each, is_chosen=each.mean == best and not each.note)
        for each in candidates
    ]


def _drop_losers(searches, X, y):
    """Fit searches on a subset of the images, and return a note on clearly worse ones.

    All get the same folds.
    """
    check_consistent_length(X, y)
    has_classes = is_classifier(searches[0].estimator)
    splitter = check_cv(searches[0].cv, y, classifier=has_classes)
    splits = list(splitter.split(X, y))
    n_folds = 1 + fmean(len(train) / len(test) for train, test in splits)
    task = task_of(y, "classification" if has_classes else "regression")
    targets = task.encode(y, len(y))
    strata = task.strata(targets)
    rows = subset_rows(strata, round(n_folds), seed=0)
    parts = restrict_splits(splits, rows, task, targets)
    losers = [False] * len(searches)
    if len(rows) < len(strata) and len(parts) > 1:
        subset = take(X, rows), take(y, rows)
        for search in searches:
            search.set_params(cv=parts).fit(*subset)
        losers = find_losers(list(map(_best_scores, searches)), n_folds)
    for search in searches:
        search.set_params(cv=splits)
    note = f", on {len(rows):,} images"
    return [note if is_loser else "" for is_loser in losers]


def _best_scores(search):
    """Return the scores of the best candidate of a search, in each split."""
    results, metric = search.cv_results_, resolve_metric(search, None)
    best = np.argmax(results[f"mean_test_{metric}"])
    return np.array(
        [
            results[f"split{split}_test_{metric}"][best]
            for split in range(search.n_splits_)
        ]
    )
