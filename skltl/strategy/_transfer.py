"""``TransferClassifier``: advice that is taken at once."""

from __future__ import annotations

import tempfile
from numbers import Integral
from os import PathLike

import numpy as np
from sklearn.base import ClassifierMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from skltl._device import DTYPES
from skltl._estimator import ImageEstimator
from skltl._randomness import draw_seed, fresh_seed
from skltl._validation import Interval, StrOptions, fit_context
from skltl.backbones import ENGINES, Backbone, get_backbone, resolve_layer
from skltl.strategy._advisor import SHARED_PARAMETERS, StrategyAdvisor
from skltl.strategy._recommendation import STRATEGIES, build_strategy

# What `layer` has a meaning for.
CUT_EARLY = ("auto", "extract_early", "finetune_top")

# What may be set after `fit`.
LATER_PARAMETERS = ("device", "precision", "engine", "decode", "n_jobs", "verbose")


def _can(name):
    """Tell whether what was advised has a method; before `fit`, nobody knows."""

    def check(classifier):
        fitted = getattr(classifier, "estimator_", None)
        return fitted is None or hasattr(fitted, name)

    return check


class TransferClassifier(ClassifierMixin, ImageEstimator):
    """Take the way of transfer that suits the data.

    It advises itself on the training pictures as `StrategyAdvisor` does, and then is
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
        If given, ``X`` is an array (n, d), and each row is a picture of this shape.
    device : str, default="auto"
        As for `CNNFeatureTransformer`.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        What the network computes in.
    engine : {"auto", "torch", "compile", "openvino"}, default="auto"
        What runs the frozen network; see :ref:`the user guide <engines>`.
    decode : {"exact", "fast"}, default="exact"
        ``"fast"`` decodes large JPEG files at a smaller scale.
    cache : bool, str or path, default=None
        As for `CNNFeatureTransformer`. Without one, the features that were measured are
        kept for the time of `fit`.
    n_jobs : int, default=None
        Threads that decode pictures.
    random_state : int, RandomState instance or None, default=None
        Of everything random.
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
        "image_size": [Interval(Integral, 1, None, closed="left"), None],
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
    def fit(self, X, y):
        """Measure if that was asked for, and fit what was advised.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,)
            Their labels.

        Returns
        -------
        TransferClassifier
            The classifier itself.

        Raises
        ------
        ValueError
            If there is nothing to tell apart, or nothing to measure by.
        """
        seed = draw_seed(self.random_state)
        seed = fresh_seed() if seed is None else seed
        shared = {name: getattr(self, name) for name in SHARED_PARAMETERS}
        shared["random_state"] = seed  # the same for what measures and what is advised
        with tempfile.TemporaryDirectory(prefix="skltl-") as folder:
            cache = self.cache or (folder if self.strategy == "auto" else None)
            advisor, strategy = self._advise(X, y, {**shared, "cache": cache})
            estimator = clone(strategy.estimator).fit(X, y)
        for one in (advisor, estimator, strategy.estimator):
            _set(one, "cache", self.cache)  # the folder is gone
        if advisor is not None:
            _set(advisor.strategy_.estimator, "cache", self.cache)
        self._read_images(X, reset=True)
        self.advisor_ = advisor
        self.strategy_ = strategy
        self.estimator_ = estimator
        return self

    @property
    def classes_(self):
        """The labels."""
        return self.estimator_.classes_

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
        return self._ask("predict", X)

    @available_if(_can("predict_proba"))
    def predict_proba(self, X):
        """Return the probability of each class; a support vector machine has none.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
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
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `fit` takes.

        Returns
        -------
        array of shape (n, n_classes), or (n,) for two classes
            As what was advised gives it.
        """
        return self._ask("decision_function", X)

    def _advise(self, X, y, shared):
        """Return the advisor, if there is one, and the strategy."""
        if self.layer is not None:
            resolve_layer(get_backbone(self.backbone), self.layer)
            if self.strategy not in CUT_EARLY:
                raise ValueError(
                    f"layer={self.layer!r} is of no use to strategy={self.strategy!r}: "
                    f"{', '.join(CUT_EARLY[1:])} can be cut anywhere."
                )
        advisor = StrategyAdvisor(self.backbone, cv=self.cv, **shared)
        if self.strategy == "auto":
            advice = advisor.fit(X, y).strategy_
            name, reasons = advice.name, advice.reasons
            layer, class_map = self.layer or advisor.best_layer_, advisor.class_map_
        else:
            name, reasons = self.strategy, ("It was asked for.",)
            layer, class_map = self.layer, advisor._map_by_names(np.unique(y))
        measured = advisor if self.strategy == "auto" else None
        return measured, build_strategy(
            name,
            reasons,
            backbone=self.backbone,
            layer=layer,
            class_map=class_map,
            **shared,
        )

    def _ask(self, method, X):
        check_is_fitted(self)
        self._read_images(X, reset=False)
        for name in LATER_PARAMETERS:
            _set(self.estimator_, name, getattr(self, name))  # may have changed
        return getattr(self.estimator_, method)(X)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


def _set(estimator, name, value):
    """Set a parameter of an estimator, or of a pipeline's first step, if it has it."""
    known = () if estimator is None else estimator.get_params()
    for full_name in (name, f"feat__{name}"):
        if full_name in known:
            estimator.set_params(**{full_name: value})
