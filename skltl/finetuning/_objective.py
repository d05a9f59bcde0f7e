"""Objectives: the loss and the score of a network, and how its head begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn
from torch.nn import functional

from skltl._targets import any_number_of_classes
from skltl.features import LEAST_SCALE

# One row of coefficients for each output of a linear layer, or a single row for two
# classes, and the intercepts.
Linear: TypeAlias = tuple[NDArray[Any], NDArray[Any]]

# The best of the powers of ten on flowers and digits, as in `make_feature_pipeline`.
PROBE_C = 0.1

# As strong as `PROBE_C` for standardized targets, whose squared errors begin near 1.
PROBE_ALPHA = 100.0

LOSSES: dict[str, Callable[..., Tensor]] = {
    "squared_error": functional.mse_loss,
    "huber": partial(functional.huber_loss, delta=1.0),
}


class Objective:
    """Loss, score and probe for targets of one kind.

    Targets are positions of classes (n,), int64; indicators of labels (n, n_labels),
    float32; or values (n, n_outputs).
    """

    n_outputs: int

    # Of standardized features, in relation to the median scale.
    least_scale = 0.0

    def head_decay(self, n_images: int) -> float:
        """Return the least weight decay of the last layer."""
        return 0.0

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image (n,) for the outputs of the head, float32."""
        raise NotImplementedError

    def score(
        self, outputs: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]
    ) -> float:
        """Return the weighted score that scikit-learn uses for such targets."""
        raise NotImplementedError

    def probe(
        self,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any],
        seed: int,
    ) -> Linear | None:
        """Fit a linear model to standardized features (n, d), if that is possible."""
        raise NotImplementedError

    def encode(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Return targets as the network learns them."""
        return targets

    def to_units(self, head: nn.Sequential) -> None:
        """Let a trained head return what it predicts, in the units of the user."""

    def from_units(self, head: nn.Sequential) -> None:
        """Undo `to_units`."""


class CrossEntropy(Objective):
    """One class for each image: cross-entropy and accuracy."""

    def __init__(self, n_classes: int, label_smoothing: float) -> None:
        self.n_outputs = n_classes
        self._label_smoothing = label_smoothing

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropies."""
        return functional.cross_entropy(
            outputs, targets, reduction="none", label_smoothing=self._label_smoothing
        )

    def score(
        self, outputs: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]
    ) -> float:
        """Return the accuracy."""
        predicted = outputs.argmax(axis=1)
        return float(accuracy_score(targets, predicted, sample_weight=weights))

    def probe(
        self,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any],
        seed: int,
    ) -> Linear | None:
        """Fit multinomial logistic regression, if all classes are present."""
        if len(np.unique(targets)) < self.n_outputs:
            return None
        return _logistic_regression(features, targets, weights, seed)


class BinaryCrossEntropy(Objective):
    """Any number of labels for each image: binary cross-entropy, subset accuracy."""

    def __init__(
        self, targets: NDArray[Any], label_smoothing: float, is_balanced: bool
    ) -> None:
        self.n_outputs = targets.shape[1]
        self._label_smoothing = label_smoothing
        self._is_balanced = is_balanced
        # Weights of absent and present labels, as ``class_weight="balanced"`` of
        # scikit-learn in a classifier for each label.
        present = np.clip(targets.mean(axis=0), 1 / len(targets), 1 - 1 / len(targets))
        shares = np.vstack([1 - present, present])
        weights = 0.5 / shares if is_balanced else np.ones_like(shares)
        self._label_weights = torch.from_numpy(weights.astype(np.float32))

    def head_decay(self, n_images: int) -> float:
        """Return that of the probe, whose loss is the sum over images and labels."""
        return 1 / (PROBE_C * n_images * self.n_outputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropies, averaged over the labels."""
        smoothing = self._label_smoothing
        absent, present = self._label_weights.to(outputs.device)
        losses = functional.binary_cross_entropy_with_logits(
            outputs,
            targets * (1 - smoothing) + smoothing / 2,
            weight=torch.where(targets > 0.5, present, absent),
            reduction="none",
        )
        return losses.mean(dim=1)

    def score(
        self, outputs: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]
    ) -> float:
        """Return the fraction of images whose labels are all right."""
        predicted = (outputs > 0).astype(int)
        return float(
            accuracy_score(targets.astype(int), predicted, sample_weight=weights)
        )

    def probe(
        self,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any],
        seed: int,
    ) -> Linear | None:
        """Fit logistic regression for each label; constant ones have a constant."""
        coefs, intercepts = [], []
        balance = "balanced" if self._is_balanced else None
        for labels in targets.T:
            if labels.min() < labels.max():
                coef, intercept = _logistic_regression(
                    features, labels, weights, seed, balance
                )
            else:  # the log odds of a label with half an image more of each kind
                coef = np.zeros((1, features.shape[1]))
                odds = np.log(2 * len(labels) + 1)
                intercept = np.array([odds if labels[0] else -odds])
            coefs.append(coef)
            intercepts.append(intercept)
        return np.vstack(coefs), np.hstack(intercepts)


class StandardizedError(Objective):
    """Values for each image: squared or Huber loss and R².

    A network learns standardized values: those of mean 0 and standard deviation 1.
    """

    least_scale = LEAST_SCALE

    def __init__(
        self, values: NDArray[np.float64], weights: NDArray[np.float64], loss: str
    ) -> None:
        self.n_outputs = values.shape[1]
        self.mean = np.average(values, axis=0, weights=weights)
        with np.errstate(over="ignore"):  # becomes infinity
            squares = (values - self.mean) ** 2
        deviation = np.sqrt(np.average(squares, axis=0, weights=weights))
        if not np.isfinite(deviation).all():
            raise ValueError("y has values that are too large for their variance.")
        is_constant = deviation <= 1e-12 * np.abs(self.mean)
        self.scale = np.where(is_constant | (deviation == 0), 1.0, deviation)
        self._loss = LOSSES[loss]

    def encode(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Return standardized values."""
        return ((targets - self.mean) / self.scale).astype(np.float32)

    def head_decay(self, n_images: int) -> float:
        """Return that of the probe, whose loss is the sum over images and outputs."""
        return 2 * PROBE_ALPHA / (n_images * self.n_outputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the losses, averaged over the outputs."""
        return self._loss(outputs, targets, reduction="none").mean(dim=1)

    def score(
        self, outputs: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]
    ) -> float:
        """Return R², averaged over the outputs."""
        if len(targets) < 2:  # of one image it is not defined
            return float("nan")
        return float(r2_score(targets, outputs, sample_weight=weights))

    def probe(
        self,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any],
        seed: int,
    ) -> Linear | None:
        """Fit ridge regression."""
        model = Ridge(PROBE_ALPHA).fit(features, targets, sample_weight=weights)
        return np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)

    @torch.no_grad()
    def to_units(self, head: nn.Sequential) -> None:
        """Let the last layer return values, not standardized ones."""
        linear, scale, mean = self._last(head)
        linear.weight.mul_(scale[:, None])
        linear.bias.mul_(scale).add_(mean)

    @torch.no_grad()
    def from_units(self, head: nn.Sequential) -> None:
        """Let the last layer return standardized values."""
        linear, scale, mean = self._last(head)
        linear.weight.div_(scale[:, None])
        linear.bias.sub_(mean).div_(scale)

    def _last(self, head: nn.Sequential) -> tuple[nn.Linear, Tensor, Tensor]:
        linear = head[-1]
        assert isinstance(linear, nn.Linear)
        options: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        return (
            linear,
            torch.tensor(self.scale, **options),
            torch.tensor(self.mean, **options),
        )


def _logistic_regression(
    features: NDArray[Any],
    targets: NDArray[Any],
    weights: NDArray[Any],
    seed: int,
    class_weight: str | None = None,
) -> Linear:
    model = LogisticRegression(
        C=PROBE_C, max_iter=1000, random_state=seed, class_weight=class_weight
    )
    with any_number_of_classes():
        model.fit(features, targets, sample_weight=weights)
    return model.coef_, model.intercept_
