"""Run fitted estimators on the blocks of Dask collections.

A collection is mapped block by block to a lazy Dask array or data frame. The estimator
is one node of the graph, on which all tasks depend: each worker process receives it,
and loads its network, once.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from skltl._estimator import in_transit, n_channels_of
from skltl._nested import image_estimator_of
from skltl.exceptions import ImageError, ImageReadError, ImageTypeError
from skltl.images import check_not_fatal

# Item of a collection whose own items are not known yet.
UNKNOWN_ITEM = "image.png"


class Shipped:
    """A fitted estimator that is pickled for other processes, with all parameters.

    It is a copy: another `fit` does not change results that are still to be computed.
    """

    def __init__(self, estimator: Any, token: str | None = None) -> None:
        self.estimator = estimator if token else copy.deepcopy(estimator)
        self.token = token or uuid4().hex

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        with in_transit():
            return _arrived, (_pickler().dumps(self.estimator), self.token)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "skltl.Shipped", self.token


def _pickler() -> Any:
    """Return cloudpickle where it is installed, as with Dask and Ray.

    It also pickles functions of scripts and notebooks, such as a `reader`.
    """
    try:
        return import_module("cloudpickle")
    except ImportError:
        return pickle


def _arrived(pickled: bytes, token: str) -> Shipped:
    """Return an estimator in the process that it was sent to."""
    with in_transit():
        return Shipped(pickle.loads(pickled), token)


def one_row(X: Any) -> Any:
    """Return one item of the type of those of a collection, which is not computed.

    What is known of the collection can then be validated as usual: the shape and dtype
    of arrays, and the columns of data frames.
    """
    kind = kind_of(X)
    if kind == "bag":
        return [UNKNOWN_ITEM]
    if kind == "array":
        if not X.ndim or any(map(math.isnan, X.shape[1:])):
            raise ValueError(
                f"X is a Dask array of shape {X.shape}; the shape of its items must be "
                "known. Call X.compute_chunk_sizes() first."
            )
        return _one_of(X.dtype, X.shape[1:])
    import pandas as pd

    if X.ndim == 1:
        return pd.Series(_one_of(X.dtype), name=X.name)
    columns = [_one_of(dtype) for dtype in X.dtypes]
    return pd.DataFrame(dict(enumerate(columns))).set_axis(X.columns, axis="columns")


def _one_of(dtype: Any, shape: tuple[int, ...] = ()) -> NDArray[Any]:
    """Return an array of one item, zeros or ``UNKNOWN_ITEM``."""
    numpy_type = getattr(dtype, "numpy_dtype", dtype)  # of pandas' and Arrow's types
    is_number = isinstance(numpy_type, np.dtype) and numpy_type.kind not in "OUT"
    if not is_number:
        return np.full((1, *shape), UNKNOWN_ITEM, dtype=object)
    return np.zeros((1, *shape), numpy_type)


def kind_of(X: Any) -> str:
    """Return "array", "bag" or "frame", which includes series."""
    modules = {base.__module__ for base in type(X).__mro__}
    for kind, name in (("array", "array"), ("bag", "bag"), ("frame", "dataframe")):
        is_kind = any(module.startswith(f"dask.{name}") for module in modules)
        is_single = getattr(X, "ndim", None) == 0
        if is_kind and hasattr(X, "npartitions") and not is_single:
            return kind
    raise TypeError(
        f"X is a Dask {type(X).__name__}; expected an array, a data frame, a series or "
        "a bag."
    )


def check_lengths(X: Any, y: Any) -> None:
    """Raise an error if `y` has another length than a collection, if both are known."""
    if kind_of(X) != "array" or not hasattr(y, "__len__"):
        return
    shape = getattr(y, "shape", None) or (len(y),)
    lengths = [X.shape[0], shape[0]]
    is_known = all(isinstance(length, int) for length in lengths)
    if is_known and lengths[0] != lengths[1]:
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: {lengths}"
        )


def map_blocks(estimator: Any, X: Any, method: str, empty: Any) -> Any:
    """Return the lazy results of a method for all images of a collection.

    `empty` is an array or a data frame as the method returns for images, without rows.
    The result is a Dask array with the blocks of ``X``, or a Dask data frame; with the
    index of ``X`` if that is one, too.
    """
    import dask

    shipped = dask.delayed(Shipped(estimator), traverse=False)
    kind = kind_of(X)
    if kind == "frame":
        return X.map_partitions(
            _run_partition, shipped, method=method, empty=empty, meta=empty
        )
    run = _map_array if kind == "array" else _map_bag
    values = np.asarray(empty)
    result = run(X, shipped, method, values)
    if values is empty:
        return result
    import dask.dataframe as dd

    return dd.from_dask_array(result, columns=list(empty.columns))


def _map_array(X: Any, shipped: Any, method: str, empty: NDArray[Any]) -> Any:
    """Map the blocks of an array; each of them holds whole images."""
    import dask
    import dask.array as da

    X = X.rechunk(dict.fromkeys(range(1, X.ndim), -1))
    starts = np.cumsum([0, *X.chunks[0][:-1]])  # NaN if chunks are unknown
    shape = empty.shape[1:]
    return da.map_blocks(
        _run_block,
        X,
        shipped,
        dask.delayed(starts, traverse=False),
        method=method,
        empty=empty,
        chunks=(X.chunks[0], *((size,) for size in shape)),
        drop_axis=list(range(1, X.ndim)),
        new_axis=list(range(1, empty.ndim)),
        dtype=empty.dtype,
        meta=empty,
        token=f"skltl-{method}",
    )


def _map_bag(X: Any, shipped: Any, method: str, empty: NDArray[Any]) -> Any:
    """Map the partitions of a bag, whose sizes are unknown."""
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

    name = f"skltl-{method}-{shipped.key.rpartition('-')[2]}-{X.name}"
    rest = (0,) * (empty.ndim - 1)
    tasks = {
        (name, number, *rest): (
            _run_partition_of_bag,
            *((X.name, number), shipped.key, method, empty, number),
        )
        for number in range(X.npartitions)
    }
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[X, shipped])
    unknown = (math.nan,) * X.npartitions
    chunks = (unknown, *((size,) for size in empty.shape[1:]))
    return da.Array(graph, name, chunks, meta=empty)


def _run_block(
    block: NDArray[Any],
    shipped: Shipped,
    starts: NDArray[Any],
    method: str,
    empty: NDArray[Any],
    block_id: tuple[int, ...],
) -> Any:
    start = starts[block_id[0]]
    place = block_id[0], None if math.isnan(start) else int(start)
    return _run(block, shipped, method, empty, place)


def _run_partition(
    partition: Any,
    shipped: Shipped,
    method: str,
    empty: Any,
    partition_info: dict[str, Any] | None = None,
) -> Any:
    number = (partition_info or {}).get("number", 0)
    result = _run(partition, shipped, method, empty, (number, None))
    if isinstance(result, np.ndarray) and not isinstance(empty, np.ndarray):
        columns = {} if result.ndim == 1 else {"columns": empty.columns}
        return type(empty)(result, index=partition.index, **columns)
    if hasattr(result, "iloc"):  # older scikit-learn drops the index of a series
        return result.set_axis(partition.index, axis="index")
    return result


def _run_partition_of_bag(
    partition: Any, shipped: Shipped, method: str, empty: NDArray[Any], number: int
) -> Any:
    return _run(list(partition), shipped, method, empty, (number, None))


def _run(
    images: Any, shipped: Shipped, method: str, empty: Any, place: tuple[int, Any]
) -> Any:
    """Return the results for a block, given its number and the index of its start."""
    if not len(images):
        return empty
    try:
        if _note_attempt():
            _check_not_fatal(shipped.estimator, images)
        result = getattr(shipped.estimator, method)(images)
    except ImageError as error:
        raise _with_place(error, *place) from error.__cause__
    if isinstance(empty, np.ndarray) or not hasattr(result, "iloc"):
        result = np.asarray(result)
    _check_like(result, empty, method)
    return result


def _note_attempt() -> bool:
    """Return whether a worker has begun this task before, and note that it was begun.

    Dask repeats the tasks of a worker that ended. The note is kept by the scheduler as
    long as the task.
    """
    if "distributed" not in sys.modules:
        return False
    from distributed import get_client, get_worker

    try:
        key = [get_worker().get_current_task()]
        client = get_client()
        was_begun: bool = client.get_metadata(key, default=False)
        client.set_metadata(key, True)
    except (ValueError, OSError):  # no worker, or no answer
        return False
    return was_begun


def _check_not_fatal(estimator: Any, images: Any) -> None:
    """Raise an error for an image that ended the worker in an earlier attempt."""
    fitted = image_estimator_of(estimator)
    if fitted is not None and fitted.image_shape is None:
        check_not_fatal(
            images,
            reader=fitted.reader,
            value_range=fitted.value_range,
            n_channels=n_channels_of(fitted),
        )


def _check_like(result: Any, empty: Any, method: str) -> None:
    """Raise an error if results have another shape or kind of type than expected."""
    is_like = result.shape[1:] == empty.shape[1:]
    found, expected = f"shape {result.shape}", f"{('n', *empty.shape[1:])}"
    if isinstance(empty, np.ndarray):
        is_like = is_like and np.can_cast(result.dtype, empty.dtype, "same_kind")
        found, expected = (
            f"{found} and {result.dtype}",
            f"{expected} and {empty.dtype}",
        )
    if not is_like:
        raise ValueError(
            f"{method} returned an array of {found}, expected {expected}. Pass an "
            "array of the right shape and dtype, without rows, as meta of "
            "skltl.distributed.apply."
        )


def _with_place(error: ImageError, number: int, start: int | None) -> ImageError:
    """Return an error with the index of its image in the whole collection.

    Where the sizes of blocks are unknown, or images are those of samples, which a note
    says, the index is that in the block.
    """
    placed = error.moved_to(error.index)
    if start is not None and not hasattr(error, "__notes__"):
        placed = error.moved_to(start + error.index)
    elif isinstance(placed, (ImageReadError, ImageTypeError)):
        placed.reason += f" (it is image {error.index} of block {number})"
    placed.add_note(f"It is in block {number} of the Dask collection.")
    return placed
