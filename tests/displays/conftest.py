"""Figures without a screen, and a count of the images that the network computes."""

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from skltl.inference import Runner


@pytest.fixture(autouse=True)
def agg_backend():
    with mpl.rc_context({"backend": "agg"}):
        yield
        plt.close("all")


@pytest.fixture
def network_counts(monkeypatch):
    """Number of images in each forward pass; padding of batches is black."""
    counts = []
    features = Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(Runner, "features", counted)
    return counts
