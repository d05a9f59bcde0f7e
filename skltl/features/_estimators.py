"""Base classes of the estimators that run images through a network."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skltl._collections import is_dask
from skltl._dask import map_blocks, one_row
from skltl._estimator import ImageEstimator, read_images_of
from skltl._parameters import resolve_threads
from skltl._sklearn import check_feature_names_in, output_config
from skltl._targets import is_multilabel_classifier
from skltl.features._extraction import extract_features, extraction_config
from skltl.inference import can_pool, n_pooled
from skltl.networks import layouts, resolve_network, skeleton


class FeatureEstimator(TransformerMixin, ImageEstimator):
    """Base class of the estimators whose `transform` returns features of layers.

    `transform` of a Dask collection is lazy.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "transform" in vars(cls):
            # Outside scikit-learn's wrappers, which would compute a lazy array.
            cls.transform = _lazy_for_dask(cls.transform)
            cls.fit_transform = _without_wrapper_for_dask(cls.fit_transform)

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


def _lazy_for_dask(transform):
    """Return a method `transform` that is lazy for Dask collections."""

    @wraps(transform)
    def wrapped(self, X):
        if not is_dask(X):
            return transform(self, X)
        check_is_fitted(self)
        read_images_of(self, one_row(X))
        return map_blocks(self, X, "transform", no_features(self))

    return wrapped


def _without_wrapper_for_dask(of_sklearn):
    """Return a method `fit_transform` that leaves Dask collections to `transform`."""

    def fit_transform(self, X, y=None, **fit_params):
        """Fit to images, and return their features.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.
        y : array of shape (n,), default=None
            Targets, as in `fit`.
        **fit_params
            Further parameters of `fit`.

        Returns
        -------
        array of shape (n, n_features), float32
            Features, as those of `transform`.
        """
        if is_dask(X):
            return self.fit(X, y, **fit_params).transform(X)
        return of_sklearn(self, X, y, **fit_params)

    return fit_transform


def no_features(estimator: Any) -> Any:
    """Return the features of no images, in the container that `set_output` sets."""
    n_features = sum(n_features_by_layer(estimator))
    empty = np.empty((0, n_features), dtype=np.float32)
    container = output_config("transform", estimator)["dense"]
    if container == "default":
        return empty
    if container != "pandas":
        raise ValueError(
            f"set_output(transform={container!r}) is not available for Dask "
            "collections; 'default' and 'pandas' are."
        )
    import pandas as pd

    return pd.DataFrame(empty, columns=estimator.get_feature_names_out())


def n_features_by_layer(estimator: Any) -> list[int]:
    """Return the number of features of each layer of a fitted estimator."""
    blocks = tuple(layer.block for layer in estimator.layers_)
    found = layouts(estimator.backbone_, estimator.preprocessing_.size, blocks)
    return [n_pooled(found[block], estimator.pooling_) for block in blocks]


def output_layout(estimator):
    """Return the layout of the network's output at the layer of an estimator."""
    (layer,) = estimator.layers_
    size = estimator.preprocessing_.size
    return layouts(estimator.backbone_, size, (layer.block,))[layer.block]


def poolable_layers(estimator):
    """Return the main layers whose outputs an estimator can pool, with their layouts.

    Its weights and its `image_size` decide about the sizes of feature maps. That there
    is no such layer is an error.
    """
    estimator._validate_params()
    backbone, _, preprocessing = resolve_network(
        estimator.backbone, estimator.weights, estimator.image_size, estimator.crop
    )
    network = skeleton(backbone, preprocessing.size)
    found = network.layouts
    layers = {
        name: found[block]
        for name, block in network.layers.items()
        if block in found and can_pool(found[block], estimator.pooling)
    }
    if not layers:
        raise ValueError(
            f"{backbone.name!r} has no layer that pooling={estimator.pooling!r} can "
            "pool."
        )
    return layers


class HeadEstimator(ImageEstimator):
    """Base class of estimators that predict with a network and a head.

    `fit` sets `network_`, `head_`, `layers_`, `preprocessing_` and `backbone_`.
    `_pooling` and `_run_head` define what comes after the network.
    """

    def _head_outputs(self, X, n_outputs):
        """Return the outputs (n, n_outputs) of the head."""
        batch_size = self._network_batch_size()
        return self._extract(X, self._pooling, batch_size, n_outputs, self._run_head)

    def _extract(self, X, pooling, batch_size="auto", n_outputs=None, then=None):
        """Return the features (n, d) of the network, or (n, n_outputs) of `then`."""
        check_is_fitted(self)
        source = read_images_of(self, X)
        block = self.layers_[0].block
        config = extraction_config(
            self,
            self.backbone_,
            self.network_,
            (block,),
            self.preprocessing_,
            pooling,
            batch_size,
        )
        return extract_features(
            source,
            config,
            [block],
            resolve_threads(self.n_jobs),
            bool(self.verbose),
            out=None if then is None else np.empty((len(source), n_outputs)),
            then=then,
        )

    def _network_batch_size(self):
        """Return the batch size of prediction."""
        return "auto"

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


class NetworkClassifier(ClassifierMixin, HeadEstimator):
    """Base class of classifiers that consist of a network and a head.

    `fit` sets `classes_`, too. With `multilabel_`, these are the columns of an
    indicator matrix, and each image has any number of labels.
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
            For multilabel targets, the log odds of each label.
        """
        logits = self._logits(X)
        is_binary = logits.shape[1] == 2 and not is_multilabel_classifier(self)
        return logits[:, 1] - logits[:, 0] if is_binary else logits

    def predict_proba(self, X):
        """Return the class probabilities.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n, n_classes)
            Probabilities, in the order of `classes_`; for multilabel targets, that of
            each label.
        """
        logits = self._logits(X)
        return (
            expit(logits) if is_multilabel_classifier(self) else softmax(logits, axis=1)
        )

    def predict_log_proba(self, X):
        """Return the logarithms of the class probabilities.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n, n_classes)
            Logarithms of the probabilities, also of those that are 0 after rounding.
        """
        logits = self._logits(X)
        if is_multilabel_classifier(self):
            return log_expit(logits)
        return log_softmax(logits, axis=1)

    def predict(self, X):
        """Return the most probable class of each image.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images of any kind that `fit` supports.

        Returns
        -------
        array of shape (n,), or (n, n_labels)
            Class labels; for multilabel targets, an indicator matrix.
        """
        check_is_fitted(self)
        logits = self._logits(X)
        if is_multilabel_classifier(self):
            return (logits > 0).astype(int)
        return self.classes_[logits.argmax(axis=1)]

    def _logits(self, X):
        """Return the logits (n, n_classes)."""
        check_is_fitted(self)
        return self._head_outputs(X, len(self.classes_))
