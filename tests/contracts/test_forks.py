"""A forked child gives correct results, whatever its parent did during the fork."""

import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

PREPARED = """
import os, signal, sys, threading, time
import numpy as np
import torch
from torch import nn
from skltl import *
SAME = {"image_shape": (8, 8), "image_size": 16, "engine": "torch"}
X, y = np.random.default_rng(0).random((40, 64)), np.arange(40) % 2

def fit(n_epochs):
    return FineTunedCNNClassifier(
        "tiny", layer="block1", dropout=0.1, head_epochs=n_epochs, finetune_epochs=0,
        random_state=0, **SAME,
    ).fit(X, y)

def extract():
    return CNNFeatureTransformer("tiny", **SAME).fit_transform(X)

def expected_of(work):
    torch.set_num_threads(1)  # as in the child
    found = work()
    torch.set_num_threads(2)  # start a thread that the child will lack
    torch.ones(512, 512) @ torch.ones(512, 512)
    return found

def in_child(work, seconds):
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)  # end a child that hangs
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1]
"""


def run(code, *args):
    """Run the code after the preparation; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", PREPARED + code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


FORKS_DURING_A_FIT = """
expected = expected_of(lambda: fit(2).decision_function(X))
threading.Thread(target=fit, args=(10**6,), daemon=True).start()
time.sleep(1)
same = lambda: np.array_equal(fit(2).decision_function(X), expected)
n_forks = int(sys.argv[1])
for number in range(n_forks):
    time.sleep(0.05 * (number % 7))
    print(in_child(same, 240), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_children_forked_during_a_fit_fit_the_same_classifier():
    assert run(FORKS_DURING_A_FIT, 30).split() == ["0"] * 30


@pytest.mark.slow
def test_children_forked_during_an_extraction_extract_the_same_features():
    code = """
expected = expected_of(extract)
def forever():
    while True:
        extract()
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.5)
for _ in range(3):
    print(in_child(lambda: np.array_equal(extract(), expected), 120))
os._exit(0)
"""
    assert run(code).split() == ["0"] * 3


@pytest.mark.slow
def test_importing_skltl_does_not_change_the_threads_of_children():
    code = """
import skltl.inference, torch
torch.set_num_threads(2)
print(in_child(lambda: torch.get_num_threads() == 2, 60))
"""
    assert run(code).split() == ["0"]


@pytest.mark.slow
def test_a_child_that_loads_a_saved_estimator_does_not_wait_for_lost_threads():
    code = """
import pickle
expected = expected_of(extract)
saved = pickle.dumps(CNNFeatureTransformer("tiny", **SAME).fit(X))
print(in_child(
    lambda: np.array_equal(pickle.loads(saved).transform(X), expected), 120
))
"""
    assert run(code).split() == ["0"]


@pytest.mark.slow
def test_a_child_lists_the_layers_of_an_own_backbone():
    code = """
expected_of(lambda: None)
mine = Backbone.from_blocks(
    "mine", {"stem": nn.Conv2d(3, 16, 3), "block1": nn.Conv2d(16, 16, 3)},
    preprocessing=Preprocessing(224),
)
print(in_child(lambda: len(list_layers(mine)) == 2, 60))
"""
    assert run(code).split() == ["0"]


def test_a_lock_that_is_held_during_a_fork_is_free_in_the_child():
    from skltl._locks import Lock

    lock = Lock()
    with lock:
        child = os.fork()
        if child == 0:
            ending = 1
            try:
                with lock:
                    ending = 0
            finally:
                os._exit(ending)
    deadline = time.monotonic() + 60
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)

    assert found[1] == 0
