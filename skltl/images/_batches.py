"""Iterate over a source in batches of one fixed size, decoding in threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from skltl.images._decode import Pixels
from skltl.images._identity import content_key, file_state
from skltl.images._preprocessing import Preprocessing, as_float
from skltl.images._sharing import one_image
from skltl.images._source import ImageSource

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_threads: int,
    n_ahead: int,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in order, computed ahead in threads.

    Parameters
    ----------
    function : callable
        What to apply. Pillow and hashlib let other threads run while they work.
    items : iterable
        To what.
    n_threads : int
        How many threads work.
    n_ahead : int
        How many results, at most, exist besides the ones yielded.

    Yields
    ------
    object
        The results. An exception is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with _threads(n_threads) as pool:
        ahead: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(remaining, n_ahead)
        )
        while ahead:
            result = ahead.popleft().result()
            for item in islice(remaining, 1):
                ahead.append(pool.submit(function, item))
            yield result


def map_in_bursts(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_threads: int,
    n_burst: int,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` of each item, in order, computed many at a time.

    For results that are used on the same cores: between two bursts no thread works, so
    that none holds up those that use the results.

    Parameters
    ----------
    function : callable
        What to apply.
    items : iterable
        To what.
    n_threads : int
        How many threads work.
    n_burst : int
        How many results are computed together, and wait at most.

    Yields
    ------
    object
        The results. An exception is raised where its result would have been yielded.
    """
    remaining = iter(items)
    with _threads(n_threads) as pool:
        while burst := deque(
            pool.submit(function, item) for item in islice(remaining, n_burst)
        ):
            wait(burst)
            while burst:
                yield burst.popleft().result()


@contextmanager
def _threads(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="skltl-decode")
    try:
        yield pool
    finally:
        # Also reached when the caller stops early or an exception is raised.
        pool.shutdown(wait=True, cancel_futures=True)


# How many batches are decoded ahead of the one in use: one being filled while another
# waits. More would cost memory and gain nothing.
BATCHES_AHEAD = 2

# Where decoding and the network share the cores they take turns: threads that decode
# would hold up those of the network, which wait for each other after every layer. A
# turn is long enough that waiting for its last image counts for little.
IMAGES_A_TURN = 64
IMAGES_A_THREAD = 8
BYTES_A_TURN = 2**28


@dataclass(frozen=True)
class Crop:
    """An image as the network will see it.

    Parameters
    ----------
    position : int
        Where the image stands in the source.
    pixels : array of shape (h, w, 3)
        Resized and cropped; uint8 or float32.
    key : bytes, default=b""
        Names the decoded image by its content, if that was asked for.
    file : bytes or None, default=None
        The state of the file it was decoded from, if that did not change meanwhile.
    """

    position: int
    pixels: Pixels
    key: bytes = b""
    file: bytes | None = None


@dataclass(frozen=True)
class Batch:
    """Images ready for the network.

    Parameters
    ----------
    positions : list of int
        Where they stand in the source.
    keys : list of bytes
        Their crops' keys.
    pixels : array of shape (batch_size, h, w, 3)
        uint8, or float32 if one image is; black after the last image.
    """

    positions: list[int]
    keys: list[bytes]
    pixels: Pixels


def iter_crops(
    source: ImageSource,
    positions: Iterable[int],
    preprocessing: Preprocessing,
    batch_size: int,
    n_threads: int,
    with_keys: bool = False,
    in_turns: bool = False,
) -> Generator[Crop, None, None]:
    """Yield images of a source, resized and cropped.

    Parameters
    ----------
    source : ImageSource
        The images.
    positions : iterable of int
        Which of them, in which order.
    preprocessing : Preprocessing
        Its resize and crop are applied.
    batch_size : int
        Of the batches that will be made.
    n_threads : int
        Threads that decode.
    with_keys : bool, default=False
        Whether the crops' `key` and `file` are wanted.
    in_turns : bool, default=False
        Whether decoding stands still while the crops are used, for use on the same
        cores.

    Yields
    ------
    Crop
        In the order of the positions.

    Raises
    ------
    ImageReadError
        For the first image, in this order, that cannot be read.
    """

    def read(position: int) -> Crop:
        with one_image():
            if not with_keys:
                return Crop(position, preprocessing.crop(source.decode(position)))
            path = source.path(position)
            before = file_state(path) if path is not None else None
            decoded = source.decode(position)
            after = file_state(path) if path is not None else None
            crop, key = preprocessing.crop(decoded), content_key(decoded)
            return Crop(position, crop, key, after if before == after else None)

    if in_turns:
        n_crops = images_a_turn(preprocessing.crop_size, batch_size, n_threads)
        return map_in_bursts(read, positions, n_threads, n_crops)
    return map_ahead(read, positions, n_threads, batch_size * (1 + BATCHES_AHEAD))


def images_a_turn(crop_size: int, batch_size: int, n_threads: int) -> int:
    """Return how many images are decoded before the network runs; whole batches."""
    n_images = max(IMAGES_A_TURN, IMAGES_A_THREAD * n_threads)
    n_that_fit = BYTES_A_TURN // (3 * 4 * crop_size**2)  # they may be float32
    n_batches = min(math.ceil(n_images / batch_size), n_that_fit // batch_size)
    return max(1, n_batches) * batch_size


def iter_batches(crops: Iterable[Crop], batch_size: int) -> Iterator[Batch]:
    """Yield crops, in order, in batches of one fixed size.

    The last batch is filled up with black images: kernels round differently for other
    batch sizes, and an image shall give the same bits wherever it stands.

    Parameters
    ----------
    crops : iterable of Crop
        All of one height and width.
    batch_size : int
        Images in each batch.

    Yields
    ------
    Batch
        The next images.
    """
    waiting: list[Crop] = []
    for crop in crops:
        waiting.append(crop)
        if len(waiting) == batch_size:
            yield _batch(waiting, batch_size)
            waiting = []
    if waiting:
        yield _batch(waiting, batch_size)


def _batch(crops: list[Crop], batch_size: int) -> Batch:
    positions = [crop.position for crop in crops]
    keys = [crop.key for crop in crops]
    return Batch(positions, keys, _stack([crop.pixels for crop in crops], batch_size))


def _stack(images: list[Pixels], batch_size: int) -> Pixels:
    if any(image.dtype != np.uint8 for image in images):
        images = [as_float(image) for image in images]
    shape: Any = (batch_size, *images[0].shape)
    stacked: Pixels = np.zeros(shape, images[0].dtype)
    for row, image in enumerate(images):
        stacked[row] = image
    return stacked
