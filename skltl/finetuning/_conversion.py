"""From a pipeline of frozen features and a linear classifier to a network's head."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skltl._random import torch_defaults
from skltl.features import CNNFeatureTransformer
from skltl.finetuning._network import Pool, Standardise, set_linear

# What a pipeline of frozen features and a linear classifier leaves no choice about.
FIXED_BY_A_PIPELINE = (
    "backbone",
    "weights",
    "layer",
    "pooling",
    "image_size",
    "image_shape",
    "conv_channels",
    "hidden_units",
    "dropout",
)


def check_free(parameters: Iterable[str]) -> None:
    """Refuse parameters of a classifier that a pipeline leaves no choice about."""
    fixed = sorted(set(parameters) & set(FIXED_BY_A_PIPELINE))
    if fixed:
        raise ValueError(f"The pipeline says already what {', '.join(fixed)} shall be.")


def unwrapped(estimator: Any) -> Any:
    """Return the fitted estimator inside of searches and other wrappers.

    These are searches (`best_estimator_`), a `TransferClassifier` (`estimator_`),
    scikit-learn's ``FrozenEstimator``, and pipelines of a single step.
    """
    inner = getattr(estimator, "best_estimator_", None)
    if inner is None and hasattr(estimator, "strategy_"):
        inner = getattr(estimator, "estimator_", None)
    if inner is None and isinstance(estimator, FrozenEstimator):
        inner = estimator.estimator
    if inner is None and isinstance(estimator, Pipeline):
        steps = _steps(estimator)
        inner = steps[0] if len(steps) == 1 else None
    return estimator if inner is None else unwrapped(inner)


def parts_of_pipeline(pipeline: Any) -> tuple[CNNFeatureTransformer, Any, Any]:
    """Return a fitted pipeline's transformer, scaler (or ``None``) and classifier.

    Raises
    ------
    ValueError
        If it has other steps, or the transformer has several cut points.
    """
    if not isinstance(pipeline, Pipeline):
        raise ValueError(
            f"A fitted Pipeline is expected, not {type(pipeline).__name__}. Of a "
            "search pass its best_estimator_."
        )
    check_is_fitted(pipeline)
    steps = _steps(pipeline)
    first, *between, last = steps if len(steps) > 1 else (*steps, None, None)[:2]
    is_scaled = len(between) == 1 and isinstance(between[0], StandardScaler)
    if not isinstance(first, CNNFeatureTransformer) or (between and not is_scaled):
        raise ValueError(
            "The pipeline must be a CNNFeatureTransformer, a StandardScaler or none, "
            "and a linear classifier; it is "
            f"{', '.join(type(step).__name__ for step in steps) or 'empty'}."
        )
    if len(first.cut_points_) > 1:
        names = [cut_point.name for cut_point in first.cut_points_]
        raise ValueError(
            f"The transformer extracts features from {len(names)} layers, "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: a network "
            "with one head needs a single layer. Fit the pipeline with one of them."
        )
    return first, between[0] if between else None, unwrapped(last)


def _steps(pipeline: Pipeline) -> list[Any]:
    """Return the steps of a pipeline that do something."""
    steps = [step for _, step in pipeline.steps]
    return [step for step in steps if step is not None and step != "passthrough"]


def head_of_pipeline(pooling: str | int, scaler: Any, classifier: Any) -> nn.Sequential:
    """Build the head that computes what a scaler and a linear classifier do.

    Raises
    ------
    ValueError
        If the classifier is not linear, or puts its coefficients together in another
        way than one row for each class.
    """
    coef, intercept = _coefficients(classifier)
    n_features = coef.shape[1]
    _check_decisions(classifier, coef, intercept)
    with torch_defaults():
        standardise = Standardise(n_features).double()
        # Without weights at first: drawing some would advance torch's generator.
        linear = nn.Linear(n_features, max(2, len(coef)), device="meta").double()
    linear.to_empty(device="cpu")
    if scaler is not None and scaler.with_mean:
        standardise.mean.copy_(torch.from_numpy(scaler.mean_))
    if scaler is not None and scaler.with_std:
        standardise.scale.copy_(torch.from_numpy(scaler.scale_))
    set_linear(linear, coef, intercept)
    return nn.Sequential(Pool(pooling), standardise, linear)


def _coefficients(classifier: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return coefficients (n_classes or 1, d) and intercepts of a linear classifier."""
    binary = getattr(classifier, "estimators_", None)
    each = [classifier] if binary is None else binary  # one-vs-rest has one per class
    if not (is_classifier(classifier) and all(hasattr(one, "coef_") for one in each)):
        raise ValueError(
            f"{type(classifier).__name__} is not a linear classifier: it has no coef_ "
            "to begin with."
        )
    coef = np.vstack([np.atleast_2d(one.coef_) for one in each])
    intercept = np.hstack(
        [np.broadcast_to(one.intercept_, len(np.atleast_2d(one.coef_))) for one in each]
    )
    return coef, intercept


def _check_decisions(
    classifier: Any, coef: NDArray[Any], intercept: NDArray[Any]
) -> None:
    """Refuse what is linear in pieces only, such as one-vs-one or multilabel ones."""
    # Near the origin, where intercepts decide, and far away, where coefficients do.
    points = np.random.default_rng(0).normal(size=(64, coef.shape[1]))
    points[32:] *= 1e3
    expected = np.asarray(points @ coef.T + intercept)
    bare = _without_names(classifier)
    decide = getattr(bare, "decision_function", None)
    found = np.zeros((64, 0)) if decide is None else np.asarray(decide(points))
    found = found.reshape(64, -1)
    is_binary = expected.shape[1] == 1
    number = expected[:, 0] > 0 if is_binary else expected.argmax(axis=1)
    # Three pairs of three classes, or three labels of one image, have the same shape.
    if (
        found.shape != expected.shape
        or not np.allclose(found, expected, atol=1e-4)
        or len(bare.classes_) != max(2, expected.shape[1])
        or not np.array_equal(bare.predict(points), bare.classes_[number.astype(int)])
    ):
        raise ValueError(
            f"{type(classifier).__name__} does not decide by one row of coefficients "
            "for each class, as a network's last layer does. LogisticRegression, "
            "LinearSVC and OneVsRestClassifier (with one label an image) do."
        )


def _without_names(classifier: Any) -> Any:
    """Return a shallow copy that does not ask for the names of its features.

    A pipeline under ``set_output(transform="pandas")`` fits it on named columns.
    """
    bare = copy.copy(classifier)
    vars(bare).pop("feature_names_in_", None)
    if hasattr(bare, "estimators_"):
        bare.estimators_ = [_without_names(one) for one in bare.estimators_]
    return bare
