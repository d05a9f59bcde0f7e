"""Pooling, compared with numpy."""

import dataclasses

import numpy as np
import pytest
import torch

from skltl.inference import can_pool, n_pooled, pool
from skltl.networks import Layout

GRID = (4, 6)
CHANNELS_FIRST = Layout((5, *GRID), GRID)
CHANNELS_LAST = Layout((*GRID, 5), GRID, is_channels_last=True)
TOKENS = Layout((24, 5), GRID, is_channels_last=True)
WITH_PREFIX = Layout((26, 5), GRID, is_channels_last=True, n_prefix=2)

# The same feature maps (n, c, h, w) in other layouts; prefix tokens are large.
ARRANGED = {
    "channels first": (CHANNELS_FIRST, lambda maps: maps),
    "channels last": (CHANNELS_LAST, lambda maps: np.moveaxis(maps, 1, -1)),
    "tokens": (TOKENS, lambda maps: np.moveaxis(maps.reshape(3, 5, 24), 1, -1)),
    "prefix tokens": (
        WITH_PREFIX,
        lambda maps: np.hstack(
            [np.full((3, 2, 5), 100.0), np.moveaxis(maps.reshape(3, 5, 24), 1, -1)]
        ),
    ),
}


@pytest.fixture
def feature_maps():
    return np.random.default_rng(0).normal(size=(3, 5, *GRID)).astype(np.float32)


BY_NUMPY = {
    "avg": lambda maps: maps.mean(axis=(2, 3)),
    "max": lambda maps: maps.max(axis=(2, 3)),
    "avgmax": lambda maps: np.hstack([maps.mean(axis=(2, 3)), maps.max(axis=(2, 3))]),
    "flatten": lambda maps: maps.reshape(3, -1),
    2: lambda maps: maps.reshape(3, 5, 2, 2, 2, 3).mean(axis=(3, 5)).reshape(3, 20),
    1: lambda maps: maps.mean(axis=(2, 3)),
}


@pytest.mark.parametrize("arrangement", ARRANGED)
@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_pooling_equals_numpy(feature_maps, pooling, arrangement):
    layout, arrange = ARRANGED[arrangement]
    output = arrange(feature_maps).astype(np.float32)

    features = pool(torch.tensor(output), pooling, layout)

    assert n_pooled(layout, pooling) == features.shape[1]
    expected = BY_NUMPY[pooling](feature_maps)
    if pooling == "flatten":  # all values of the output, in its order
        expected = output.reshape(3, -1)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_class_tokens_are_the_first_tokens():
    tokens = np.random.default_rng(0).normal(size=(3, 26, 5)).astype(np.float32)
    average = tokens[:, 2:].mean(axis=1)

    def pooled(pooling, layout=WITH_PREFIX):
        return pool(torch.tensor(tokens), pooling, layout).numpy()

    own_class_token = dataclasses.replace(WITH_PREFIX, uses_class_token=True)
    np.testing.assert_array_equal(pooled("cls"), tokens[:, 0])
    np.testing.assert_array_equal(pooled("auto", own_class_token), tokens[:, 0])
    np.testing.assert_allclose(pooled("auto"), average, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        pooled("cls+avg"), np.hstack([tokens[:, 0], average]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_features_are_not_a_view_of_the_feature_map(feature_maps, pooling):
    feature_map = torch.tensor(feature_maps)
    features = pool(feature_map, pooling, CHANNELS_FIRST)
    before = features.clone()

    feature_map.zero_()

    assert torch.equal(features, before)


@pytest.mark.parametrize("pooling", BY_NUMPY)
def test_vectors_are_returned_as_features(pooling):
    vectors = torch.randn(3, 7)

    assert torch.equal(pool(vectors, pooling, Layout((7,))), vectors)


def test_averages_of_bfloat16_are_float32():
    feature_map = torch.ones(1, 1, 100, 100, dtype=torch.bfloat16)
    feature_map[0, 0, :50] = 3

    layout = Layout((1, 100, 100), (100, 100))

    assert pool(feature_map, "avg", layout).item() == 2


@pytest.mark.parametrize(
    ("layout", "pooling", "expected"),
    [
        (CHANNELS_FIRST, "avg", True),
        (CHANNELS_FIRST, 4, True),
        (CHANNELS_FIRST, 5, False),
        (CHANNELS_FIRST, "cls", False),
        (TOKENS, "cls+avg", False),
        (WITH_PREFIX, "cls+avg", True),
        (WITH_PREFIX, 4, True),
        (WITH_PREFIX, 5, False),
        (Layout((7,)), 5, True),
        (Layout((7, 3)), "avg", False),
        (Layout((7, 3)), "flatten", True),
    ],
)
def test_outputs_that_can_be_pooled(layout, pooling, expected):
    assert can_pool(layout, pooling) is expected
