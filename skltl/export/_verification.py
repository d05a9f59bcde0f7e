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
        for name, found in run(crops[:n_images]).items():
            _compare(name, expected[name][:n_images], found, kind)


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


def _compare(name: str, expected: NDArray[Any], found: NDArray[Any], kind: str) -> None:
    """Raise an error if an output differs too much from the expected one."""
    if found.shape != expected.shape:
        raise ExportError(
            f"The {kind} returns {name} of shape {found.shape} instead of "
            f"{expected.shape}."
        )
    if name in ("index", "labels"):
        n_wrong = np.count_nonzero(found != expected)
        if n_wrong:
            raise ExportError(
                f"The {kind} predicts {n_wrong} of {expected.size} labels otherwise "
                "than the estimator."
            )
        return
    largest = 1.0 if name == "probabilities" else np.abs(expected).max()
    difference = np.abs(found - expected).max()
    if not difference <= TOLERANCE * largest:  # NaN is refused, too
        raise ExportError(
            f"The {name} of the {kind} differ from those of the estimator by "
            f"{difference:.3g}; {TOLERANCE:g} times {largest:.3g}, the largest one, is "
            "tolerated."
        )
