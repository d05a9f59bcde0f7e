"""An estimator as a line of code."""

from __future__ import annotations

import inspect
from typing import Any

from sklearn.pipeline import Pipeline

# A longer value, such as a map of a thousand classes, is not printed.
MOST_CHARACTERS = 200


def code_of(estimator: Any) -> str:
    """Return code that makes an estimator: one of skltl's, or its feature pipeline."""
    if not isinstance(estimator, Pipeline):
        return f"{type(estimator).__name__}({', '.join(_arguments(estimator))})"
    backbone, *others = _arguments(estimator[0])
    classifier = repr(estimator.steps[-1][0])
    return f"make_feature_pipeline({', '.join([backbone, classifier, *others])})"


def _arguments(estimator: Any) -> list[str]:
    """Return the backbone and the parameters that are not at their defaults."""
    parameters = inspect.signature(type(estimator)).parameters
    changed = [
        f"{name}={_shown(value)}"
        for name, value in estimator.get_params(deep=False).items()
        if name != "backbone" and repr(value) != repr(parameters[name].default)
    ]
    return [_shown(estimator.backbone), *changed]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else "..."
