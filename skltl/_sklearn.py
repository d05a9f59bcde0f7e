"""The only door to scikit-learn's private names.

Parameter constraints are not public API, although scikit-learn's own check suite asks
third-party estimators for them. If a release moves them, this is the file to mend.
"""

from __future__ import annotations

from numbers import Integral

from sklearn.base import _fit_context
from sklearn.utils import _safe_indexing as take
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_sample_weight as check_sample_weight

fit_context = _fit_context(prefer_skip_nested_validation=True)
"""Decorator of ``fit``: check the parameters against ``_parameter_constraints``."""

# Height and width of a network's input, in pixels. The largest take gigabytes.
IMAGE_SIZES = Interval(Integral, 1, 10_000, closed="both")

__all__ = [
    "IMAGE_SIZES",
    "Interval",
    "InvalidParameterError",
    "StrOptions",
    "check_feature_names_in",
    "check_sample_weight",
    "fit_context",
    "take",
]
