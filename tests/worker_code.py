"""Code that the workers of a test cluster run; they import it as ``worker_code``."""

import os
import signal
import time

FATAL = "fatal.png"


def read_slowly(path):
    """Return an image after a while, so that its worker can be killed meanwhile."""
    time.sleep(0.1)
    return path


def read_or_die(path):
    """Return an image, but for one of them end the process."""
    if str(path).endswith(FATAL):
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def score_slowly(estimator, X, y):
    """Return the accuracy after a while."""
    time.sleep(0.3)
    return estimator.score(X, y)


def count_arrivals():
    """Let this process count the estimators that are unpickled in it."""
    from skltl import CNNFeatureTransformer

    setstate = CNNFeatureTransformer.__setstate__

    def counted(self, state):
        os.environ["N_ARRIVALS"] = str(int(os.environ.get("N_ARRIVALS", "0")) + 1)
        setstate(self, state)

    CNNFeatureTransformer.__setstate__ = counted


def n_arrivals():
    """Return how many estimators were unpickled in this process."""
    return int(os.environ.get("N_ARRIVALS", "0"))
