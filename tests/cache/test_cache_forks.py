"""What a forked child finds of a cache that its parent is using."""

import os
import signal
import threading
import time
from contextlib import closing

import pytest
from skltl.cache import _store

from skltl.cache._store import Leases, Store

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
    store, leases = Store(tmp_path, "store", n_value_bytes=5), Leases(tmp_path, "work")
    store.write([(b"parent's", b"value")])
    leases.acquire([b"parent's"])

    def use():
        found = list(store.read([b"parent's"]))
        store.write([(b"child's", b"value")])
        granted = leases.acquire([b"parent's"])  # not shared: compute it
        leases.release_all()
        for one in (store, leases):
            one.close()
        return 0 if found == [] and granted == {b"parent's"} else 2

    assert in_child(use) == 0
    assert list(store.read([b"parent's", b"child's"])) == [(b"parent's", b"value")]
    other = Leases(tmp_path, "work")
    assert other.acquire([b"parent's"]) == set()
    for one in (store, leases, other):
        one.close()


def test_a_fork_waits_for_a_thread_that_uses_sqlite():
    is_inside = threading.Event()
    left = []

    def stay():
        with _store._sqlite_lock:
            is_inside.set()
            time.sleep(0.2)
            left.append(True)

    thread = threading.Thread(target=stay)
    thread.start()
    is_inside.wait()

    assert in_child(lambda: 0 if left else 2) == 0
    thread.join()


def test_a_fork_does_not_wait_forever_for_a_thread(monkeypatch):
    done = threading.Event()
    is_inside = threading.Event()
    monkeypatch.setattr(_store, "LOCK_SECONDS", 0.1)

    def stay():
        with _store._sqlite_lock:
            is_inside.set()
            done.wait()

    def use():
        with _store._sqlite_lock:
            return 0

    thread = threading.Thread(target=stay)
    thread.start()
    is_inside.wait()
    assert in_child(use) == 0
    done.set()
    thread.join()
    assert use() == 0


@pytest.mark.slow
def test_no_child_waits_for_a_lock_of_another_thread(tmp_path):
    stop = threading.Event()

    def work(number):
        rows = [(bytes([row]), bytes(200)) for row in range(20)]
        while not stop.is_set():
            with closing(Store(tmp_path, f"thread{number}", 200)) as store:
                for _ in range(20):
                    store.write(rows)
                    assert list(store.read([key for key, _ in rows])) == rows

    def use():
        with closing(Store(tmp_path, "child", 200)) as store:
            store.write([(b"key", bytes(200))])
            return len(list(store.read([b"key"]))) - 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    codes = [in_child(use) for _ in range(200)]
    stop.set()
    for thread in threads:
        thread.join()

    assert codes == [0] * 200
