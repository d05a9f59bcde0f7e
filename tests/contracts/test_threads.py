"""Several threads of one process may predict with one estimator."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import Ridge
from small_pipeline import pipeline

from skltl import (
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.inference import Runner

N_THREADS = 8

SHORT = {"head_epochs": 1, "finetune_epochs": 1, "random_state": 0}

ESTIMATORS = {
    "svm": make_feature_pipeline("tiny", "svm", layer="block2"),
    "softmax": make_feature_pipeline("tiny", "softmax", layer="block2", batch_size=1),
    "ovr": make_feature_pipeline("tiny", "ovr", layer="block2"),
    "ridge": pipeline(Ridge()),
    "pretrained": PretrainedCNNClassifier("tiny"),
    "fine-tuned": FineTunedCNNClassifier("tiny", **SHORT),
    "fine-tuned regressor": FineTunedCNNRegressor("tiny", **SHORT),
    "transfer": TransferClassifier(strategy="extract", random_state=0),
}


def outputs(estimator, images):
    """Return what the methods of an estimator return."""
    methods = ("predict", "predict_proba", "decision_function")
    return [
        getattr(estimator, one)(images) for one in methods if hasattr(estimator, one)
    ]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_threads_predict_the_same_bits_as_one(name, images):
    estimator = ESTIMATORS[name]
    if name == "transfer":
        estimator.set_params(transformer=pipeline(Ridge())[0].set_params(layer="last"))
    is_regressor = "regressor" in name or name == "ridge"
    y = np.arange(9) % 2
    estimator.fit(images, y.astype(float) if is_regressor else y)
    parts = [images[number : number + 2] for number in range(N_THREADS)]
    expected = [outputs(estimator, part) for part in parts]
    with ThreadPoolExecutor(N_THREADS) as threads:
        for _ in range(3):
            found = list(threads.map(lambda part: outputs(estimator, part), parts))
            for values, wanted in zip(found, expected, strict=True):
                for one, other in zip(values, wanted, strict=True):
                    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["svm", "pretrained", "fine-tuned", "transfer"])
def test_no_lock_is_held_during_a_forward_pass(name, images, monkeypatch):
    fitted = clone(ESTIMATORS[name])
    transformer = make_feature_pipeline("tiny", engine="torch")[0]
    parameters = {
        "svm": {"feat": transformer},
        "transfer": {"transformer": transformer},
    }
    fitted.set_params(**parameters.get(name, {"engine": "torch"}))
    fitted.fit(images, np.arange(9) % 2)
    expected = fitted.predict(images)
    everyone, run = Barrier(N_THREADS), Runner.features

    def run_together(*args):
        everyone.wait(timeout=60)  # until all threads are here
        return run(*args)

    monkeypatch.setattr(Runner, "features", run_together)
    with ThreadPoolExecutor(N_THREADS) as threads:
        found = list(threads.map(fitted.predict, [images] * N_THREADS))
    np.testing.assert_array_equal(found, [expected] * N_THREADS)
