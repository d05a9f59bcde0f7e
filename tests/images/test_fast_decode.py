"""JPEG files decoded at a smaller scale: when, how far, and what that changes."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from skltl import CNNFeatureTransformer, cache_info
from skltl.images import read_images


@pytest.fixture
def photographs(tmp_path):
    """Large images with soft shapes, as JPEG and PNG files."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (name, size) in enumerate(
        [("wide.jpg", (1600, 900)), ("high.jpg", (700, 1200)), ("same.png", (900, 900))]
    ):
        soft = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(soft).resize(size, Image.Resampling.BICUBIC)
        paths.append(tmp_path / f"{number}_{name}")
        image.save(paths[-1], quality=90)
    return paths


@pytest.mark.parametrize(
    ("least_side", "shapes"),
    [
        (100, [(113, 200), (150, 88), (900, 900)]),  # an eighth; half of 8: of 700
        (128, [(225, 400), (300, 175), (900, 900)]),
        (400, [(450, 800), (1200, 700), (900, 900)]),
        (901, [(900, 1600), (1200, 700), (900, 900)]),
    ],
)
def test_no_side_gets_too_short(least_side, shapes, photographs):
    source = read_images(photographs).reduced_to(least_side)

    found = [image.shape[:2] for image in source]

    for shape, expected, full in zip(
        found, shapes, ((900, 1600), (1200, 700), (900, 900)), strict=True
    ):
        assert min(shape) >= min(least_side, min(full))
        assert shape == expected or least_side == 100
        assert full[0] / shape[0] == pytest.approx(full[1] / shape[1], rel=0.02)


def test_features_differ_a_little(photographs):
    exact, fast = (
        CNNFeatureTransformer(
            "tiny", decode=decode, precision="float32", engine="torch"
        ).fit_transform(photographs)
        for decode in ("exact", "fast")
    )

    assert_array_equal(fast[2], exact[2])  # a PNG file has one scale
    for one, other in zip(fast[:2], exact[:2], strict=True):
        assert 0 < np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


def test_a_cache_keeps_both_apart(photographs, tmp_path):
    folder = tmp_path / "cache"
    settings = {"cache": folder, "image_size": 64}
    for decode in ("exact", "fast"):
        alone = CNNFeatureTransformer("tiny", decode=decode, image_size=64)
        cached = CNNFeatureTransformer("tiny", decode=decode, **settings)
        expected = alone.fit_transform(photographs)
        for _ in range(2):
            assert_array_equal(cached.fit_transform(photographs), expected)
    again = CNNFeatureTransformer("tiny", decode="exact", **settings)
    exact = CNNFeatureTransformer("tiny", image_size=64).fit_transform(photographs)

    assert_array_equal(again.fit_transform(photographs), exact)
    assert cache_info(folder).n_bytes > 0
