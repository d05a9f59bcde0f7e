"""Rules: the recommended strategy by data set size and domain similarity."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass, field, replace
from numbers import Integral
from os import PathLike, fspath
from typing import Any

import numpy as np
from sklearn.base import MetaEstimatorMixin, clone, is_regressor
from sklearn.pipeline import Pipeline

from skltl._estimator import (
    ImageEstimator,
    clone_for_file,
    for_file,
    is_in_transit,
)
from skltl._random import draw_seed
from skltl._sklearn import Interval
from skltl.exceptions import shorten
from skltl.features import (
    CNNFeatureTransformer,
    make_feature_pipeline,
    poolable_layers,
)
from skltl.finetuning import FineTunedCNN, FineTunedCNNClassifier, FineTunedCNNRegressor
from skltl.networks import (
    Backbone,
    get_backbone,
    resolve_layer,
    resolve_weights,
)
from skltl.pretrained import PretrainedCNNClassifier, map_by_names

FEW = "{size} are few: fine-tuning would overfit."
MANY = "{size} are enough to fine-tune the network."
REASONS = {
    "as_is": (
        "All classes are among the categories of the pretrained classifier.",
        "It classifies the images without training.",
    ),
    "extract": (
        FEW,
        "They are similar to the pretraining data: the features of the last layer, the "
        "most specific ones, transfer best.",
    ),
    "extract_early": (
        FEW,
        "They differ from the pretraining data: the features of the last layer are too "
        "specific, those of earlier layers are more general.",
    ),
    "finetune": (
        MANY,
        "They are similar to the pretraining data: the pretrained weights are a good "
        "initialization of all layers.",
    ),
    "finetune_top": (
        MANY,
        "They differ from the pretraining data: the last layers are too specific and "
        "are removed, all others are fine-tuned.",
    ),
    "scratch": (
        "{size} are enough to train the network from scratch.",
        "They differ from the pretraining data: there is little to transfer.",
    ),
}
STRATEGIES = tuple(REASONS)

# How many images there are, by kind of targets.
SIZES = {
    "classes": "{n_images:,} images, {n_smallest:,} in the smallest class,",
    "labels": "{n_images:,} images, {n_smallest:,} with or without the rarest label,",
    "values": "{n_images:,} images",
}
SIMILARITIES = ("contained", "similar", "different")

# A data set below either of them is small: fine-tuning would overfit. With 16 images of
# each of 17 flowers fine-tuning gained nothing over a linear classifier, with 100 of
# each of 10 digits it did (see the user guide).
LARGE_N_IMAGES = 1_000
LARGE_N_PER_CLASS = 50

# From here on, training from scratch is an alternative for data that differ from the
# pretraining data: it is as good from COCO's 118,000 images on [He2019]_.
VERY_LARGE_N_IMAGES = 100_000

# Accuracy by which an earlier layer must be better than the last one to be chosen.
MIN_LEAD = 0.01

# A training step costs as much as three forward passes: one forward, two backward.
PASSES_PER_EPOCH = 3.0

# Epochs from scratch: those of torchvision's reference training for ImageNet.
SCRATCH_EPOCHS = 90

# Linear models of the last and of earlier layers, by kind of targets.
LINEAR = {
    "classes": [("classifier", "softmax"), ("classifier", "svm")],
    "labels": [("classifier", "softmax"), ("classifier", "svm")],
    "values": [("regressor", "ridge"), ("regressor", "ridge")],
}

# A longer value, such as a class map with a thousand classes, is not printed.
MAX_CHARACTERS = 200


@dataclass(frozen=True)
class Strategy:
    """A transfer learning strategy, the reasons for it and its estimator.

    Parameters
    ----------
    name : {"as_is", "extract", "extract_early", "finetune", "finetune_top", "scratch"}
        Name of the strategy.
    reasons : tuple of str
        Sentences that explain the recommendation.
    estimator : estimator
        Configured estimator, not fitted.

    Examples
    --------
    >>> from skltl import CNNFeatureTransformer, recommend_strategy
    >>> transformer = CNNFeatureTransformer("tiny")
    >>> strategy = recommend_strategy(5000, 10, "similar", transformer=transformer)
    >>> strategy.name, strategy.n_passes
    ('finetune', 31.0)
    >>> print(strategy.code)
    FineTunedCNNClassifier('tiny')
    """

    __module__ = "skltl"  # the path in saved files

    name: str
    reasons: tuple[str, ...]
    estimator: Any = field(repr=False)

    @property
    def code(self) -> str:
        """Code that builds the estimator, without parameters at their defaults.

        What has no code is a name: of a function, or ``backbone`` and ``class_map``.
        """
        estimator = self.estimator
        if not isinstance(estimator, Pipeline):
            return f"{self._function}({', '.join(_arguments(estimator))})"
        backbone, *others = _arguments(estimator[0])
        name, last = estimator.steps[-1]
        model = f"regressor={name!r}" if is_regressor(last) else repr(name)
        return f"{self._function}({', '.join([backbone, model, *others])})"

    @property
    def script(self) -> str:
        """Code that imports, builds and fits the estimator, for images `X` and `y`."""
        return (
            f"from skltl import {self._function}\n"
            f"estimator = {self.code}\n"
            "estimator.fit(X, y)"
        )

    @property
    def _function(self) -> str:
        """Name of the function or class that builds the estimator."""
        is_pipeline = isinstance(self.estimator, Pipeline)
        return "make_feature_pipeline" if is_pipeline else type(self.estimator).__name__

    @property
    def n_passes(self) -> float:
        """Cost of a fit, in forward passes of the whole network over the data."""
        estimator = self.estimator
        if isinstance(estimator, PretrainedCNNClassifier):
            return 1.0 if estimator.class_map == "learn" else 0.0
        if isinstance(estimator, FineTunedCNN):
            n_for_head = 1 if estimator.head_epochs else 0
            return n_for_head + PASSES_PER_EPOCH * estimator.finetune_epochs
        return float(estimator[0].n_views)


def recommend_strategy(
    n_images: int,
    n_classes: int,
    similarity: str,
    *,
    transformer: CNNFeatureTransformer | None = None,
    n_smallest: int | None = None,
    class_map: dict[Any, Any] | None = None,
    targets: str = "classes",
) -> Strategy:
    """Recommend a strategy by data set size and domain similarity.

    Parameters
    ----------
    n_images : int
        Number of labeled images.
    n_classes : int
        Number of classes, labels or values.
    similarity : {"contained", "similar", "different"}
        Similarity to the pretraining data: the classes are among the categories of the
        pretrained classifier, the images are similar to the pretraining data, or
        neither of them. `StrategyAdvisor` estimates it.
    transformer : CNNFeatureTransformer, default=None
        Transformer whose parameters configure the recommended estimator: backbone,
        weights, preprocessing, device and so on. A `layer` other than ``"last"`` is
        where ``"extract_early"`` and ``"finetune_top"`` truncate the network; with
        ``"last"``, they truncate it at about two thirds of its depth. ``None`` is
        ``CNNFeatureTransformer()``.
    n_smallest : int, default=None
        Number of images in the smallest class; ``None`` assumes balanced classes. Of
        labels, the number of images that have, or have not, the rarest one; ``None``
        assumes half of the images. Not used for values.
    class_map : dict, default=None
        Class map of the pretrained classifier, for ``"contained"``; ``None`` learns it
        from the images.
    targets : {"classes", "labels", "values"}, default="classes"
        Kind of the targets: one class of each image, any number of labels (an indicator
        matrix), or one or several values.

    Returns
    -------
    Strategy
        Name, reasons and estimator.

    Raises
    ------
    TypeError
        If `transformer` is not a `CNNFeatureTransformer`.
    ValueError
        If a number is not a positive integer, or `similarity` or `targets` is not one
        of the above.

    Notes
    -----
    A data set is small if it has less than 1,000 images or less than 50 in a class.

    - Small and similar: a linear classifier on the features of the last layer.
    - Small and different: a linear classifier on the features of an earlier layer.
    - Large and similar: all layers are fine-tuned, after the head.
    - Large and different: the last layers are removed and the others fine-tuned; from
      100,000 images on, the network is trained from scratch [He2019]_.

    These are the rules of [CS231n]_. Yosinski et al. [Yosinski2014]_ measured that the
    features of late layers transfer the less, the more the two tasks differ.

    References
    ----------
    .. [CS231n] Karpathy, "Transfer learning", notes of the course CS231n, Stanford,
       2015. https://cs231n.github.io/transfer-learning
    .. [Yosinski2014] Yosinski, Clune, Bengio, Lipson, "How transferable are features in
       deep neural networks?", NeurIPS, 2014.
    .. [He2019] He, Girshick, Dollár, "Rethinking ImageNet pre-training", ICCV, 2019.

    Examples
    --------
    >>> from skltl import CNNFeatureTransformer, recommend_strategy
    >>> transformer = CNNFeatureTransformer("tiny")
    >>> strategy = recommend_strategy(300, 5, "similar", transformer=transformer)
    >>> strategy.name
    'extract'
    >>> print(strategy.reasons[0])
    300 images, 60 in the smallest class, are few: fine-tuning would overfit.
    """
    check_transformer(transformer, "recommend_strategy")
    counts: dict[str, Any] = {"n_images": n_images, "n_classes": n_classes}
    if n_smallest is not None:
        counts["n_smallest"] = n_smallest
    for name, count in counts.items():
        is_count = not isinstance(count, bool) and isinstance(count, Integral)
        if not is_count or count < 1:
            got = shorten(repr(count))
            raise ValueError(f"{name} must be a positive integer, got {got}.")
    choices = ("similarity", similarity, SIMILARITIES), ("targets", targets, SIZES)
    for name, value, known in choices:
        if value not in list(known):  # it may be unhashable
            raise ValueError(
                f"{name} must be one of {', '.join(known)}; got {shorten(repr(value))}."
            )
    if similarity == "contained" and targets != "classes":
        raise ValueError(
            "similarity='contained': a pretrained classifier has classes, not "
            f"{targets}."
        )
    n_smallest = smallest_size(n_images, n_classes, n_smallest, targets)
    strategy = _choose(n_images, n_smallest, similarity)
    size = SIZES[targets].format(n_images=n_images, n_smallest=n_smallest)
    reasons = tuple(reason.format(size=size) for reason in REASONS[strategy])
    transformer = transformer or CNNFeatureTransformer()
    return build_strategy(strategy, reasons, transformer, class_map, targets)


def smallest_size(
    n_images: int, n_classes: int, n_smallest: int | None, targets: str
) -> int:
    """Return the number of images in the smallest class, for `relative_size`."""
    if targets == "values":
        return n_images
    if n_smallest is None:
        return n_images // (n_classes if targets == "classes" else 2)
    return n_smallest


def _choose(n_images: int, n_smallest: int, similarity: str) -> str:
    """Return the name of the recommended strategy."""
    is_large = relative_size(n_images, n_smallest) >= 1
    if similarity == "contained":
        return "as_is"
    if similarity == "similar":
        return "finetune" if is_large else "extract"
    if not is_large:
        return "extract_early"
    return "finetune_top" if n_images < VERY_LARGE_N_IMAGES else "scratch"


def relative_size(n_images: int, n_smallest: int) -> float:
    """Return the size of a data set; it is large from 1 on."""
    return min(n_images / LARGE_N_IMAGES, n_smallest / LARGE_N_PER_CLASS)


def similarity_of(lead: float) -> str:
    """Return the domain similarity, from the lead of the best earlier layer."""
    return "different" if lead >= MIN_LEAD else "similar"


def build_strategy(
    name: str,
    reasons: tuple[str, ...],
    transformer: CNNFeatureTransformer,
    class_map: dict[Any, Any] | None = None,
    targets: str = "classes",
) -> Strategy:
    """Configure the estimator of a strategy with the parameters of a transformer."""
    check_layer(transformer)
    is_values = targets == "values"
    fine_tuned: Any = FineTunedCNNRegressor if is_values else FineTunedCNNClassifier
    estimator: Any
    match name:
        case "as_is":
            estimator = PretrainedCNNClassifier(class_map=class_map or "learn")
        case "extract":
            model = LINEAR[targets][0]
            layer = _find_last_layer(transformer)
            estimator = _feature_pipeline(transformer, *model, layer=layer)
        case "extract_early":
            model = LINEAR[targets][1]
            layer = find_early_layer(transformer)
            estimator = _feature_pipeline(transformer, *model, layer=layer)
        case "finetune":
            estimator = fine_tuned(layer=_find_last_layer(transformer))
        case "finetune_top":
            estimator = fine_tuned(layer=find_early_layer(transformer))
        case _:
            estimator = fine_tuned(
                layer=_find_last_layer(transformer),
                head_init="random",
                head_epochs=0,
                finetune_epochs=SCRATCH_EPOCHS,
                head_lr=0.1,
                backbone_lr=0.1,
            )
    if not isinstance(estimator, Pipeline):
        estimator.set_params(**shared_parameters(transformer, estimator))
    if name == "scratch":
        estimator.set_params(weights=None)
    return Strategy(name, reasons, estimator)


def _feature_pipeline(
    transformer: CNNFeatureTransformer, kind: str, model: str, layer: str | int
) -> Pipeline:
    """Build a pipeline of the transformer, at a layer, and a linear model."""
    pipeline = make_feature_pipeline(
        **{kind: model}, random_state=transformer.random_state
    )
    return pipeline.set_params(feat=clone(transformer).set_params(layer=layer))


def shared_parameters(
    transformer: CNNFeatureTransformer, estimator: Any
) -> dict[str, Any]:
    """Return the parameters of a transformer that another estimator has, too."""
    names = estimator.get_params(deep=False).keys() - {"layer"}
    if isinstance(estimator, FineTunedCNN):
        names -= {"batch_size", "n_views"}  # there they are those of training
    values = transformer.get_params(deep=False)
    return {name: value for name, value in values.items() if name in names}


def check_layer(transformer: CNNFeatureTransformer) -> None:
    """Refuse a transformer with several layers, or with one that does not exist."""
    transformer._validate_params()
    layer: Any = transformer.layer
    if isinstance(layer, (list, tuple)):
        raise ValueError(
            "A strategy needs a transformer with a single layer; got "
            f"layer={shorten(repr(layer))}."
        )
    resolve_layer(get_backbone(transformer.backbone), layer)


def find_early_layer(transformer: CNNFeatureTransformer) -> Any:
    """Return the layer of a transformer, or the one at two thirds of the depth."""
    if transformer.layer != "last":
        return transformer.layer
    names = feature_map_layers(transformer) or list(poolable_layers(transformer))
    return names[round((len(names) - 1) * 2 / 3)]


def _find_last_layer(transformer: CNNFeatureTransformer) -> str:
    """Return the last layer that can be pooled, by the name ``"last"`` if it is that.

    Small images end before it, or are a smaller feature map there than `pooling`.
    """
    names = feature_map_layers(transformer) or list(poolable_layers(transformer))
    last = resolve_layer(get_backbone(transformer.backbone), "last").name
    return "last" if names[-1] == last else names[-1]


def feature_map_layers(transformer: CNNFeatureTransformer) -> list[str]:
    """Return the main layers that output a feature map to pool, from the input on.

    Shapes decide, not strides: the output of adaptive pooling is a feature map, too.
    """
    layouts = poolable_layers(transformer)
    return [name for name, layout in layouts.items() if not layout.is_vector]


def find_class_map(transformer: CNNFeatureTransformer, classes: Any) -> Any:
    """Return the category of each class, or None if a class is not a category."""
    backbone = get_backbone(transformer.backbone)
    weights = resolve_weights(backbone, transformer.weights)
    if weights is None:
        return None
    return map_by_names(classes, weights.categories or backbone.weights[0].categories)


def _arguments(estimator: Any) -> list[str]:
    """Return the backbone and the parameters that are not at their defaults."""
    parameters = inspect.signature(type(estimator)).parameters
    changed = []
    for name, value in estimator.get_params(deep=False).items():
        if name != "backbone" and repr(value) != repr(parameters[name].default):
            changed.append(f"{name}={_code_of(name, value)}")
    return [_code_of("backbone", estimator.backbone), *changed]


def _code_of(name: str, value: Any) -> str:
    """Return the code of a value; of what has none, the name of a variable."""
    own_name = getattr(value, "__qualname__", "")
    if own_name and getattr(sys.modules.get(value.__module__), own_name, None) is value:
        return own_name
    text = repr(_plain(value))
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name
    return text if len(text) <= MAX_CHARACTERS else name


def _plain(value: Any) -> Any:
    """Return a value with paths as text, and numbers of NumPy as those of Python."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, PathLike):
        return fspath(value)
    return value.item() if isinstance(value, np.generic) else value


class TransformerMetaEstimator(MetaEstimatorMixin, ImageEstimator):
    """Base of the meta-estimators of a `CNNFeatureTransformer`."""

    _parameter_constraints: dict = {
        "transformer": [CNNFeatureTransformer, None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    @property
    def backbone(self):
        """The `backbone` of the transformer."""
        transformer = self.transformer or CNNFeatureTransformer()
        return transformer.backbone

    @property
    def image_shape(self):
        """The `image_shape` of the transformer."""
        return getattr(self.transformer, "image_shape", None)

    @property
    def reader(self):
        """The `reader` of the transformer."""
        return getattr(self.transformer, "reader", None)

    @property
    def value_range(self):
        """The `value_range` of the transformer."""
        return getattr(self.transformer, "value_range", None)

    def _validate_params(self):
        check_transformer(self.transformer, type(self).__name__)
        super()._validate_params()
        if self.transformer is not None:
            self.transformer._validate_params()

    def _make_transformer(self, seed=None):
        """Return a clone of the transformer with a seed and the verbosity filled in."""
        transformer = clone(self.transformer or CNNFeatureTransformer())
        own_seed = draw_seed(transformer.random_state)
        return transformer.set_params(
            random_state=seed if own_seed is None else own_seed,
            verbose=transformer.verbose or self.verbose,
        )

    def __getstate__(self):
        return _for_file(super().__getstate__())

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__ = _for_file(self.__dict__)  # the file may say otherwise


def _for_file(state):
    """Return a state that, once loaded, writes nowhere and prints nothing."""
    if "strategy_" not in state or is_in_transit():  # not fitted, or no file
        return state
    strategy = state["strategy_"]
    strategy = replace(strategy, estimator=clone_for_file(strategy.estimator))
    return for_file({**state, "strategy_": strategy}, "transformer")


def reader_of(estimator: Any) -> Any:
    """Return the part of a recommended estimator that reads images."""
    return estimator[0] if isinstance(estimator, Pipeline) else estimator


def check_transformer(transformer: Any, owner: str) -> None:
    """Raise a TypeError if a `transformer` parameter is something else."""
    if transformer is None or isinstance(transformer, CNNFeatureTransformer):
        return
    got = shorten(repr(transformer))
    is_backbone = isinstance(transformer, (str, Backbone))
    raise TypeError(
        f"The 'transformer' parameter of {owner} must be a CNNFeatureTransformer or "
        f"None, got {got}."
        + (f" Pass CNNFeatureTransformer({got})." if is_backbone else "")
    )
