"""Interrupted fits, for the tests of checkpoints."""

import pytest

from skltl.finetuning._checkpoint import Checkpoint


class Interruption(Exception):
    """Raised in the middle of a fit."""


def interrupt(estimator, X, y, after=2, **kwargs):
    """Fit until the state has been saved `after` times."""
    save, n_saves = Checkpoint.save, []

    def save_and_stop(self, state):
        save(self, state)
        n_saves.append(1)
        if len(n_saves) == after:
            raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(Interruption):
            estimator.fit(X, y, **kwargs)


def the_file(folder):
    (path,) = folder.glob("*.checkpoint")
    return path
