"""Damaged content of every format is an image or a named error, in little memory."""

import pytest
from peak_memory import measured

from skltl.images._decode import FILE_FORMATS

pytest.importorskip("resource")

# 250 damaged byte strings of one format.
FIND_BAD = """
import io, sys
from PIL import Image
from skltl import find_bad_images

file_format, seed = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(seed)
buffer = io.BytesIO()
tiles = rng.integers(256, size=(9, 12, 3))
image = Image.fromarray(np.kron(tiles, np.ones((8, 8, 1))).astype(np.uint8))
if file_format == "HEIF":
    import pillow_heif
    pillow_heif.from_pillow(image).save(buffer)
else:
    options = {"progressive": True} if file_format == "JPEG" and seed else {}
    image.save(buffer, file_format, **options)
content = np.frombuffer(buffer.getvalue(), np.uint8)

def damaged():
    kind, copied = rng.integers(4), content.copy()
    if kind == 0:
        return copied[: rng.integers(len(copied))]
    if kind == 1:
        copied[rng.integers(len(copied), size=rng.integers(1, 20))] ^= 255
    if kind == 2:  # the header, where sizes and offsets are
        at = rng.integers(min(64, len(copied)), size=4)
        copied[at] = rng.integers(256, size=4)
    if kind == 3:
        start = rng.integers(len(copied))
        copied = np.concatenate([copied[:start], rng.integers(256, size=50), copied])
    return copied

strings = [damaged().astype(np.uint8).tobytes() for _ in range(250)]
bad = find_bad_images(strings, n_jobs=2)
assert all(one.reason for one in bad)
print(peak(), len(bad))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF"]
)
def test_damaged_bytes_are_images_or_named_errors(file_format, seed):
    if file_format == "HEIF":
        pytest.importorskip("pillow_heif")
    elif file_format not in FILE_FORMATS:
        pytest.skip(f"this Pillow has no decoder of {file_format}")

    peak, n_bad = measured(FIND_BAD, file_format, seed)

    assert peak < 1.5e9
    assert n_bad > 0
