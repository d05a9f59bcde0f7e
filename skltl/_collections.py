"""Recognize Dask collections, which are computed elsewhere, without importing Dask."""

from __future__ import annotations

from typing import Any

PACKAGES = {"dask", "dask_expr"}


def is_dask(X: Any) -> bool:
    """Return whether this is a collection of Dask: an array, a data frame, a bag."""
    modules = {base.__module__.partition(".")[0] for base in type(X).__mro__}
    return bool(modules & PACKAGES) and hasattr(X, "__dask_graph__")


def check_not_dask(X: Any) -> None:
    """Raise an error for a Dask collection, which would be computed in this process."""
    if is_dask(X):
        raise TypeError(
            f"X is a Dask {type(X).__name__}, which would be computed in the memory of "
            "this process. Pass X.compute() if it holds paths or fits into memory. "
            "CNNFeatureTransformer and skltl.distributed.apply take Dask collections, "
            "and return lazy ones."
        )
