"""Take the data out of the containers that ``X`` may be."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl.exceptions import shorten
from skltl.images._decode import is_tensor
from skltl.images._refusals import refuse_container, refuse_table, refuse_text

EXPECTED = (
    "a list or 1-D array of paths or pictures, or an array of shape (n, h, w), "
    "(n, h, w, channels) or (n, channels, h, w)"
)


def unwrap(X: Any) -> Any:
    """Take the data out of its container; refuse what is no batch of images."""
    if isinstance(X, (str, os.PathLike)):
        raise refuse_text(os.fsdecode(X))
    if isinstance(X, Image.Image):
        raise ValueError("X is a single picture. Reshape your data: X=[picture].")
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data cannot be pictures; pass a dense array.")
    check_not_masked(X)
    if type(X).__module__.partition(".")[0] == "pyarrow":
        return _unwrap_arrow(X)
    if hasattr(X, "to_numpy"):  # pandas, polars
        X = _values_of(X)
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        # One column of paths, as `ColumnTransformer` hands it over.
        return X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
    if isinstance(X, (np.ndarray, list, tuple)) or is_tensor(X):
        return X
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise refuse_container(X, EXPECTED)


def check_not_masked(X: Any) -> None:
    """Refuse a masked array, whose masked pixels have no values."""
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(
            "Masked arrays are not supported: fill the masked pixels first."
        )


def labels_of(X: Any) -> Any:
    """Return the labels of the rows of a pandas object, or ``None``."""
    index = getattr(X, "index", None)
    return index if hasattr(X, "iloc") and hasattr(index, "__getitem__") else None


def label_of(labels: Any, index: int) -> str:
    """Say, for a message, by which label the user knows a row."""
    if labels is None:
        return ""
    label = labels[index]
    if isinstance(label, np.generic):
        label = label.item()
    return f" (index label {shorten(repr(label))})"


def _values_of(X: Any) -> Any:
    """Return the values of a series or a data frame as an array."""
    shape: tuple[int, ...] = getattr(X, "shape", ())
    if len(shape) == 2 and shape[1] == 1:
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X.to_series()
    values = X.to_numpy()
    if values.ndim == 2 and values.dtype.kind in "OUT" and hasattr(X, "columns"):
        raise refuse_table(list(X.columns), type(X).__name__)
    return values


def _unwrap_arrow(X: Any) -> Any:
    """Take texts out of an array or a table of one column of Arrow."""
    if hasattr(X, "column_names"):
        if len(X.column_names) != 1:
            raise refuse_table(X.column_names, f"pyarrow {type(X).__name__}")
        X = X.column(0)
    kind = str(getattr(X, "type", ""))
    if not kind.endswith(("string", "string_view")):
        raise TypeError(
            f"X is a pyarrow {type(X).__name__} of {shorten(kind, 40)}: of Arrow's "
            "types only texts (paths) are read. Pass X.to_pylist() if its items are "
            "images, or X.to_pandas()."
        )
    return X.to_pylist()


def stacked(X: Any) -> NDArray[Any]:
    """Turn nested lists of numbers into one array."""
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise ValueError(
            "X is a list of lists of different lengths. Pass each picture as an array."
        ) from error
    if array.dtype.kind not in "buifc":
        raise ValueError(f"Expected {EXPECTED}, got nested lists of {array.dtype}.")
    return array
