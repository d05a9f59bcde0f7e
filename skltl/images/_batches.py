"""Iterate over the images of a source in batches of one size, decoded by threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from skltl.exceptions import ImageError, ImageReadError, ImageTypeError
from skltl.images._decode import Pixels
from skltl.images._identity import content_key, file_state
from skltl.images._memory import one_image
from skltl.images._preprocessing import Preprocessing, as_float
from skltl.images._source import ImageSource

Item = TypeVar("Item")
Result = TypeVar("Result")

# Number of prefetched batches: one being decoded while another one waits. More would
# take memory and gain nothing.
PREFETCHED_BATCHES = 2

# Where decoding and the network share the cores they alternate: decoding threads would
# delay those of the network, which wait for each other after every layer. A turn is
# long enough that waiting for its last image hardly counts.
IMAGES_PER_TURN = 64
IMAGES_PER_THREAD = 8
BYTES_PER_TURN = 2**28


@dataclass(frozen=True)
class Crop:
    """A decoded image, resized and cropped for the network."""

    position: int  # in the source
    pixels: Pixels  # (h, w, channels), uint8 or float32; several: (n_crops, h, ...)
    key: bytes = b""  # content key of the decoded image, if requested
    file: bytes | None = None  # state of its file, unless that changed meanwhile


@dataclass(frozen=True)
class Batch:
    """Crops stacked for the network: uint8, or float32 if one of them is."""

    positions: list[int]
    keys: list[bytes]
    # (batch_size, h, w, channels), black after the last image; of several crops of each
    # image (batch_size, n_crops, h, w, channels).
    pixels: Pixels


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_threads: int,
    n_in_flight: int,
    alternate: bool = False,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in order, prefetched by threads.

    At most `n_in_flight` results are in flight. With `alternate` these are computed
    together, and no thread runs while they are used: a single thread would be no
    faster than the caller. An exception is raised in place of its result.
    """
    if n_threads == 1 and alternate:
        yield from map(function, items)
        return
    remaining = iter(items)
    in_flight: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="skltl-decode")
    try:
        while True:
            if not (alternate and in_flight):
                for item in islice(remaining, n_in_flight - len(in_flight)):
                    in_flight.append(pool.submit(function, item))
                if alternate:
                    wait(in_flight)
            if not in_flight:
                return
            yield in_flight.popleft().result()
    finally:  # also if the caller stops early or an exception is raised
        pool.shutdown(wait=True, cancel_futures=True)


def iter_crops(
    source: ImageSource,
    positions: Iterable[int],
    preprocessing: Preprocessing,
    batch_size: int,
    n_threads: int,
    with_keys: bool = False,
    alternate: bool = False,
    unreadable: list[ImageError] | None = None,
    n_crops: int = 1,
) -> Generator[Crop, None, None]:
    """Yield the crops at the given positions of a source, prefetched by threads.

    `with_keys` sets `Crop.key` and `Crop.file`. With `alternate` no image is decoded
    while the crops are used, which is faster on shared cores. For the first image, in
    the order of the positions, that cannot be read, its error is raised; or else, the
    errors of all such images are added to `unreadable`, and the others are yielded.
    Each image has `n_crops` crops, as in `Preprocessing.crops`.
    """

    def read(position: int) -> Crop:
        with one_image():
            if not with_keys:
                decoded = source.decode(position)
                return Crop(position, preprocessing.crops(decoded, n_crops))
            item = source.fetch(position)
            path = source.file_of(item)
            before = file_state(path) if path is not None else None
            decoded = source.decode_item(position, item)
            is_own = source.file_of(item) == path  # its reader has read no other file
            after = file_state(path) if path is not None and is_own else None
            crops, key = preprocessing.crops(decoded, n_crops), content_key(decoded)
            return Crop(position, crops, key, after if before == after else None)

    def read_or_error(position: int) -> Crop | ImageError:
        try:
            return read(position)
        except (ImageReadError, ImageTypeError) as error:
            return error.with_traceback(None)  # which holds the image

    if alternate:
        n_in_flight = images_per_turn(preprocessing, batch_size, n_threads, n_crops)
    else:
        n_in_flight = batch_size * (1 + PREFETCHED_BATCHES)
    if unreadable is None:
        return prefetch(read, positions, n_threads, n_in_flight, alternate)
    results = prefetch(read_or_error, positions, n_threads, n_in_flight, alternate)
    return _without_errors(results, unreadable)


def _without_errors(
    results: Generator[Crop | ImageError, None, None], errors: list[ImageError]
) -> Generator[Crop, None, None]:
    """Yield the crops among results, and add the errors among them to a list."""
    with closing(results):
        for result in results:
            if isinstance(result, Crop):
                yield result
            else:
                errors.append(result)


def images_per_turn(
    preprocessing: Preprocessing, batch_size: int, n_threads: int, n_crops: int = 1
) -> int:
    """Return the number of images to decode before the network runs: whole batches."""
    n_images = max(IMAGES_PER_TURN, IMAGES_PER_THREAD * n_threads)
    n_values = n_crops * preprocessing.n_channels * math.prod(preprocessing.size)
    n_that_fit = BYTES_PER_TURN // (4 * n_values)  # maybe float32
    n_batches = min(math.ceil(n_images / batch_size), n_that_fit // batch_size)
    return max(1, n_batches) * batch_size


def iter_batches(crops: Iterable[Crop], batch_size: int) -> Iterator[Batch]:
    """Yield crops, in order, in batches of one size.

    The last batch is padded with black images: kernels round differently for other
    batch sizes, and the features of an image must not depend on its position.
    """
    remaining = iter(crops)
    while group := list(islice(remaining, batch_size)):
        yield _stack(group, batch_size)
        group.clear()  # frees their memory before the next ones are decoded


def _stack(crops: list[Crop], batch_size: int) -> Batch:
    """Copy crops to the beginning of a black batch."""
    images = [crop.pixels for crop in crops]
    if any(image.dtype != np.uint8 for image in images):
        images = [as_float(image) for image in images]
    shape: Any = (batch_size, *images[0].shape)
    pixels: Pixels = np.zeros(shape, images[0].dtype)
    for row, image in enumerate(images):
        pixels[row] = image
    return Batch(
        [crop.position for crop in crops], [crop.key for crop in crops], pixels
    )
