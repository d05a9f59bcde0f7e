"""The user's defaults of torch change no estimator, and stay as they are."""

import pickle

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

rng = np.random.default_rng(0)
ROWS, LABELS = rng.random((24, 64)), np.arange(24) % 2
TINY = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}


def features():
    return CNNFeatureTransformer("tiny", **TINY).fit_transform(ROWS)


def random_features():
    return CNNFeatureTransformer("tiny", weights=None, **TINY).fit_transform(ROWS)


def categories():
    return PretrainedCNNClassifier("tiny", **TINY).fit(ROWS).predict_proba(ROWS)


def tuned():
    settings = {"head_epochs": 2, "finetune_epochs": 1, "hidden_units": (5,)}
    classifier = FineTunedCNNClassifier("tiny", dropout=0.1, **settings, **TINY)
    return classifier.fit(ROWS, LABELS).decision_function(ROWS)


def tuned_with_views():
    settings = {"head_epochs": 2, "finetune_epochs": 1, "conv_channels": (4,)}
    classifier = FineTunedCNNClassifier(
        "tiny", augment=lambda image: image.flip(-1), n_views=1, **settings, **TINY
    )
    return classifier.fit(ROWS, LABELS).decision_function(ROWS)


def advised():
    transformer = CNNFeatureTransformer("tiny", **TINY)
    advisor = StrategyAdvisor(transformer, cv=2, random_state=0).fit(ROWS, LABELS)
    return np.array(list(advisor.layer_scores_.values()))


def transferred():
    transformer = CNNFeatureTransformer("tiny", **TINY)
    classifier = TransferClassifier(transformer, strategy="extract")
    return classifier.fit(ROWS, LABELS).decision_function(ROWS)


JOBS = [
    features,
    random_features,
    categories,
    tuned,
    tuned_with_views,
    advised,
    transferred,
]


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def other_defaults(request):
    """Another default dtype, or device: "meta" has no numbers, as "cuda" other ones."""

    def exchange():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield exchange
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_defaults_of_torch_change_no_result(job, other_defaults):
    expected = job()
    release_memory()
    other_defaults()
    before = torch.get_default_dtype(), torch.get_default_device()

    found = job()

    assert_array_equal(found, expected)
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


def test_a_saved_estimator_is_loaded_to_the_cpu(other_defaults):
    settings = {"head_epochs": 1, "finetune_epochs": 1}
    fitted = FineTunedCNNClassifier("tiny", **settings, **TINY).fit(ROWS, LABELS)
    own = PretrainedCNNClassifier("tiny", **TINY).fit(ROWS)
    expected = fitted.predict_proba(ROWS), own.predict_proba(ROWS)
    saved = pickle.dumps([fitted, own])
    other_defaults()

    loaded = pickle.loads(saved)

    for one, probabilities in zip(loaded, expected, strict=True):
        weights = next(iter(one.network_.blocks.values())).state_dict().values()
        assert {weight.device.type for weight in weights} == {"cpu"}
        assert_array_equal(one.predict_proba(ROWS), probabilities)


def test_building_a_network_does_not_change_what_other_threads_see():
    """A default dtype that is changed for a moment would be seen by all threads."""
    import threading

    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(torch.get_default_dtype())

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

    assert seen == {torch.float64}
