"""Memory of large images: what waits for what, and the peak memory of processes."""

import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from struct import pack

import pytest
from peak_memory import measured
from PIL import Image

from skltl import find_bad_images
from skltl.images import read_images
from skltl.images._decode import lock_of
from skltl.images._memory import (
    BYTES_OF_LARGE_IMAGES,
    LARGE_IMAGE,
    one_image,
    reserve_memory,
)

resource = pytest.importorskip("resource")

GIGABYTE = 1e9

# Below Pillow's limit of 89,478,485 pixels.
SHAPES = [(9459, 9459), (16383, 5461), (5461, 16383), (11184, 8000), (8000, 11184)]


def most_at_once(n_pixels, bytes_per_pixel, n_threads=6):
    """Count how many threads hold the memory of such an image at the same time."""
    lock, now, most = threading.Lock(), [0], [0]

    def decode():
        with one_image():
            reserve_memory(n_pixels, bytes_per_pixel)
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.02)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=decode, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    return most[0]


@pytest.mark.parametrize(
    ("n_pixels", "bytes_per_pixel", "n_at_once"),
    [
        (80_000_000, BYTES_OF_LARGE_IMAGES // 80_000_000, 1),  # fills the budget
        (1_000_000_000, 8, 1),  # exceeds it
        (40_000_000, BYTES_OF_LARGE_IMAGES // 120_000_000, 3),
    ],
)
def test_large_images_share_a_memory_budget(n_pixels, bytes_per_pixel, n_at_once):
    assert most_at_once(n_pixels, bytes_per_pixel) == n_at_once


def test_images_of_common_sizes_never_wait():
    everyone = threading.Barrier(6)

    def decode(_):
        with one_image():
            reserve_memory(LARGE_IMAGE, 1000)
            everyone.wait(timeout=20)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode, range(6)))  # a broken barrier is an error


def test_memory_is_reserved_once_in_nested_blocks():
    with one_image():
        for _ in range(2):
            with one_image():
                reserve_memory(10 * LARGE_IMAGE, 8)

    assert most_at_once(10 * LARGE_IMAGE, 8, n_threads=2) == 1


def test_an_error_releases_the_memory():
    def fail():
        with one_image():
            reserve_memory(10 * LARGE_IMAGE, 8)
            raise OSError

    with pytest.raises(OSError, match="^$"):
        fail()

    assert most_at_once(10 * LARGE_IMAGE, 8, n_threads=1) == 1


def test_an_object_has_one_lock_while_it_is_used(image):
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
        lambda: (read_images([image])[0], most_at_once(10 * LARGE_IMAGE, 8, 1))
    )
    may_end.set()
    thread.join()

    assert status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_its_thread_holds_memory_has_the_whole_budget():
    with one_image():
        reserve_memory(10 * LARGE_IMAGE, 8)
        status = in_a_child(lambda: most_at_once(10 * LARGE_IMAGE, 8, 1))

    assert status == 0
    assert most_at_once(10 * LARGE_IMAGE, 8, 1) == 1


def chunk(kind, body):
    return pack(">I", len(body)) + kind + body + pack(">I", zlib.crc32(kind + body))


def png(path, size, n_bits, color_type, n_channels, further=b""):
    """Write a black PNG file by hand, row by row."""
    width, height = size
    row = b"\0" + bytes(width * n_channels * n_bits // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = pack(">IIBBBBB", width, height, n_bits, color_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + further
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


PALETTE = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256))

BOMBS = {
    "png rgba": lambda path, size: png(path, size, 8, 6, 4),
    "png rgba 16 bits": lambda path, size: png(path, size, 16, 6, 4),
    "png rgb": lambda path, size: png(path, size, 8, 2, 3),
    "png rgb 16 bits": lambda path, size: png(path, size, 16, 2, 3),
    "png palette": lambda path, size: png(path, size, 8, 3, 1, PALETTE),
    "png gray 16 bits": lambda path, size: png(path, size, 16, 0, 1),
    "png gray and alpha": lambda path, size: png(path, size, 8, 4, 2),
    "webp rgba": lambda path, size: Image.new("RGBA", size).save(
        path, "WEBP", lossless=True
    ),
    "jpeg progressive": lambda path, size: Image.new("RGB", size).save(
        path, "JPEG", progressive=True
    ),
    "jpeg": lambda path, size: Image.new("RGB", size).save(path, "JPEG"),
    "gif": lambda path, size: Image.new("P", size).save(path, "GIF", transparency=0),
    "tiff group 4": lambda path, size: Image.new("1", size).save(
        path, "TIFF", compression="group4"
    ),
}


PEAKS = """
import os
from skltl import find_bad_images
from skltl.images import Preprocessing, _memory, iter_crops, read_images

def crop(path):
    list(iter_crops(read_images([path]), [0], Preprocessing(224), 1, 1, True))

def decode_in_four_threads(path):
    _memory.BYTES_OF_LARGE_IMAGES = 8 * 4600 * 4600  # room for one
    assert find_bad_images([path] * 4, n_jobs=4) == []

def peak_in_child(function, path):
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        function(sys.argv[-1])  # pages of libraries count once they are used
        before = peak()
        function(path)
        os.write(write_end, str(peak() - before).encode())
        os._exit(0)
    os.close(write_end)
    print(os.read(read_end, 99).decode() or "nan")
    os.wait()

for path in sys.argv[1:-1]:
    peak_in_child(crop, path)
peak_in_child(decode_in_four_threads, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_decoding_takes_a_few_bytes_per_pixel(tmp_path):
    """Also in four threads, whose large images are decoded one after the other."""
    size = (4600, 4600)
    limits = {"png rgba": 6, "png palette": 7, "png gray 16 bits": 8}
    paths = [tmp_path / kind for kind in limits]
    for path in paths:
        BOMBS[path.name](path, size)

    BOMBS["png rgba"](tmp_path / "small", (64, 64))

    *alone, together = measured(PEAKS, *paths, tmp_path / "small")

    assert LARGE_IMAGE < 4600**2
    for taken, most in zip(alone, limits.values(), strict=True):
        assert taken / 4600**2 < most
    assert together / 4600**2 < 7


def test_files_whose_decoder_takes_too_much_memory_are_refused(tmp_path):
    """WebP takes 16 bytes per pixel: 46 bytes on disk would become 1.4 GB."""
    Image.new("RGBA", (16, 16)).save(tmp_path / "bomb.webp", lossless=True)
    content = bytearray((tmp_path / "bomb.webp").read_bytes())
    bits = (16383 - 1) | (5461 - 1) << 14 | 1 << 28  # width, height, alpha
    content[21:25] = pack("<I", bits)
    (tmp_path / "bomb.webp").write_bytes(content)

    (bad,) = find_bad_images([tmp_path / "bomb.webp"])

    assert "89,467,563 pixels, more than the limit of 36,350,634" in bad.reason
    assert "a WebP file needs 16 bytes" in bad.reason


def test_the_limit_of_the_decoder_follows_that_of_pillow(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.webp")
    limits = {8000: 1, 64 * 64 * 3: 0, None: 0}

    for limit, n_bad in limits.items():
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert len(find_bad_images([tmp_path / "image.webp"])) == n_bad


@pytest.mark.parametrize(
    ("options", "n_bytes"), [({"subsampling": 0}, 10), ({"subsampling": 2}, 7)]
)
def test_progressive_jpeg_files_have_a_lower_limit(
    options, n_bytes, tmp_path, monkeypatch
):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (64, 64)).save(path, progressive=True, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)

    (bad,) = find_bad_images([path])

    assert f"a progressive JPEG file needs {n_bytes} bytes" in bad.reason


READ_IMAGES = """
from skltl import CNNFeatureTransformer, find_bad_images
from skltl.exceptions import ImageReadError
n_threads, small, *paths = sys.argv[1:]
n_threads = int(n_threads)
transformer = CNNFeatureTransformer("tiny", n_jobs=n_threads)
transformer.fit([small] * 8).transform([small] * 8)
before = peak()
find_bad_images(paths, n_jobs=n_threads)
try:
    transformer.transform(paths)
except ImageReadError:
    pass
print(peak() - before)
"""


def memory_of_reading(n_threads, kind, path, *paths):
    """Peak memory beyond that of the imported packages and the loaded network.

    How much of the libraries is resident depends on the system's page cache, up to
    several hundred megabytes, so that the total says nothing about skltl.
    """
    small = path.with_name("small")
    BOMBS[kind](small, (64, 64))
    (most,) = measured(READ_IMAGES, n_threads, small, path, *paths)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_sixty_bombs_take_less_than_750_megabytes(kind, tmp_path):
    """Twelve kinds of five shapes, one after the other."""
    paths = [tmp_path / f"bomb_{number}" for number in range(len(SHAPES))]
    for path, shape in zip(paths, SHAPES, strict=True):
        BOMBS[kind](path, shape)

    assert memory_of_reading(1, kind, *paths) < 0.75 * GIGABYTE


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_eight_threads_of_bombs_share_the_memory_budget(kind, tmp_path):
    path = tmp_path / "bomb"
    BOMBS[kind](path, SHAPES[0] if kind != "webp rgba" else SHAPES[1])

    assert memory_of_reading(8, kind, *[path] * 8) < BYTES_OF_LARGE_IMAGES
