"""``apply``: a method of a fitted estimator on a Dask collection, lazily."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skltl._collections import is_dask
from skltl._dask import kind_of, map_blocks, one_row
from skltl._estimator import ImageEstimator, read_images_of
from skltl.distributed._results import no_results
from skltl.exceptions import shorten

METHODS = (
    *("predict", "predict_proba", "predict_log_proba", "decision_function"),
    "transform",
)


def apply(estimator: Any, X: Any, method: str = "predict", *, meta: Any = None) -> Any:
    """Predict or transform the images of a Dask collection, lazily.

    The whole estimator runs in Dask's tasks, the steps of a pipeline included. The
    same method of the estimator itself would compute the images or their features in
    this process.

    Parameters
    ----------
    estimator : estimator
        Fitted pipeline, classifier, regressor or transformer.
    X : Dask array, bag, series or data frame
        Images of any kind that the estimator takes. Arrays of images are rechunked,
        so that each chunk holds whole images.
    method : str, default="predict"
        ``"predict"``, ``"predict_proba"``, ``"predict_log_proba"``,
        ``"decision_function"`` or ``"transform"``.
    meta : array or data frame, default=None
        Result for no images, with the shape and dtype of the results, such as
        ``np.empty((0, 3))``. If ``None``, it is that for a blank image.

    Returns
    -------
    Dask array or data frame
        Lazy results, with the chunks of ``X``; a data frame if the estimator returns
        data frames.

    Raises
    ------
    ImportError
        If Dask is not installed.
    TypeError
        If ``X`` is not a Dask collection.
    ValueError
        If the shape of the results cannot be determined: pass `meta`.

    See Also
    --------
    BatchFunction : The same for tables, without Dask.

    Notes
    -----
    Nothing is computed, and the estimator is copied, so that another `fit` does not
    change the results.

    Examples
    --------
    >>> import dask.array as da  # doctest: +SKIP
    >>> from skltl.distributed import apply
    >>> X = da.from_array(paths, chunks=1000)  # doctest: +SKIP
    >>> y = apply(pipeline, X).compute()  # doctest: +SKIP
    """
    if find_spec("dask") is None:
        raise ImportError(
            "skltl.distributed.apply needs Dask: pip install 'skltl[dask]'."
        )
    if method not in METHODS:
        raise ValueError(
            f"method={shorten(repr(method))} must be one of {', '.join(METHODS)}."
        )
    if not is_dask(X):
        raise TypeError(
            f"X is a {type(X).__name__}, not a Dask collection. Call "
            f"estimator.{method}(X), or convert it: dask.array.from_array(X)."
        )
    kind_of(X)
    check_is_fitted(estimator)
    if not hasattr(estimator, method):
        raise AttributeError(f"{type(estimator).__name__} has no method {method!r}.")
    if isinstance(estimator, ImageEstimator):
        read_images_of(estimator, one_row(X))  # of the right kind
    if meta is None:
        return map_blocks(estimator, X, method, no_results(estimator, method))
    if not isinstance(meta, np.ndarray) and not hasattr(meta, "iloc"):
        raise TypeError(
            f"meta is a {type(meta).__name__}; expected an array of numpy or a data "
            "frame of pandas, such as np.empty((0, 3))."
        )
    return map_blocks(estimator, X, method, meta[:0])
