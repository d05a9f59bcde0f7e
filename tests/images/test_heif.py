"""AVIF and HEIC, the formats of phones: by Pillow, and by pillow-heif if installed."""

import io

import numpy as np
import pytest
from PIL import Image

from skltl import find_bad_images
from skltl.exceptions import ImageReadError
from skltl.images import read_images
from skltl.images._decode import FILE_FORMATS


def smooth():
    """A smooth image, of which little is lost by compression."""
    down, right = np.mgrid[:160, :240] / 240
    return (255 * np.stack([down, right, 1 - right], axis=2)).astype(np.uint8)


@pytest.fixture
def avif():
    if "AVIF" not in FILE_FORMATS:
        pytest.skip("this Pillow has no AVIF decoder")
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "AVIF", quality=95)
    return buffer.getvalue()


@pytest.fixture
def heic():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(smooth())).save(buffer, quality=95)
    return buffer.getvalue()


@pytest.fixture(params=["avif", "heic"])
def content(request):
    return request.getfixturevalue(request.param)


def test_the_image_is_decoded(content):
    np.testing.assert_allclose(read_images([content])[0], smooth(), atol=12)


def test_limits_hold(content, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # it has 38,400

    with pytest.raises(ImageReadError, match="for this kind of file"):
        read_images([content])[0]


@pytest.mark.parametrize("n_kept", [20, 100, 300, -5])
def test_truncated_files_are_named(content, n_kept):
    with pytest.raises(ImageReadError, match="Image 1 could not be read"):
        read_images([smooth(), content[:n_kept]])[1]


def test_damaged_bytes_raise_no_other_error(content):
    rng = np.random.default_rng(0)
    damaged = []
    for _ in range(60):
        bytes_ = np.frombuffer(content, np.uint8).copy()
        bytes_[rng.integers(len(bytes_), size=8)] = rng.integers(256, size=8)
        damaged.append(bytes_.tobytes())

    find_bad_images(damaged)


def test_heic_needs_a_package(monkeypatch):
    monkeypatch.setattr("skltl.images._decode.has_heif", lambda: False)
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

    with pytest.raises(ImageReadError, match="HEIC file; pip install pillow-heif"):
        read_images([head])[0]
