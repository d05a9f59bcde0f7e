"""What a forked child finds of a cache that its parent is using."""

import os
import signal
import threading
import time
from contextlib import closing

import pytest

from skltl.cache._database import Database, _gate
from skltl.cache._store import Shelf

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="about forks"),
    # From Python 3.12 on.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def in_child(function):
    """Return a forked child's exit code, or the signal (negative) that ended it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        code = function()
    finally:
        os._exit(code)


def test_a_child_leaves_open_databases_alone(tmp_path):
    shelf = Shelf(tmp_path, "skltl-claims", n_bytes=5)
    shelf.write([(b"of the parent", b"value")])

    def use():
        found = list(shelf.read([b"of the parent"]))
        shelf.write([(b"of the child", b"value")])
        announced = shelf.claim([b"of the child"], b"child")
        shelf.close()
        return 0 if found == [] and announced is None else 2

    assert in_child(use) == 0
    keys = [b"of the parent", b"of the child"]
    assert list(shelf.read(keys)) == [(b"of the parent", b"value")]
    shelf.close()


def test_a_fork_waits_for_threads_inside_of_sqlite():
    is_inside = threading.Event()
    left = []

    def stay():
        with _gate:
            is_inside.set()
            time.sleep(0.5)
            left.append(True)

    thread = threading.Thread(target=stay)
    thread.start()
    is_inside.wait()

    assert in_child(lambda: 0 if left else 2) == 0
    thread.join()


@pytest.mark.slow
def test_no_child_waits_for_a_lock_of_another_thread(tmp_path):
    stop = threading.Event()

    def work(number):
        rows = [(bytes([row]), bytes(200)) for row in range(20)]
        while not stop.is_set():
            with closing(Database(tmp_path / f"{number}.sqlite", 200)) as database:
                for _ in range(20):
                    database.write(rows)
                    database.read([key for key, _ in rows])

    def use():
        with closing(Database(tmp_path / "child.sqlite")) as database:
            return len(database.read([b"key"]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    codes = [in_child(use) for _ in range(200)]
    stop.set()
    for thread in threads:
        thread.join()

    assert codes == [0] * 200
