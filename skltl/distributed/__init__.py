"""Estimators on data that several processes or machines compute.

`apply` runs whole fitted estimators on Dask collections. `BatchFunction` makes a
function of tables of an estimator, for Ray Data, Hugging Face datasets and others.
"""

from skltl.distributed._apply import apply
from skltl.distributed._batch_function import BatchFunction

__all__ = ["BatchFunction", "apply"]
