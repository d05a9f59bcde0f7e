"""Linear models of scikit-learn, for multilabel targets and for values, too.

An indicator matrix is fitted column by column, as by ``OneVsRestClassifier``, but the
parameters keep their names, such as ``svm__C``.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit
from sklearn import linear_model, svm
from sklearn.base import clone
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.validation import check_is_fitted, validate_data

from skltl._targets import (
    check_indicators,
    is_multilabel,
    is_multilabel_classifier,
)

# Least scale of a feature, in relation to the median one. Some features are 0 for
# almost all images: divided by their standard deviation, those of another image may be
# thousands, and a regression without bounds follows them. (R² of -7 instead of 0.88 on
# rotated digits; 0.563 instead of 0.566 on the mean hue of flowers.)
LEAST_SCALE = 0.1


class FeatureScaler(StandardScaler):
    """scikit-learn's scaler, which does not magnify features that hardly vary."""

    __module__ = "skltl.features"  # the path in saved files

    def partial_fit(self, X, y=None, sample_weight=None):
        """Compute means and scales.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.
        y : None
            Ignored.
        sample_weight : array of shape (n,), default=None
            Weights of the samples.

        Returns
        -------
        self
            Fitted scaler.
        """
        super().partial_fit(X, y, sample_weight)
        scales = vars(self)["scale_"]
        if scales is not None:
            self.scale_ = np.maximum(scales, LEAST_SCALE * np.median(scales))
        return self


class MultilabelMixin:
    """Fit a linear classifier to each column of an indicator matrix.

    Its coefficients are the rows of those of the labels.
    """

    def fit(self, X, y, sample_weight=None):
        """Fit the model.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.
        y : array of shape (n,) or (n, n_labels)
            Classes, or an indicator matrix of labels.
        sample_weight : array of shape (n,), default=None
            Weights of the samples.

        Returns
        -------
        self
            Fitted classifier.
        """
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)  # of an earlier fit to other targets
        self.multilabel_ = is_multilabel(y)
        if not self.multilabel_:
            return super().fit(X, y, sample_weight)  # type: ignore[misc]
        y = y.toarray() if hasattr(y, "toarray") else np.asarray(y)
        check_indicators(y)
        y = y.astype(int)  # of nullable types of pandas, too
        models = [
            clone(self).fit(X, labels, sample_weight)
            for labels in y.T
            if labels.min() < labels.max()
        ]
        validate_data(self, X, skip_check_array=True)  # sets the number and names
        self.classes_ = np.arange(y.shape[1])
        self.coef_ = np.zeros((y.shape[1], np.shape(X)[1]))
        # A label that all samples have, or none, is constant.
        self.intercept_ = np.where(y[0] > 0, 1.0, -1.0)
        self.n_iter_ = np.max([one.n_iter_ for one in models], axis=0, initial=0)
        is_varied = y.min(axis=0) < y.max(axis=0)
        if models:
            self.coef_[is_varied] = np.vstack([model.coef_ for model in models])
            self.intercept_[is_varied] = np.hstack([one.intercept_ for one in models])
        return self

    def predict(self, X):
        """Predict classes, or an indicator matrix of labels.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.

        Returns
        -------
        array of shape (n,) or (n, n_labels)
            Classes or indicators.
        """
        check_is_fitted(self)
        if not is_multilabel_classifier(self):
            return super().predict(X)  # type: ignore[misc]
        return (self.decision_function(X) > 0).astype(int)  # type: ignore[attr-defined]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.classifier_tags.multi_label = True
        return tags


class LinearSVC(MultilabelMixin, svm.LinearSVC):
    """scikit-learn's linear support vector machine, for multilabel targets, too."""

    __module__ = "skltl.features"  # the path in saved files


class LogisticRegression(MultilabelMixin, linear_model.LogisticRegression):
    """scikit-learn's logistic regression, for multilabel targets, too."""

    __module__ = "skltl.features"  # the path in saved files

    def predict_proba(self, X):
        """Return the probabilities of the classes, or of each label.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.

        Returns
        -------
        array of shape (n, n_classes) or (n, n_labels)
            Probabilities.
        """
        check_is_fitted(self)
        if not is_multilabel_classifier(self):
            return super().predict_proba(X)
        return expit(self.decision_function(X))


class Ridge(linear_model.Ridge):
    """scikit-learn's ridge regression, for values of any magnitude.

    With features in float32, it would round dates or large offsets to float32, too.
    """

    __module__ = "skltl.features"  # the path in saved files

    def fit(self, X, y, sample_weight=None):
        """Fit the model.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.
        y : array of shape (n,) or (n, n_outputs)
            Values.
        sample_weight : array of shape (n,), default=None
            Weights of the samples.

        Returns
        -------
        self
            Fitted regressor.
        """
        if y is None or not self.fit_intercept:
            return super().fit(X, y, sample_weight)
        values = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        offset = values.mean(axis=0)
        super().fit(X, values - offset, sample_weight)
        self.intercept_ = np.add(vars(self)["intercept_"], offset, dtype=np.float64)
        return self

    def predict(self, X):
        """Predict the values.

        Parameters
        ----------
        X : array of shape (n, d)
            Features.

        Returns
        -------
        array of shape (n,) or (n, n_outputs), float64
            Values.
        """
        check_is_fitted(self)
        formats = ["csr", "csc"]  # which can be checked for NaN
        X = validate_data(self, X, reset=False, accept_sparse=formats)
        products = safe_sparse_dot(X, self.coef_.T, dense_output=True)
        return np.add(products, self.intercept_, dtype=np.float64)
