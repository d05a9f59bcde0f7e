"""A fit that is interrupted goes on, and ends with the same bits."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from numpy.testing import assert_array_equal
from tiny_classifier import classifier, losses, saved_state

from skltl.finetuning._checkpoint import Checkpoint


class InterruptedError_(Exception):
    """What ends a fit in the middle."""


@pytest.mark.parametrize("n_saves", [1, 3, 4, 5])
def test_an_interrupted_fit_goes_on_with_the_same_bits(
    n_saves, digits, tmp_path, monkeypatch
):
    X, y = digits[0][:60], digits[1][:60]
    settings = {"dropout": 0.2, "validation_fraction": 0.2, "early_stopping": True}
    expected = classifier(**settings).fit(X, y)
    interrupted = classifier(checkpoint=tmp_path, **settings)
    save, saves = Checkpoint.save, []

    def save_and_end(self, state):
        save(self, state)
        saves.append(state["stage"])
        if len(saves) == n_saves:
            raise InterruptedError_

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_end)
        with pytest.raises(InterruptedError_):
            interrupted.fit(X, y)
    interrupted.fit(X, y)

    assert_array_equal(interrupted.decision_function(X), expected.decision_function(X))
    assert losses(interrupted) == losses(expected)
    assert list(tmp_path.iterdir()) == []


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
        time.sleep(rng.uniform(0.3, 0.8))
        worker.kill()
        worker.communicate()
        n_killed += worker.returncode == -signal.SIGKILL
    n_files = len(list(folder.iterdir()))

    done = subprocess.run([*command, str(folder)], stdout=subprocess.PIPE, check=True)

    assert n_killed == 10
    assert n_files > 0
    assert done.stdout == expected.stdout
    assert list(folder.iterdir()) == []


def test_a_checkpoint_of_another_fit_is_not_used(digits, tmp_path, monkeypatch):
    X, y = digits[0][:60], digits[1][:60]
    clear = Checkpoint.clear
    monkeypatch.setattr(Checkpoint, "clear", lambda self: None)
    classifier(checkpoint=tmp_path, head_lr=0.1).fit(X, y)
    classifier(checkpoint=tmp_path).fit(X, y[::-1])
    monkeypatch.setattr(Checkpoint, "clear", clear)

    found = classifier(checkpoint=tmp_path).fit(X, y)

    assert losses(found) == losses(classifier().fit(X, y))


def test_a_checkpoint_that_needs_code_is_refused(digits, tmp_path):
    X, y = digits[0][:60], digits[1][:60]
    interrupted = classifier(checkpoint=tmp_path)

    def write_code(self, state):
        torch.save({"stage": print}, self._path)  # a function: code
        raise InterruptedError_

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", write_code)
        with pytest.raises(InterruptedError_):
            interrupted.fit(X, y)

    with pytest.raises(ValueError, match="would need code .* Delete it to begin anew"):
        interrupted.fit(X, y)


class Diary:
    """Notes the tasks that end; stops each stage after two epochs."""

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


def interrupted_after(n_saves, fit, monkeypatch):
    """Fit until the state has been saved so many times."""
    save, saves = Checkpoint.save, []

    def save_and_end(self, state):
        save(self, state)
        saves.append(state["stage"])
        if len(saves) == n_saves:
            raise InterruptedError_

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_end)
        with pytest.raises(InterruptedError_):
            fit()


@pytest.mark.skipif(not hasattr(classifier(), "set_callbacks"), reason="old sklearn")
@pytest.mark.parametrize("n_saves", [1, 2, 3])
def test_callbacks_see_the_same_whether_a_fit_is_interrupted_or_not(
    n_saves, digits, tmp_path, monkeypatch
):
    X, y = digits[0][:60], digits[1][:60]
    expected, diary = Diary(), Diary()
    settings = {"finetune_epochs": 3}
    whole = classifier(**settings).set_callbacks(expected).fit(X, y)
    parted = classifier(checkpoint=tmp_path, **settings).set_callbacks(diary)

    interrupted_after(n_saves, lambda: parted.fit(X, y), monkeypatch)
    diary.tasks.clear()
    parted.fit(X, y)

    assert diary.tasks == expected.tasks[-len(diary.tasks) :]
    assert losses(parted) == losses(whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"random_state": None, "early_stopping": True},
        {"random_state": None, "weights": None, "unfreeze": "all"},
        {"random_state": None, "augment": lambda image: image.flip(2)},
    ],
    ids=["held out", "random weights", "augment"],
)
def test_a_fit_without_a_seed_goes_on_with_the_one_it_drew(
    settings, digits, tmp_path, monkeypatch
):
    X, y = digits[0][:100], digits[1][:100]
    parted = classifier(checkpoint=tmp_path, **settings)

    interrupted_after(2, lambda: parted.fit(X, y), monkeypatch)
    begun = saved_state(next(tmp_path.glob("*.checkpoint")))
    parted.fit(X, y)

    assert parted.history_[:2] == begun["history"]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_augmentation_is_not_used(
    digits, tmp_path, monkeypatch
):
    X, y = digits[0][:60], digits[1][:60]
    augmented = {
        name: classifier(checkpoint=tmp_path, augment=augment)
        for name, augment in (
            ("same", lambda image: image),
            ("black", lambda image: image * 0),
        )
    }

    interrupted_after(2, lambda: augmented["same"].fit(X, y), monkeypatch)
    found = augmented["black"].fit(X, y)

    alone = classifier(augment=lambda image: image * 0).fit(X, y)
    assert losses(found) == losses(alone)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_work(digits, tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(ValueError, match=r"checkpoint='.*file' is no folder"):
        classifier(checkpoint=file).fit(digits[0][:60], digits[1][:60])
