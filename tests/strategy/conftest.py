"""Digits and transformers that the tests of strategies share."""

import pytest
from sklearn.datasets import load_digits

import skltl
from skltl import CNNFeatureTransformer


@pytest.fixture(scope="session")
def make_transformer():
    """Function that returns a small transformer of rows."""

    def make(backbone="tiny", **parameters):
        rows = {"image_shape": (8, 8), "image_size": 32}
        return CNNFeatureTransformer(backbone, **{**rows, **parameters})

    return make


@pytest.fixture(scope="package")
def few_digits():
    """60 digits with the remainders of a division by 3 as labels."""
    rows, labels = load_digits(return_X_y=True)
    return rows[1:61] / 16, labels[1:61] % 3


@pytest.fixture
def n_forward(monkeypatch):
    """List of the numbers of images in all batches that a network has processed."""
    counts = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    return counts
