"""``TransferClassifier``: advice that is taken at once."""

from __future__ import annotations

from numbers import Integral
from os import PathLike

import numpy as np
from sklearn import config_context, get_config
from sklearn.base import ClassifierMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, has_fit_parameter

from skltl._estimator import LEFT_OUT_OF_FILES, ImageEstimator
from skltl._parameters import DTYPES
from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import IMAGE_SIZES, Interval, StrOptions, fit_context
from skltl.inference import ENGINES
from skltl.networks import Backbone, get_backbone, resolve_layer
from skltl.strategy._advisor import StrategyAdvisor
from skltl.strategy._measurement import (
    SHARED_PARAMETERS,
    label,
    map_of_classes,
    measure,
)
from skltl.strategy._rules import STRATEGIES, build_strategy, portable

# What `layer` has a meaning for.
CUT_EARLY = ("auto", "extract_early", "finetune_top")

# What may be set after `fit`.
LATER_PARAMETERS = (
    "device",
    "precision",
    "engine",
    "decode",
    "cache",
    "n_jobs",
    "verbose",
)


def _can(name):
    """Tell whether what was advised has a method; before `fit`, nobody knows."""

    def check(classifier):
        fitted = getattr(classifier, "estimator_", None)
        return fitted is None or hasattr(fitted, name)

    return check


class TransferClassifier(ClassifierMixin, ImageEstimator):
    """Take the way of transfer that suits the data.

    It advises itself on the training images as `StrategyAdvisor` does, and then is
    what was advised: the network as it is, a linear classifier on its features at the
    end or earlier, or a fine-tuned network.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own.
    strategy : str, default="auto"
        ``"auto"`` measures. Or one of ``"as_is"``, ``"extract"``, ``"extract_early"``,
        ``"finetune"``, ``"finetune_top"``, ``"scratch"``; see `Strategy`.
    layer : str, default=None
        Where ``"extract_early"`` and ``"finetune_top"`` cut; ``None`` is the best of
        the cut points that were measured, or that at about two thirds of the depth.
    weights : str, path or None, default="imagenet"
        As for `CNNFeatureTransformer`.
    cv : int, default=5
        Folds of the measurement, at least 2.
    image_size : int, default=None
        As for `CNNFeatureTransformer`.
    image_shape : tuple of 2 or 3 ints, default=None
        If given, ``X`` is an array (n, d), and each row is an image of this shape.
    device : str, default="auto"
        As for `CNNFeatureTransformer`.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        What the network computes in.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What runs the frozen network; see :ref:`the user guide <engines>`.
    decode : {"exact", "fast"}, default="exact"
        ``"fast"`` decodes large JPEG files at a smaller scale.
    cache : bool, str or path, default=None
        As for `CNNFeatureTransformer`. Without one, too, a linear classifier is fitted
        on the features that were measured, not on new ones.
    n_jobs : int, default=None
        Threads that decode images.
    random_state : int, RandomState instance or None, default=None
        Of everything random, in what measures and in what is fitted.
    verbose : int, default=0
        Whether progress is shown.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        The labels.
    strategy_ : Strategy
        What was advised, or asked for.
    advisor_ : StrategyAdvisor or None
        What was measured, with ``strategy="auto"``.
    estimator_ : estimator
        What was advised, fitted.

    See Also
    --------
    StrategyAdvisor : The measurement alone.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import TransferClassifier
    >>> digits, labels = load_digits(return_X_y=True)
    >>> classifier = TransferClassifier(
    ...     "tiny", image_shape=(8, 8), image_size=32, random_state=0
    ... )
    >>> classifier.fit(digits[:200] / 16, labels[:200]).strategy_.name
    'extract_early'
    """

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "strategy": [StrOptions({"auto", *STRATEGIES})],
        "layer": [str, None],
        "weights": [str, PathLike, None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "image_size": [IMAGE_SIZES, None],
        "image_shape": [tuple, list, None],
        "device": [str],
        "precision": [StrOptions({"auto", *DTYPES})],
        "engine": [StrOptions({"auto", *ENGINES})],
        "decode": [StrOptions({"exact", "fast"})],
        "cache": ["boolean", str, PathLike, None],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone="resnet50",
        *,
        strategy="auto",
        layer=None,
        weights="imagenet",
        cv=5,
        image_size=None,
        image_shape=None,
        device="auto",
        precision="auto",
        engine="auto",
        decode="exact",
        cache=None,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.strategy = strategy
        self.layer = layer
        self.weights = weights
        self.cv = cv
        self.image_size = image_size
        self.image_shape = image_shape
        self.device = device
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.cache = cache
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y, sample_weight=None, groups=None):
        """Measure if that was asked for, and fit what was advised.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,)
            Their labels.
        sample_weight : array of shape (n,), default=None
            Weights of the images, in the measurement and in what is fitted.
        groups : array of shape (n,), default=None
            Which images belong together (of one plant, one patient): the folds of the
            measurement and the images that a fine-tuned network holds out keep them
            together. Other strategies hold nothing out, and have no use for them.

        Returns
        -------
        TransferClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If there is nothing to tell apart, or nothing to measure by, or lengths
            differ.
        """
        n_images = len(clone(self)._read_images(X, reset=True))
        labelled = label(X, y, n_images, sample_weight, groups)
        seed = draw_seed(self.random_state)
        shared = {name: getattr(self, name) for name in SHARED_PARAMETERS}
        # The same for what measures and what is advised.
        shared["random_state"] = fresh_seed() if seed is None else seed
        self._check_layer()
        advisor, measured = None, None
        if self.strategy == "auto":
            advisor = StrategyAdvisor(self.backbone, cv=self.cv, **shared)
            measured = measure(advisor, X, y, sample_weight, groups)
            advisor._take(measured, X)
        strategy = self._build_strategy(labelled.classes, measured, shared)
        estimator = clone(strategy.estimator)
        known = () if measured is None else measured.features_of(strategy.estimator)
        _fit(estimator, labelled, known)
        # Only now does anything change: a fit that fails leaves the one before.
        self._read_images(X, reset=True)
        self.advisor_ = advisor
        self.strategy_ = strategy
        self.estimator_ = estimator
        self._set_at_fit = {name: getattr(self, name) for name in LATER_PARAMETERS}
        return self

    @property
    def classes_(self):
        """The labels."""
        return self.estimator_.classes_

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
        return self._ask("predict", X)

    @available_if(_can("predict_proba"))
    def predict_proba(self, X):
        """Return the probability of each class; a support vector machine has none.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes)
            In the order of `classes_`.
        """
        return self._ask("predict_proba", X)

    def decision_function(self, X):
        """Return how sure the classifier is of each class.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes), or (n,) for two classes
            As what was advised gives it.
        """
        return self._ask("decision_function", X)

    def _check_layer(self):
        """Refuse a `layer` that does not exist, or that the strategy does not use."""
        if self.layer is None:
            return
        resolve_layer(get_backbone(self.backbone), self.layer)
        if self.strategy not in CUT_EARLY:
            raise ValueError(
                f"layer={self.layer!r} is of no use to strategy={self.strategy!r}: "
                f"{', '.join(CUT_EARLY[1:])} can be cut anywhere."
            )

    def _build_strategy(self, classes, measured, shared):
        """Return the strategy that was asked for or, if measured, is advised."""
        if measured is None:
            name, reasons, layer = self.strategy, ("It was asked for.",), self.layer
            class_map = map_of_classes(self.backbone, self.weights, classes)
        else:
            name, reasons = measured.strategy.name, measured.strategy.reasons
            layer = self.layer or measured.depths.best
            class_map = measured.class_map
        return build_strategy(
            name,
            reasons,
            backbone=self.backbone,
            layer=layer,
            class_map=class_map,
            **shared,
        )

    def _ask(self, method, X):
        check_is_fitted(self)
        self._validate_params()  # they may have been set after `fit`
        self._read_images(X, reset=False)
        changed = {
            name: getattr(self, name)
            for name, value in self._set_at_fit.items()
            if getattr(self, name) != value
        }
        return getattr(_with_parameters(self.estimator_, changed), method)(X)

    def __getstate__(self):
        return _portable(super().__getstate__())

    def __setstate__(self, state):
        super().__setstate__(_portable(state))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


def _portable(state):
    """Return a state for a file, or from one: it does not say where features go."""
    if "strategy_" not in state:
        return state
    known = state["_set_at_fit"]
    unset = {name: one for name, one in LEFT_OUT_OF_FILES.items() if name in known}
    return {
        **state,
        "strategy_": portable(state["strategy_"]),
        "_set_at_fit": {**known, **unset},
    }


def _fit(estimator, labelled, known):
    """Fit what was advised; `known` are the features of some images, and which."""
    X, y = labelled.X, labelled.classes[labelled.targets]
    sample_weight = labelled.weights
    given = {"sample_weight": sample_weight, "groups": labelled.groups}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(estimator, Pipeline):
        takes = {name: has_fit_parameter(estimator, name) for name in given}
        with labelled.named():
            estimator.fit(X, y, **{name: given[name] for name in given if takes[name]})
        return
    by_step = {
        f"{name}__sample_weight": sample_weight
        for name, step in estimator.steps
        if "sample_weight" in given and has_fit_parameter(step, "sample_weight")
    }
    # These are names of steps, whether the user has metadata routed or not.
    with config_context(enable_metadata_routing=False):
        # Tables get their columns' names from the transformer.
        if known and get_config()["transform_output"] == "default":
            transformer = estimator[0].fit(X, y)
            features = _completed(transformer, labelled, *known)
            estimator[1:].fit(features, y, **by_step)
        else:
            with labelled.named():
                estimator.fit(X, y, **by_step)


def _completed(transformer, labelled, features, known):
    """Return the features of all images; those of some are known."""
    n = len(labelled.positions)
    if len(known) == n:
        return features
    others = np.setdiff1d(np.arange(n), known)
    rows = np.empty((n, features.shape[1]), features.dtype)
    rows[known] = features
    part = labelled.part(others)
    with part.named():
        rows[others] = transformer.transform(part.X)
    return rows


def _with_parameters(estimator, parameters):
    """Return the estimator with other parameters, as a copy that shares what is fitted.

    So threads may ask at the same time, and what a user has set on it stays.
    """
    if not parameters:
        return estimator
    changed = object.__new__(type(estimator))
    vars(changed).update(vars(estimator))
    if isinstance(estimator, Pipeline):
        (name, first), *others = estimator.steps
        changed.steps = [(name, _with_parameters(first, parameters)), *others]
        return changed
    known = changed.get_params(deep=False)
    return changed.set_params(
        **{name: value for name, value in parameters.items() if name in known}
    )
