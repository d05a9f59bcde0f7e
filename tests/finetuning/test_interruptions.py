"""An interrupted fit resumes from its checkpoint, and ends with the same bits."""

import copy
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from checkpoints import interrupt, the_file
from numpy.testing import assert_allclose, assert_array_equal
from tiny_classifier import classifier, losses, saved_state

from skltl import FineTunedCNNClassifier
from skltl.exceptions import InterruptionWarning
from skltl.finetuning._checkpoint import Checkpoint
from skltl.finetuning._data import hold_out
from skltl.finetuning._network import SplitNetwork
from skltl.finetuning._optimization import OPTIMIZERS
from skltl.finetuning._training import StageTrainer

# Functions that only these tests know cannot be pickled, of which `fit` warns.
pytestmark = pytest.mark.filterwarnings("ignore:augment=.*cannot be pickled")

STOCHASTIC = {"dropout": 0.2, "validation_fraction": 0.2, "early_stopping": True}


@pytest.fixture(scope="module")
def uninterrupted(data):
    return classifier(**STOCHASTIC).fit(*data)


@pytest.mark.parametrize("n_epochs", [1, 3, 4])
def test_an_interrupted_fit_ends_with_the_same_bits(
    n_epochs, data, uninterrupted, tmp_path
):
    resumed = classifier(checkpoint=tmp_path, **STOCHASTIC)

    interrupt(resumed, *data, after=n_epochs)
    resumed.fit(*data)

    expected = uninterrupted.decision_function(data[0])
    assert_array_equal(resumed.decision_function(data[0]), expected)
    assert losses(resumed) == losses(uninterrupted)
    assert resumed.best_validation_score_ == uninterrupted.best_validation_score_
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_restored(optimizer, data, tmp_path):
    expected = classifier(optimizer=optimizer).fit(*data)
    resumed = classifier(optimizer=optimizer, checkpoint=tmp_path)

    interrupt(resumed, *data, after=4)
    resumed.fit(*data)

    assert losses(resumed) == losses(expected)


@pytest.mark.slow
def test_a_fit_killed_ten_times_at_random_ends_with_the_same_bits(tmp_path):
    code = """
import pickle, sys
from sklearn.datasets import load_digits
from skltl import FineTunedCNNClassifier
X, y = load_digits(return_X_y=True)
classifier = FineTunedCNNClassifier(
    "tiny", layer="block3", image_shape=(8, 8), image_size=32, unfreeze=1, dropout=0.1,
    head_epochs=200, finetune_epochs=60, random_state=0, checkpoint=sys.argv[1] or None,
)
print("begins", flush=True)
classifier.fit(X[:200] / 16, y[:200])
sys.stdout.buffer.write(pickle.dumps(classifier.decision_function(X[:200] / 16)))
"""
    command = [sys.executable, "-c", code]
    expected = subprocess.run([*command, ""], stdout=subprocess.PIPE, check=True)
    folder = tmp_path / "fit"
    rng = random.Random(0)
    n_killed = 0
    for _ in range(10):
        worker = subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE)
        worker.stdout.readline()
        for _ in range(600):  # until there is a state; a busy machine takes longer
            if worker.poll() is not None or any(folder.glob("*.checkpoint")):
                break
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.4))
        worker.kill()
        worker.communicate()
        n_killed += worker.returncode == -signal.SIGKILL
    n_files = len(list(folder.iterdir()))

    done = subprocess.run([*command, str(folder)], stdout=subprocess.PIPE, check=True)

    assert n_killed == 10
    assert n_files > 0
    assert done.stdout == expected.stdout
    assert list(folder.iterdir()) == []


class Diary:
    """Callback that records the tasks that end, and stops a stage after two epochs."""

    def __init__(self):
        self.tasks = []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context):
        self.tasks.append((context.task_name, context.task_id))
        return context.task_name == "epoch" and context.task_id == 1


@pytest.mark.skipif(not hasattr(classifier(), "set_callbacks"), reason="old sklearn")
def test_callbacks_get_the_same_tasks_from_a_resumed_fit(data, tmp_path):
    expected = Diary()
    longer = {"finetune_epochs": 3}
    whole = classifier(**longer).set_callbacks(expected).fit(*data)

    for n_epochs in (1, 2, 3):  # within a stage, at its end, and in the next one
        diary = Diary()
        resumed = classifier(checkpoint=tmp_path, **longer).set_callbacks(diary)
        interrupt(resumed, *data, after=n_epochs)
        diary.tasks.clear()
        resumed.fit(*data)

        assert diary.tasks == expected.tasks[-len(diary.tasks) :]
        assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"random_state": None, "early_stopping": True},
        {"random_state": None, "weights": None, "unfreeze": "all"},
        {"random_state": None, "augment": lambda image: image.flip(2), "n_views": 2},
        {"random_state": None, "hidden_units": (4,)},
    ],
    ids=["held out", "random weights", "augment", "random head"],
)
def test_a_fit_without_random_state_resumes_with_the_seed_it_drew(
    settings, digits, tmp_path, monkeypatch
):
    X, y = digits[0][:100], digits[1][:100]
    resumed = classifier(checkpoint=tmp_path, image_size=16, **settings)
    interrupt(resumed, X, y)
    saved = saved_state(the_file(tmp_path))

    resumed.fit(X, y)

    assert resumed.history_[:2] == saved["history"]
    assert list(tmp_path.iterdir()) == []
    seeded = resumed.set_params(random_state=saved["seed"], checkpoint=None).fit(X, y)
    assert losses(seeded)[:2] == [record["loss"] for record in saved["history"]]


@pytest.mark.parametrize("n_loads", [1, 2])
def test_a_fit_that_is_interrupted_as_it_resumes_can_be_resumed_again(
    n_loads, data, fitted, tmp_path, monkeypatch
):
    """The network is loaded to find the checkpoint, and with the seed that it holds."""
    resumed = classifier(checkpoint=tmp_path)
    interrupt(resumed, *data)
    load, calls = FineTunedCNNClassifier._load_network, []

    def load_or_stop(self, seed):
        calls.append(seed)
        if len(calls) == n_loads:
            raise KeyboardInterrupt
        load(self, seed)

    with monkeypatch.context() as patch:
        patch.setattr(FineTunedCNNClassifier, "_load_network", load_or_stop)
        with pytest.raises(KeyboardInterrupt):
            resumed.fit(*data)
    left = [path.suffix for path in tmp_path.iterdir()]
    resumed.fit(*data)

    assert left == [".checkpoint"]  # and no lock
    assert losses(resumed) == losses(fitted)
    assert list(tmp_path.iterdir()) == []


def test_every_fit_ignores_the_checkpoints_of_others(data, fitted, tmp_path):
    X, y = data
    interrupt(classifier(checkpoint=tmp_path, head_lr=0.1), X, y)
    interrupt(classifier(checkpoint=tmp_path), X, y[::-1])
    weights = np.linspace(0.1, 1, 60)
    interrupt(classifier(checkpoint=tmp_path), X, y, sample_weight=weights)

    found = classifier(checkpoint=tmp_path).fit(X, y)

    assert losses(found) == losses(fitted)
    assert len(list(tmp_path.glob("*.checkpoint"))) == 3


def test_a_warm_start_ignores_the_checkpoint_of_another_one(data, fitted, tmp_path):
    warm = copy.deepcopy(fitted).set_params(warm_start=True)
    expected = losses(copy.deepcopy(warm).fit(*data))
    cold = classifier(warm_start=True, checkpoint=tmp_path)
    interrupt(cold, *data)

    warm.set_params(checkpoint=tmp_path).fit(*data)

    assert losses(warm) == expected
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1


def test_a_refit_that_is_interrupted_at_its_end_keeps_the_earlier_fit(
    data, fitted, monkeypatch
):
    refitted = copy.deepcopy(fitted)
    expected = refitted.decision_function(data[0])

    def interrupted(network):
        raise KeyboardInterrupt

    monkeypatch.setattr(SplitNetwork, "finished", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refitted.fit(data[0][:30], data[1][:30])

    assert_array_equal(refitted.decision_function(data[0]), expected)


# Interruptions whose result is kept


class InterruptsOnce:
    """An augmentation that is interrupted, as by Ctrl-C, at one of its calls."""

    def __init__(self, at):
        self.at, self.n_calls = at, 0

    def __call__(self, image):
        self.n_calls += 1
        if self.n_calls == self.at:
            raise KeyboardInterrupt
        return image


# Of 60 images in 3 + 2 epochs: in the second epoch of the head, and of the network.
EVERY_EPOCH = {"n_views": None, "keep_on_interrupt": True}


@pytest.mark.parametrize(("at", "n_epochs"), [(90, 1), (200, 3), (270, 4)])
def test_an_interrupted_fit_keeps_its_last_epoch_if_asked(at, n_epochs, data):
    whole = classifier(augment=InterruptsOnce(at=0), **EVERY_EPOCH).fit(*data)
    kept = classifier(augment=InterruptsOnce(at), **EVERY_EPOCH)

    with pytest.warns(InterruptionWarning, match=f"first {n_epochs} epochs is kept"):
        kept.fit(*data)

    assert losses(kept) == losses(whole)[:n_epochs]
    assert kept.n_epochs_ == n_epochs
    if n_epochs == 3:  # the weights are those after the head stage
        head_only = classifier(
            augment=InterruptsOnce(at=0), finetune_epochs=0, **EVERY_EPOCH
        ).fit(*data)
        # Trainable blocks run apart from the frozen ones, which rounds differently.
        expected = head_only.decision_function(data[0])
        assert_allclose(kept.decision_function(data[0]), expected, atol=1e-3)


def test_an_interrupted_fit_keeps_its_best_epoch(data):
    early = {**EVERY_EPOCH, "early_stopping": True, "validation_fraction": 0.5}
    kept = classifier(augment=InterruptsOnce(75), head_init="random", **early)
    with pytest.warns(InterruptionWarning):
        kept.fit(*data)
    scores = [record["validation_score"] for record in kept.history_]
    assert len(scores) == 2
    _, validation = hold_out(np.unique(data[1], return_inverse=True)[1], None, 0.5, 0)
    score = kept.score(data[0][validation], data[1][validation])
    assert_allclose(score, kept.best_validation_score_)
    assert score >= max(scores)


@pytest.mark.parametrize("place", ["keep_if_best", "evaluate", "_is_done"])
@pytest.mark.parametrize("n_calls", range(2, 9))
def test_what_is_kept_belongs_together(place, n_calls, data, monkeypatch):
    """An interruption between two steps, or two stages, of training."""
    original, calls = getattr(StageTrainer, place), []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == n_calls:
            raise KeyboardInterrupt
        return original(self, *args)

    early = {"early_stopping": True, "validation_fraction": 0.5, "patience": 9}
    kept = classifier(keep_on_interrupt=True, head_init="random", **early)
    monkeypatch.setattr(StageTrainer, place, interrupted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InterruptionWarning)
            kept.fit(*data)
    except KeyboardInterrupt:
        assert not hasattr(kept, "history_")  # before the first epoch
        return
    monkeypatch.undo()
    _, validation = hold_out(np.unique(data[1], return_inverse=True)[1], None, 0.5, 0)
    score = kept.score(data[0][validation], data[1][validation])
    assert_allclose(score, kept.best_validation_score_)
    assert kept.n_epochs_ == len(kept.history_)


@pytest.mark.parametrize(("at", "keep"), [(30, True), (90, False)])
def test_an_interruption_is_raised_before_an_epoch_or_if_not_asked(at, keep, data):
    parameters = {**EVERY_EPOCH, "keep_on_interrupt": keep}
    with pytest.raises(KeyboardInterrupt):
        classifier(augment=InterruptsOnce(at), **parameters).fit(*data)


def test_a_fit_that_was_kept_can_be_resumed(data, tmp_path, monkeypatch):
    """The checkpoint stays, and the same call goes on from it."""
    expected = classifier(checkpoint=tmp_path).fit(*data)
    kept = classifier(checkpoint=tmp_path, keep_on_interrupt=True)
    save, n_saves = Checkpoint.save, []

    def save_and_stop(self, state):
        save(self, state)
        n_saves.append(1)
        if len(n_saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        with pytest.warns(InterruptionWarning):
            kept.fit(*data)

    assert losses(kept) == losses(expected)[:2]
    kept.fit(*data)
    assert losses(kept) == losses(expected)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_fit_that_resumes_keeps_what_it_had(data, tmp_path, monkeypatch):
    """It is interrupted again before its first new epoch."""
    expected = classifier().fit(*data)
    resumed = classifier(checkpoint=tmp_path, keep_on_interrupt=True)
    interrupt(resumed, *data, after=4)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_train_epoch", interrupted)
        with pytest.warns(InterruptionWarning, match="first 4 epochs"):
            resumed.fit(*data)
    assert losses(resumed) == losses(expected)[:4]
    resumed.fit(*data)
    assert losses(resumed) == losses(expected)
