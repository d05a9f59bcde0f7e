"""``StrategyAdvisor``: data-driven selection of a transfer learning strategy."""

from __future__ import annotations

import copy
import html
from dataclasses import dataclass
from numbers import Integral
from textwrap import wrap
from typing import Any

from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from skltl._random import draw_seed
from skltl._sklearn import Interval, StrOptions, fit_context
from skltl.strategy._comparison import check_backbones
from skltl.strategy._cross_validation import label_images
from skltl.strategy._evaluation import evaluate_strategies
from skltl.strategy._rules import MIN_LEAD, TransformerMetaEstimator
from skltl.strategy._tasks import task_of

# More images pay if doubling their number improves accuracy by at least this.
MIN_GAIN = 0.01

REPORT_WIDTH = 80

SIMILARITY_TEXTS = {
    "contained": "All classes are among the categories of the pretrained classifier.",
    "similar": "The images are similar to the pretraining data: no earlier layer is "
    "better by {least}.",
    "assumed": "Similar images are assumed: with a single layer, there is no estimate.",
    "different": "The images differ from the pretraining data: an earlier layer is "
    "better by {least} or more.",
}


@dataclass(frozen=True)
class Wording:
    """Words of the report for one kind of targets."""

    data_set: str
    score: str
    heading: str
    least: str  # `MIN_LEAD`

    def difference(self, value: float, sign: str = "") -> str:
        """Return a difference of scores as text."""
        if self.score == "R²":
            return f"{value:{sign}.3f}"
        return f"{100 * value:{sign}.1f} percentage points"

    def error(self, value: float) -> str:
        """Return a standard error of a difference as text."""
        return self.difference(value).removesuffix(" percentage points")


WORDINGS = {
    "classes": Wording(
        "{n_images:,} images in {n_classes} classes, {n_smallest:,} in the smallest",
        "accuracy",
        "Accuracy of a linear classifier (standard error)",
        "1 percentage point",
    ),
    "labels": Wording(
        "{n_images:,} images, {n_classes} labels, {n_smallest:,} images with or "
        "without the rarest one",
        "accuracy",
        "Accuracy of a linear classifier, mean over the labels (standard error)",
        "1 percentage point",
    ),
    "values": Wording(
        "{n_images:,} images, number of values: {n_classes}",
        "R²",
        "R² of ridge regression (standard error)",
        "0.01",
    ),
}


class StrategyAdvisor(TransformerMetaEstimator):
    """Recommend a transfer learning strategy, based on cross-validated scores.

    The features of all main layers are extracted in one forward pass, and a linear
    classifier, or ridge regression for values, is cross-validated on those of each
    layer. If the last layer is the best,
    the images are similar to the pretraining data; if an earlier one is, they are
    different. Similarity and size of the data determine the strategy. Of several
    backbones, the one with the best layer is recommended.

    Parameters
    ----------
    transformer : CNNFeatureTransformer, default=None
        Transformer that extracts the features. Its parameters also configure the
        recommended estimator: backbone, weights, preprocessing, device and so on. All
        main layers are evaluated; a `layer` other than ``"last"`` replaces the best
        one in the recommended estimator. ``None`` is ``CNNFeatureTransformer()``.
    backbones : list of str or Backbone, default=None
        Backbones to compare, each in place of that of the transformer. All are
        evaluated on a subset of the images, a quarter but at least 200; those that are
        clearly worse than the best one are not evaluated on the others.
    task : {"auto", "classification", "regression"}, default="auto"
        Kind of the prediction: classes, or labels if the targets are an indicator
        matrix; or values. ``"auto"`` takes floats that are no integers for values.
    cv : int, default=5
        Number of cross-validation folds, at least 2. It is reduced to the number of
        images, or groups, in the smallest class.
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
    best_backbone_ : str
        Name of the backbone with the highest score. The other attributes concern
        this one.
    backbone_scores_, backbone_errors_ : dict of str to float
        Cross-validated score of a linear model at the best layer of each backbone, and
        its standard error.
    backbone_layers_ : dict of str to str
        Best layer of each backbone.
    backbone_sizes_ : dict of str to int
        Number of images that each backbone was evaluated on, less than `n_evaluated_`
        for those that were clearly worse than the best one.
    targets_ : {"classes", "labels", "values"}
        Kind of the targets. Scores are accuracies, averaged over the labels if there
        are several, or R², one minus the mean squared error of the test images divided
        by the variance of all images.
    strategy_ : Strategy
        Recommended strategy: `name`, `reasons`, `estimator`, and cost.
    similarity_ : {"contained", "similar", "different"}
        Similarity to the pretraining data.
    layer_scores_, layer_errors_ : dict of str to float
        Cross-validated score of a linear model at each main layer, and its standard
        error.
    best_layer_ : str
        Layer with the highest score.
    lead_ : tuple of float
        Difference in score between the best of the earlier layers and the last one,
        and its standard error.
    layer_ : str
        Layer that suits the images: `best_layer_` if they are different, otherwise the
        last one.
    size_scores_, size_errors_ : dict of int to float
        Cross-validated score at `layer_` by number of training images, and its
        standard error. The last one is that of `layer_scores_`.
    gain_ : tuple of float
        Difference in score from the last doubling of the number of training images,
        and its standard error.
    as_is_score_, as_is_error_ : float or None
        Accuracy of the pretrained classifier, and its standard error, if the classes
        are among its categories.
    class_map_ : dict or None
        Category of each class, if all classes are categories of the pretrained
        classifier.
    n_images_, n_classes_, n_smallest_ : int
        Number of images, of classes (labels, values), and of images in the smallest
        class (with or without the rarest label).
    seconds_per_pass_ : float or None
        Time of a forward pass over all images, decoding included, by the measurement
        here; ``None`` with a `cache`, which may have held features already.
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
    score or more; a smaller difference is not worth leaving the last one for. This
    is model selection, not a hypothesis test: among layers of equal quality an earlier
    one may win by chance, especially as the best of several. `lead_` has the
    standard error of the difference; all standard errors are corrected for the training
    images that the folds share [1]_. Up to 500 images, the cross-validation is repeated
    three times.

    Of several backbones, one is clearly worse than the best one if a t-test of the
    differences between their best layers, in the same folds and with the same
    correction, is significant at 2.5 % (one-sided). A network runs once on each image
    that it is evaluated on; all networks are in memory until the subset is evaluated.

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
        **TransformerMetaEstimator._parameter_constraints,
        "backbones": [list, tuple, None],
        "task": [StrOptions({"auto", "classification", "regression"})],
        "max_images": [Interval(Integral, 2, None, closed="left"), None],
    }

    def __init__(
        self,
        transformer=None,
        *,
        backbones=None,
        task="auto",
        cv=5,
        max_images=2000,
        random_state=None,
        verbose=0,
    ):
        self.transformer = transformer
        self.backbones = backbones
        self.task = task
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
        y : array of shape (n,), or of shape (n, n_labels) or (n, n_values)
            Class labels, an indicator matrix of labels, or values.
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
            If there are fewer than two classes, a class has a single image or group,
            all values are equal, lengths are inconsistent, or `backbones` is empty or
            has a name twice.
        """
        fitted = copy.copy(self)
        fitted._fit(X, y, sample_weight, groups)
        self.__dict__ = fitted.__dict__  # a fit that fails changes nothing
        return self

    def _fit(self, X, y, sample_weight, groups):
        task = task_of(y, self.task)
        labeled = label_images(self, X, y, sample_weight, groups, task)
        seed = draw_seed(self.random_state)
        transformers = [self._make_transformer(seed)]
        if self.backbones is not None:
            check_backbones(self.backbones)
            transformers = [
                clone(transformers[0]).set_params(backbone=backbone)
                for backbone in self.backbones
            ]
        self.transformer_, *_ = evaluate_strategies(self, labeled, transformers, seed)

    def __setstate__(self, state):
        if "strategy_" in state:  # a file of an earlier version has classes
            state = {"targets_": "classes", "seconds_per_pass_": None, **state}
        super().__setstate__(state)

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
        wording = WORDINGS[self.targets_]
        lines = [
            wording.data_set.format(
                n_images=self.n_images_,
                n_classes=self.n_classes_,
                n_smallest=self.n_smallest_,
            ),
            f"Evaluated on {self.n_evaluated_:,} images, {self.n_folds_}-fold "
            f"cross-validation{repeated}",
            "",
            wording.heading,
            *_describe_backbones(self),
            *_describe_layers(self),
        ]
        if strategy.name != "as_is":
            lines += _describe_sizes(self)
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
            f"  Cost of a fit: {_describe_cost(self)}",
            "",
        ]
        wrapped = [part for line in lines for part in _wrap(line)]
        return "\n".join([*wrapped, strategy.script])

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


def _wrap(line: str) -> list[str]:
    """Split a line of the report, with the same indent."""
    indent = " " * (len(line) - len(line.lstrip()))
    return wrap(line, REPORT_WIDTH, subsequent_indent=indent) or [""]


def _describe_backbones(advisor: Any) -> list[str]:
    """Return the lines about the scores by backbone, if there are several."""
    scores = advisor.backbone_scores_
    if len(scores) == 1:
        return []
    lines = ["  at the best layer of each backbone:"]
    rows = _table(scores, advisor.backbone_errors_)
    for (name, layer), row in zip(advisor.backbone_layers_.items(), rows, strict=True):
        size = advisor.backbone_sizes_[name]
        note = "  best" if name == advisor.best_backbone_ else ""
        if size < advisor.n_evaluated_:
            note = f"  clearly worse, on {size:,} images"
        lines.append(f"{row} at {layer}{note}")
    return lines


def _describe_layers(advisor: Any) -> list[str]:
    """Return the lines about the scores by layer."""
    scores, (lead, error) = advisor.layer_scores_, advisor.lead_
    wording = WORDINGS[advisor.targets_]
    is_one_of_many = len(advisor.backbone_scores_) > 1
    heading = f"of {advisor.best_backbone_}, by layer" if is_one_of_many else "by layer"
    lines = [f"  {heading}:", *_table(scores, advisor.layer_errors_)]
    lines[1 + list(scores).index(advisor.best_layer_)] += "  best"
    if len(scores) > 1 and lead:
        lines.append(
            f"  The best earlier layer is {'better' if lead > 0 else 'worse'} than the "
            f"last one by {wording.difference(abs(lead))} (standard error "
            f"{wording.error(error)})."
        )
    elif len(scores) > 1:
        lines.append("  The best earlier layer is as good as the last one.")
    return lines


def _describe_sizes(advisor: Any) -> list[str]:
    """Return the lines about the scores by number of training images."""
    lines = [
        f"  at {advisor.layer_}, by number of training images:",
        *_table(advisor.size_scores_, advisor.size_errors_),
    ]
    if len(advisor.size_scores_) < 2:
        return [*lines, "  There are too few images to estimate the gain from more."]
    wording = WORDINGS[advisor.targets_]
    gain, error = advisor.gain_
    *_, score = advisor.size_scores_.values()
    if min(gain, 1 - score) < MIN_GAIN:  # accuracy and R² cannot exceed 1
        outlook = "more images would change little."
    elif gain <= error:
        outlook = "within the standard error, so the gain from more images is open."
    else:
        outlook = "more images would improve it."
    return [
        *lines,
        f"  The last doubling of the training images changed the {wording.score} by "
        f"{wording.difference(gain, '+')} (standard error {wording.error(error)}):",
        f"  {outlook}",
    ]


def _describe_cost(advisor: Any) -> str:
    """Return the cost of a fit, in forward passes and as time on this machine."""
    n_passes, seconds = advisor.strategy_.n_passes, advisor.seconds_per_pass_
    passes = "forward pass" if n_passes == 1 else "forward passes"
    text = f"about {n_passes:g} {passes} over the data"
    if seconds is None or not n_passes:
        return text
    minutes = round(n_passes * seconds / 60)
    duration = f"{minutes:,} minutes" if minutes > 1 else "about a minute or less"
    return f"{text}, {duration} at the speed that was measured here"


def _table(scores: dict[Any, float], errors: dict[Any, float]) -> list[str]:
    """Return a line for each score, with its standard error."""
    width = max(12, *(len(str(name)) for name in scores))
    return [
        f"    {name:<{width}} {score:.3f} ({errors[name]:.3f})"
        for name, score in scores.items()
    ]


def _describe_similarity(advisor: Any) -> list[str]:
    """Return the lines about the similarity to the pretraining data."""
    is_measured = advisor.similarity_ != "contained"
    if is_measured and len(advisor.layer_scores_) == 1:
        return [SIMILARITY_TEXTS["assumed"]]
    least = WORDINGS[advisor.targets_].least
    lines = [SIMILARITY_TEXTS[advisor.similarity_].format(least=least)]
    lead, error = advisor.lead_
    if is_measured and abs(lead - MIN_LEAD) < error:
        lines.append("This is within the standard error and may be due to chance.")
    return lines
