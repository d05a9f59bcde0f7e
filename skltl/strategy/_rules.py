"""Rules: which strategy to use, by size of the data and domain similarity."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from sklearn.base import clone
from sklearn.pipeline import Pipeline

from skltl._estimator import LEFT_OUT_OF_FILES
from skltl.exceptions import shorten
from skltl.features import CNNFeatureTransformer, make_feature_pipeline
from skltl.finetuning import FineTunedCNNClassifier
from skltl.networks import Backbone, block_shapes, get_backbone, resolve_layer, skeleton
from skltl.pretrained import PretrainedCNNClassifier

# A longer value, such as a map of a thousand classes, is not printed.
MOST_CHARACTERS = 200


def code_of(estimator: Any) -> str:
    """Return code that makes an estimator: one of skltl's, or its feature pipeline."""
    if not isinstance(estimator, Pipeline):
        return f"{type(estimator).__name__}({', '.join(_arguments(estimator))})"
    backbone, *others = _arguments(estimator[0])
    classifier = repr(estimator.steps[-1][0])
    return f"make_feature_pipeline({', '.join([backbone, classifier, *others])})"


def _arguments(estimator: Any) -> list[str]:
    """Return the backbone and the parameters that are not at their defaults."""
    parameters = inspect.signature(type(estimator)).parameters
    changed = [
        f"{name}={_shown(value)}"
        for name, value in estimator.get_params(deep=False).items()
        if name != "backbone" and repr(value) != repr(parameters[name].default)
    ]
    return [_shown(estimator.backbone), *changed]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else "..."


# Below either of them a data set counts as small: there is too little to change a
# network by. With 16 images of each of 17 flowers fine-tuning gained nothing over a
# linear classifier, with 100 of each of 10 digits it did (see the user guide).
LARGE_N_IMAGES = 1_000
LARGE_N_PER_CLASS = 50

# From here on, images that are unlike those of the pretraining may be learned from
# scratch: that is as good from COCO's 118,000 images on [He2019]_.
VERY_LARGE_N_IMAGES = 100_000

# By how much accuracy an earlier layer must be ahead of the last one to be chosen.
LEAD_THAT_COUNTS = 0.01

SIMILARITIES = ("contained", "similar", "different")

# A training step costs as much as three forward passes: one forward, two backward.
PASSES_PER_EPOCH = 3.0

# Epochs from scratch: what torchvision's reference recipe for ImageNet takes.
SCRATCH_EPOCHS = 90


@dataclass(frozen=True)
class Strategy:
    """A way of transfer, why it is taken, and the estimator that takes it.

    Parameters
    ----------
    name : {"as_is", "extract", "extract_early", "finetune", "finetune_top", "scratch"}
        Which way.
    reasons : tuple of str
        Sentences that say why.
    estimator : estimator
        Configured, not fitted.
    n_passes : float
        What its fit costs, in forward passes of the whole network over the data.

    Examples
    --------
    >>> from skltl import recommend_strategy
    >>> strategy = recommend_strategy(5000, 10, "similar", backbone="tiny")
    >>> strategy
    Strategy(name='finetune', reasons=(...), n_passes=31.0)
    >>> print(strategy.code)
    FineTunedCNNClassifier('tiny')
    """

    name: str
    reasons: tuple[str, ...]
    estimator: Any = field(repr=False)
    n_passes: float

    @property
    def code(self) -> str:
        """The estimator as code to run, with the parameters that are no defaults."""
        return code_of(self.estimator)


def portable(strategy: Strategy) -> Strategy:
    """Return a strategy for a file: one that is loaded writes no features anywhere."""
    estimator = clone(strategy.estimator)
    reader = estimator[0] if isinstance(estimator, Pipeline) else estimator
    known = reader.get_params()
    unset = LEFT_OUT_OF_FILES
    reader.set_params(**{name: unset[name] for name in unset if name in known})
    return replace(strategy, estimator=estimator)


def relative_size(n_images: int, n_smallest: int) -> float:
    """Return the size of a data set in units of where large ones begin.

    Parameters
    ----------
    n_images : int
        Labelled images.
    n_smallest : int
        Images of the smallest class.

    Returns
    -------
    float
        At least 1 for a large data set, below 1 for a small one.
    """
    return min(n_images / LARGE_N_IMAGES, n_smallest / LARGE_N_PER_CLASS)


def similarity_of(lead: float) -> str:
    """Return ``"different"`` if the best earlier layer is ahead by enough accuracy."""
    return "different" if lead >= LEAD_THAT_COUNTS else "similar"


def recommend_strategy(
    n_images: int,
    n_classes: int,
    similarity: str,
    *,
    backbone: str | Backbone = "resnet50",
    layer: str | None = None,
    n_smallest: int | None = None,
    class_map: dict[Any, Any] | None = None,
    **parameters: Any,
) -> Strategy:
    """Recommend a way of transfer, by the size of the data and their likeness.

    Parameters
    ----------
    n_images : int
        Labelled images that there are.
    n_classes : int
        Classes that are to be told apart.
    similarity : {"contained", "similar", "different"}
        The classes are among the categories of the network; the images are like those
        that it was trained on; or they are not. `StrategyAdvisor` measures this.
    backbone : str or Backbone, default="resnet50"
        The network.
    layer : str, default=None
        Where to cut if not at the end; ``None`` is the main cut point at about two
        thirds of the depth.
    n_smallest : int, default=None
        Images of the smallest class; ``None`` takes all classes for equal.
    class_map : dict, default=None
        For ``"contained"``: which categories the classes are; ``None`` is to be learned
        from images.
    **parameters
        Further parameters of the estimator, such as `weights` and `image_shape`. The
        pretrained classifier leaves out those of training.

    Returns
    -------
    Strategy
        The way, the reasons, and the estimator.

    Raises
    ------
    ValueError
        If a number is no positive integer, or `similarity` is another word.

    Notes
    -----
    Small and similar: a linear classifier on the last cut. Small and different: a
    linear support vector machine on an earlier one. Large and similar: all layers are
    fine-tuned, after the head. Large and different: fine-tuning with the top left out,
    or, from 100,000 images on, training from scratch [He2019]_. These are the rules
    of [CS231n]_; Yosinski et al. [Yosinski2014]_ measured what is behind them: the more
    two tasks differ, the less is gained from late layers. Small means less than 1,000
    images or less than 50 of a class.

    References
    ----------
    .. [CS231n] Karpathy, "Transfer learning", notes of the course CS231n, Stanford,
       2015. https://cs231n.github.io/transfer-learning
    .. [Yosinski2014] Yosinski, Clune, Bengio, Lipson, "How transferable are features in
       deep neural networks?", NeurIPS, 2014.
    .. [He2019] He, Girshick, Dollár, "Rethinking ImageNet pre-training", ICCV, 2019.

    Examples
    --------
    >>> from skltl import recommend_strategy
    >>> strategy = recommend_strategy(300, 5, "similar", backbone="tiny")
    >>> strategy.name
    'extract'
    >>> print(strategy.reasons[0])
    300 images, 60 of the smallest class, are few: a network would learn them ...
    """
    numbers: dict[str, Any] = {"n_images": n_images, "n_classes": n_classes}
    if n_smallest is not None:
        numbers["n_smallest"] = n_smallest
    for name, number in numbers.items():
        is_count = not isinstance(number, bool) and isinstance(number, Integral)
        if not is_count or number < 1:
            got = shorten(repr(number))
            raise ValueError(f"{name} must be a positive integer, got {got}.")
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"similarity must be one of {', '.join(SIMILARITIES)}; got "
            f"{shorten(repr(similarity))}."
        )
    if n_smallest is None:
        n_smallest = n_images // n_classes
    name, reasons = _choose(n_images, n_smallest, similarity)
    return build_strategy(
        name,
        reasons,
        backbone=backbone,
        layer=layer,
        class_map=class_map,
        **parameters,
    )


def build_strategy(
    name: str,
    reasons: tuple[str, ...] = (),
    *,
    backbone: str | Backbone = "resnet50",
    layer: str | None = None,
    class_map: dict[Any, Any] | None = None,
    **parameters: Any,
) -> Strategy:
    """Configure the estimator of a way of transfer.

    Parameters
    ----------
    name : str
        Which way; see `Strategy`.
    reasons : tuple of str, default=()
        Why.
    backbone, layer, class_map, **parameters
        See `recommend_strategy`.

    Returns
    -------
    Strategy
        With its estimator and its costs.
    """
    if layer is not None:
        resolve_layer(get_backbone(backbone), layer)  # is there such a layer
    if name == "as_is":
        parameters = {
            key: one for key, one in parameters.items() if key not in TRAINING_ONLY
        }
        parameters["class_map"] = class_map or "learn"
    early = layer or _early_layer(backbone)
    estimator = STRATEGIES[name](backbone, early, parameters)
    return Strategy(name, reasons, estimator, _count_passes(estimator))


def _choose(
    n_images: int, n_smallest: int, similarity: str
) -> tuple[str, tuple[str, ...]]:
    """Return the name of a box, and why it is that one."""
    is_large = relative_size(n_images, n_smallest) >= 1
    have = f"{n_images:,} images, {n_smallest:,} of the smallest class,"
    if similarity == "contained":
        return "as_is", (
            "The classes are among the categories that the network knows.",
            "It needs no training to tell them apart.",
        )
    if not is_large:
        few = f"{have} are few: a network would learn them by heart."
        if similarity == "similar":
            return "extract", (
                few,
                "They are like those the network knows, so its last features, the most "
                "special ones, are the best to classify by.",
            )
        return "extract_early", (
            few,
            "They are unlike those the network knows, so its last features are too "
            "special: earlier ones are more general.",
        )
    many = f"{have} are enough to fine-tune a network."
    if similarity == "similar":
        return "finetune", (
            many,
            "They are like those the network knows, so all its layers are a good "
            "beginning.",
        )
    if n_images >= VERY_LARGE_N_IMAGES:
        return "scratch", (
            f"{have} are enough to train a network from scratch.",
            "They are unlike those the network knows, so there is little to transfer.",
        )
    return "finetune_top", (
        many,
        "They are unlike those the network knows, so its last layers are left out, and "
        "all before them learn.",
    )


def map_layers(backbone: str | Backbone, image_size: int | None = None) -> list[str]:
    """Return the main cut points that give a feature map, from the image on.

    Parameters
    ----------
    backbone : str or Backbone
        The network.
    image_size : int, default=None
        Height and width of what it sees; ``None`` is the usual size.

    Returns
    -------
    list of str
        Their names. Where the map ends, as in fully connected layers, is decided by the
        shape: a map of one pixel, behind adaptive pooling, is one, too.

    Raises
    ------
    ValueError
        If images of this size cannot cross the network.
    """
    record = get_backbone(backbone)
    shapes = block_shapes(record, image_size or record.preprocessing.crop_size)
    cut_points = skeleton(record).cut_points
    return [name for name, block in cut_points.items() if len(shapes[block]) == 3]


def _early_layer(backbone: str | Backbone) -> str:
    """Return the main cut point with a feature map at about two thirds of the depth."""
    names = map_layers(backbone) or list(skeleton(get_backbone(backbone)).cut_points)
    return names[round((len(names) - 1) * 2 / 3)]


def _count_passes(estimator: Any) -> float:
    """Return what a fit costs, in forward passes of the whole network."""
    if isinstance(estimator, PretrainedCNNClassifier):
        return 1.0 if estimator.class_map == "learn" else 0.0
    if not isinstance(estimator, FineTunedCNNClassifier):
        return 1.0
    n_head = 1 if estimator.head_epochs else 0
    return n_head + PASSES_PER_EPOCH * estimator.finetune_epochs


def _as_is(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    return PretrainedCNNClassifier(backbone, **parameters)


def _extract(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    return make_feature_pipeline(backbone, "softmax", **parameters)


def _extract_early(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    return make_feature_pipeline(backbone, "svm", layer=layer, **parameters)


def _finetune(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    return FineTunedCNNClassifier(backbone, **parameters)


def _finetune_top(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    return FineTunedCNNClassifier(backbone, layer=layer, **parameters)


def _scratch(backbone: Any, layer: str, parameters: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {
        "head_epochs": 0,
        "finetune_epochs": SCRATCH_EPOCHS,
        "head_lr": 0.1,
    }
    settings |= {"backbone_lr": 0.1, "head_init": "random"}
    return FineTunedCNNClassifier(
        backbone, **{**settings, **parameters, "weights": None}
    )


# What `recommend_strategy` may be given for other ways than the pretrained classifier,
# which trains nothing and keeps nothing.
TRAINING_ONLY = (
    FineTunedCNNClassifier().get_params().keys()
    | CNNFeatureTransformer().get_params().keys()
) - PretrainedCNNClassifier().get_params().keys()

Build = Callable[[Any, str, dict[str, Any]], Any]

STRATEGIES: dict[str, Build] = {
    "as_is": _as_is,
    "extract": _extract,
    "extract_early": _extract_early,
    "finetune": _finetune,
    "finetune_top": _finetune_top,
    "scratch": _scratch,
}
