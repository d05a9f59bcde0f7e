"""Pooling, compared with numpy."""

import numpy as np
import pytest
import torch

from skltl.inference import can_pool, n_pooled, pool


@pytest.fixture
def feature_maps():
    return np.random.default_rng(0).normal(size=(3, 5, 4, 6)).astype(np.float32)


BY_NUMPY = {
    "avg": lambda maps: maps.mean(axis=(2, 3)),
    "max": lambda maps: maps.max(axis=(2, 3)),
    "avgmax": lambda maps: np.hstack([maps.mean(axis=(2, 3)), maps.max(axis=(2, 3))]),
    "flatten": lambda maps: maps.reshape(3, -1),
    2: lambda maps: maps.reshape(3, 5, 2, 2, 2, 3).mean(axis=(3, 5)).reshape(3, 20),
    1: lambda maps: maps.mean(axis=(2, 3)),
}


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_pooling_equals_numpy(feature_maps, pooling):
    features = pool(torch.tensor(feature_maps), pooling)

    assert n_pooled(feature_maps.shape[1:], pooling) == features.shape[1]
    expected = BY_NUMPY[pooling](feature_maps)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_features_are_not_a_view_of_the_feature_map(feature_maps, pooling):
    feature_map = torch.tensor(feature_maps)
    features = pool(feature_map, pooling)
    before = features.clone()

    feature_map.zero_()

    assert torch.equal(features, before)


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_vectors_are_returned_as_features(pooling):
    vectors = torch.randn(3, 7)

    assert torch.equal(pool(vectors, pooling), vectors)


def test_averages_of_bfloat16_are_float32():
    feature_map = torch.ones(1, 1, 100, 100, dtype=torch.bfloat16)
    feature_map[0, 0, :50] = 3

    assert pool(feature_map, "avg").item() == 2


@pytest.mark.parametrize(
    ("shape", "pooling", "expected"),
    [
        ((5, 4, 6), "avg", True),
        ((5, 4, 6), 4, True),
        ((5, 4, 6), 5, False),
        ((7,), 5, True),
        ((7, 3), "avg", False),
    ],
)
def test_outputs_that_can_be_pooled(shape, pooling, expected):
    assert can_pool(shape, pooling) is expected
