"""``TransferClassifier``: fit the recommended estimator."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from skltl._estimator import is_fitted, read_images_of
from skltl._nested import inner_estimator
from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import StrOptions, fit_context
from skltl.features import SHARED_PARAMETERS, check_readable
from skltl.finetuning import FineTunedCNNClassifier
from skltl.networks import get_backbone, resolve_layer
from skltl.strategy._advisor import StrategyAdvisor
from skltl.strategy._cross_validation import (
    Features,
    LabeledImages,
    fit_linear,
    label_images,
)
from skltl.strategy._evaluation import evaluate_strategies
from skltl.strategy._rules import (
    STRATEGIES,
    TransformerMetaEstimator,
    build_strategy,
    find_class_map,
    reader_of,
    shared_parameters,
)
from skltl.strategy._tasks import task_of

# Strategies that may truncate the network earlier than at the last layer.
TRUNCATING = ("auto", "extract_early", "finetune_top")

# Parameters of the transformer that take effect after `fit`.
RUNTIME_PARAMETERS = (*SHARED_PARAMETERS, "batch_size", "cache", "verbose")


def _may_have_proba(classifier):
    """Return whether the fitted estimator has `predict_proba`; before `fit`, it may."""
    estimator = getattr(classifier, "estimator_", None)
    return estimator is None or hasattr(estimator, "predict_proba")


class TransferClassifier(ClassifierMixin, TransformerMetaEstimator):
    """Classify images with the transfer learning strategy that suits the data.

    `fit` runs `StrategyAdvisor` on the training data and fits the recommended
    estimator: the pretrained classifier, a linear classifier on features of the last or
    of an earlier layer, or a fine-tuned network.

    Parameters
    ----------
    transformer : CNNFeatureTransformer, default=None
        Transformer whose parameters configure all estimators: backbone, weights,
        preprocessing, device and so on. A `layer` other than ``"last"`` is where
        ``"extract_early"`` and ``"finetune_top"`` truncate the network; with
        ``"last"``, they use the best layer that was evaluated, or the one at about two
        thirds of the depth if none was. ``None`` is ``CNNFeatureTransformer()``.
    strategy : str, default="auto"
        ``"auto"`` fits the recommended estimator. ``"as_is"``, ``"extract"``,
        ``"extract_early"``, ``"finetune"``, ``"finetune_top"`` and ``"scratch"`` skip
        the evaluation; see `recommend_strategy`.
    cv : int, default=5
        Number of cross-validation folds, at least 2. It is reduced to the number of
        images, or groups, in the smallest class.
    random_state : int, RandomState instance or None, default=None
        Controls the folds, the sampling of images and the linear classifiers. Where
        that of the transformer is ``None``, it also controls random weights and the
        recommended estimator.
    verbose : int, default=0
        Verbosity level. If positive, a progress bar is shown.

    Attributes
    ----------
    classes_ : array of shape (n_classes,)
        Class labels, or the columns of an indicator matrix.
    multilabel_ : bool
        Whether each image has any number of labels.
    strategy_ : Strategy
        Recommended or requested strategy.
    advisor_ : StrategyAdvisor or None
        Fitted advisor, with ``strategy="auto"``. It has no `transformer_`: the network
        is that of `estimator_`.
    estimator_ : estimator
        Fitted estimator of the strategy.
    n_features_in_ : int
        Number of features seen during `fit`. Only with `image_shape`.
    feature_names_in_ : array of shape (`n_features_in_`,)
        Names of features seen during `fit`, if ``X`` has any. Only with
        `image_shape`.

    See Also
    --------
    StrategyAdvisor : The recommendation without the fit.

    Notes
    -----
    The network runs once: a linear classifier is fitted on the features that were
    evaluated. Parameters of the transformer that were set after `fit` take effect at
    once if they only concern how the network runs, such as ``transformer__n_jobs``, and
    in the next `fit` otherwise.

    With metadata routing, `sample_weight` and `groups` are consumed here: request them
    with `set_fit_request`. The fitted estimator receives those that it supports.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import CNNFeatureTransformer, TransferClassifier
    >>> digits, labels = load_digits(return_X_y=True)
    >>> transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    >>> classifier = TransferClassifier(transformer, random_state=0)
    >>> classifier.fit(digits[:100] / 16, labels[:100]).strategy_.name
    'extract_early'
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        **TransformerMetaEstimator._parameter_constraints,
        "strategy": [StrOptions({"auto", *STRATEGIES})],
    }

    def __init__(
        self, transformer=None, *, strategy="auto", cv=5, random_state=None, verbose=0
    ):
        self.transformer = transformer
        self.strategy = strategy
        self.cv = cv
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y, sample_weight=None, groups=None):
        """Recommend a strategy, unless it is given, and fit its estimator.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `CNNFeatureTransformer` accepts.
        y : array of shape (n,), or indicator matrix of shape (n, n_labels)
            Class labels; or, for multilabel targets, a column of 0 and 1 per label.
        sample_weight : array of shape (n,), default=None
            Sample weights, for the evaluation and the fit. Images of weight 0 are
            ignored.
        groups : array of shape (n,), default=None
            Group labels (one plant, one patient): images of one group are in the same
            fold, and all or none of them in the validation set of a fine-tuned network.
            Other estimators do not use groups.

        Returns
        -------
        TransferClassifier
            The fitted classifier.

        Raises
        ------
        TypeError
            If `transformer` is not a `CNNFeatureTransformer`.
        ValueError
            If there are fewer than two classes, too few images to evaluate, a `layer`
            that the strategy does not use, or lengths are inconsistent.
        """
        fitted = copy.copy(self)
        fitted._fit(X, y, sample_weight, groups)
        self.__dict__ = fitted.__dict__  # a fit that fails changes nothing
        return self

    @property
    def classes_(self):
        """Class labels."""
        return self.estimator_.classes_

    def predict(self, X):
        """Predict the class of each image.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `fit` accepts.

        Returns
        -------
        array of shape (n,), or (n, n_labels)
            Predicted labels; for multilabel targets, an indicator matrix.
        """
        return self._configured_estimator().predict(X)

    @available_if(_may_have_proba)
    def predict_proba(self, X):
        """Predict class probabilities; a support vector machine has none.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `fit` accepts.

        Returns
        -------
        array of shape (n, n_classes)
            Probabilities, in the order of `classes_`.
        """
        return self._configured_estimator().predict_proba(X)

    @available_if(_may_have_proba)
    def predict_log_proba(self, X):
        """Predict the logarithms of class probabilities.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `fit` accepts.

        Returns
        -------
        array of shape (n, n_classes)
            Logarithms of the probabilities, in the order of `classes_`.
        """
        return self._configured_estimator().predict_log_proba(X)

    def decision_function(self, X):
        """Return the confidence scores of the classes.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `fit` accepts.

        Returns
        -------
        array of shape (n, n_classes), or (n,) for two classes
            Scores of the fitted estimator, in the order of `classes_`.
        """
        return self._configured_estimator().decision_function(X)

    def _fit(self, X, y, sample_weight, groups):
        task = task_of(y, "classification")
        labeled = label_images(self, X, y, sample_weight, groups, task)
        self.multilabel_ = task.name == "labels"
        seed = draw_seed(self.random_state)
        # The same for the evaluation and the recommended estimator.
        seed = fresh_seed() if seed is None else seed
        transformer = self._make_transformer(seed)
        self._check_layer(transformer)
        advisor, evaluated = None, labeled
        features: dict[str, Features] = {}
        if self.strategy == "auto":
            advisor = StrategyAdvisor(transformer, cv=self.cv, random_state=seed)
            read_images_of(advisor, X, reset=True)
            # The fitted transformer is not kept, or its network would be saved twice.
            _, evaluated, features = evaluate_strategies(
                advisor, labeled, [transformer], seed
            )
            strategy = advisor.strategy_
        else:
            class_map = None
            if not self.multilabel_:
                class_map = find_class_map(transformer, labeled.task.classes)
            strategy = build_strategy(
                *(self.strategy, ("It was requested.",), transformer),
                *(class_map, task.name),
            )
        self.advisor_, self.strategy_ = advisor, strategy
        self.estimator_ = clone(strategy.estimator)
        if isinstance(self.estimator_, Pipeline):
            fit_pipeline(self.estimator_, labeled, evaluated, features)
        else:
            fit_classifier(self.estimator_, labeled)

    def _check_layer(self, transformer):
        """Raise a ValueError for a layer that the requested strategy does not use."""
        layer = transformer.layer
        if layer == "last" or self.strategy in TRUNCATING:
            return
        backbone = get_backbone(transformer.backbone)
        if isinstance(layer, (list, tuple)) or (
            resolve_layer(backbone, layer).block
            != resolve_layer(backbone, "last").block
        ):
            raise ValueError(
                f"layer={layer!r} is not used by strategy={self.strategy!r}; only "
                f"{', '.join(TRUNCATING[1:])} truncate the network at another layer "
                "than 'last'."
            )

    def _configured_estimator(self):
        """Return the fitted estimator with the runtime parameters that were set since.

        It is a copy, for threads and for what the user has set on `estimator_`.
        """
        check_is_fitted(self)
        self._validate_params()
        at_fit = reader_of(self.strategy_.estimator)
        now = shared_parameters(self._make_transformer(), at_fit)
        changed = {
            name: now[name]
            for name in RUNTIME_PARAMETERS
            if name in now and now[name] != getattr(at_fit, name)
        }
        if not changed:
            return self.estimator_
        estimator = copy.copy(self.estimator_)
        if not isinstance(estimator, Pipeline):
            return estimator.set_params(**changed)
        (name, reader), *others = estimator.steps
        estimator.steps = [(name, copy.copy(reader).set_params(**changed)), *others]
        return estimator

    def __setstate__(self, state):
        if "strategy_" in state:  # a file of an earlier version has no such attribute
            state = {"multilabel_": False, **state}
        super().__setstate__(state)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        tags.classifier_tags.multi_label = True
        return tags


@inner_estimator.register
def _(estimator: TransferClassifier) -> Any:
    return estimator._configured_estimator() if is_fitted(estimator) else None


def fit_classifier(classifier: Any, labeled: LabeledImages) -> None:
    """Fit a pretrained or fine-tuned classifier."""
    metadata = {"sample_weight": labeled.weights}
    if isinstance(classifier, FineTunedCNNClassifier):
        metadata["groups"] = labeled.groups
    with labeled.original_positions():
        classifier.fit(labeled.X, labeled.y, **metadata)


def fit_pipeline(
    pipeline: Any,
    labeled: LabeledImages,
    evaluated: LabeledImages,
    by_layer: dict[str, Features],
) -> None:
    """Fit a feature pipeline, on the features of evaluated images as far as possible.

    `by_layer` are those of the evaluated images.
    """
    # The evaluated features have no column names, so neither have those to predict.
    transformer = pipeline[0].set_output(transform="default").fit(labeled.X)
    features = by_layer.get(transformer.layers_[0].name)
    if features is None:
        with labeled.original_positions():
            features = transformer.transform(labeled.X)
    elif len(features) < len(labeled.targets):
        features = _complete(features, transformer, labeled, evaluated)
    check_readable(features, labeled.positions)
    fit_linear(pipeline[1:], features, labeled.y, labeled.weights)


def _complete(
    evaluated_features: Features,
    transformer: Any,
    labeled: LabeledImages,
    evaluated: LabeledImages,
) -> Features:
    """Return the features of all images, given those of the evaluated ones."""
    is_evaluated = np.isin(labeled.positions, evaluated.positions)
    n_features = evaluated_features.shape[1]
    features = np.empty((len(is_evaluated), n_features), evaluated_features.dtype)
    features[is_evaluated] = evaluated_features
    others = labeled.subset(np.flatnonzero(~is_evaluated))
    with others.original_positions():
        features[~is_evaluated] = transformer.transform(others.X)
    return features
