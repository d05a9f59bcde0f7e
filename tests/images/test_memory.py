"""How much memory decoding takes at most, measured in processes of their own."""

import subprocess
import sys
import zlib
from struct import pack

import numpy as np
import pytest
from PIL import Image

from skltl import find_bad_images

resource = pytest.importorskip("resource")

GIGABYTE = 1e9

# Below Pillow's limit of 89,478,485 pixels.
SHAPES = [(9459, 9459), (16383, 5461), (5461, 16383), (11184, 8000), (8000, 11184)]

MEASURE = """
import pathlib, resource, sys
import numpy as np
def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # the other figure is at least what the parent process had
        (line,) = [one for one in status.read_text().splitlines() if "VmHWM" in one]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
"""


def chunk(kind, body):
    return pack(">I", len(body)) + kind + body + pack(">I", zlib.crc32(kind + body))


def png(path, size, n_bits, colour_type, n_channels, further=b""):
    """Write an empty PNG file by hand, row by row."""
    width, height = size
    row = b"\0" + bytes(width * n_channels * n_bits // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = pack(">IIBBBBB", width, height, n_bits, colour_type, 0, 0, 0)
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
    "png grey 16 bits": lambda path, size: png(path, size, 16, 0, 1),
    "png grey and alpha": lambda path, size: png(path, size, 8, 4, 2),
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


def measured(code, *arguments):
    """Run code in a new process and return the numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


@pytest.mark.parametrize(
    ("kind", "most"), [("png rgba", 6), ("png palette", 7), ("png grey 16 bits", 8)]
)
def test_one_image_takes_a_few_bytes_a_pixel(kind, most, tmp_path):
    size = (5000, 5000)
    BOMBS[kind](tmp_path / "bomb", size)
    code = """
from skltl.images import Preprocessing, iter_crops, read_images
before = peak()
list(iter_crops(read_images(sys.argv[1:]), [0], Preprocessing(224), 1, 1, True))
print(peak() - before)
"""

    (taken,) = measured(code, tmp_path / "bomb")

    assert taken / np.prod(size) < most


def test_four_threads_decode_large_images_in_turn(tmp_path):
    """Nor does the allocator keep for one thread what another one needs."""
    size = (9459, 9459)
    BOMBS["png rgba"](tmp_path / "bomb", size)
    code = """
from skltl import find_bad_images
before = peak()
found = find_bad_images(sys.argv[1:] * 4, n_jobs=4)
print(peak() - before, len(found))
"""

    taken, n_bad = measured(code, tmp_path / "bomb")

    assert taken / np.prod(size) < 7
    assert n_bad == 0


def test_files_whose_decoder_takes_too_much_are_refused_by_their_header(tmp_path):
    """WebP takes 16 bytes a pixel: 46 bytes on disk would become 1.4 GB."""
    Image.new("RGBA", (16, 16)).save(tmp_path / "bomb.webp", lossless=True)
    content = bytearray((tmp_path / "bomb.webp").read_bytes())
    bits = (16383 - 1) | (5461 - 1) << 14 | 1 << 28  # width, height, alpha
    content[21:25] = pack("<I", bits)
    (tmp_path / "bomb.webp").write_bytes(content)

    (bad,) = find_bad_images([tmp_path / "bomb.webp"])

    assert "89,467,563 pixels, more than the limit of 36,350,634" in bad.reason
    assert "a WebP file needs 16 bytes" in bad.reason


def test_the_limit_for_the_decoder_goes_with_pillows(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.webp")
    limits = {8000: 1, 64 * 64 * 3: 0, None: 0}

    for limit, n_bad in limits.items():
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert len(find_bad_images([tmp_path / "image.webp"])) == n_bad


@pytest.mark.parametrize(
    ("options", "n_bytes"), [({"subsampling": 0}, 10), ({"subsampling": 2}, 7)]
)
def test_progressive_files_hold_their_coefficients(
    options, n_bytes, tmp_path, monkeypatch
):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (64, 64)).save(path, progressive=True, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)

    (bad,) = find_bad_images([path])

    assert f"a progressive JPEG file needs {n_bytes} bytes" in bad.reason


WITH_TORCH = """
import torch, torchvision, sklearn
from skltl import CNNFeatureTransformer, find_bad_images
from skltl.exceptions import ImageReadError
n_threads, *paths = sys.argv[1:]
transformer = CNNFeatureTransformer("tiny", n_jobs=int(n_threads))
transformer.fit([np.zeros((9, 9, 3), np.uint8)])
find_bad_images(paths, n_jobs=int(n_threads))
try:
    transformer.transform(paths)
except ImageReadError:
    pass
print(peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_sixty_bombs_stay_below_a_gigabyte_and_a_half(kind, tmp_path):
    """Twelve kinds of five shapes, one after the other, with torch in memory."""
    paths = [tmp_path / f"bomb_{number}" for number in range(len(SHAPES))]
    for path, shape in zip(paths, SHAPES, strict=True):
        BOMBS[kind](path, shape)

    (most,) = measured(WITH_TORCH, 1, *paths)

    assert most < 1.5 * GIGABYTE


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_eight_threads_of_bombs_stay_below_two_gigabytes(kind, tmp_path):
    BOMBS[kind](tmp_path / "bomb", SHAPES[0] if kind != "webp rgba" else SHAPES[1])

    (most,) = measured(WITH_TORCH, 8, *[tmp_path / "bomb"] * 8)

    assert most < 2 * GIGABYTE
