"""Base classes of the estimators that run images through a network."""

from __future__ import annotations

import warnings
from numbers import Integral

import numpy as np
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skltl._caller import level_of_the_user
from skltl._estimator import ImageEstimator
from skltl._parameters import (
    has_native_bfloat16,
    name_of_dtype,
    resolve_batch_size,
    resolve_device,
    resolve_precision,
)
from skltl._sklearn import check_feature_names_in
from skltl.cache import resolve_folder
from skltl.exceptions import EngineWarning, PrecisionWarning
from skltl.inference import Recipe, can_run, n_pooled, resolve_engine
from skltl.networks import Backbone, Network, block_shapes, largest_map, skeleton


class NetworkEstimator(ImageEstimator):
    """Base class of the estimators with a network, a device and a precision."""

    def _make_recipe(
        self, backbone, network, blocks, preprocessing, pooling, batch_size="auto"
    ):
        return extraction_config(
            self, backbone, network, blocks, preprocessing, pooling, batch_size
        )

    def _fitted_precision(self, device):
        return name_of_dtype(resolve_precision(self.precision, device))

    def _cache_folder(self):
        return cache_folder(self)


def extraction_config(
    estimator, backbone, network, blocks, preprocessing, pooling, batch_size="auto"
):
    """Return how images become features, by the parameters of an estimator."""
    estimator._validate_params()  # they may have been set after `fit`
    device = resolve_device(estimator.device)
    dtype = _resolve_dtype(estimator, device)
    map_bytes = largest_map(backbone, preprocessing.crop_size) * dtype.itemsize
    return Recipe(
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


def cache_folder(estimator):
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
        stacklevel=level_of_the_user(),
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
            stacklevel=level_of_the_user(),
        )
        return resolve_precision("float32", device)
    return resolve_precision(fitted, device)


class FeatureEstimator(TransformerMixin, NetworkEstimator):
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
            for layer, n in zip(self.cut_points_, self._n_features(), strict=True)
            for index in range(n)
        ]
        return np.asarray(names, dtype=object)

    def _n_features(self):
        return n_features_by_layer(self)

    def _own_backbone(self):
        """Return a backbone that holds the weights of the truncated network."""
        blocks, whole = self.network_.blocks, skeleton(self.backbone_)
        layers = {name: one for name, one in whole.cut_points.items() if one in blocks}
        aliases = {name: one for name, one in whole.aliases.items() if one in layers}
        return Backbone.from_network(
            self.backbone_.name,
            Network(blocks, {}, layers, aliases),
            self.preprocessing_,
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def n_features_by_layer(estimator):
    """Return the number of features of each layer of a fitted estimator."""
    blocks = tuple(layer.block for layer in estimator.cut_points_)
    size = estimator.preprocessing_.crop_size
    shapes = block_shapes(estimator.backbone_, size, blocks)
    return [n_pooled(shapes[block], estimator.pooling_) for block in blocks]
