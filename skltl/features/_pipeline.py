"""The three classical classifiers on frozen features, ready to fit."""

from __future__ import annotations

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl.features._transformer import CNNFeatureTransformer


def make_feature_pipeline(backbone="resnet50", classifier="svm", **parameters):
    """Make a pipeline of frozen features, scaling and a linear classifier.

    Parameters
    ----------
    backbone : str or Backbone, default="resnet50"
        The network.
    classifier : {"svm", "softmax", "ovr"} or estimator, default="svm"
        A linear support vector machine, multinomial logistic regression, one binary
        logistic regression per class, or any classifier or regressor of your own.
        ``"softmax"`` and ``"ovr"`` have `predict_proba`, ``"svm"`` has not. ``"ovr"``
        takes several labels per image, too, as an indicator matrix; the others take
        one.
    **parameters
        Further parameters of `CNNFeatureTransformer`. `random_state` is that of the
        classifier, too: of one of your own, where it has left its `random_state` at
        ``None``.

    Returns
    -------
    Pipeline
        Its steps are ``"feat"``, ``"scale"`` and the classifier, named ``"svm"``,
        ``"softmax"``, ``"ovr"``, or ``"classifier"`` for one of your own.

    Raises
    ------
    ValueError
        If `classifier` is another string.

    Notes
    -----
    Features have hundreds to thousands of dimensions, more than a small set has
    images, so the classifiers are regularised more than scikit-learn's defaults
    (``C=1``): with standardised features ``C=0.01`` for the support vector machine and
    ``C=0.1`` for logistic regression were best or near it on flowers and digits. Search
    over ``svm__C`` (``ovr__estimator__C``) in decades when in doubt.

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
    """Set `random_state` of an estimator, and of those in it, where it is None."""
    unset = {
        name: random_state
        for name, value in estimator.get_params().items()
        if name.rpartition("__")[2] == "random_state" and value is None
    }
    return estimator.set_params(**unset)


CLASSIFIERS = {
    # Regularized less, it needs more than scikit-learn's 1000 iterations to converge.
    "svm": LinearSVC(C=0.01, max_iter=10_000),
    "softmax": LogisticRegression(C=0.1, max_iter=1000),
    "ovr": OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000)),
}
