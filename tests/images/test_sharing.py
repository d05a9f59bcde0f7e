"""What decoding threads share: locks of images, and the memory of large ones."""

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from PIL import Image

from skltl.images import read_images
from skltl.images._decode import (
    BYTES_OF_LARGE_IMAGES,
    LARGE_IMAGE,
    lock_of,
    one_image,
    reserve_memory,
)


@pytest.fixture
def image(images):
    return Image.fromarray(images[0])


def peak_of(n_pixels, bytes_per_pixel, n_threads=6):
    """Count how many threads hold the memory of such an image at the same time."""
    lock, now, most = threading.Lock(), [0], [0]

    def decode():
        with one_image():
            reserve_memory(n_pixels, bytes_per_pixel)
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.05)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=decode) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most[0]


def test_images_that_fill_the_memory_are_decoded_one_after_the_other():
    n_pixels = 80_000_000

    assert peak_of(n_pixels, BYTES_OF_LARGE_IMAGES // n_pixels) == 1


def test_an_image_larger_than_the_memory_is_decoded_alone():
    assert peak_of(1_000_000_000, 8) == 1


def test_as_many_images_are_decoded_at_once_as_the_memory_holds():
    n_pixels = 40_000_000

    assert peak_of(n_pixels, BYTES_OF_LARGE_IMAGES // n_pixels // 3) == 3


def test_images_of_common_sizes_never_wait():
    everyone = threading.Barrier(6)

    def decode(_):
        with one_image():
            reserve_memory(LARGE_IMAGE, 1000)
            everyone.wait(timeout=20)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode, range(6)))  # a broken barrier is an error


def test_blocks_may_be_nested():
    """The memory is held until the outer one ends, so that it is not taken twice."""
    with one_image():
        for _ in range(2):
            with one_image():
                reserve_memory(10 * LARGE_IMAGE, 8)

    assert peak_of(10 * LARGE_IMAGE, 8, n_threads=2) == 1


def in_a_daemon(function):
    """Call a function in a thread that does not keep the process from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_a_failure_gives_the_memory_back():
    def fail():
        with one_image():
            reserve_memory(10 * LARGE_IMAGE, 8)
            raise OSError

    for _ in range(3):  # a thread that waits for ever does not end the process
        with pytest.raises(OSError, match="^$"):
            in_a_daemon(fail).result(timeout=20)


def test_one_object_has_one_lock_as_long_as_it_is_used(image):
    with lock_of(image):
        assert lock_of(image) is lock_of(image)
        assert lock_of(image) is not lock_of(image.copy())


def in_a_child(function):
    """Run a function in a forked child and return its exit status."""
    child = os.fork()
    if not child:
        threading.Timer(20, os._exit, [1]).start()
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_can_read_what_another_thread_was_reading(image):
    reading, may_end = threading.Event(), threading.Event()

    def read():
        with lock_of(image), one_image():
            reserve_memory(10 * LARGE_IMAGE, 8)
            reading.set()
            may_end.wait()

    thread = threading.Thread(target=read)
    thread.start()
    reading.wait()
    status = in_a_child(
        lambda: (read_images([image])[0], peak_of(10 * LARGE_IMAGE, 8, 1))
    )
    may_end.set()
    thread.join()

    assert status == 0
