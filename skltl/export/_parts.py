"""Parts of a fitted estimator, and its predictions for crops of images."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skltl._nested import unwrapped
from skltl._random import torch_defaults
from skltl.exceptions import ExportError
from skltl.features import CNNFeatureTransformer, HeadEstimator, n_features_by_layer
from skltl.images import Preprocessing, crop_images
from skltl.networks import prefix_digests

# Views that a module can make of a single crop: the crop itself, and its mirror image.
MAX_VIEWS = 2

# How an exported estimator computes, whatever the estimator itself was set to.
EXPORTED = {
    "device": "cpu",
    "precision": "float32",
    "engine": "torch",
    "decode": "exact",
    "reader": None,
    "value_range": None,
    "cache": None,
    "on_error": "raise",
    "verbose": 0,
}


@dataclass(frozen=True)
class Parts:
    """A fitted estimator: what reads the images, and the steps of a pipeline after it.

    `network` is a `CNNFeatureTransformer`, or a network with a head, which no steps
    follow. `model` is the estimator itself, without searches and wrappers.
    """

    network: Any
    steps: list[tuple[str, Any]]
    model: Any

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the images."""
        found: Preprocessing = self.network.preprocessing_
        return found

    @property
    def classes(self) -> NDArray[Any] | None:
        """The class labels, or ``None`` of a regressor."""
        return getattr(self.model, "classes_", None)

    def crops(self, X: Any) -> NDArray[Any]:
        """Return the crops of images, as the estimator reads them."""
        network = self.network
        return crop_images(
            X,
            network.preprocessing_,
            image_shape=network._fitted_image_shape,
            reader=network.reader,
            value_range=network.value_range,
        )

    def on_crops(self) -> Any:
        """Return a copy of the estimator that predicts for crops, as an export does."""
        network = copy.copy(self.network)
        names = network.get_params(deep=False).keys() & EXPORTED.keys()
        network.set_params(**{name: EXPORTED[name] for name in names})
        whole = replace(network.preprocessing_, resize_size=None, mode="center")
        network.preprocessing_ = whole
        network._fitted_image_shape = None
        if not self.steps:
            return network
        return Pipeline([("network", network), *self.steps])


def parts_of(estimator: Any) -> Parts:
    """Return the parts of a fitted estimator; refuse one that cannot be exported."""
    check_is_fitted(estimator)
    model = unwrapped(estimator)
    if isinstance(model, HeadEstimator):
        return Parts(model, [], model)
    pipeline = _calibrated_last(model)
    if not isinstance(pipeline, Pipeline):
        raise ExportError(
            f"{type(model).__name__} cannot be exported. Pass a fitted network of "
            "skltl, or a Pipeline of a CNNFeatureTransformer and a model."
        )
    steps = _flat_steps(pipeline)
    passed = [step for _, step in steps]
    names = ", ".join(type(step).__name__ for step in passed) or "none"
    if len(steps) < 2 or not isinstance(passed[0], CNNFeatureTransformer):
        raise ExportError(
            "The first step of the pipeline must be a CNNFeatureTransformer, and the "
            f"last one a model; its steps are {names}."
        )
    if not hasattr(passed[-1], "predict"):
        raise ExportError(f"The last step of the pipeline does not predict: {names}.")
    n_views = passed[0].n_views
    if n_views > MAX_VIEWS:
        raise ExportError(
            f"The transformer averages n_views={n_views} views of five crops of each "
            "image, and an exported model takes one crop. Use n_views=1 or 2."
        )
    return Parts(passed[0], steps[1:], model)


def _calibrated_last(model: Any) -> Any:
    """Return a calibrated pipeline as a pipeline whose last step is calibrated.

    ``CalibratedClassifierCV`` of a whole pipeline has one for each fold, each with its
    own transformer; if all of them are equal, one is sufficient.
    """
    if not isinstance(model, CalibratedClassifierCV):
        return model
    pipelines = [unwrapped(one.estimator) for one in model.calibrated_classifiers_]
    if not all(isinstance(one, Pipeline) for one in pipelines):
        return model
    steps = [_flat_steps(one) for one in pipelines]
    transformers = [transformer for (_, transformer), *_ in steps]
    if not all(isinstance(one, CNNFeatureTransformer) for one in transformers):
        return model
    if len({*map(_identity, transformers)}) > 1:
        raise ExportError(
            "The transformers of the calibrated pipelines differ, in their layers or "
            "in random weights without a random_state."
        )
    last = copy.copy(model)
    last.calibrated_classifiers_ = [*map(copy.copy, model.calibrated_classifiers_)]
    for calibrated, (_, *after) in zip(
        last.calibrated_classifiers_, steps, strict=True
    ):
        calibrated.estimator = Pipeline(after)
    last.n_features_in_ = sum(n_features_by_layer(transformers[0]))
    return Pipeline([("network", transformers[0]), ("calibrated", last)])


def _identity(transformer: CNNFeatureTransformer) -> tuple[Any, ...]:
    """Return all of a transformer that features of an export depend on."""
    layers = tuple(layer.block for layer in transformer.layers_)
    digests = prefix_digests(transformer.backbone_, transformer.network_.blocks)
    settings = transformer.preprocessing_, transformer.pooling_, transformer.n_views
    return tuple(digests[layer] for layer in layers), *settings


def _flat_steps(pipeline: Pipeline) -> list[tuple[str, Any]]:
    """Return the steps of a pipeline and of those in it, without wrappers."""
    steps: list[tuple[str, Any]] = []
    for name, step in pipeline.steps:
        if step is None or step == "passthrough":
            continue
        step = unwrapped(step)
        if isinstance(step, Pipeline):
            inner = _flat_steps(step)
            steps.extend((f"{name}.{inner_name}", one) for inner_name, one in inner)
        else:
            steps.append((name, step))
    return steps


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute in float32 on the CPU, whatever the user has set for this thread."""
    with (
        torch_defaults(),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),  # its tensors could not be used outside of it
        torch.no_grad(),
    ):
        yield


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return a path to which a file can be written; refuse it before the work."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r}.")
    return path
