"""What classifiers share that are a network and a head."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from skltl._device import resolve_threads
from skltl.backbones import block_shapes
from skltl.features import NetworkEstimator, extract_features


class NetworkClassifier(ClassifierMixin, NetworkEstimator):
    """A network up to a cut, and a head on it.

    Its `fit` sets `network_`, `head_`, `cut_points_`, `preprocessing_`, `backbone_` and
    `classes_`; `_pooling` and `_run_head` say what lies between network and logits.
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
        """Return the shape of what the network gives for a picture."""
        block, size = self.cut_points_[0].block, self.preprocessing_.crop_size
        return block_shapes(self.backbone_, size, (block,))[block]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags
