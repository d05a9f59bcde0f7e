"""Pipelines of frozen features and a linear classifier."""

from __future__ import annotations

from sklearn import linear_model
from sklearn.base import clone
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from skltl.features._linear import (
    FeatureScaler,
    LinearSVC,
    LogisticRegression,
    Ridge,
)
from skltl.features._transformer import CNNFeatureTransformer


def make_feature_pipeline(
    backbone="resnet50", classifier=None, *, regressor=None, **parameters
):
    """Construct a pipeline of frozen features, scaling and a linear model.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network: a name of :func:`~skltl.list_backbones`, such as ``"vgg16"`` or
        ``"timm:vit_small_patch16_dinov3.lvd1689m"``, or a `Backbone`.
    classifier : {"svm", "softmax", "ovr"} or estimator, default=None
        A linear support vector machine, multinomial logistic regression, one-vs-rest
        logistic regression, or any estimator. ``"softmax"`` and ``"ovr"`` have
        `predict_proba`, ``"svm"`` does not. For multilabel targets, an indicator
        matrix, each of them is one model for each label. ``None`` is ``"svm"``, if
        there is no `regressor`.
    regressor : {"ridge"} or estimator, default=None
        Ridge regression, for one or several values of each image, or any estimator.
    **parameters
        Further parameters of `CNNFeatureTransformer`. `random_state` is passed to the
        classifier, too, unless the given estimator sets its own.

    Returns
    -------
    Pipeline
        The steps are ``"feat"``, ``"scale"`` and the model: ``"svm"``, ``"softmax"``,
        ``"ovr"``, ``"ridge"``, or ``"classifier"`` or ``"regressor"`` for a given
        estimator.

    Raises
    ------
    ValueError
        If `classifier` or `regressor` is another string, or both are given.

    Notes
    -----
    Features often have more dimensions than a small data set has images, so the
    classifiers are regularized more strongly than by scikit-learn's default ``C=1``.
    With standardized features, ``C=0.01`` for the support vector machine and ``C=0.1``
    for logistic regression were the best or close to it on flowers and digits, and so
    was ``alpha=100`` for ridge regression. For a `regressor`, features that hardly vary
    are not scaled to a standard deviation of 1, but of less. When in doubt, search over
    ``svm__C`` (``ovr__estimator__C``, ``ridge__alpha``) on a logarithmic grid.

    Examples
    --------
    >>> from skltl import make_feature_pipeline
    >>> pipeline = make_feature_pipeline("tiny", "softmax", layer="block3")
    >>> list(pipeline.named_steps)
    ['feat', 'scale', 'softmax']
    """
    if classifier is not None and regressor is not None:
        raise ValueError("classifier and regressor exclude each other.")
    transformer = CNNFeatureTransformer(backbone, **parameters)
    if regressor is None:
        last = "svm" if classifier is None else classifier
        name, known = "classifier", CLASSIFIERS
    else:
        name, last, known = "regressor", regressor, REGRESSORS
    if isinstance(last, str):
        if last not in known:
            raise ValueError(
                f"Unknown {name} {last[:40]!r}. Use one of {', '.join(known)}, or an "
                "estimator."
            )
        name, last = last, known[last]
    last = _seeded(clone(last), parameters.get("random_state"))
    scaler = StandardScaler() if regressor is None else FeatureScaler()
    return Pipeline([("feat", transformer), ("scale", scaler), (name, last)])


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
    "ovr": OneVsRestClassifier(linear_model.LogisticRegression(C=0.1, max_iter=1000)),
}

# The best of the powers of ten on the mean hue of flowers (R² of 0.56 with the last
# layer of SqueezeNet; 0.39 with 10, 0.53 with 1000) and on the ink of digits.
REGRESSORS = {"ridge": Ridge(alpha=100.0)}
