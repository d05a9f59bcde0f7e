"""Batches keep order and size, and hold few images at a time."""

import threading
import time
import weakref
from contextlib import closing

import numpy as np
import pytest

from skltl import Preprocessing
from skltl.exceptions import ImageReadError
from skltl.images import ImageSource, iter_batches, iter_crops, read_images
from skltl.images._batches import BATCHES_AHEAD, IMAGES_PER_TURN, images_per_turn


def batches_of(source, size, batch_size, n_threads, in_turns=False):
    """Yield all of a source in batches; `crops` is closed with the generator."""
    crops = iter_crops(
        source,
        range(len(source)),
        Preprocessing(size),
        batch_size,
        n_threads,
        in_turns=in_turns,
    )
    with closing(crops):
        yield from iter_batches(crops, batch_size)


def test_batches_have_one_size_and_keep_the_order(images):
    batches = list(batches_of(read_images(images), 40, batch_size=4, n_threads=3))

    assert [len(batch.pixels) for batch in batches] == [4, 4, 4]
    assert [position for batch in batches for position in batch.positions] == [
        *range(9)
    ]
    assert (batches[-1].pixels[1:] == 0).all()
    middle = images[:, :, 4:44]
    together = np.concatenate([batch.pixels for batch in batches])[:9]
    np.testing.assert_array_equal(together, middle)


class CountingImages:
    """A sequence that knows how many of its images were read, and how many live."""

    def __init__(self, n):
        self.n = n
        self.n_read = 0
        self.n_most_alive = 0
        self.alive = weakref.WeakSet()
        self.threads = set()
        self.lock = threading.Lock()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        with self.lock:
            self.n_read += 1
            image = Tracked((8, 8, 3), np.uint8)
            self.alive.add(image)
            self.n_most_alive = max(self.n_most_alive, len(self.alive))
            self.threads.add(threading.current_thread().name)
        time.sleep(0.001)
        return image


class Tracked(np.ndarray):
    """An array that can be watched, by identity."""

    __hash__ = object.__hash__


def test_few_images_are_decoded_ahead_and_none_is_kept():
    items = CountingImages(500)
    batches = batches_of(ImageSource(items), 8, 10, n_threads=4)

    for number, _ in enumerate(batches, start=1):
        assert items.n_read <= 10 * (number + BATCHES_AHEAD)

    assert items.n_read == 500
    assert items.n_most_alive <= 10 * (1 + BATCHES_AHEAD)


def test_in_turns_nothing_is_decoded_while_images_are_used():
    items = CountingImages(150)
    crops = iter_crops(
        ImageSource(items), range(150), Preprocessing(8), 10, 4, in_turns=True
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
        (2500, 8, 2, 8),  # a batch is needed in any case
    ],
)
def test_a_turn_is_many_images_but_at_most_256_megabytes(
    size, batch_size, n_threads, n_expected
):
    n_images = images_per_turn(size, batch_size, n_threads)

    assert n_images == n_expected
    assert n_images % batch_size == 0
    n_bytes = n_images * np.zeros((size, size, 3), np.float32).nbytes
    assert n_bytes <= 2**28 or n_images == batch_size


@pytest.mark.parametrize("n_threads", [1, 4])
def test_so_many_threads_decode(n_threads):
    items = CountingImages(60)

    list(batches_of(ImageSource(items), 8, 10, n_threads))

    assert len(items.threads) == n_threads


@pytest.mark.parametrize("in_turns", [False, True])
def test_the_first_unreadable_image_is_named_and_threads_end(images, in_turns):
    items = [*images, "missing.png", *images, "also missing.png"]

    with pytest.raises(ImageReadError, match="Image 9 .'missing.png'."):
        list(batches_of(read_images(items), 8, 4, 4, in_turns))

    assert not [t for t in threading.enumerate() if t.name.startswith("skltl-decode")]


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_caller_may_stop_early(images, in_turns):
    batches = batches_of(read_images(images), 8, 2, 2, in_turns)
    next(batches)
    batches.close()

    assert not [t for t in threading.enumerate() if t.name.startswith("skltl-decode")]
