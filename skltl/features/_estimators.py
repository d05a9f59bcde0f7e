"""Base classes of the estimators that run images through a network."""

from __future__ import annotations

import warnings
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import ClassifierMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skltl._caller import user_stacklevel
from skltl._estimator import ImageEstimator, read_images_of
from skltl._parameters import (
    has_native_bfloat16,
    resolve_batch_size,
    resolve_device,
    resolve_precision,
    resolve_threads,
)
from skltl._sklearn import check_feature_names_in
from skltl.cache import resolve_folder
from skltl.exceptions import EngineWarning, PrecisionWarning
from skltl.features._extraction import extract_features
from skltl.images import Preprocessing
from skltl.inference import (
    ExtractionConfig,
    FrozenPrefix,
    can_run,
    n_pooled,
    resolve_engine,
)
from skltl.networks import (
    Backbone,
    Network,
    block_shapes,
    largest_map,
    own_backbone,
    skeleton,
)


def extraction_config(
    estimator: Any,
    backbone: Backbone,
    network: FrozenPrefix,
    blocks: tuple[str, ...],
    preprocessing: Preprocessing,
    pooling: str | int,
    batch_size: int | str = "auto",
) -> ExtractionConfig:
    """Return how images become features, by the parameters of an estimator."""
    estimator._validate_params()  # they may have been set after `fit`
    device = resolve_device(estimator.device)
    dtype = _resolve_dtype(estimator, device)
    map_bytes = largest_map(backbone, preprocessing.crop_size) * dtype.itemsize
    return ExtractionConfig(
        backbone,
        network,
        blocks,
        preprocessing,
        pooling,
        resolve_batch_size(batch_size, device, map_bytes),
        device,
        dtype,
        _resolve_engine(estimator, device, network),
        estimator.decode,
    )


def cache_folder(estimator: Any) -> Path | None:
    """Return the folder in which features are stored, or ``None``.

    Features of random weights that cannot be drawn again are not worth storing.
    """
    is_random = estimator.weights is None
    folder = resolve_folder(estimator.cache)
    can_repeat = isinstance(estimator.random_state, Integral)
    return None if is_random and not can_repeat else folder


def _resolve_engine(estimator, device, network):
    """Return the engine: for ``"auto"``, the one that was fitted if it can run."""
    fitted = getattr(estimator, "engine_", None)
    if estimator.engine != "auto" or fitted is None:
        return resolve_engine(estimator.engine, device, network.blocks)
    if can_run(fitted, device):
        return fitted
    warnings.warn(
        f"The estimator was fitted with engine={fitted!r}, which is not available "
        "here. It uses torch, and features differ in the last digits.",
        EngineWarning,
        stacklevel=user_stacklevel(),
    )
    return "torch"


def _resolve_dtype(estimator, device):
    """Return the data type: for ``"auto"``, the one that was fitted.

    Except for bfloat16 where it is emulated, at a fraction of the speed.
    """
    fitted = getattr(estimator, "precision_", None)
    if estimator.precision != "auto" or fitted is None:
        return resolve_precision(estimator.precision, device)
    if fitted == "bfloat16" and not has_native_bfloat16(device):
        warnings.warn(
            "The estimator was fitted in bfloat16, which is not native here. It "
            "computes in float32, and features differ by about 1 %.",
            PrecisionWarning,
            stacklevel=user_stacklevel(),
        )
        return resolve_precision("float32", device)
    return resolve_precision(fitted, device)


class FeatureEstimator(TransformerMixin, ImageEstimator):
    """Base class of the estimators whose `transform` returns features of layers."""

    def get_feature_names_out(self, input_features=None):
        """Get output feature names: backbone, layer and index.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Not used, validated against `feature_names_in_` as in scikit-learn.

        Returns
        -------
        ndarray of str objects
            Names such as ``resnet50_layer3_17``.
        """
        check_is_fitted(self)
        check_feature_names_in(self, input_features, generate_names=False)
        names = [
            f"{self.backbone_.name}_{layer.name}_{index}"
            for layer, n in zip(self.layers_, n_features_by_layer(self), strict=True)
            for index in range(n)
        ]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def n_features_by_layer(estimator):
    """Return the number of features of each layer of a fitted estimator."""
    blocks = tuple(layer.block for layer in estimator.layers_)
    size = estimator.preprocessing_.crop_size
    shapes = block_shapes(estimator.backbone_, size, blocks)
    return [n_pooled(shapes[block], estimator.pooling_) for block in blocks]


def truncated_backbone(estimator):
    """Return a backbone that holds the weights of the truncated network."""
    blocks, whole = estimator.network_.blocks, skeleton(estimator.backbone_)
    layers = {name: one for name, one in whole.layers.items() if one in blocks}
    aliases = {name: one for name, one in whole.aliases.items() if one in layers}
    return own_backbone(
        estimator.backbone_.name,
        Network(blocks, {}, layers, aliases),
        estimator.preprocessing_,
    )


class NetworkClassifier(ClassifierMixin, ImageEstimator):
    """Base class of classifiers that consist of a network and a head.

    `fit` sets `network_`, `head_`, `layers_`, `preprocessing_`, `backbone_` and
    `classes_`. `_pooling` and `_run_head` define what comes after the network.
    """

    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n, n_classes), or (n,) for two classes
            Logits; for two classes, the difference between the second and the first.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X):
        """Return the class probabilities.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n, n_classes)
            Probabilities, in the order of `classes_`.
        """
        return softmax(self._logits(X), axis=1)

    def predict(self, X):
        """Return the most probable class of each image.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n,)
            Class labels.
        """
        check_is_fitted(self)
        return self.classes_[self._logits(X).argmax(axis=1)]

    def _logits(self, X):
        """Return the logits (n, n_classes)."""
        check_is_fitted(self)
        return self._head_outputs(X, len(self.classes_))

    def _head_outputs(self, X, n_outputs):
        """Return the outputs (n, n_outputs) of the head."""
        check_is_fitted(self)
        source = read_images_of(self, X)
        block = self.layers_[0].block
        config = extraction_config(
            self,
            self.backbone_,
            self.network_,
            (block,),
            self.preprocessing_,
            self._pooling,
            self._network_batch_size(),
        )
        return extract_features(
            source,
            config,
            [block],
            resolve_threads(self.n_jobs),
            bool(self.verbose),
            out=np.empty((len(source), n_outputs)),
            then=self._run_head,
        )

    def _network_batch_size(self):
        """Return the batch size of prediction."""
        return "auto"

    def _map_shape(self):
        """Return the shape of the network's output for one image."""
        block, size = self.layers_[0].block, self.preprocessing_.crop_size
        return block_shapes(self.backbone_, size, (block,))[block]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags
