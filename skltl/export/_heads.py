"""Torch modules of what comes after the features.

The steps of a pipeline become layers, and what the last one predicts becomes a
dictionary of outputs. All of them compute in float32, which every runtime supports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_selection import SelectorMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from torch import Tensor, nn

from skltl._nested import steps_of, unwrapped
from skltl._targets import is_multilabel_classifier
from skltl.exceptions import ExportError
from skltl.finetuning import (
    FineTunedCNN,
    linear_function_of,
    n_dimensions_of,
    without_names,
)

Outputs = dict[str, Tensor]

# Scores below which scikit-learn's sigmoids vanish, since exp(-score) overflows. Of
# features in float32 they are in float32, but those of calibration are in float64.
VANISHING, VANISHING_CALIBRATED = (
    -float(np.log(np.finfo(dtype).max)) for dtype in (np.float32, np.float64)
)


class Affine(nn.Module):
    """Shift and scale each feature, and clip the results."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        shift: Any = None,
        scale: Any = None,
        offset: float = 0.0,
        limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("shift", _float32(0.0 if shift is None else shift))
        self.register_buffer("scale", _float32(1.0 if scale is None else scale))
        self.offset = offset
        self.limits = limits

    def forward(self, features: Tensor) -> Tensor:
        """Return the scaled features (n, d)."""
        scaled = (features - self.shift) / self.scale + self.offset
        return scaled if self.limits is None else scaled.clamp(*self.limits)


class Normalize(nn.Module):
    """Divide the features of each image by their norm, unless it is 0."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.order = {"l1": 1.0, "l2": 2.0, "max": float("inf")}[norm]

    def forward(self, features: Tensor) -> Tensor:
        """Return the normalized features (n, d)."""
        norms = torch.linalg.vector_norm(features, self.order, dim=1, keepdim=True)
        return features / torch.where(norms == 0, torch.ones_like(norms), norms)


class Project(nn.Module):
    """Subtract a mean, and project the features on components."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Any, components: Any) -> None:
        super().__init__()
        self.register_buffer("mean", _float32(mean))
        self.register_buffer("components", _float32(components))

    def forward(self, features: Tensor) -> Tensor:
        """Return the projections (n, n_components)."""
        return (features - self.mean) @ self.components.T


class Select(nn.Module):
    """Select some of the columns."""

    columns: Tensor

    def __init__(self, columns: Any) -> None:
        super().__init__()
        self.register_buffer("columns", torch.from_numpy(np.array(columns)).long())

    def forward(self, features: Tensor) -> Tensor:
        """Return the selected features (n, n_selected)."""
        return features.index_select(1, self.columns)


@singledispatch
def layer_of(step: Any) -> nn.Module:
    """Return the layer that computes what a fitted transformer of features does."""
    raise ExportError(f"{type(step).__name__} has no equivalent in torch.")


@layer_of.register
def _(step: StandardScaler) -> nn.Module:
    mean = step.mean_ if step.with_mean else None
    return Affine(mean, step.scale_)


@layer_of.register
def _(step: RobustScaler) -> nn.Module:
    return Affine(step.center_, step.scale_)


@layer_of.register
def _(step: MaxAbsScaler) -> nn.Module:
    return Affine(None, step.scale_, limits=(-1, 1) if _clips(step) else None)


@layer_of.register
def _(step: MinMaxScaler) -> nn.Module:
    low, high = step.feature_range
    limits = (float(low), float(high)) if step.clip else None
    return Affine(step.data_min_, 1 / step.scale_, float(low), limits)


@layer_of.register
def _(step: Normalizer) -> nn.Module:
    return Normalize(step.norm)


@layer_of.register
def _(step: PCA) -> nn.Module:
    if not step.whiten:
        return Project(step.mean_, step.components_)
    variances = step.explained_variance_[:, None]
    least = np.finfo(variances.dtype).eps  # as in scikit-learn: some are 0
    return Project(step.mean_, step.components_ / np.maximum(np.sqrt(variances), least))


@layer_of.register
def _(step: TruncatedSVD) -> nn.Module:
    return Project(0.0, step.components_)


@layer_of.register
def _(step: SelectorMixin) -> nn.Module:
    return Select(step.get_support(indices=True))


def _clips(step: Any) -> bool:
    return bool(getattr(step, "clip", False))  # since scikit-learn 1.7


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=1)


def _one_vs_rest(scores: Tensor, vanishing: float = VANISHING) -> Tensor:
    """Return the probabilities of one-vs-rest models, scaled to a sum of 1.

    By their logarithms, since runtimes round sigmoids to 0 at different scores. Where
    all sigmoids of scikit-learn vanish, its classes are equally probable.
    """
    logarithms = scores.clamp(max=0) - torch.log1p(torch.exp(-scores.abs()))
    vanish = (scores < vanishing).all(dim=1, keepdim=True)
    return torch.where(vanish, torch.zeros_like(scores), logarithms).softmax(dim=1)


def _of_two(scores: Tensor) -> Tensor:
    proba = scores.sigmoid()
    return torch.cat([1 - proba, proba], dim=1)


# From the scores (n, n_scores) of classifiers to the probabilities of the classes.
PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "one-vs-rest": _one_vs_rest,
    "of two classes": _of_two,
    "of labels": torch.sigmoid,
}


class ClassOutputs(nn.Module):
    """Scores of classes, their probabilities, and the class with the highest score.

    `scores` are the layers that return the scores (n, n_scores): one for two classes.
    `probabilities` is a key of `PROBABILITIES`, or ``None``. For multilabel targets,
    there are indicators of the labels instead of a class.
    """

    def __init__(
        self, scores: nn.Module, probabilities: str | None, is_multilabel: bool = False
    ) -> None:
        super().__init__()
        self.scores = scores
        self.probabilities = probabilities
        self.is_multilabel = is_multilabel

    def forward(self, features: Tensor) -> Outputs:
        """Return the outputs for features (n, d), or outputs of a network."""
        scores = self.scores(features)
        is_binary = scores.shape[1] == 1 and not self.is_multilabel
        outputs = {"scores": scores.squeeze(1) if is_binary else scores}
        if self.probabilities is not None:
            outputs["probabilities"] = PROBABILITIES[self.probabilities](scores)
        if self.is_multilabel:
            outputs["labels"] = (scores > 0).long()
        elif is_binary:
            outputs["index"] = (scores.squeeze(1) > 0).long()
        else:
            outputs["index"] = scores.argmax(dim=1)
        return outputs


class CalibratedOutputs(nn.Module):
    """Mean of the probabilities of classifiers with sigmoid calibration."""

    def __init__(self, parts: Sequence[tuple[nn.Module, Any, Any]]) -> None:
        super().__init__()
        self.scores = nn.ModuleList(scores for scores, _, _ in parts)
        self.slopes = _parameters(slopes for _, slopes, _ in parts)
        self.intercepts = _parameters(intercepts for _, _, intercepts in parts)

    def forward(self, features: Tensor) -> Outputs:
        """Return the outputs for features (n, d)."""
        parts = zip(self.scores, self.slopes, self.intercepts, strict=True)
        proba = torch.stack([self._calibrated(features, *part) for part in parts])
        proba = proba.mean(dim=0)
        return {"probabilities": proba, "index": proba.argmax(dim=1)}

    def _calibrated(
        self, features: Tensor, scores: nn.Module, slopes: Tensor, intercepts: Tensor
    ) -> Tensor:
        log_odds = -(slopes * scores(features) + intercepts)
        if len(slopes) == 1:
            return _of_two(log_odds)
        return _one_vs_rest(log_odds, VANISHING_CALIBRATED)


class ValueOutputs(nn.Module):
    """Values that a regressor predicts: (n,) or (n, n_outputs)."""

    def __init__(self, values: nn.Module, n_dimensions: int) -> None:
        super().__init__()
        self.values = values
        self.n_dimensions = n_dimensions

    def forward(self, features: Tensor) -> Outputs:
        """Return the outputs for features (n, d), or outputs of a network."""
        values = self.values(features)
        return {"values": values.squeeze(1) if self.n_dimensions == 1 else values}


class LogOdds(nn.Module):
    """Difference between the logits of two classes."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the differences (n, 1)."""
        return logits[:, 1:] - logits[:, :1]


class OfClasses(nn.Module):
    """Logits of classes that consist of categories, by their shares of each category.

    Sums of probabilities would be 0 for most classes of a confident network.
    """

    log_shares: Tensor

    def __init__(self, shares: Any) -> None:
        super().__init__()
        self.register_buffer("log_shares", _float32(shares).log())

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits (n, n_classes)."""
        return (logits[:, :, None] + self.log_shares).logsumexp(dim=1)


def outputs_of_model(model: Any) -> nn.Module:
    """Return the layers for the last step of a pipeline: a fitted linear model."""
    if isinstance(model, CalibratedClassifierCV):
        return _outputs_of_calibrated(model)
    linear = _linear_layer(model)
    if not hasattr(model, "classes_"):
        return ValueOutputs(linear, n_dimensions_of(model, linear.in_features))
    is_multilabel = is_multilabel_classifier(model)
    return ClassOutputs(linear, _probabilities_of(model, linear), is_multilabel)


def outputs_of_network(estimator: Any) -> nn.Module:
    """Return the head of a fine-tuned or pretrained network, with all its outputs."""
    head = copy.deepcopy(estimator.head_).float()
    if not hasattr(estimator, "classes_"):
        return ValueOutputs(head, estimator._target_ndim)
    if is_multilabel_classifier(estimator):
        return ClassOutputs(head, "of labels", is_multilabel=True)
    layers = [head]
    if not isinstance(estimator, FineTunedCNN):
        shares = estimator.class_map_
        order = np.argsort(estimator.categories_)
        layers.append(Select(order) if shares is None else OfClasses(shares))
    if len(estimator.classes_) == 2:
        return ClassOutputs(nn.Sequential(*layers, LogOdds()), "of two classes")
    return ClassOutputs(nn.Sequential(*layers), "softmax")


def _scores_of(model: Any) -> nn.Module:
    """Return the layers from features to scores, also of a pipeline."""
    model = unwrapped(model)
    if not isinstance(model, Pipeline):
        return _linear_layer(model)
    *between, last = steps_of(model)
    return nn.Sequential(*map(layer_of, between), _scores_of(last))


def _linear_layer(model: Any) -> nn.Linear:
    """Return the linear layer of a linear model."""
    try:
        coef, intercept = linear_function_of(model)
    except ValueError as error:
        raise ExportError(str(error)) from error
    layer = nn.Linear(coef.shape[1], len(coef), device="meta").requires_grad_(False)
    weights = {"weight": _float32(coef), "bias": _float32(intercept)}
    layer.load_state_dict(weights, assign=True)
    return layer


def _probabilities_of(model: Any, linear: nn.Linear) -> str | None:
    """Return how a classifier makes probabilities of its scores, by comparison."""
    bare = without_names(model)
    if not hasattr(bare, "predict_proba"):
        return None
    points = _points_of_scores_near_0(linear)
    expected = bare.predict_proba(points)
    scores = torch.from_numpy(bare.decision_function(points).reshape(64, -1))
    for name, function in PROBABILITIES.items():
        found = function(scores).numpy()
        if found.shape == np.shape(expected) and np.allclose(found, expected):
            return name
    raise ExportError(
        f"The probabilities of {type(model).__name__} are neither the softmax nor "
        "sigmoids of its scores."
    )


def _points_of_scores_near_0(linear: nn.Linear) -> NDArray[np.float64]:
    """Return features (64, d) for which no probabilities are close to 0 or 1.

    Far from there, different functions of scores are equal up to rounding: sigmoids of
    negative scores, scaled to a sum of 1, are their softmax.
    """
    coef = linear.weight.numpy().astype(np.float64)
    intercept = linear.bias.numpy()
    scores = np.random.default_rng(0).normal(scale=2, size=(64, len(coef)))
    weights = np.linalg.lstsq(coef @ coef.T, (scores - intercept).T, rcond=None)[0]
    return np.asarray(weights.T @ coef)


def _outputs_of_calibrated(model: CalibratedClassifierCV) -> nn.Module:
    """Return the layers for a classifier with sigmoid calibration."""
    if model.method != "sigmoid":
        raise ExportError(
            f"CalibratedClassifierCV(method={model.method!r}) has no equivalent in "
            "torch; method='sigmoid' has."
        )
    parts = []
    for calibrated in model.calibrated_classifiers_:
        one = calibrated.estimator
        if not np.array_equal(one.classes_, model.classes_):
            raise ExportError(
                "A classifier of CalibratedClassifierCV was fitted without some of the "
                "classes."
            )
        slopes = [calibrator.a_ for calibrator in calibrated.calibrators]
        intercepts = [calibrator.b_ for calibrator in calibrated.calibrators]
        parts.append((_scores_of(one), slopes, intercepts))
    return CalibratedOutputs(parts)


def _float32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())


def _parameters(rows: Any) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(_float32(row), requires_grad=False) for row in rows
    )
