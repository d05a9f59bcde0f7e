"""Find the pictures that cannot be read, before a long job does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from joblib import cpu_count

from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images._source import ImageSource, read_images


class BadImage(NamedTuple):
    """A picture that cannot be read: its position, path (if it is a file), and why."""

    index: int  # type: ignore[assignment]  # hides `tuple.index`, not needed here
    path: str | None
    reason: str


def find_bad_images(X: Any) -> list[BadImage]:
    """Decode every picture once and list those that cannot be read.

    Parameters
    ----------
    X : sequence of paths, PIL pictures, arrays or tensors, or one array of pictures
        What `CNNFeatureTransformer` takes. Rows of numbers are not pictures here.

    Returns
    -------
    list of BadImage
        Named tuples (index, path, reason) in the order of ``X``, empty if all is well;
        the path is ``None`` for a picture that is not a file.

    Raises
    ------
    TypeError, ValueError
        If ``X`` as a whole is not a sequence of pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import find_bad_images
    >>> good = np.zeros((4, 4, 3), dtype=np.uint8)
    >>> find_bad_images([good, np.full((4, 4), np.nan), good])
    [BadImage(index=1, path=None, reason='it holds NaN or infinity')]
    """
    source = read_images(X, check_items=False)
    with ThreadPoolExecutor(cpu_count()) as pool:
        found = pool.map(lambda index: _find_fault(source, index), range(len(source)))
        return [bad for bad in found if bad is not None]


def _find_fault(source: ImageSource, index: int) -> BadImage | None:
    try:
        source.decode(index)
    except ImageReadError as error:
        return BadImage(error.index, error.path, error.reason)
    except ImageTypeError as error:
        return BadImage(error.index, None, f"it is {error.reason}")
    return None
