"""Batches keep their order and size; prefetching is bounded and leaves no threads."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest

from skltl import Preprocessing
from skltl.exceptions import ImageReadError
from skltl.images import (
    ImageSource,
    iter_batches,
    iter_crops,
    prefetch,
    read_images,
)
from skltl.images._batches import IMAGES_PER_TURN, PREFETCHED_BATCHES, images_per_turn


def batches_of(source, size, batch_size, n_threads, alternate=False):
    """Yield all batches of a source; the crops are closed with the generator."""
    crops = iter_crops(
        source,
        range(len(source)),
        Preprocessing(size),
        batch_size,
        n_threads,
        alternate=alternate,
    )
    with closing(crops):
        yield from iter_batches(crops, batch_size)


def decoding_threads():
    return [t for t in threading.enumerate() if t.name.startswith("skltl-decode")]


def wait_until(condition):
    """Wait until a condition holds, for 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_batches_have_one_size_and_keep_the_order(images, n_threads):
    batches = list(batches_of(read_images(images), 40, 4, n_threads))

    assert [len(batch.pixels) for batch in batches] == [4, 4, 4]
    assert [position for batch in batches for position in batch.positions] == [
        *range(9)
    ]
    assert (batches[-1].pixels[1:] == 0).all()
    center = images[:, :, 4:44]
    together = np.concatenate([batch.pixels for batch in batches])[:9]
    np.testing.assert_array_equal(together, center)


class CountingImages:
    """A sequence that counts the images read from it, and the threads that read."""

    def __init__(self, n):
        self.n = n
        self.n_read = 0
        self.threads = set()
        self.lock = threading.Lock()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        time.sleep(0.001)
        with self.lock:
            self.n_read += 1
            self.threads.add(threading.current_thread().name)
        return np.zeros((8, 8, 3), np.uint8)


def test_prefetching_is_bounded():
    items = CountingImages(70)
    n_in_flight = 10 * (1 + PREFETCHED_BATCHES)
    crops = iter_crops(ImageSource(items), range(70), Preprocessing(8), 10, 4)

    with closing(crops):
        for n_used, _ in enumerate(crops):
            expected = min(70, n_used + n_in_flight)
            wait_until(lambda expected=expected: items.n_read >= expected)
            assert items.n_read == expected

    assert len(items.threads) == 4


def test_in_turns_no_image_is_decoded_while_others_are_used():
    items = CountingImages(150)
    crops = iter_crops(
        ImageSource(items), range(150), Preprocessing(8), 10, 4, alternate=True
    )
    turn = 70  # whole batches
    assert 0 <= turn - IMAGES_PER_TURN < 10

    n_read = []
    with closing(crops):
        for number, crop in enumerate(crops):
            time.sleep(0.0002)
            assert crop.position == number
            n_read.append(items.n_read)

    assert n_read == [70] * 70 + [140] * 70 + [150] * 10
    assert len(items.threads) == 4


@pytest.mark.parametrize(
    ("size", "batch_size", "n_threads", "n_expected"),
    [
        (224, 8, 2, 64),
        (224, 7, 2, 70),
        (224, 8, 32, 256),
        (224, 8, 128, 440),  # of 445 that fit
        (1024, 8, 2, 16),  # of 21
        (2500, 2, 2, 2),
        (2500, 8, 2, 8),  # at least one batch
    ],
)
def test_a_turn_takes_at_most_256_megabytes(size, batch_size, n_threads, n_expected):
    n_images = images_per_turn(Preprocessing(size), batch_size, n_threads)

    assert n_images == n_expected
    assert n_images % batch_size == 0
    assert n_images * size**2 * 3 * 4 <= 2**28 or n_images == batch_size


@pytest.mark.parametrize("alternate", [False, True])
def test_a_single_thread_is_the_callers_unless_it_prefetches(alternate):
    items = CountingImages(20)

    list(batches_of(ImageSource(items), 8, 10, 1, alternate))

    assert len(items.threads) == 1
    assert (threading.current_thread().name in items.threads) == alternate


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("alternate", [False, True])
def test_the_first_unreadable_image_is_named(images, alternate, n_threads):
    items = [*images, "missing.png", *images, "also missing.png"]

    with pytest.raises(ImageReadError, match="Image 9 .'missing.png'."):
        list(batches_of(read_images(items), 8, 4, n_threads, alternate))

    assert not decoding_threads()


@pytest.mark.parametrize("alternate", [False, True])
def test_a_caller_may_stop_early(images, alternate):
    batches = batches_of(read_images(images), 8, 2, 2, alternate)
    next(batches)
    batches.close()

    assert not decoding_threads()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("alternate", [False, True])
def test_no_thread_outlives_an_error(error, alternate):
    def fail_at_3(number):
        if number == 3:
            raise error
        return number

    results = prefetch(fail_at_3, range(100), 2, 8, alternate)

    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error):
        next(results)
    assert not decoding_threads()
