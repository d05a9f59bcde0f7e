"""Find unreadable images before a long computation does."""

from __future__ import annotations

from contextlib import closing
from typing import Any, NamedTuple

from joblib import effective_n_jobs
from tqdm import tqdm

from skltl.exceptions import ImageReadError, ImageTypeError
from skltl.images._batches import IMAGES_PER_THREAD, prefetch
from skltl.images._decode import one_image
from skltl.images._source import read_images


class BadImage(NamedTuple):
    """Index in ``X``, path (if it is a file) and reason of an unreadable image."""

    index: int  # type: ignore[assignment]  # hides `tuple.index`, not needed here
    path: str | None
    reason: str


def find_bad_images(
    X: Any, *, n_jobs: int | None = None, verbose: bool | int = False
) -> list[BadImage]:
    """Decode each image once and list the unreadable ones.

    Parameters
    ----------
    X : sequence of paths, PIL images, arrays or tensors, or one array of images
        Images, as for `CNNFeatureTransformer` without `image_shape`.
    n_jobs : int, default=None
        Number of decoding threads; ``None`` and -1 use one per core.
    verbose : bool or int, default=False
        Whether to show a progress bar.

    Returns
    -------
    list of BadImage
        Named tuples (index, path, reason) in the order of ``X``, empty if all images
        are readable. The path is ``None`` for an image that is not a file.

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
    source = read_images(X, check_items=False)
    n_threads = effective_n_jobs(-1 if n_jobs is None else n_jobs)

    def check(index: int) -> BadImage | None:
        try:
            with one_image():
                source.decode(index)
        except ImageReadError as error:
            return BadImage(error.index, error.path, error.reason)
        except ImageTypeError as error:
            return BadImage(error.index, None, f"it is {error.reason}")
        return None

    n_in_flight = IMAGES_PER_THREAD * n_threads
    with closing(prefetch(check, range(len(source)), n_threads, n_in_flight)) as found:
        progress = tqdm(
            found, total=len(source), desc="images", unit="img", disable=not verbose
        )
        return [bad for bad in progress if bad is not None]
