"""Torch's default dtype and device neither change a result nor are changed."""

import functools
import pickle
import threading

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    release_memory,
)

TINY = {"image_shape": (8, 8), "image_size": 16, "random_state": 0}
TRAINING = {"layer": "block1", "head_epochs": 1, "finetune_epochs": 1}


@functools.cache
def rows():
    return np.random.default_rng(0).random((16, 64)), np.arange(16) % 2


def features():
    X, _ = rows()
    return CNNFeatureTransformer("tiny", **TINY).fit_transform(X)


def random_features():
    X, _ = rows()
    return CNNFeatureTransformer("tiny", weights=None, **TINY).fit_transform(X)


def pretrained():
    X, _ = rows()
    return PretrainedCNNClassifier("tiny", **TINY).fit(X).predict_proba(X)


def fine_tuned():
    X, y = rows()
    classifier = FineTunedCNNClassifier(
        "tiny", dropout=0.1, hidden_units=(5,), **TRAINING, **TINY
    )
    return classifier.fit(X, y).decision_function(X)


def mirrored(image):
    return image.flip(-1)


def fine_tuned_on_augmented_views():
    X, y = rows()
    classifier = FineTunedCNNClassifier(
        "tiny",
        augment=mirrored,
        n_views=1,
        conv_channels=(4,),
        **TRAINING,
        **TINY,
    )
    return classifier.fit(X, y).decision_function(X)


def advised():
    advisor = StrategyAdvisor(
        CNNFeatureTransformer("tiny", **TINY), cv=2, random_state=0
    ).fit(*rows())
    return np.array(list(advisor.layer_scores_.values()))


def transferred():
    X, y = rows()
    classifier = TransferClassifier(
        CNNFeatureTransformer("tiny", **TINY), strategy="extract", random_state=0
    )
    return classifier.fit(X, y).decision_function(X)


OUTPUTS = [
    features,
    random_features,
    pretrained,
    fine_tuned,
    fine_tuned_on_augmented_views,
    advised,
    transferred,
]


@pytest.fixture(scope="module")
def expected_of():
    """Return a function that computes an output once, with the usual defaults."""
    return functools.cache(lambda output: output())


# Tensors on the device "meta" have no values, as those on "cuda" have other ones.
@pytest.fixture(
    params=[pytest.param("float64", marks=pytest.mark.slow), "bfloat16", "meta"]
)
def set_other_defaults(request):
    """Return a function that sets another default dtype or device for the test."""

    def set_defaults():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield set_defaults
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.__name__)
def test_defaults_of_torch_change_no_result(output, expected_of, set_other_defaults):
    expected = expected_of(output)
    release_memory()
    set_other_defaults()
    before = torch.get_default_dtype(), torch.get_default_device()

    found = output()

    assert_array_equal(found, expected)
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


def test_a_saved_estimator_is_loaded_to_the_cpu(set_other_defaults):
    X, y = rows()
    fine_tuned = FineTunedCNNClassifier("tiny", **TRAINING, **TINY).fit(X, y)
    pretrained = PretrainedCNNClassifier("tiny", **TINY).fit(X)
    expected = fine_tuned.predict_proba(X), pretrained.predict_proba(X)
    saved = pickle.dumps([fine_tuned, pretrained])
    set_other_defaults()

    loaded = pickle.loads(saved)

    for estimator, probabilities in zip(loaded, expected, strict=True):
        first = next(iter(estimator.network_.blocks.values()))
        weights = first.state_dict().values()
        assert {weight.device.type for weight in weights} == {"cpu"}
        assert_array_equal(estimator.predict_proba(X), probabilities)


def test_building_a_network_does_not_change_the_default_dtype_of_other_threads():
    """Torch's default dtype is global: even a short change would reach all threads."""
    found, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            found.add(torch.get_default_dtype())

    torch.set_default_dtype(torch.float64)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for seed in range(5):
            CNNFeatureTransformer("tiny", weights=None, random_state=seed).fit(
                np.zeros((1, 80, 80, 3), np.uint8)
            )
    finally:
        done.set()
        watcher.join()
        torch.set_default_dtype(torch.float32)

    assert found == {torch.float64}
