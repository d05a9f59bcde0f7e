"""``BatchFunction``: an estimator as a function of tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skltl._dask import Shipped
from skltl.distributed._results import result_of_one
from skltl.exceptions import shorten


class BatchFunction:
    """Function that adds the results of a fitted estimator to tables of images.

    Ray Data, Hugging Face datasets, Daft and Spark all call a function with a batch of
    rows, and pickle it for other processes. The network is loaded once per process.

    Parameters
    ----------
    estimator : estimator or BatchFunction
        Fitted transformer, pipeline, classifier or regressor; or a function that has
        one, for engines that construct the function in their processes, such as Ray.
    method : str, default="transform"
        Method of the estimator, such as ``"predict"`` or ``"predict_proba"``.
    column : str, default="path"
        Name of the column that holds the images: paths or encoded images; in a
        dict or a data frame, arrays, too.
    output : str, default="features"
        Name of the new column. A column of this name is replaced.

    See Also
    --------
    apply : The same for Dask collections.

    Notes
    -----
    A `BatchFunction` is pickled with all parameters of the estimator, `cache` included,
    which a pickle of the estimator itself omits. The estimator is copied, so that
    another `fit` does not change what an engine computes later.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer
    >>> from skltl.distributed import BatchFunction
    >>> images = np.zeros((2, 40, 40, 3), dtype=np.uint8)
    >>> transformer = CNNFeatureTransformer("tiny", layer="block2").fit(images)
    >>> function = BatchFunction(transformer, column="image")
    >>> batch = function({"id": np.arange(2), "image": images})
    >>> batch["features"].shape
    (2, 96)
    """

    __module__ = "skltl.distributed"

    def __init__(
        self,
        estimator: Any,
        method: str = "transform",
        column: str = "path",
        output: str = "features",
    ) -> None:
        if isinstance(estimator, (BatchFunction, Shipped)):
            estimator = estimator.estimator
        else:
            estimator = copy.deepcopy(estimator)
        check_is_fitted(estimator)
        if not callable(getattr(estimator, method, None)):
            raise AttributeError(
                f"{type(estimator).__name__} has no method {shorten(repr(method))}. "
                "Pass another one as method, such as 'predict'."
            )
        self.estimator: Any = estimator
        self.method = method
        self.column = column
        self.output = output

    def __call__(self, batch: Any) -> Any:
        """Return a batch with the results as one more column.

        Parameters
        ----------
        batch : dict, pandas.DataFrame, pyarrow.Table or RecordBatch
            Columns; in a dict, lists or arrays.

        Returns
        -------
        dict, pandas.DataFrame or pyarrow.Table
            Batch with the column `output`: an array in a dict, a column of arrays in a
            data frame, and a column of lists of fixed size in a table. It is a column
            of numbers or text if there is one result per image.
        """
        images = self._images(batch)
        results, n = self._results(images), len(images)
        if isinstance(batch, Mapping):
            added: Any = batch.copy()  # type: ignore[attr-defined]
            added[self.output] = results[:n]
            return added
        if hasattr(batch, "append_column"):
            return self._add_to_arrow(batch, results)
        column = results[:n] if results.ndim == 1 else _objects(results[:n])
        return batch.assign(**{self.output: column})

    def __repr__(self) -> str:
        return (
            f"BatchFunction({shorten(repr(self.estimator), 200)}, {self.method!r}, "
            f"column={self.column!r}, output={self.output!r})"
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The token is fixed: Hugging Face compares pickles to find earlier results.
        shipped = Shipped(self.estimator, token="batch")
        return BatchFunction, (shipped, self.method, self.column, self.output)

    def _images(self, batch: Any) -> Any:
        """Return the column of images."""
        is_table = hasattr(batch, "append_column") or hasattr(batch, "assign")
        if not (isinstance(batch, Mapping) or is_table):
            package = type(batch).__module__.partition(".")[0]
            raise TypeError(
                "The batch must be a dict of columns, a pandas.DataFrame or a "
                f"pyarrow.Table; got a {package}.{type(batch).__name__}."
            )
        names = list(getattr(batch, "column_names", batch))
        if self.column not in names:
            raise KeyError(
                f"The batch has no column {self.column!r}, only "
                f"{shorten(', '.join(map(repr, names)))}. Pass its name as column."
            )
        return batch[self.column]

    def _results(self, images: Any) -> NDArray[Any]:
        """Return the results for images; if there are none, that for a blank one."""
        if len(images):
            found = getattr(self.estimator, self.method)(images)
        else:
            found = result_of_one(self.estimator, self.method)
        results = np.asarray(found)
        if results.shape[:1] != (max(len(images), 1),):
            raise TypeError(
                f"{type(self.estimator).__name__}.{self.method} returns a "
                f"{type(found).__name__}, not an array with a row for each image."
            )
        return results

    def _add_to_arrow(self, table: Any, results: NDArray[Any]) -> Any:
        """Return a table with one more column, or a new one for that of its name."""
        import pyarrow as pa

        if results.ndim == 1:
            column = pa.array(results)
        else:
            values = pa.array(results.reshape(-1))
            width = int(np.prod(results.shape[1:]))
            column = pa.FixedSizeListArray.from_arrays(values, width)
        column = column[: table.num_rows]
        if self.output in table.column_names:
            index = table.column_names.index(self.output)
            return table.set_column(index, self.output, column)
        return table.append_column(self.output, column)


def _objects(rows: NDArray[Any]) -> NDArray[np.object_]:
    """Return an array of the rows, which is one of objects even if there are none."""
    column = np.empty(len(rows), dtype=object)
    column[:] = list(rows)
    return column
