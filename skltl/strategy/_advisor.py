"""``StrategyAdvisor``: measure how near the data are to what a network knows."""

from __future__ import annotations

import html
from numbers import Integral
from os import PathLike

from sklearn import get_config
from sklearn.utils.validation import check_is_fitted

from skltl._estimator import ImageEstimator
from skltl._parameters import DTYPES
from skltl._sklearn import IMAGE_SIZES, Interval, StrOptions, fit_context
from skltl.inference import ENGINES
from skltl.networks import Backbone
from skltl.strategy._measurement import measure
from skltl.strategy._report import write_report
from skltl.strategy._rules import portable


class StrategyAdvisor(ImageEstimator):
    """Advise on the way of transfer, by measuring instead of guessing.

    One pass of the network gives the features at every cut point. A linear classifier,
    cross-validated at each, tells how near the images are to what the network knows:
    if the last cut is the best, they are similar; if an earlier one is, they are not.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: any of :func:`~skltl.list_backbones`, or a record of your own.
    weights : str, path or None, default="imagenet"
        As for `CNNFeatureTransformer`.
    cv : int, default=5
        Folds, at least 2; fewer if a class has fewer images.
    max_images : int or None, default=2000
        How many images are looked at, drawn by class; but of each class at least as
        many as there are folds. ``None`` is all.
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
        As for `CNNFeatureTransformer`. What is advised can then use the same features.
    n_jobs : int, default=None
        Threads that decode images.
    random_state : int, RandomState instance or None, default=None
        Of the folds, of which images are looked at, and of the linear classifiers; of
        the weights, too, if they are random.
    verbose : int, default=0
        Whether a progress bar is shown.

    Attributes
    ----------
    strategy_ : Strategy
        The advice: its `name`, its `reasons`, the `estimator`, and its costs.
    similarity_ : {"contained", "similar", "different"}
        How near the images are to what the network knows.
    layer_scores_ : dict of str to float
        Cross-validated accuracy of a linear classifier at each main cut point.
    layer_errors_ : dict of str to float
        Their standard errors.
    best_layer_ : str
        The cut point with the best of them.
    lead_ : tuple of float
        By how much the best of the earlier cuts is ahead of the last one, negative if
        it is behind, and the standard error of this.
    layer_ : str
        The cut point that suits the images: `best_layer_` if they are different, else
        the last one.
    size_scores_ : dict of int to float
        Accuracy at `layer_`, by number of training images, in the same folds; the last
        of them is that of `layer_scores_`.
    size_errors_ : dict of int to float
        Their standard errors.
    gain_ : tuple of float
        By how much accuracy rose when the number of training images was last doubled,
        and the standard error of this.
    as_is_score_ : float or None
        Accuracy of the network as it is, if its categories contain the classes.
    as_is_error_ : float or None
        Its standard error.
    class_map_ : dict or None
        Which categories the classes are, if all of them are some.
    n_images_, n_classes_, n_smallest_ : int
        The size of the data: images, classes, and images of the smallest class.
    n_looked_at_, n_folds_, n_repeats_ : int
        How many images were looked at, in how many folds, drawn how many times.

    See Also
    --------
    recommend_strategy : The same rules without measuring.
    TransferClassifier : Advice that is taken at once.

    Notes
    -----
    Images are different if an earlier cut is ahead of the last one by a point (0.01)
    of accuracy or more; less than that is not worth leaving the last one for. This
    chooses a cut, it tests no hypothesis: of cuts that are equally good, an earlier one
    may be ahead by luck, all the more as it is the best of several. `lead_` says how
    large luck may be. Up to 500 images, the cross-validation is repeated three times.

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
    def fit(self, X, y, sample_weight=None, groups=None):
        """Measure, and advise.

        Parameters
        ----------
        X : sequence of n images, or array of shape (n, d) with `image_shape`
            Of any kind that `CNNFeatureTransformer` takes.
        y : array of shape (n,)
            Their labels.
        sample_weight : array of shape (n,), default=None
            Weights of the images, in the linear classifiers and in their accuracies.
            Images of weight 0 are left out.
        groups : array of shape (n,), default=None
            Which images belong together (of one plant, one patient): all of them are in
            the same fold.

        Returns
        -------
        StrategyAdvisor
            The advisor itself.

        Raises
        ------
        ValueError
            If there are less than two classes, one has a single image or group, or
            lengths differ.
        """
        self._take(measure(self, X, y, sample_weight, groups), X)
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

    def _take(self, measured, X):
        """Set what `fit` sets: only now, so a fit that fails leaves the one before."""
        self._read_images(X, reset=True)
        self.__dict__.update(measured.attributes())

    def __getstate__(self):
        state = super().__getstate__()
        if "strategy_" in state:  # where a file is loaded is not for the file to say
            state["strategy_"] = portable(state["strategy_"])
        return state

    @property
    def _repr_html_(self):
        """Return the report as HTML, under scikit-learn's switch of such displays."""
        if not hasattr(self, "strategy_"):
            return super()._repr_html_
        if get_config()["display"] != "diagram":
            raise AttributeError(
                "_repr_html_ needs sklearn.set_config(display='diagram')."
            )
        return self._report_as_html

    def _report_as_html(self):
        return f"<pre>{html.escape(self.report())}</pre>"

    def _repr_mimebundle_(self, **kwargs):
        if not hasattr(self, "strategy_"):
            return super()._repr_mimebundle_(**kwargs)
        if get_config()["display"] != "diagram":
            return {"text/plain": repr(self)}
        return {"text/plain": self.report(), "text/html": self._report_as_html()}
