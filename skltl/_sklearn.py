"""Private names of scikit-learn that skltl uses, imported in this module only.

Parameter constraints are not public API, although scikit-learn's own check suite asks
third-party estimators for them. If a release moves them, only this file changes.
"""

from __future__ import annotations

from numbers import Integral

from sklearn.base import _fit_context
from sklearn.utils import _safe_indexing as take
from sklearn.utils._param_validation import (
    Interval,
    InvalidParameterError,
    Options,
    StrOptions,
)
from sklearn.utils._set_output import _get_output_config as output_config
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_sample_weight as check_sample_weight

fit_context = _fit_context(prefer_skip_nested_validation=True)
"""Decorator of ``fit``: check the parameters against ``_parameter_constraints``."""

# Height and width of a network's input, in pixels. The largest take gigabytes.
IMAGE_SIZES = Interval(Integral, 1, 10_000, closed="both")

AT_LEAST_ONE = Interval(Integral, 1, None, closed="left")

__all__ = [
    "AT_LEAST_ONE",
    "IMAGE_SIZES",
    "Interval",
    "InvalidParameterError",
    "Options",
    "StrOptions",
    "check_feature_names_in",
    "check_sample_weight",
    "fit_context",
    "output_config",
    "take",
]
