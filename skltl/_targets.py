"""Kinds of targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.multiclass import type_of_target


def is_multilabel(y: Any) -> bool:
    """Return whether targets are an indicator matrix of several labels."""
    n_dimensions = y.ndim if issparse(y) else np.asarray(y).ndim
    return n_dimensions == 2 and type_of_target(y) == "multilabel-indicator"
