"""Images, image files and data folders shared by several test files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

# Workers of pytest-xdist share the cores.
N_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
N_THREADS = max(1, torch.get_num_threads() // N_WORKERS)
torch.set_num_threads(N_THREADS)
threadpool_limits(N_THREADS)


@pytest.fixture(scope="session")
def shared_images():
    """Nine RGB images of one size, read-only: smooth gradients with some noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 40)
    images = np.empty((9, 40, 48, 3))
    for image in images:
        slopes = rng.uniform(-1, 1, size=(2, 3))
        image[:] = 100 + ramp[:, None, None] * slopes[0] / 2
        image += np.linspace(0, 200, 48)[None, :, None] * slopes[1] / 2
    noise = rng.normal(0, 8, images.shape)
    images = np.clip(images + noise, 0, 255).astype(np.uint8)
    images.flags.writeable = False
    return images


@pytest.fixture
def images(shared_images):
    """A writable copy of the shared images."""
    return shared_images.copy()


@pytest.fixture
def image_files(images, tmp_path):
    """The same images as PNG files."""
    paths = [tmp_path / f"image_{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(scope="session")
def real_data():
    """Folder of real images and weights, from the variable ``SKLTL_TEST_DATA``."""
    folder = os.environ.get("SKLTL_TEST_DATA")
    if not folder:
        pytest.skip("SKLTL_TEST_DATA is not set")
    assert Path(folder).is_dir(), f"SKLTL_TEST_DATA={folder} is not a folder"
    return Path(folder)


@pytest.fixture(scope="session")
def squeezenet_weights(real_data):
    """ImageNet weights of SqueezeNet 1.0."""
    return real_data / "weights" / "squeezenet1_0_imagenet.safetensors"


@pytest.fixture(scope="session")
def flowers(real_data):
    """Paths and labels of 408 flower images: 24 of each of 17 classes."""
    paths = sorted((real_data / "flowers17").glob("*/*.jpg"))
    return paths, np.array([path.parent.name for path in paths])


@pytest.fixture(scope="session")
def digits():
    """Rows in [0, 1] and labels of scikit-learn's digits."""
    rows, labels = load_digits(return_X_y=True)
    return rows / 16, labels
