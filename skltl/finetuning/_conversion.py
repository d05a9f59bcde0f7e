"""Conversion of a pipeline with a linear model to the head of a network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skltl._nested import steps_of, unwrapped
from skltl._random import torch_defaults
from skltl._targets import is_multilabel_classifier
from skltl.features import CNNFeatureTransformer
from skltl.finetuning._data import abbreviate
from skltl.finetuning._head import Pool, Standardize, head_specs, set_linear
from skltl.networks import Layout


def parts_of_pipeline(pipeline: Any) -> tuple[CNNFeatureTransformer, Any, Any]:
    """Return a fitted pipeline's transformer, scaler (or ``None``) and linear model."""
    if not isinstance(pipeline, Pipeline):
        raise ValueError(
            f"Expected a fitted Pipeline, got {type(pipeline).__name__}. For a search, "
            "pass its best_estimator_."
        )
    check_is_fitted(pipeline)
    steps = steps_of(pipeline)
    first, *between, last = steps if len(steps) > 1 else (*steps, None, None)[:2]
    is_known = isinstance(first, CNNFeatureTransformer) and last is not None
    if not is_known or not _is_at_most_a_scaler(between):
        raise ValueError(
            "The steps of the pipeline must be a CNNFeatureTransformer, optionally a "
            "StandardScaler, and a linear model, got "
            f"{', '.join(type(step).__name__ for step in steps) or 'none'}."
        )
    if first.n_views > 1:
        raise ValueError(
            f"The transformer averages n_views={first.n_views} views of each image: a "
            "network with one head takes one. Fit the pipeline with n_views=1."
        )
    if len(first.layers_) > 1:
        names = [layer.name for layer in first.layers_]
        raise ValueError(
            f"The transformer extracts features from {len(names)} layers, "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: a network "
            "with one head needs a single layer. Fit the pipeline with one of them."
        )
    return first, between[0] if between else None, unwrapped(last)


def _is_at_most_a_scaler(steps: list[Any]) -> bool:
    """Return whether steps before a linear model can be part of a head."""
    return not steps or (len(steps) == 1 and isinstance(steps[0], StandardScaler))


def head_of_pipeline(
    pooling: str | int, layout: Layout, scaler: Any, model: Any
) -> nn.Sequential:
    """Build the head that is equivalent to a scaler and a linear model."""
    coef, intercept = linear_function_of(model)
    n_features, n_outputs = coef.shape[1], len(coef)
    if is_classifier(model) and not is_multilabel_classifier(model):
        n_outputs = max(2, n_outputs)
    with torch_defaults():
        standardize = Standardize(n_features).double()
        # On the meta device: initial weights would advance torch's generator.
        linear = nn.Linear(n_features, n_outputs, device="meta").double()
    linear.to_empty(device="cpu")
    if scaler is not None and scaler.with_mean:
        standardize.mean.copy_(torch.from_numpy(scaler.mean_))
    if scaler is not None and scaler.with_std:
        standardize.scale.copy_(torch.from_numpy(scaler.scale_))
    set_linear(linear, coef, intercept)
    return nn.Sequential(Pool(pooling, layout), standardize, linear)


def linear_head(
    fitted: Any,
    pooling: str | int,
    layout: Layout,
    expected: nn.Sequential,
) -> nn.Sequential:
    """Build the head that is equivalent to `head_init`, a fitted estimator.

    Its layers must be those of the `expected` head.
    """
    *between, linear = steps_of(fitted) if isinstance(fitted, Pipeline) else [fitted]
    if not _is_at_most_a_scaler(between):
        raise ValueError(
            "head_init: expected a linear model, or a pipeline of a StandardScaler and "
            f"one, got {', '.join(type(step).__name__ for step in steps_of(fitted))}. "
            "For a pipeline with a CNNFeatureTransformer, use from_pipeline."
        )
    scaler = between[0] if between else None
    head = head_of_pipeline(pooling, layout, scaler, unwrapped(linear))
    n_outputs, n_expected = head[-1].out_features, expected[-1].out_features
    if n_outputs != n_expected:
        raise ValueError(
            f"head_init: outputs of the fitted model: {n_outputs}, of y: {n_expected}."
        )
    layers, expected_layers = head_specs(head), head_specs(expected)
    if layers != expected_layers:
        raise ValueError(
            "head_init: the fitted model is not the head that layer, pooling, "
            f"conv_channels, hidden_units and dropout define: {layers} instead of "
            f"{expected_layers}."
        )
    return head


def check_same_classes(classes: NDArray[Any], is_multilabel: bool, fitted: Any) -> None:
    """Refuse a fitted classifier in `head_init` that has other classes or labels."""
    found = getattr(fitted, "classes_", np.empty(0))
    if not np.array_equal(classes, found):
        raise ValueError(
            f"head_init: the classes are {abbreviate(classes)}, those of the fitted "
            f"classifier are {abbreviate(found)}."
        )
    last = fitted[-1] if isinstance(fitted, Pipeline) else fitted
    if is_multilabel_classifier(unwrapped(last)) != is_multilabel:
        kinds = ("classes", "an indicator matrix of labels")
        raise ValueError(
            f"head_init was fitted to {kinds[not is_multilabel]}, and y has "
            f"{kinds[is_multilabel]}."
        )


def linear_function_of(model: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the coefficients (n_outputs or 1, d) and intercepts of a linear model.

    A model that decides or predicts in another way than by them is an error.
    """
    coef, intercept = _coefficients(model)
    check = _check_decisions if is_classifier(model) else _check_predictions
    check(model, coef, intercept)
    return coef, intercept


def _coefficients(model: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the coefficients (n_outputs or 1, d) and intercepts of a linear model."""
    several = getattr(model, "estimators_", None)
    parts = [model] if several is None else several  # one-vs-rest: one per class
    is_linear = all(hasattr(part, "coef_") for part in parts)
    if is_multilabel_classifier(model) and not is_linear:
        constant = [n for n, part in enumerate(parts) if not hasattr(part, "coef_")]
        if len(constant) < len(parts):
            raise ValueError(
                f"{type(model).__name__} has no coef_ for label {constant[0]}, which "
                "all images have, or none. The classifiers 'softmax' and 'svm' of "
                "make_feature_pipeline have one."
            )
    if not ((is_classifier(model) or is_regressor(model)) and is_linear):
        raise ValueError(
            f"{type(model).__name__} is not a linear model: it has no coef_."
        )
    coefs = [np.atleast_2d(part.coef_) for part in parts]
    if len({coef.shape[1] for coef in coefs}) > 1:
        raise ValueError(
            f"The models in {type(model).__name__} have different numbers of "
            "coefficients: some take more than the features."
        )
    intercepts = [
        np.broadcast_to(part.intercept_, len(coef))
        for part, coef in zip(parts, coefs, strict=True)
    ]
    return np.vstack(coefs), np.hstack(intercepts)


def _check_decisions(
    classifier: Any, coef: NDArray[Any], intercept: NDArray[Any]
) -> None:
    """Raise if decisions are not those of one linear function for each class.

    As with one-vs-one and multilabel classifiers, which may have as many coefficients:
    three classes have three pairs.
    """
    # Near the origin, where intercepts decide, and far away, where coefficients do.
    points = np.random.default_rng(0).normal(size=(64, coef.shape[1]))
    points[32:] *= 1e3
    expected = np.asarray(points @ coef.T + intercept)
    bare = without_names(classifier)
    decide = getattr(bare, "decision_function", None)
    decisions = np.zeros((64, 0)) if decide is None else np.asarray(decide(points))
    decisions = decisions.reshape(64, -1)
    n_classes = expected.shape[1]
    is_binary = n_classes == 1
    predicted = expected > 0 if is_binary else expected.argmax(axis=1)
    if is_multilabel_classifier(classifier):
        predicted = expected > 0
    else:
        n_classes = max(2, n_classes)
    if (
        decisions.shape != expected.shape
        or not np.allclose(decisions, expected, atol=1e-4)
        or len(bare.classes_) != n_classes
        or not _is_same(bare, points, predicted)
    ):
        raise ValueError(
            f"{type(classifier).__name__} does not decide by one row of coefficients "
            "for each class, as the last layer of a network does. LogisticRegression, "
            "LinearSVC and OneVsRestClassifier do."
        )


def _is_same(classifier: Any, points: NDArray[Any], predicted: NDArray[Any]) -> bool:
    """Return whether a classifier predicts these positions of classes, or labels."""
    if not is_multilabel_classifier(classifier):
        predicted = classifier.classes_[predicted.astype(int).ravel()]
    return np.array_equal(classifier.predict(points), predicted)


def _check_predictions(model: Any, coef: NDArray[Any], intercept: NDArray[Any]) -> None:
    """Raise if predictions are not those of one linear function for each output."""
    points = np.random.default_rng(0).normal(size=(64, coef.shape[1]))
    predicted = np.asarray(without_names(model).predict(points)).reshape(64, -1)
    expected = points @ coef.T + intercept
    if predicted.shape != expected.shape or not np.allclose(predicted, expected):
        raise ValueError(
            f"{type(model).__name__} does not predict by one row of coefficients for "
            "each output, as the last layer of a network does. Ridge and other linear "
            "regressors do."
        )


def n_dimensions_of(model: Any, n_features: int) -> int:
    """Return the number of dimensions of the predictions of a fitted model."""
    return int(np.ndim(without_names(model).predict(np.zeros((1, n_features)))))


def without_names(classifier: Any) -> Any:
    """Return a shallow copy that does not require feature names.

    With ``set_output(transform="pandas")`` it was fitted on named columns.
    """
    bare = copy.copy(classifier)
    vars(bare).pop("feature_names_in_", None)
    if isinstance(getattr(bare, "estimators_", None), list):
        bare.estimators_ = [without_names(part) for part in bare.estimators_]
    return bare
