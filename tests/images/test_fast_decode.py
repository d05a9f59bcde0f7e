"""Decoding of JPEG files at a reduced scale, and its effect on features."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from skltl import CNNFeatureTransformer, cache_info
from skltl.images import read_images

SIZES = {"0.jpg": (1600, 900), "1.jpg": (700, 1200), "2.png": (900, 900)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Large images with soft shapes, as JPEG and PNG files."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photographs")
    for name, size in SIZES.items():
        soft = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(soft).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / name, quality=90)
    return [folder / name for name in SIZES]


def extracted(paths, decode, **settings):
    settings = {"image_size": 64, "precision": "float32", "engine": "torch"} | settings
    return CNNFeatureTransformer("tiny", decode=decode, **settings).fit_transform(paths)


@pytest.fixture(scope="module")
def features(photographs):
    """Features of the images by the value of `decode`."""
    return {decode: extracted(photographs, decode) for decode in ("exact", "fast")}


@pytest.mark.parametrize(
    ("least_side", "shapes"),
    [
        (100, [(113, 200), (150, 88), (900, 900)]),  # an eighth; half of 8: of 700
        (128, [(225, 400), (300, 175), (900, 900)]),
        (400, [(450, 800), (1200, 700), (900, 900)]),
        (901, [(900, 1600), (1200, 700), (900, 900)]),
    ],
)
def test_both_sides_keep_the_least_length(least_side, shapes, photographs):
    source = read_images(photographs).reduced_to(least_side)

    found = [image.shape[:2] for image in source]

    for shape, expected, (width, height) in zip(
        found, shapes, SIZES.values(), strict=True
    ):
        assert min(shape) >= min(least_side, width, height)
        assert shape == expected or least_side == 100
        assert height / shape[0] == pytest.approx(width / shape[1], rel=0.02)


def test_features_differ_slightly(features):
    exact, fast = features["exact"], features["fast"]

    assert_array_equal(fast[2], exact[2])  # PNG files have one scale
    for one, other in zip(fast[:2], exact[:2], strict=True):
        assert 0 < np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


def test_a_cache_distinguishes_both(photographs, features, tmp_path):
    folder = tmp_path / "cache"

    for decode in ("exact", "fast", "fast", "exact"):
        found = extracted(photographs, decode, cache=folder)
        assert_array_equal(found, features[decode])

    assert cache_info(folder).n_bytes > 0
