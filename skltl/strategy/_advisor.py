"""``StrategyAdvisor``: data-driven selection of a transfer learning strategy."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, column_or_1d

from skltl._estimator import read_images_of
from skltl._random import draw_seed, fresh_seed
from skltl._sklearn import Interval, check_sample_weight, fit_context, take
from skltl.exceptions import ImageReadError, ImageTypeError, WeightsError
from skltl.features import CNNFeatureTransformer, make_feature_pipeline
from skltl.finetuning import encode_labels
from skltl.inference import n_pooled
from skltl.networks import block_shapes, get_backbone
from skltl.pretrained import PretrainedCNNClassifier, map_by_names
from skltl.strategy._rules import (
    MIN_LEAD,
    TransformerMetaEstimator,
    feature_map_layers,
    find_class_map,
    find_early_layer,
    recommend_strategy,
    shared_parameters,
    similarity_of,
)

# Up to this number of images the cross-validation is repeated: a fold of twenty images
# gives a coarse estimate.
FEW_IMAGES = 500
N_REPEATS = 3

# Subsets of the training images of each fold, for the learning curve.
TRAIN_FRACTIONS = (0.25, 0.5)

# Fraction of the images that the pretrained classifier is evaluated on.
PRETRAINED_FRACTION = 0.2

# More images pay if doubling their number improves accuracy by at least this.
MIN_GAIN = 0.01

REPORT_WIDTH = 80

SIMILARITY_TEXTS = {
    "contained": "All classes are among the categories of the pretrained classifier.",
    "similar": "The images are similar to the pretraining data: no earlier layer is "
    "better by 1 percentage point.",
    "different": "The images differ from the pretraining data: an earlier layer is "
    "better by 1 percentage point or more.",
}

Features = NDArray[np.float32]
Split = tuple[NDArray[np.int64], NDArray[np.int64]]


class StrategyAdvisor(TransformerMetaEstimator):
    """Recommend a transfer learning strategy, based on cross-validated accuracy.

    The features of all main layers are extracted in one forward pass, and a linear
    classifier is cross-validated on those of each layer. If the last layer is the best,
    the images are similar to the pretraining data; if an earlier one is, they are
    different. Similarity and size of the data determine the strategy.

    Parameters
    ----------
    transformer : CNNFeatureTransformer, default=None
        Transformer that extracts the features. Its parameters also configure the
        recommended estimator: backbone, weights, preprocessing, device and so on. All
        main layers are evaluated; a `layer` other than ``"last"`` replaces the best
        one in the recommended estimator. ``None`` is ``CNNFeatureTransformer()``.
    cv : int, default=5
        Number of cross-validation folds, at least 2. It is reduced to the number of
        images in the smallest class.
    max_images : int or None, default=2000
        Maximum number of images to evaluate on, sampled by class. Each class keeps at
        least as many images as there are folds. ``None`` evaluates on all images.
    random_state : int, RandomState instance or None, default=None
        Controls the folds, the sampling of images and the linear classifiers. Where
        that of the transformer is ``None``, it also controls random weights and the
        recommended estimator.
    verbose : int, default=0
        Verbosity level. If positive, a progress bar is shown.

    Attributes
    ----------
    transformer_ : CNNFeatureTransformer
        Fitted clone of the transformer that extracts the features of all main layers.
    strategy_ : Strategy
        Recommended strategy: `name`, `reasons`, `estimator`, and cost.
    similarity_ : {"contained", "similar", "different"}
        Similarity to the pretraining data.
    layer_scores_, layer_errors_ : dict of str to float
        Cross-validated accuracy of a linear classifier at each main layer, and its
        standard error.
    best_layer_ : str
        Layer with the highest accuracy.
    lead_ : tuple of float
        Difference in accuracy between the best of the earlier layers and the last one,
        and its standard error.
    layer_ : str
        Layer that suits the images: `best_layer_` if they are different, otherwise the
        last one.
    size_scores_, size_errors_ : dict of int to float
        Cross-validated accuracy at `layer_` by number of training images, and its
        standard error. The last one is that of `layer_scores_`.
    gain_ : tuple of float
        Difference in accuracy from the last doubling of the number of training images,
        and its standard error.
    as_is_score_, as_is_error_ : float or None
        Accuracy of the pretrained classifier, and its standard error, if the classes
        are among its categories.
    class_map_ : dict or None
        Category of each class, if all classes are categories of the pretrained
        classifier.
    n_images_, n_classes_, n_smallest_ : int
        Number of images, of classes, and of images in the smallest class.
    n_evaluated_, n_folds_, n_repeats_ : int
        Number of images evaluated on, of folds, and of repetitions of the
        cross-validation.
    n_features_in_, feature_names_in_ : int, array of shape (`n_features_in_`,)
        Number and names of features seen during `fit`. Only with `image_shape`.

    See Also
    --------
    recommend_strategy : The rules, for a known similarity.
    TransferClassifier : Fits the recommended estimator.

    Notes
    -----
    Images are different if an earlier layer is better than the last one by 0.01 in
    accuracy or more; a smaller difference is not worth leaving the last one for. This
    is model selection, not a hypothesis test: among layers of equal quality an earlier
    one may win by chance, especially as the best of several. `lead_` has the
    standard error of the difference; all standard errors are corrected for the training
    images that the folds share [1]_. Up to 500 images, the cross-validation is repeated
    three times.

    References
    ----------
    .. [1] Nadeau, Bengio, "Inference for the generalization error", Machine Learning,
       2003.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import CNNFeatureTransformer, StrategyAdvisor
    >>> digits, labels = load_digits(return_X_y=True)
    >>> transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    >>> advisor = StrategyAdvisor(transformer, random_state=0)
    >>> advisor.fit(digits[:100] / 16, labels[:100]).similarity_
    'different'
    """

    __module__ = "skltl"  # the path in saved files

    _parameter_constraints: dict = {
        "transformer": [CNNFeatureTransformer, None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "max_images": [Interval(Integral, 2, None, closed="left"), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self, transformer=None, *, cv=5, max_images=2000, random_state=None, verbose=0
    ):
        self.transformer = transformer
        self.cv = cv
        self.max_images = max_images
        self.random_state = random_state
        self.verbose = verbose

    @fit_context
    def fit(self, X, y, sample_weight=None, groups=None):
        """Evaluate the layers and recommend a strategy.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Images, of any kind that `CNNFeatureTransformer` accepts.
        y : array of shape (n,)
            Labels.
        sample_weight : array of shape (n,), default=None
            Sample weights, of the linear classifiers and of their accuracy. Images of
            weight 0 are ignored.
        groups : array of shape (n,), default=None
            Group labels (one plant, one patient): images of one group are in the same
            fold.

        Returns
        -------
        StrategyAdvisor
            The fitted advisor.

        Raises
        ------
        TypeError
            If `transformer` is not a `CNNFeatureTransformer`.
        ValueError
            If there are fewer than two classes, a class has a single image or group, or
            lengths are inconsistent.
        """
        fitted = copy.copy(self)
        fitted._evaluate(X, y, sample_weight, groups)
        self.__dict__ = fitted.__dict__  # a fit that fails changes nothing
        return self

    def report(self):
        """Describe the measurements and the recommendation.

        Returns
        -------
        str
            Several lines of text.
        """
        check_is_fitted(self)
        strategy, n_repeats = self.strategy_, self.n_repeats_
        repeated = f" repeated {n_repeats} times" if n_repeats > 1 else ""
        passes = "forward pass" if strategy.n_passes == 1 else "forward passes"
        lines = [
            f"{self.n_images_:,} images in {self.n_classes_} classes, "
            f"{self.n_smallest_:,} in the smallest",
            f"Evaluated on {self.n_evaluated_:,} images, {self.n_folds_}-fold "
            f"cross-validation{repeated}",
            "",
            "Accuracy of a linear classifier (standard error)",
            *_describe_layers(self),
            *([] if strategy.name == "as_is" else _describe_sizes(self)),
        ]
        if self.as_is_score_ is not None:
            lines.append(
                "Accuracy of the pretrained classifier without training: "
                f"{self.as_is_score_:.3f} ({self.as_is_error_:.3f})"
            )
        lines += [
            "",
            *_describe_similarity(self),
            "",
            f"Strategy: {strategy.name}",
            *(f"  {reason}" for reason in strategy.reasons),
            f"  Cost of a fit: about {strategy.n_passes:g} {passes} over the data",
        ]
        wrapped = [part for line in lines for part in _wrap(line)]
        return "\n".join([*wrapped, f"  {strategy.code}"])

    def _evaluate(self, X, y, sample_weight, groups):
        """Fit; return the evaluated images and their features by layer."""
        n_images = len(read_images_of(self, X, reset=True))
        labeled = label_images(X, y, n_images, sample_weight, groups)
        seed = draw_seed(self.random_state)
        transformer = self._make_transformer(seed)
        find_early_layer(transformer)  # raises if there is no such layer
        seed = fresh_seed() if seed is None else seed
        n_folds = min(self.cv, _count_smallest(labeled))
        evaluated = sample_images(labeled, self.max_images, n_folds, seed)
        splits = split_folds(evaluated.targets, evaluated.groups, n_folds, seed)
        with evaluated.original_positions():
            self.transformer_, features = extract_layers(transformer, evaluated.X)
        self.n_images_, self.n_classes_ = len(labeled.targets), len(labeled.classes)
        self.n_smallest_ = int(np.bincount(labeled.targets).min())
        self.n_evaluated_, self.n_folds_ = len(evaluated.targets), n_folds
        self.n_repeats_ = -(-len(splits) // n_folds)
        self.class_map_ = find_class_map(transformer, labeled.classes)
        as_is = score_pretrained(transformer, evaluated, self.class_map_, seed)
        by_layer = {
            layer: score_linear(some, evaluated, splits, seed)
            for layer, some in features.items()
        }
        self._compare_layers(by_layer, as_is)
        full = by_layer[self.layer_]
        some = features[self.layer_]
        self._compare_sizes(score_sizes(some, evaluated, splits, seed, full))
        if transformer.layer == "last":
            transformer.set_params(layer=self.best_layer_)
        self.strategy_ = recommend_strategy(
            *(self.n_images_, self.n_classes_, self.similarity_),
            transformer=transformer,
            n_smallest=self.n_smallest_,
            class_map=self.class_map_,
        )
        return evaluated, features

    def _compare_layers(self, by_layer, as_is):
        """Set the fitted attributes that follow from the scores by layer."""
        *earlier, last = by_layer
        scores = {layer: float(some.mean()) for layer, some in by_layer.items()}
        best = max(
            reversed(scores), key=lambda layer: scores[layer]
        )  # the last of ties
        self.layer_scores_, self.best_layer_ = scores, best
        self.layer_errors_ = self._standard_errors(by_layer)
        self.lead_ = 0.0, 0.0
        if earlier:
            best_earlier = max(earlier, key=lambda layer: scores[layer])
            leads = by_layer[best_earlier] - by_layer[last]
            self.lead_ = float(leads.mean()), self._standard_error(leads)
        self.similarity_ = similarity_of(self.lead_[0])
        self.as_is_score_ = None if as_is is None else as_is[0]
        self.as_is_error_ = None if as_is is None else as_is[1]
        if as_is is not None and sum(as_is) >= scores[best]:
            self.similarity_ = "contained"
        self.layer_ = best if self.similarity_ == "different" else last

    def _compare_sizes(self, by_size):
        """Set the fitted attributes that follow from the scores by size."""
        self.size_scores_ = {size: float(some.mean()) for size, some in by_size.items()}
        self.size_errors_ = self._standard_errors(by_size)
        self.gain_ = 0.0, 0.0
        if len(by_size) > 1:
            smaller, larger = list(by_size)[-2:]
            doublings = np.log2(larger / smaller)
            gains = (by_size[larger] - by_size[smaller]) / doublings
            self.gain_ = float(gains.mean()), self._standard_error(gains)

    def _standard_errors(self, scores):
        return {name: self._standard_error(some) for name, some in scores.items()}

    def _standard_error(self, values):
        """Return the standard error of a mean over splits.

        Splits share training images, for which it is corrected (see Notes).
        """
        test_per_train = 1 / (self.n_folds_ - 1)
        variance = values.var(ddof=1) * (1 / len(values) + test_per_train)
        return float(np.sqrt(variance))

    def _repr_html_inner(self):
        """Show the report of a fitted advisor in notebooks."""
        if not hasattr(self, "strategy_"):
            return super()._repr_html_inner()
        return f"<pre>{html.escape(self.report())}</pre>"

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        if hasattr(self, "strategy_") and "text/html" in bundle:
            return {"text/plain": self.report(), "text/html": self._repr_html_inner()}
        return bundle


@dataclass(frozen=True)
class LabeledImages:
    """Images with labels, and with weights and groups if there are any.

    `targets` index `classes`, `weights` have a mean of 1, and `positions` are those of
    the images in the ``X`` of the user.
    """

    X: Any
    positions: NDArray[np.int64]
    classes: NDArray[Any]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64] | None
    groups: NDArray[Any] | None

    def subset(self, rows: NDArray[np.int64]) -> LabeledImages:
        """Return some of the images."""
        return replace(
            self,
            X=take(self.X, rows),
            positions=self.positions[rows],
            targets=self.targets[rows],
            weights=None if self.weights is None else self.weights[rows],
            groups=None if self.groups is None else self.groups[rows],
        )

    @contextmanager
    def original_positions(self) -> Iterator[None]:
        """Let errors of images name their positions in the ``X`` of the user."""
        try:
            yield
        except (ImageReadError, ImageTypeError) as error:
            position = int(self.positions[error.index])
            raise type(error)(position, *error.args[1:]) from error


def label_images(
    X: Any, y: Any, n_images: int, sample_weight: Any, groups: Any
) -> LabeledImages:
    """Check labels, weights and groups, and leave out images of weight 0."""
    classes, targets = encode_labels(y, n_images)
    positions = np.arange(n_images)
    weights = None
    if groups is not None:
        groups = column_or_1d(groups)
        check_consistent_length(positions, groups)
    if sample_weight is not None:
        weights = check_sample_weight(
            sample_weight, targets, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError("sample_weight is zero for all training samples.")
        # As in fine-tuning, only their ratios matter: strategies are compared.
        weights = weights / weights[weights > 0].mean()
    labeled = LabeledImages(X, positions, classes, targets, weights, groups)
    if weights is None or weights.all():
        return labeled
    rows = np.flatnonzero(weights)
    classes, targets = encode_labels(classes[targets[rows]], len(rows))
    return replace(labeled.subset(rows), classes=classes, targets=targets)


def _count_smallest(labeled: LabeledImages) -> int:
    """Count the images, or groups, of the class that has the fewest."""
    counts = np.bincount(labeled.targets)
    unit = "image"
    if counts.min() > 1 and labeled.groups is not None:
        unit = "group of images"
        members = [labeled.targets == target for target in range(len(labeled.classes))]
        counts = np.array([len(np.unique(labeled.groups[some])) for some in members])
    if counts.min() < 2:
        rarest = repr(labeled.classes.tolist()[counts.argmin()])[:80]
        raise ValueError(
            f"The class {rarest} has a single {unit}, but cross-validation needs at "
            "least two of each class."
        )
    return int(counts.min())


def sample_images(
    labeled: LabeledImages, max_images: int | None, n_per_class: int, seed: int
) -> LabeledImages:
    """Sample images by class, at least `n_per_class` of each or all that there are."""
    rows = np.arange(len(labeled.targets))
    if max_images is None or len(rows) <= max_images:
        return labeled
    fraction = Fraction(max_images, len(rows))
    rows = _sample_rows(rows, labeled.targets, fraction, n_per_class, seed)
    return labeled.subset(rows)


def _sample_rows(
    rows: NDArray[np.int64],
    targets: NDArray[np.int64],
    fraction: float | Fraction,
    n_per_class: int,
    seed: int | list[int],
) -> NDArray[np.int64]:
    """Sample a fraction of some rows by class; return them sorted."""
    rng = np.random.default_rng(seed)
    chosen = []
    for target in np.unique(targets[rows]):
        members = rng.permutation(rows[targets[rows] == target])
        n_wanted = max(n_per_class, round(fraction * len(members)))
        chosen.append(members[:n_wanted])
    return np.sort(np.concatenate(chosen))


def split_folds(
    targets: NDArray[np.int64], groups: NDArray[Any] | None, n_folds: int, seed: int
) -> list[Split]:
    """Split images into stratified folds, repeatedly if there are few images.

    Folds without test images or with a single training class are left out.
    """
    n_repeats = N_REPEATS if len(targets) <= FEW_IMAGES else 1
    if groups is None:
        folds = RepeatedStratifiedKFold(
            n_splits=n_folds, n_repeats=n_repeats, random_state=seed
        )
        return list(folds.split(targets, targets))
    rng = np.random.RandomState(seed)
    splits = []
    for _ in range(n_repeats):
        seed_of_folds = rng.randint(2**31 - 1)
        grouped = StratifiedGroupKFold(
            n_folds, shuffle=True, random_state=seed_of_folds
        )
        splits += [
            (train, test)
            for train, test in grouped.split(targets, targets, groups)
            if len(test) and len(np.unique(targets[train])) > 1
        ]
    if len(splits) < 2:
        raise ValueError(
            "The groups leave fewer than two folds with two classes to train on. "
            "Provide classes that occur in several groups."
        )
    return splits


def extract_layers(transformer: Any, X: Any) -> tuple[Any, dict[str, Features]]:
    """Extract the features of all main layers; return the fitted transformer, too."""
    layers = feature_map_layers(
        transformer.backbone, transformer.image_size, transformer.pooling
    )
    if not layers:
        name = get_backbone(transformer.backbone).name
        raise ValueError(f"{name!r} has no layer with a feature map to compare.")
    fitted = clone(transformer).set_params(layer=layers).fit(X)
    features = fitted.transform(X)
    shapes = block_shapes(fitted.backbone_, fitted.preprocessing_.crop_size)
    widths = [
        n_pooled(shapes[point.block], fitted.pooling_) for point in fitted.layers_
    ]
    by_layer = np.split(features, np.cumsum(widths)[:-1], axis=1)
    return fitted, dict(zip(layers, by_layer, strict=True))


def score_linear(
    features: Features, labeled: LabeledImages, splits: list[Split], seed: int
) -> NDArray[np.float64]:
    """Return the accuracy of a linear classifier in each split."""
    probe = make_feature_pipeline(classifier="svm", random_state=seed)[1:]
    scores = []
    for train, test in splits:
        y, weights = labeled.targets, labeled.weights
        w_train = None if weights is None else weights[train]
        w_test = None if weights is None else weights[test]
        fit_linear(probe, features[train], y[train], w_train)
        predicted = probe.predict(features[test])
        scores.append(accuracy_score(y[test], predicted, sample_weight=w_test))
    return np.array(scores, dtype=np.float64)


def score_sizes(
    features: Features,
    labeled: LabeledImages,
    splits: list[Split],
    seed: int,
    full_scores: NDArray[np.float64],
) -> dict[int, NDArray[np.float64]]:
    """Return the accuracy by number of training images, in each split.

    `full_scores` are those with all training images of a split.
    """
    scores = {}
    for fraction in TRAIN_FRACTIONS:
        smaller = [
            (_sample_rows(train, labeled.targets, fraction, 1, [seed, number]), test)
            for number, (train, test) in enumerate(splits)
        ]
        size = round(np.mean([len(train) for train, _ in smaller]))
        scores[size] = score_linear(features, labeled, smaller, seed)
    scores[round(np.mean([len(train) for train, _ in splits]))] = full_scores
    return dict(sorted(scores.items()))


def fit_linear(
    steps: Pipeline, features: Any, y: NDArray[Any], sample_weight: Any
) -> None:
    """Fit the scaler and the classifier of a feature pipeline, both with weights."""
    weights = {f"{name}__sample_weight": sample_weight for name, _ in steps.steps}
    # Parameters of steps by name, whether the user enables metadata routing or not.
    with config_context(enable_metadata_routing=False):
        steps.fit(features, y, **weights)


def score_pretrained(
    transformer: Any, labeled: LabeledImages, class_map: Any, seed: int
) -> tuple[float, float] | None:
    """Return the accuracy of the pretrained classifier and its standard error.

    It is evaluated on a sample of the images, and only if it knows their classes.
    """
    if class_map is None:
        return None
    targets, classes = labeled.targets, labeled.classes
    n_most = max(len(classes), round(PRETRAINED_FRACTION * len(targets)))
    some = sample_images(labeled, min(n_most, len(targets) // 2), 1, seed)
    classifier: Any = PretrainedCNNClassifier()
    classifier.set_params(**shared_parameters(transformer, classifier))
    with some.original_positions():
        try:
            categories = classifier.fit(some.X).categories_.tolist()
        except WeightsError:  # the network has no head
            return None
        if map_by_names(classes, categories) is None:  # a file with another head
            return None
        classifier.set_params(class_map=class_map).fit(some.X)
        predicted = classifier.predict(some.X)
    is_right = predicted == classes[some.targets]
    score = float(np.average(is_right, weights=some.weights))
    return score, float(np.sqrt(score * (1 - score) / len(is_right)))


def _wrap(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return wrap(line, REPORT_WIDTH, subsequent_indent=indent) or [""]


def _describe_layers(advisor: Any) -> list[str]:
    lines = ["  by layer:", *_table(advisor.layer_scores_, advisor.layer_errors_)]
    lines[1 + list(advisor.layer_scores_).index(advisor.best_layer_)] += "  best"
    lead, error = advisor.lead_
    if len(advisor.layer_scores_) == 1:
        return lines
    if not lead:
        return [*lines, "  The best earlier layer is as good as the last one."]
    comparison = "better" if lead > 0 else "worse"
    return [
        *lines,
        f"  The best earlier layer is {100 * abs(lead):.1f} percentage points "
        f"{comparison} than the last one (standard error {100 * error:.1f}).",
    ]


def _describe_sizes(advisor: Any) -> list[str]:
    lines = [
        f"  at {advisor.layer_}, by number of training images:",
        *_table(advisor.size_scores_, advisor.size_errors_),
    ]
    if len(advisor.size_scores_) < 2:
        return [*lines, "  There are too few images to estimate the gain from more."]
    gain, error = advisor.gain_
    *_, score = advisor.size_scores_.values()
    if min(gain, 1 - score) < MIN_GAIN:  # accuracy cannot exceed 1
        outlook = "more images would change little."
    elif gain <= error:
        outlook = "within the standard error, so the gain from more images is open."
    else:
        outlook = "more images would improve it."
    return [
        *lines,
        "  The last doubling of the training images changed the accuracy by "
        f"{100 * gain:+.1f} percentage points (standard error {100 * error:.1f}):",
        f"  {outlook}",
    ]


def _table(scores: dict[Any, float], errors: dict[Any, float]) -> list[str]:
    return [
        f"    {name:<12} {score:.3f} ({errors[name]:.3f})"
        for name, score in scores.items()
    ]


def _describe_similarity(advisor: Any) -> list[str]:
    lead, error = advisor.lead_
    if advisor.similarity_ != "contained" and len(advisor.layer_scores_) == 1:
        return [
            "Similar images are assumed: with a single layer, there is no estimate."
        ]
    lines = [SIMILARITY_TEXTS[advisor.similarity_]]
    if advisor.similarity_ != "contained" and abs(lead - MIN_LEAD) < error:
        lines.append("This is within the standard error and may be due to chance.")
    return lines
