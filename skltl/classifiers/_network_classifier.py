"""What classifiers of a ConvNet and a head share once they are fitted."""

from __future__ import annotations

from dataclasses import asdict

import torch
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from skltl._device import (
    resolve_threads,
)
from skltl.backbones import block_shapes
from skltl.classifiers._head import Pool, head_from_state, head_state
from skltl.classifiers._stages import Stage
from skltl.features import CNNFeatureTransformer, FeatureEstimator, extract_features

# What a transformer and a classifier on the same network have in common.
SHARED_PARAMETERS = (
    "backbone",
    "weights",
    "layer",
    "pooling",
    "image_size",
    "image_shape",
    "device",
    "precision",
    "n_jobs",
)
FITTED_BY_BOTH = (
    "backbone_",
    "cut_points_",
    "network_",
    "preprocessing_",
    "n_features_in_",
    "feature_names_in_",
)


class NetworkClassifier(ClassifierMixin, FeatureEstimator):
    """A network up to a cut, and a head on it.

    Its `fit` sets `network_`, `head_`, `cut_points_`, `preprocessing_`, `backbone_`,
    `classes_` and `stages_`.
    """

    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes), or (n,) for two classes
            For two classes, the logit of the second against the first.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X):
        """Return the probability of each class.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes)
            In the order of `classes_`.
        """
        return softmax(self._logits(X), axis=1)

    def predict(self, X):
        """Return the most probable class of each picture.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n,)
            Of `classes_`.
        """
        check_is_fitted(self)
        return self.classes_[self._logits(X).argmax(axis=1)]

    def transform(self, X):
        """Return the features under the new layers, of the tuned network.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_features), float32
            Pooled at the cut, as `CNNFeatureTransformer` would.
        """
        check_is_fitted(self)
        return self._features(X, self.pooling)

    def to_transformer(self):
        """Return the tuned network up to the cut as a transformer.

        Returns
        -------
        CNNFeatureTransformer
            Fitted; it gives what `transform` gives. Fitted again, or cloned, it is the
            pretrained network as its parameters say.
        """
        check_is_fitted(self)
        transformer = CNNFeatureTransformer(
            **{name: getattr(self, name) for name in SHARED_PARAMETERS}
        )
        for name in FITTED_BY_BOTH:
            if hasattr(self, name):
                setattr(transformer, name, getattr(self, name))
        return transformer

    def _logits(self, X):
        """Run network and head; in float64 sums do not depend on the batch."""
        check_is_fitted(self)
        begins_with_pool = isinstance(self.head_[0], Pool)
        rows = self._features(
            X, self.head_[0].pooling if begins_with_pool else "flatten"
        )
        features = torch.from_numpy(rows).double()
        if not begins_with_pool:
            block, size = self.cut_points_[0].block, self.preprocessing_.crop_size
            shape = block_shapes(self.backbone_, size, (block,))[block]
            features = features.reshape(len(rows), *shape)
        with torch.inference_mode():
            return self.head_(features).numpy()

    def _features(self, X, pooling):
        """Return what the tuned network gives at the cut."""
        source = self._read_images(X, reset=False)
        block = self.cut_points_[0].block
        recipe = self._make_recipe(
            self.backbone_, self.network_, (block,), self.preprocessing_, pooling
        )
        threads, verbose = resolve_threads(self.n_jobs), bool(self.verbose)
        return extract_features(source, recipe, [block], threads, verbose)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags

    def __getstate__(self):
        state = super().__getstate__()
        if "head_" in state:
            state["head_"] = head_state(self.head_)
            state["stages_"] = [asdict(stage) for stage in self.stages_]
        return state

    def __setstate__(self, state):
        state = dict(state)
        if "head_" in state:
            state["head_"] = head_from_state(state["head_"])
            state["stages_"] = [Stage(**stage) for stage in state["stages_"]]
        super().__setstate__(state)
