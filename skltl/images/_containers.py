"""Take the items out of ``X``: lists, arrays, tables and lazy sequences."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skltl._collections import check_not_dask
from skltl.exceptions import quote, shorten
from skltl.images._decode import is_tensor, lock_of
from skltl.images._descriptions import describe_text
from skltl.images._items import Encoded, type_name

EXPECTED = (
    "a list or 1-D array of paths or images, or an array of shape (n, h, w), "
    "(n, h, w, channels) or (n, channels, h, w)"
)

N_COLUMNS_SHOWN = 5


class LazyItems:
    """The items of a container that may decode them when they are fetched.

    One is fetched at a time, since the code of a container need not be safe in
    threads.
    """

    def __init__(self, container: Any) -> None:
        self._container = container
        self._known: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._container)

    def __getitem__(self, index: int) -> Any:
        if index in self._known:
            return self._known[index]
        with lock_of(self._container):
            item = self._container[index]
        return item.as_py() if hasattr(item, "as_py") else item  # of pyarrow

    def first(self) -> Any:
        """Fetch the first item that can be fetched, which is kept: it is fetched once.

        ``None`` if there is none.
        """
        for index in range(len(self)):
            # Any error of the container is raised again when the item is read.
            with suppress(Exception):
                self._known[index] = self[index]
                return self._known[index]
        return None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of a container that is an array of numbers, such as one of h5py."""
        dtype = getattr(self._container, "dtype", None)
        is_numeric = isinstance(dtype, np.dtype) and dtype.kind in "biuf"
        return tuple(self._container.shape) if is_numeric else None


# Arrays are no `Sequence` to Python, but serve as one here.
Items: TypeAlias = Sequence[Any] | NDArray[Any] | LazyItems


def index_labels(X: Any) -> Any:
    """Return the labels by which the user knows the items of a pandas object."""
    index = getattr(X, "index", None)
    return index if hasattr(X, "iloc") and hasattr(index, "__getitem__") else None


def unwrap(X: Any) -> Any:
    """Take the data out of its container; refuse what is no batch of items.

    The result is a list, a tuple, an array, a tensor, or `LazyItems`.
    """
    _check_not_single(X)
    check_not_dask(X)
    if hasattr(X, "toarray") and hasattr(X, "nnz"):
        raise TypeError("Sparse data cannot be images; pass a dense array.")
    check_not_masked(X)
    if isinstance(names := getattr(X, "column_names", None), list):
        X = _only_column(X, names)
    if type(X).__module__.partition(".")[0] == "pyarrow":
        return _unwrap_arrow(X)
    if hasattr(X, "to_numpy"):  # pandas, polars
        X = _unwrap_frame(X)
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        # One column of paths, as `ColumnTransformer` passes it.
        return X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
    if isinstance(X, (np.ndarray, list, tuple)) or is_tensor(X):
        return X
    if _is_lazy(X):
        return _unwrap_lazy(X)
    if hasattr(X, "__array__"):
        return np.asarray(X)
    raise TypeError(
        f"X must be {EXPECTED}; got {type_name(X)}.{_advice_on_container(X)}"
    )


def _check_not_single(X: Any) -> None:
    """Raise an error for a single path or image, which should be in a list."""
    if isinstance(X, (str, os.PathLike)):
        raise _single_path(os.fsdecode(X))
    if isinstance(X, Image.Image):
        raise ValueError("X is a single image. Reshape your data: X=[image].")


def check_not_masked(X: Any) -> None:
    """Raise an error for a masked array, whose masked pixels have no values."""
    if isinstance(X, np.ma.MaskedArray):
        raise TypeError(
            "Masked arrays are not supported: fill the masked pixels first."
        )


def _is_lazy(X: Any) -> bool:
    """Return whether an object has a length and items by number."""
    if isinstance(X, (Mapping, Set, *Encoded)) or not hasattr(X, "__getitem__"):
        return False
    return hasattr(X, "__len__")


def _unwrap_lazy(X: Any) -> Any:
    """Return a container as `LazyItems`, but paths as a list: they are needed often."""
    items = LazyItems(X)
    if len(items) and isinstance(items.first(), (str, os.PathLike)):
        return [items[index] for index in range(len(items))]
    return items


def _unwrap_frame(X: Any) -> Any:
    """Return the values of a series or a data frame as an array."""
    shape: tuple[int, ...] = getattr(X, "shape", ())
    if len(shape) == 2 and shape[1] == 1:
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X.to_series()
    if str(getattr(X, "dtype", "")).startswith("Struct"):  # of polars
        return X.to_list()
    values = X.to_numpy()
    if values.ndim == 2 and values.dtype.kind in "OUT" and hasattr(X, "columns"):
        raise _several_columns(list(X.columns), type(X).__name__)
    return values


def _only_column(X: Any, names: list[str]) -> Any:
    """Return the only column of a table of pyarrow or of Hugging Face."""
    if len(names) == 1:
        return X[names[0]]
    package = type(X).__module__.partition(".")[0]
    raise _several_columns(names, f"{package} {type_name(X)}")


def _unwrap_arrow(X: Any) -> Any:
    """Return the paths, or the encoded images, of an Arrow array."""
    kind = str(getattr(X, "type", ""))
    if kind == "null":  # all of them are missing
        return X.to_pylist()
    if kind.startswith("dictionary<"):
        return _unwrap_arrow(X.cast(X.type.value_type))
    if kind.endswith(("string", "string_view")):
        return X.to_pylist()
    if kind.endswith(("binary", "binary_view")) or kind.startswith("struct<"):
        return LazyItems(X)
    raise TypeError(
        f"X is a pyarrow {type_name(X)} of {shorten(kind, 40)}; expected strings "
        "(paths), binary values (encoded images) or structs of 'bytes' and 'path'. "
        "Pass X.to_pylist() if its items are images."
    )


def _single_path(text: str) -> TypeError:
    """Return the error for a string or path instead of a list."""
    example = quote(text)
    if os.path.isdir(text):  # noqa: PTH112  # accepts odd names, unlike Path
        return TypeError(
            f"X is a directory, {example}; pass the files in it: those of class "
            "folders from skltl.load_image_folder(X), or a list such as "
            "sorted(pathlib.Path(X).rglob('*.jpg'))."
        )
    if not os.path.exists(text) and (what := describe_text(text)):  # noqa: PTH110
        return TypeError(f"X is a string, {example}, not a list, and {what}.")
    return TypeError(f"X is a single path; put it in a list: X=[{example}].")


def _several_columns(names: Sequence[Any], kind: str) -> ValueError:
    """Return the error for a table of several columns that are not all numeric."""
    shown = [quote(str(name), 30) for name in names[:N_COLUMNS_SHOWN]]
    more = ", ..." if len(names) > N_COLUMNS_SHOWN else ""
    return ValueError(
        f"X is a {kind} with the columns {', '.join(shown)}{more}. Pass the one that "
        f"holds the images, for instance X[{shown[0]}], or select it with "
        "sklearn.compose.ColumnTransformer."
    )


def _advice_on_container(X: object) -> str:
    """Return advice on what to pass instead of an unsupported container."""
    if isinstance(X, Encoded):
        return " Put encoded images in a list: [X]."
    if isinstance(X, Mapping):
        return " Pass list(X.values()) if its values are the images."
    if isinstance(X, Set):
        return " A set has no order; pass sorted(X) or list(X)."
    if hasattr(X, "dataset") and hasattr(X, "batch_size"):  # of torch
        return " Pass its dataset: X.dataset."
    if hasattr(X, "read") and hasattr(X, "seek"):
        return " Put file objects in a list: [X]."
    if isinstance(X, Iterable):
        return " Pass list(X)."
    return ""
