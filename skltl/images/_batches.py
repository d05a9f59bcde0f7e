"""Walk a source in batches of one fixed size, decoding ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from skltl.images._decode import Pixels
from skltl.images._preprocessing import Preprocessing, as_float
from skltl.images._source import ImageSource

# How many batches are decoded ahead of the one in use: one being filled while another
# waits. More would cost memory and gain nothing.
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """Pictures ready for the network.

    Parameters
    ----------
    positions : range
        Where the pictures stand in the source.
    pixels : array of shape (batch_size, h, w, 3)
        uint8, or float32 if one picture is; black after the last picture.
    """

    positions: range
    pixels: Pixels


def iter_batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    n_threads: int,
) -> Iterator[Batch]:
    """Yield the pictures of a source in order, in batches of one fixed size.

    The last batch is filled up with black pictures: kernels round differently for other
    batch sizes, and an image shall give the same bits wherever it stands.

    Parameters
    ----------
    source : ImageSource
        The pictures.
    preprocessing : Preprocessing
        Its resize and crop are applied.
    batch_size : int
        Pictures in each batch.
    n_threads : int
        Threads that decode.

    Yields
    ------
    Batch
        At most ``BATCHES_AHEAD`` batches more than the one yielded are in memory.

    Raises
    ------
    ImageReadError
        For the first picture, in order, that cannot be read.
    """

    def read(index: int) -> Pixels:
        return preprocessing.crop(source[index])

    remaining = iter(range(len(source)))
    ahead: deque[Future[Pixels]] = deque()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="skltl-decode")
    try:
        for first in range(0, len(source), batch_size):
            while len(ahead) < batch_size * (1 + BATCHES_AHEAD):
                index = next(remaining, None)
                if index is None:
                    break
                ahead.append(pool.submit(read, index))
            positions = range(first, min(first + batch_size, len(source)))
            pictures = [ahead.popleft().result() for _ in positions]
            yield Batch(positions, _stack(pictures, batch_size))
    finally:
        # Also reached when the caller stops early or a picture cannot be read.
        pool.shutdown(wait=True, cancel_futures=True)
    source.warn_of_odd_range()


def _stack(pictures: list[Pixels], batch_size: int) -> Pixels:
    if any(picture.dtype != np.uint8 for picture in pictures):
        pictures = [as_float(picture) for picture in pictures]
    shape: Any = (batch_size, *pictures[0].shape)
    stacked: Pixels = np.zeros(shape, pictures[0].dtype)
    for row, picture in enumerate(pictures):
        stacked[row] = picture
    return stacked
