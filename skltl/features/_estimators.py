"""What estimators share that run images through a network."""

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
    """Base of the estimators with a network, a device and a precision."""

    def _make_recipe(
        self, backbone, network, blocks, preprocessing, pooling, batch_size="auto"
    ):
        """Say how images become features, on which device, in which precision."""
        self._validate_params()  # they may have been set after `fit`
        device = resolve_device(self.device)
        dtype = self._find_dtype(device)
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
            self._find_engine(device, network),
            self.decode,
        )

    def _find_engine(self, device, network):
        """Return what runs the network: if that is left open, the same as in `fit`."""
        fitted = getattr(self, "engine_", None)
        if self.engine != "auto" or fitted is None:
            return resolve_engine(self.engine, device, network.blocks)
        if can_run(fitted, device):
            return fitted
        warnings.warn(
            f"The estimator was fitted with engine={fitted!r}, which cannot run here; "
            "torch runs instead, and features differ in the last digits.",
            EngineWarning,
            stacklevel=level_of_the_user(),
        )
        return "torch"

    def _find_dtype(self, device):
        """Return what to compute in: if that is left open, the same as in `fit`.

        But never bfloat16 where it is emulated, at a fraction of the speed.
        """
        fitted = getattr(self, "precision_", None)
        if self.precision != "auto" or fitted is None:
            return resolve_precision(self.precision, device)
        if fitted == "bfloat16" and not has_native_bfloat16(device):
            warnings.warn(
                "The estimator was fitted in bfloat16, which is not native here; it "
                "computes in float32, and features differ by about 1 %.",
                PrecisionWarning,
                stacklevel=level_of_the_user(),
            )
            return resolve_precision("float32", device)
        return resolve_precision(fitted, device)

    def _fitted_precision(self, device):
        """Return the name of what `fit` computes in."""
        return name_of_dtype(resolve_precision(self.precision, device))

    def _cache_folder(self):
        """Return where features are kept, or ``None``.

        Those of random weights that nobody can draw again are not worth keeping.
        """
        is_lost = self.weights is None and not isinstance(self.random_state, Integral)
        folder = resolve_folder(self.cache)
        return None if is_lost else folder


class FeatureEstimator(TransformerMixin, NetworkEstimator):
    """Base of the estimators whose `transform` gives features at cut points."""

    def get_feature_names_out(self, input_features=None):
        """Name the features: backbone, cut point, number.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Not used, checked against `feature_names_in_` as scikit-learn asks.

        Returns
        -------
        ndarray of str objects
            Such as ``resnet50_layer3_17``.
        """
        check_is_fitted(self)
        check_feature_names_in(self, input_features, generate_names=False)
        names = [
            f"{self.backbone_.name}_{cut_point.name}_{number}"
            for cut_point, n in zip(self.cut_points_, self._n_features(), strict=True)
            for number in range(n)
        ]
        return np.asarray(names, dtype=object)

    def _n_features(self):
        """Count the features at each cut point."""
        blocks = tuple(cut_point.block for cut_point in self.cut_points_)
        shapes = block_shapes(self.backbone_, self.preprocessing_.crop_size, blocks)
        return [n_pooled(shapes[block], self.pooling_) for block in blocks]

    def _own_backbone(self):
        """Return a backbone that holds the fitted network up to the cut."""
        blocks, whole = self.network_.blocks, skeleton(self.backbone_)
        mains = {name: one for name, one in whole.cut_points.items() if one in blocks}
        aliases = {name: one for name, one in whole.aliases.items() if one in mains}
        return Backbone.from_network(
            self.backbone_.name,
            Network(blocks, {}, mains, aliases),
            self.preprocessing_,
        )

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
