"""Prediction with a network and a head, for trained and pretrained classifiers."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from skltl._parameters import resolve_threads
from skltl.features import NetworkEstimator, extract_features
from skltl.networks import block_shapes


class NetworkClassifier(ClassifierMixin, NetworkEstimator):
    """Base class of classifiers that consist of a network and a head.

    `fit` sets `network_`, `head_`, `cut_points_`, `preprocessing_`, `backbone_` and
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
        source = self._read_images(X, reset=False)
        block = self.cut_points_[0].block
        config = self._make_recipe(
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
        block, size = self.cut_points_[0].block, self.preprocessing_.crop_size
        return block_shapes(self.backbone_, size, (block,))[block]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags
