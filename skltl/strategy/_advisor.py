"""``StrategyAdvisor``: measure how near the data are to what a network knows."""

from __future__ import annotations

import html
from numbers import Integral
from os import PathLike

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from skltl._device import DTYPES
from skltl._estimator import ImageEstimator
from skltl._randomness import draw_seed, fresh_seed
from skltl._validation import Interval, StrOptions, fit_context, take
from skltl.backbones import (
    ENGINES,
    Backbone,
    get_backbone,
    list_layers,
    resolve_weights,
)
from skltl.classifiers import (
    PretrainedCNNClassifier,
    encode_labels,
    map_by_names,
)
from skltl.exceptions import WeightsError
from skltl.features import CNNFeatureTransformer
from skltl.strategy._depth_probe import probe_depths, probe_sizes
from skltl.strategy._recommendation import recommend_strategy
from skltl.strategy._report import write_report

# What the estimators that are advised have in common with the advisor.
SHARED_PARAMETERS = (
    "weights",
    "image_size",
    "image_shape",
    "device",
    "precision",
    "engine",
    "decode",
    "cache",
    "n_jobs",
    "random_state",
    "verbose",
)

# By how much accuracy an earlier cut must be ahead.
LEAD_THAT_COUNTS = 0.01

# How many of the pictures are looked at to see how the network does as it is.
SHARE_AS_IS = 0.2


class StrategyAdvisor(ImageEstimator, BaseEstimator):
    """Advise on the way of transfer, by measuring instead of guessing.

    One pass of the network gives the features at every cut point. A linear classifier,
    cross-validated at each, tells how near the pictures are to what the network knows:
    if the last cut is the best, they are similar; if an earlier one is, they are not.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own.
    weights : str, path or None, default="imagenet"
        As for `CNNFeatureTransformer`.
    cv : int, default=5
        Folds, at least 2; fewer if a class has fewer pictures.
    max_images : int or None, default=2000
        How many pictures are looked at, drawn by class; but of each class at least as
        many as there are folds. ``None`` is all.
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
        As for `CNNFeatureTransformer`. What is advised can then use the same features.
    n_jobs : int, default=None
        Threads that decode pictures.
    random_state : int, RandomState instance or None, default=None
        Of the folds, and of which pictures are looked at.
    verbose : int, default=0
        Whether a progress bar is shown.

    Attributes
    ----------
    strategy_ : Strategy
        The advice: its `name`, its `reasons`, the `estimator`, and its costs.
    similarity_ : {"contained", "similar", "different"}
        How near the pictures are to what the network knows.
    layer_scores_ : dict of str to float
        Cross-validated accuracy of a linear classifier at each main cut point.
    best_layer_ : str
        The cut point with the best of them.
    lead_ : tuple of float
        By how much the best of the earlier cuts is ahead of the last one, negative if
        it is behind, and the standard error of this.
    size_scores_ : dict of int to float
        Accuracy there, by number of training pictures.
    as_is_score_ : float or None
        Accuracy of the network as it is, if its categories contain the classes.
    class_map_ : dict or None
        Which categories the classes are, if all of them are some.
    n_images_, n_classes_ : int
        The size of the data.
    n_looked_at_, n_folds_ : int
        How many pictures were looked at, in how many folds.

    See Also
    --------
    recommend_strategy : The same rules without measuring.
    TransferClassifier : Advice that is taken at once.

    Notes
    -----
    Pictures are different if an earlier cut is ahead of the last one by a point (0.01)
    of accuracy or more; less than that is not worth leaving the last one for. This
    chooses a cut, it tests no hypothesis: of cuts that are equally good, an earlier one
    may be ahead by luck, all the more as it is the best of several. `lead_` says how
    large luck may be. Up to 500 pictures, the cross-validation is repeated three times.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skltl import StrategyAdvisor
    >>> digits, labels = load_digits(return_X_y=True)
    >>> advisor = StrategyAdvisor(
    ...     "tiny", image_shape=(8, 8), image_size=32, random_state=0
    ... )
    >>> advisor.fit(digits[:200] / 16, labels[:200]).similarity_
    'different'
    """

    _parameter_constraints: dict = {
        "backbone": [str, Backbone],
        "weights": [str, PathLike, None],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "max_images": [Interval(Integral, 2, None, closed="left"), None],
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
        weights="imagenet",
        cv=5,
        max_images=2000,
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
        self.weights = weights
        self.cv = cv
        self.max_images = max_images
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
        """Measure, and advise.

        Parameters
        ----------
        X : sequence of n pictures, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,)
            Their labels.

        Returns
        -------
        StrategyAdvisor
            The advisor itself.

        Raises
        ------
        ValueError
            If there are less than two classes, or one has a single picture.
        """
        reader = clone(self)
        n_images = len(reader._read_images(X, reset=True))
        classes, targets = encode_labels(y, n_images)
        n_smallest = self._count_smallest(classes, targets)
        n_folds = min(self.cv, n_smallest)
        seed = draw_seed(self.random_state)
        seed = fresh_seed() if seed is None else seed
        looked_at = _stratified(targets, self.max_images, n_folds, seed)
        some = take(X, looked_at) if len(looked_at) < n_images else X
        targets = targets[looked_at]
        shared = {name: getattr(self, name) for name in SHARED_PARAMETERS}
        features = _features_by_layer(self.backbone, shared, some)
        depths = probe_depths(features, targets, n_folds, seed)
        sizes = probe_sizes(features[depths.best], targets, n_folds, seed)
        class_map = self._map_by_names(classes)
        as_is = self._score_as_is(some, targets, classes, class_map, shared, seed)
        similarity = _judge(depths, as_is)
        strategy = recommend_strategy(
            n_images,
            len(classes),
            similarity,
            backbone=self.backbone,
            layer=depths.best,
            n_smallest=n_smallest,
            class_map=class_map,
            **shared,
        )
        # Only now does anything change: a fit that fails leaves the one before.
        self._read_images(X, reset=True)
        self.n_images_, self.n_classes_ = n_images, len(classes)
        self.n_looked_at_, self.n_folds_ = len(looked_at), n_folds
        self.layer_scores_, self.best_layer_ = depths.means, depths.best
        self.lead_ = depths.lead()
        self.size_scores_ = sizes
        self.as_is_score_ = None if as_is is None else as_is[0]
        self.class_map_ = class_map
        self.similarity_, self.strategy_ = similarity, strategy
        return self

    def report(self):
        """Say in words what was measured, and what follows from it.

        Returns
        -------
        str
            Some lines of text.
        """
        check_is_fitted(self)
        return write_report(self)

    def _count_smallest(self, classes, targets):
        """Count the pictures of the smallest class."""
        counts = np.bincount(targets)
        if counts.min() < 2:
            rarest = classes.tolist()[counts.argmin()]
            raise ValueError(
                f"The class {rarest!r} has a single picture; advice "
                "is cross-validated, and needs at least two of each class."
            )
        return int(counts.min())

    def _map_by_names(self, classes):
        """Return which categories the classes are, if all of them are some."""
        backbone = get_backbone(self.backbone)
        weights = resolve_weights(backbone, self.weights)
        if weights is None:
            return None
        categories = weights.categories or backbone.weights[0].categories
        return map_by_names(classes, categories)

    def _score_as_is(self, X, targets, classes, class_map, shared, seed):
        """Return how well the network does as it is, and the standard error of this.

        On a part of the pictures, and only if it knows the classes.
        """
        if class_map is None:
            return None
        n_most = max(len(classes), round(SHARE_AS_IS * len(targets)))
        chosen = _stratified(targets, min(n_most, len(targets) // 2), 1, seed)
        known = {name: one for name, one in shared.items() if name != "cache"}
        as_is = PretrainedCNNClassifier(self.backbone, **known)
        try:
            categories = as_is.fit(X).categories_.tolist()
        except WeightsError:  # there is no head
            return None
        if map_by_names(classes, categories) is None:  # a file with another head
            return None
        some = take(X, chosen)
        predicted = as_is.set_params(class_map=class_map).fit(X).predict(some)
        score = float((predicted == classes[targets[chosen]]).mean())
        return score, float(np.sqrt(score * (1 - score) / len(chosen)))

    def _repr_html_(self):
        if not hasattr(self, "strategy_"):
            return super()._repr_html_()
        return f"<pre>{html.escape(self.report())}</pre>"

    def _repr_mimebundle_(self, **kwargs):
        if not hasattr(self, "strategy_"):
            return super()._repr_mimebundle_(**kwargs)
        return {"text/plain": self.report(), "text/html": self._repr_html_()}


def _features_by_layer(backbone, shared, X):
    """Send the pictures through the network, once; return what each main cut gives."""
    names = [layer.name for layer in list_layers(backbone) if layer.stride is not None]
    if not names:
        raise ValueError(
            f"{get_backbone(backbone).name!r} has no cut point with a feature map: "
            "there are no depths to compare."
        )
    transformer = CNNFeatureTransformer(backbone, layer=names, **shared)
    rows = np.asarray(transformer.fit(X).transform(X))
    ends = np.cumsum(transformer._n_features())[:-1]
    return dict(zip(names, np.split(rows, ends, axis=1), strict=True))


def _judge(depths, as_is):
    """Return the word for what was measured."""
    if as_is is not None and as_is[0] + as_is[1] >= max(depths.means.values()):
        return "contained"
    return "different" if depths.lead()[0] >= LEAD_THAT_COUNTS else "similar"


def _stratified(targets, n_most, n_least, seed):
    """Return the positions of about so many pictures, of each class its share.

    But of each class at least `n_least`, or all that there are.
    """
    if n_most is None or len(targets) <= n_most:
        return np.arange(len(targets))
    rng = np.random.default_rng(seed)
    chosen = []
    for number, count in enumerate(np.bincount(targets)):
        n_wanted = max(n_least, round(n_most * count / len(targets)))
        members = np.flatnonzero(targets == number)
        chosen.append(rng.permutation(members)[:n_wanted])
    return np.sort(np.concatenate(chosen))
