"""Pipelines of frozen features and a linear classifier."""

from __future__ import annotations

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl.features._transformer import CNNFeatureTransformer


def make_feature_pipeline(backbone="resnet50", classifier="svm", **parameters):
    """Construct a pipeline of frozen features, scaling and a linear classifier.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: a name of :func:`~skltl.list_backbones`, such as ``"vgg16"`` or
        ``"timm:vit_small_patch16_dinov3.lvd1689m"``, or a `Backbone`.
    classifier : {"svm", "softmax", "ovr"} or estimator, default="svm"
        A linear support vector machine, multinomial logistic regression, one-vs-rest
        logistic regression, or any classifier or regressor. ``"softmax"`` and
        ``"ovr"`` have `predict_proba`, ``"svm"`` does not. ``"ovr"`` also supports
        multilabel targets as an indicator matrix.
    **parameters
        Further parameters of `CNNFeatureTransformer`. `random_state` is passed to the
        classifier, too, unless the given estimator sets its own.

    Returns
    -------
    Pipeline
        The steps are ``"feat"``, ``"scale"`` and the classifier: ``"svm"``,
        ``"softmax"``, ``"ovr"``, or ``"classifier"`` for a given estimator.

    Raises
    ------
    ValueError
        If `classifier` is another string.

    Notes
    -----
    Features often have more dimensions than a small data set has images, so the
    classifiers are regularized more strongly than by scikit-learn's default ``C=1``.
    With standardized features, ``C=0.01`` for the support vector machine and ``C=0.1``
    for logistic regression were the best or close to it on flowers and digits. When in
    doubt, search over ``svm__C`` (``ovr__estimator__C``) on a logarithmic grid.

    Examples
    --------
    >>> from skltl import make_feature_pipeline
    >>> pipeline = make_feature_pipeline("tiny", "softmax", layer="block3")
    >>> list(pipeline.named_steps)
    ['feat', 'scale', 'softmax']
    """
    transformer = CNNFeatureTransformer(backbone, **parameters)
    name, last = "classifier", classifier
    if isinstance(classifier, str):
        if classifier not in CLASSIFIERS:
            raise ValueError(
                f"Unknown classifier {classifier[:40]!r}. Use one of "
                f"{', '.join(CLASSIFIERS)}, or an estimator."
            )
        name, last = classifier, CLASSIFIERS[classifier]
    last = _seeded(clone(last), parameters.get("random_state"))
    return Pipeline([("feat", transformer), ("scale", StandardScaler()), (name, last)])


def _seeded(estimator, random_state):
    """Set each `random_state` that is None, of an estimator and of those in it."""
    unset = {
        name: random_state
        for name, value in estimator.get_params().items()
        if name.rpartition("__")[2] == "random_state" and value is None
    }
    return estimator.set_params(**unset)


CLASSIFIERS = {
    # With less regularization, it needs more than 1000 iterations to converge.
    "svm": LinearSVC(C=0.01, max_iter=10_000),
    "softmax": LogisticRegression(C=0.1, max_iter=1000),
    "ovr": OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000)),
}
