"""Images and files that are shared by all tests of this folder; they are read only."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images():
    """Nine RGB images of one size: smooth gradients with some noise."""
    rng = np.random.default_rng(0)
    down, right = np.linspace(0, 100, 40), np.linspace(0, 100, 48)
    slopes = rng.uniform(-1, 1, size=(2, 9, 1, 1, 3))
    smooth = 100 + down[:, None, None] * slopes[0] + right[:, None] * slopes[1]
    noise = rng.normal(0, 8, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def image_files(images, tmp_path_factory):
    """The same images as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"image_{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture
def image(images):
    """The first of the images, of 48 x 40 pixels."""
    return Image.fromarray(images[0])
