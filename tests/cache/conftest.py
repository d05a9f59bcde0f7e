"""Counters of images, and forked children that run a function."""

import json
import os
import signal
import time
import traceback

import pytest

from skltl.cache import _store
from skltl.features import _extraction
from skltl.images import ImageSource

GROUP = 54_321


@pytest.fixture
def computed(monkeypatch):
    """A list of the number of images in each batch that the network computes."""
    counts = []
    iter_batches = _extraction.iter_batches

    def counted(crops, batch_size):
        for batch in iter_batches(crops, batch_size):
            counts.append(len(batch.positions))
            yield batch

    monkeypatch.setattr(_extraction, "iter_batches", counted)
    return counts


@pytest.fixture
def decoded(monkeypatch):
    """A list of the positions of the images that are decoded."""
    positions = []
    decode = ImageSource.decode_item

    def counted(self, index, item):
        positions.append(index)
        return decode(self, index, item)

    monkeypatch.setattr(ImageSource, "decode_item", counted)
    return positions


@pytest.fixture
def fresh_process(monkeypatch):
    """Warnings and pauses of this process are forgotten after the test."""
    for name, empty in {"_warned": set(), "_unused": {}, "_unwritten": {}}.items():
        monkeypatch.setattr(_store, name, empty)


class Child:
    """A forked child that runs a function; one that hangs is ended after a minute."""

    def __init__(self, function, *arguments, user=None):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(writer, user, function, arguments)
        os.close(writer)
        self._reader = reader

    def _run(self, writer, user, function, arguments):
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            if user is not None:
                os.setgroups([])
                os.setgid(GROUP)
                os.setuid(user)
            os.write(writer, json.dumps(function(*arguments)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self):
        """Kill the child, and return whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._reader)
        return os.waitpid(self.pid, 0)[1] == signal.SIGKILL

    def result(self):
        """Wait for what the function returns."""
        with os.fdopen(self._reader) as file:
            text = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert code == 0, f"exit code {code}"
        return json.loads(text)


@pytest.fixture
def fork():
    """The class of forked children, on systems that have them."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork on this system")
    return Child


@pytest.fixture
def wait_until():
    """A function that waits until a condition is true."""

    def wait(condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    return wait
