"""Find unreadable images before a long computation does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import closing
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from joblib import effective_n_jobs
from sklearn.utils import check_consistent_length, check_scalar
from tqdm import tqdm

from skltl._caller import user_stacklevel
from skltl._sklearn import take
from skltl.exceptions import (
    BadImageWarning,
    ImageReadError,
    ImageTypeError,
    quote,
    shorten,
)
from skltl.images._batches import IMAGES_PER_THREAD, prefetch
from skltl.images._channels import RGB
from skltl.images._memory import one_image
from skltl.images._source import Reader, check_reader, check_value_range, read_images

# Dropped images that a warning names.
N_NAMED = 3


class BadImage(NamedTuple):
    """Index in ``X``, path or name (if it has one) and reason of a bad image."""

    index: int  # type: ignore[assignment]  # hides `tuple.index`, not needed here
    path: str | None
    reason: str


def find_bad_images(
    X: Any,
    *,
    reader: Reader | None = None,
    value_range: tuple[float, float] | None = None,
    n_channels: int = RGB,
    n_jobs: int | None = None,
    verbose: bool | int = False,
) -> list[BadImage]:
    """Decode each image once and list the unreadable ones.

    Parameters
    ----------
    X : sequence of images
        Images of any kind, as for `CNNFeatureTransformer` without `image_shape`.
    reader : callable, default=None
        Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
    value_range : tuple of 2 floats, default=None
        Values of black and white, as for `CNNFeatureTransformer`.
    n_channels : int, default=3
        Number of channels that the network takes.
    n_jobs : int, default=None
        Number of decoding threads; ``None`` and -1 use one per core.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Returns
    -------
    list of BadImage
        Named tuples (index, path, reason) in the order of ``X``, empty if all images
        are readable. The path is ``None`` for an image without a path, URL or name.

    Raises
    ------
    TypeError, ValueError
        If ``X`` is not a sequence of images.

    Examples
    --------
    >>> import numpy as np
    >>> from skltl import find_bad_images
    >>> good = np.zeros((4, 4, 3), dtype=np.uint8)
    >>> find_bad_images([good, np.full((4, 4), np.nan), good])
    [BadImage(index=1, path=None, reason='it holds NaN or infinity')]
    """
    check_scalar(n_channels, "n_channels", Integral, min_val=1)
    check_reader(reader)
    check_value_range(value_range)
    source = read_images(
        X,
        check_items=False,
        reader=reader,
        value_range=value_range,
        n_channels=n_channels,
    )
    n_threads = effective_n_jobs(-1 if n_jobs is None else n_jobs)

    def check(index: int) -> ImageReadError | ImageTypeError | None:
        try:
            with one_image():
                source.decode(index)
        except (ImageReadError, ImageTypeError) as error:
            return error.with_traceback(None)  # which holds the image
        return None

    n_in_flight = IMAGES_PER_THREAD * n_threads
    with closing(prefetch(check, range(len(source)), n_threads, n_in_flight)) as found:
        progress = tqdm(
            found, total=len(source), desc="images", unit="img", disable=not verbose
        )
        return bad_images(error for error in progress if error is not None)


def bad_images(errors: Iterable[ImageReadError | ImageTypeError]) -> list[BadImage]:
    """Return errors of images as named tuples, in the order of ``X``."""
    found = [
        BadImage(error.index, error.path, error.reason)
        if isinstance(error, ImageReadError)
        else BadImage(error.index, None, f"it is {error.reason}")
        for error in errors
    ]
    return sorted(found, key=lambda bad: bad.index)


def drop_bad(
    X: Any,
    *arrays: Any,
    reader: Reader | None = None,
    value_range: tuple[float, float] | None = None,
    n_channels: int = RGB,
    n_jobs: int | None = None,
    verbose: bool | int = False,
) -> Any:
    """Drop the images that cannot be read, and their labels.

    Each image is decoded once. A warning says how many images were dropped.

    Parameters
    ----------
    X : sequence of images
        Images of any kind that :func:`find_bad_images` supports.
    *arrays : array-like of length n
        Labels, sample weights, groups and other values of the images. ``None`` is
        returned unchanged.
    reader : callable, default=None
        Function from an item of ``X`` to an image, as for `CNNFeatureTransformer`.
    value_range : tuple of 2 floats, default=None
        Values of black and white, as for `CNNFeatureTransformer`.
    n_channels : int, default=3
        Number of channels that the network takes.
    n_jobs : int, default=None
        Number of decoding threads; ``None`` and -1 use one per core.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Returns
    -------
    X or tuple
        The readable images, as scikit-learn selects them from ``X`` (a list of a lazy
        sequence); with `arrays`, a tuple of these and of the selected values. If all
        images are readable, the arguments themselves.

    Raises
    ------
    TypeError, ValueError
        If ``X`` is not a sequence of images, or the lengths differ.

    Warns
    -----
    BadImageWarning
        If an image was dropped.

    See Also
    --------
    find_bad_images : List the images that cannot be read.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> from skltl import drop_bad
    >>> good = np.zeros((4, 4, 3), dtype=np.uint8)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     X, y = drop_bad([good, "missing.jpg", good], ["a", "b", "c"])
    >>> len(X), y
    (2, ['a', 'c'])
    """
    options: Any = {"reader": reader, "n_channels": n_channels}
    n_images = len(read_images(X, check_items=False, **options))
    check_consistent_length(range(n_images), *arrays)
    options |= {"value_range": value_range, "n_jobs": n_jobs, "verbose": verbose}
    bad = find_bad_images(X, **options)
    parts = (X, *arrays)
    if bad:
        report = _report_of_dropped(bad, n_images)
        warnings.warn(report, BadImageWarning, user_stacklevel())
        readable = np.setdiff1d(np.arange(n_images), [one.index for one in bad])
        parts = tuple(None if part is None else take(part, readable) for part in parts)
    return parts if arrays else parts[0]


def _report_of_dropped(bad: list[BadImage], n_images: int) -> str:
    """Return a text about dropped images that names the first ones."""
    named = [
        f"{one.index}{'' if one.path is None else f' ({quote(one.path, 60)})'}: "
        f"{shorten(one.reason, 160)}"
        for one in bad[:N_NAMED]
    ]
    more = "; ..." if len(bad) > N_NAMED else ""
    return (
        f"{len(bad)} of {n_images} images cannot be read and were dropped: image "
        f"{'; image '.join(named)}{more}. find_bad_images lists all."
    )
