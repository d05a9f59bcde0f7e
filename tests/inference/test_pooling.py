"""Pooling, against numpy."""

import numpy as np
import pytest
import torch

from skltl.inference._pooling import n_pooled, pool


@pytest.fixture
def maps():
    return np.random.default_rng(0).normal(size=(3, 5, 4, 6)).astype(np.float32)


def grid_of_averages(maps):
    quarters = maps.reshape(3, 5, 2, 2, 2, 3)
    return quarters.mean(axis=(3, 5)).reshape(3, 20)


BY_NUMPY = {
    "avg": lambda maps: maps.mean(axis=(2, 3)),
    "max": lambda maps: maps.max(axis=(2, 3)),
    "avgmax": lambda maps: np.hstack([maps.mean(axis=(2, 3)), maps.max(axis=(2, 3))]),
    "flatten": lambda maps: maps.reshape(3, -1),
    2: grid_of_averages,
    1: lambda maps: maps.mean(axis=(2, 3)),
}


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_pooling_is_numpys(maps, pooling):
    features = pool(torch.tensor(maps), pooling)

    assert n_pooled(maps.shape[1:], pooling) == features.shape[1]
    np.testing.assert_allclose(features, BY_NUMPY[pooling](maps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_features_are_no_view_of_the_map(maps, pooling):
    feature_map = torch.tensor(maps)
    features = pool(feature_map, pooling)
    before = features.clone()

    feature_map.zero_()

    assert torch.equal(features, before)


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_vectors_are_pooled_already(pooling):
    vectors = torch.randn(3, 7)

    assert torch.equal(pool(vectors, pooling), vectors)


def test_averages_of_bfloat16_are_float32():
    maps = torch.ones(1, 1, 100, 100, dtype=torch.bfloat16)
    maps[0, 0, :50] = 3

    assert pool(maps, "avg").item() == 2
