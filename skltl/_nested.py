"""Fitted estimators inside of pipelines, searches and other wrappers."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from skltl._estimator import ImageEstimator, is_fitted

# Attributes and parameters of meta-estimators that hold a single estimator.
HOLDERS = ("best_estimator_", "estimator_", "estimator")


@singledispatch
def inner_estimator(estimator: Any) -> Any:
    """Return the fitted estimator that predicts for a wrapper; ``None`` of others.

    Wrappers of skltl register a function of their own.
    """
    return getattr(estimator, "best_estimator_", None)  # of searches


@inner_estimator.register
def _(estimator: FrozenEstimator) -> Any:
    return estimator.estimator


@inner_estimator.register
def _(estimator: Pipeline) -> Any:
    steps = steps_of(estimator)
    return steps[0] if len(steps) == 1 else None


def unwrapped(estimator: Any) -> Any:
    """Return the fitted estimator inside of wrappers.

    These are searches, `TransferClassifier`, ``FrozenEstimator`` and pipelines with a
    single step.
    """
    inner = inner_estimator(estimator)
    return estimator if inner is None else unwrapped(inner)


def steps_of(pipeline: Pipeline) -> list[Any]:
    """Return the steps of a pipeline, without those that pass their input through."""
    steps = [step for _, step in pipeline.steps]
    return [step for step in steps if step is not None and step != "passthrough"]


def image_estimator_of(estimator: Any) -> Any:
    """Return the first fitted part of an estimator that reads images, or ``None``."""
    if isinstance(estimator, ImageEstimator):
        return estimator if is_fitted(estimator) else None
    parts = [
        *(step for _, step in getattr(estimator, "steps", [])),
        *(getattr(estimator, name, None) for name in HOLDERS),
        *getattr(estimator, "calibrated_classifiers_", [])[:1],
    ]
    found = [image_estimator_of(part) for part in parts if hasattr(part, "__dict__")]
    return next((one for one in found if one is not None), None)
