"""Comparison of an export with the estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skltl.exceptions import ExportError
from skltl.export._parts import Parts

# Largest difference between scores, as a fraction of the largest score.
TOLERANCE = 1e-3

# Relative difference between scores that float32 does not distinguish.
ROUNDING = 1e-6

# Random images with which an export is compared, if there are no others.
N_IMAGES = 8

# From crops of images to the outputs by name.
Run = Callable[[NDArray[np.uint8]], Mapping[str, NDArray[Any]]]


def verify(parts: Parts, run: Run, X: Any, kind: str) -> None:
    """Raise an error if an export does not predict what the estimator predicts.

    It runs for all images at once, and for the first one alone: the number of images
    must be free.
    """
    crops = random_crops(parts) if X is None else parts.crops(X)
    if crops.dtype != np.uint8:
        raise ExportError(
            "X has images of other than 8 bits per channel, and exported models take "
            "8 bits. Compare with other images."
        )
    expected = predictions_of(parts, crops)
    for n_images in (len(crops), 1):
        found = run(crops[:n_images])
        # Models that skl2onnx converts have no scores if they have probabilities.
        optional = {"scores"} if "probabilities" in found else set()
        if not expected.keys() - optional <= found.keys() <= expected.keys():
            raise ExportError(
                f"The {kind} returns {_names(found)}, the estimator has "
                f"{_names(expected)}."
            )
        for name in found:
            _compare(name, expected, found[name], kind)


def random_crops(parts: Parts) -> NDArray[np.uint8]:
    """Return smooth random images, of different colors."""
    height, width = parts.preprocessing.size
    n_channels = parts.preprocessing.n_channels
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 256, (N_IMAGES, 8, 8, n_channels))
    rows = np.arange(height) * 8 // height
    columns = np.arange(width) * 8 // width
    fine = rng.normal(0, 16, (N_IMAGES, height, width, n_channels))
    images = coarse[:, rows][:, :, columns] + fine
    return images.clip(0, 255).astype(np.uint8)


def predictions_of(parts: Parts, crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return what the estimator predicts, by the names of the outputs of an export."""
    estimator = parts.on_crops()
    if parts.classes is None:
        return {"values": estimator.predict(crops)}
    found = {}
    for name, method in (
        ("scores", "decision_function"),
        ("probabilities", "predict_proba"),
    ):
        if hasattr(estimator, method):
            found[name] = getattr(estimator, method)(crops)
    predicted = np.asarray(estimator.predict(crops))
    if predicted.ndim > 1:
        return found | {"labels": predicted}
    return found | {"index": np.searchsorted(parts.classes, predicted)}


def _compare(
    name: str, expected: Mapping[str, NDArray[Any]], found: NDArray[Any], kind: str
) -> None:
    """Raise an error if an output differs too much from the expected one.

    It may be that of the first images only.
    """
    wanted = expected[name][: len(found)]
    if found.shape != wanted.shape:
        raise ExportError(
            f"The {kind} returns {name} of shape {found.shape} instead of "
            f"{wanted.shape}."
        )
    if name in ("index", "labels"):
        n_wrong = np.count_nonzero((found != wanted) & ~_is_tie(name, expected, found))
        if n_wrong:
            raise ExportError(
                f"The {kind} predicts {n_wrong} of {wanted.size} labels differently "
                "from the estimator."
            )
        return
    scale = _scale_of(name, expected[name])
    difference = np.abs(found - wanted)
    is_small = difference <= TOLERANCE * scale
    if not is_small.all():  # NaN is refused, too
        worst = np.unravel_index(np.argmin(is_small), is_small.shape)
        what = "the range of the values" if name == "values" else "the largest one"
        raise ExportError(
            f"The {name} of the {kind} differ from those of the estimator by "
            f"{difference[worst]:.3g}; {TOLERANCE:g} times "
            f"{np.broadcast_to(scale, wanted.shape)[worst]:.3g}, {what}, is tolerated."
        )


def _scale_of(name: str, expected: NDArray[Any]) -> Any:
    """Return what differences are compared with, for each output of a regressor.

    Values may have a large offset, of which a small fraction would be a large error.
    """
    if name == "probabilities":
        return 1.0
    if name == "scores":
        return np.abs(expected).max()
    spread, largest = np.ptp(expected, axis=0), np.abs(expected).max(axis=0)
    is_constant = spread <= 1e-12 * largest  # up to rounding in float64
    return np.where(is_constant, largest, spread)


def _is_tie(
    name: str, expected: Mapping[str, NDArray[Any]], found: NDArray[Any]
) -> NDArray[np.bool_]:
    """Return where the estimator is undecided, up to the rounding of float32.

    Random images may be so far from the training images that probabilities are equal.
    """
    kinds = [one for one in ("probabilities", "scores") if one in expected]
    if not kinds:
        return np.zeros(found.shape, dtype=bool)
    scores = expected[kinds[0]][: len(found)]
    if name == "labels":
        gaps = scores - 0.5 if kinds[0] == "probabilities" else scores
    else:
        if scores.ndim == 1:  # of the second of two classes
            scores = np.column_stack([np.zeros_like(scores), scores])
        gaps = np.full(len(found), np.inf)
        (known,) = np.nonzero((found >= 0) & (found < scores.shape[1]))
        gaps[known] = scores[known].max(axis=1) - scores[known, found[known]]
    return np.asarray(np.abs(gaps) <= ROUNDING * np.abs(scores).max())


def _names(outputs: Mapping[str, Any]) -> str:
    return ", ".join(sorted(outputs)) or "nothing"
