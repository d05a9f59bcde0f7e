"""Data of which four colors are the classes."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def training_images():
    """Forty images of four colors, with noise, of another size than the network's."""
    rng = np.random.default_rng(0)
    colors = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
    noise = rng.normal(0, 60, (40, 48, 60, 3))
    images = colors[np.arange(40) % 4][:, None, None] + noise
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def labels():
    """The names of the colors."""
    return np.array(["red", "green", "blue", "yellow"])[np.arange(40) % 4]


@pytest.fixture(scope="session")
def indicators(labels):
    """Indicators of two labels, which some of the images have both."""
    return np.stack([labels != "red", np.isin(labels, ["green", "yellow"])], 1).astype(
        int
    )
