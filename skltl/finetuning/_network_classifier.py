"""Base classes of classifiers that consist of a network and a head."""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from skltl._parameters import resolve_threads
from skltl.features import (
    CNNFeatureTransformer,
    FeatureEstimator,
    NetworkEstimator,
    extract_features,
)
from skltl.finetuning._network import Pool, head_from_state, head_state
from skltl.finetuning._training import Stage
from skltl.networks import block_shapes


class NetworkClassifier(ClassifierMixin, NetworkEstimator):
    """A network up to a cut, and a head on it.

    Its `fit` sets `network_`, `head_`, `cut_points_`, `preprocessing_`, `backbone_` and
    `classes_`; `_pooling` and `_run_head` say what lies between network and logits.
    """

    def decision_function(self, X):
        """Return the logits.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
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
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes)
            In the order of `classes_`.
        """
        return softmax(self._logits(X), axis=1)

    def predict(self, X):
        """Return the most probable class of each image.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n,)
            Of `classes_`.
        """
        check_is_fitted(self)
        return self.classes_[self._logits(X).argmax(axis=1)]

    def _logits(self, X):
        """Return the logits (n, n_classes)."""
        check_is_fitted(self)
        return self._head_outputs(X, len(self.classes_))

    def _head_outputs(self, X, n_outputs):
        """Run network and head, in batches."""
        check_is_fitted(self)
        source = self._read_images(X, reset=False)
        block = self.cut_points_[0].block
        recipe = self._make_recipe(
            self.backbone_,
            self.network_,
            (block,),
            self.preprocessing_,
            self._pooling,
            self._network_batch_size(),
        )
        return extract_features(
            source,
            recipe,
            [block],
            resolve_threads(self.n_jobs),
            bool(self.verbose),
            out=np.empty((len(source), n_outputs)),
            then=self._run_head,
        )

    def _network_batch_size(self):
        """Return how many images cross the network together to be classified."""
        return "auto"

    def _map_shape(self):
        """Return the shape of what the network gives for an image."""
        block, size = self.cut_points_[0].block, self.preprocessing_.crop_size
        return block_shapes(self.backbone_, size, (block,))[block]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


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
    "engine",
    "decode",
    "n_jobs",
)
FITTED_BY_BOTH = (
    "backbone_",
    "cut_points_",
    "network_",
    "preprocessing_",
    "pooling_",
    "precision_",
    "engine_",
    "n_features_in_",
    "feature_names_in_",
)


class TunedNetwork(FeatureEstimator, NetworkClassifier):
    """A tuned network and new layers; its `fit` sets `stages_`, too."""

    def get_params(self, deep=True):
        """Return the parameters; none of them is an estimator with its own.

        Some of torchvision's transforms have a `get_params` that is another thing.

        Parameters
        ----------
        deep : bool, default=True
            Without meaning here.

        Returns
        -------
        dict
            Names and values.
        """
        return super().get_params(deep=False)

    def __sklearn_clone__(self):
        # Not `copy.copy`, which would take the fitted network to pieces.
        bare = type(self).__new__(type(self))
        bare.__dict__ = {**vars(self), "augment": None}
        cloned = super(TunedNetwork, bare).__sklearn_clone__()
        cloned.augment = copy.deepcopy(self.augment)
        return cloned

    def transform(self, X):
        """Return the features under the new layers, of the tuned network.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_features), float32
            Pooled at the cut, as `CNNFeatureTransformer` would.
        """
        check_is_fitted(self)
        source = self._read_images(X, reset=False)
        block = self.cut_points_[0].block
        recipe = self._make_recipe(
            self.backbone_, self.network_, (block,), self.preprocessing_, self.pooling_
        )
        threads, verbose = resolve_threads(self.n_jobs), bool(self.verbose)
        return extract_features(source, recipe, [block], threads, verbose)

    def to_transformer(self):
        """Return the tuned network up to the cut as a transformer.

        Returns
        -------
        CNNFeatureTransformer
            Fitted; it gives what `transform` gives. Its `backbone` is a `Backbone` that
            holds the tuned weights, so clones of it, and what it gives after another
            `fit`, are the same.
        """
        check_is_fitted(self)
        cut_point, own = self.cut_points_[0], self._own_backbone()
        parameters = {name: getattr(self, name) for name in SHARED_PARAMETERS}
        parameters |= {"backbone": own, "weights": "imagenet", "layer": cut_point.name}
        parameters["pooling"] = self.pooling_
        parameters["image_size"] = None  # the backbone's own
        parameters["image_shape"] = self._fitted_image_shape
        transformer = CNNFeatureTransformer(**parameters)
        for name in (*FITTED_BY_BOTH, "_fitted_image_shape"):
            if hasattr(self, name):
                setattr(transformer, name, getattr(self, name))
        transformer.backbone_, transformer._recorder = own, None
        transformer._fitted_weights = "imagenet"  # the backbone's own
        return transformer

    @property
    def _pooling(self):
        """What the head begins with, which then runs with the network."""
        return self.head_[0].pooling if isinstance(self.head_[0], Pool) else "flatten"

    def _run_head(self, rows):
        """Return the logits; in float64 sums do not depend on the batch."""
        features = rows.double()
        if not isinstance(self.head_[0], Pool):
            features = features.reshape(len(rows), *self._map_shape())
        with torch.inference_mode():
            return self.head_(features)

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
