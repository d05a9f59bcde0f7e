"""A forked child can use a cache, whatever its parent is doing with it."""

import threading
import time
from contextlib import closing

import pytest

from skltl import CNNFeatureTransformer
from skltl.cache import _store
from skltl.cache._store import Leases, Store

# Python 3.12 and later warn of forks while there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def test_a_child_leaves_open_databases_alone(fork, tmp_path):
    store, leases = Store(tmp_path, "store", n_value_bytes=5), Leases(tmp_path, "work")
    store.write([(b"parent's", b"value")])
    leases.acquire([b"parent's"])

    def use():
        found = list(store.read([b"parent's"]))
        store.write([(b"child's", b"value")])
        granted = leases.acquire([b"parent's"])
        leases.release()
        for one in (store, leases):
            one.close()
        return found == [] and granted == {b"parent's"}  # not shared: compute it

    assert fork(use).result()
    assert list(store.read([b"parent's", b"child's"])) == [(b"parent's", b"value")]
    other = Leases(tmp_path, "work")
    assert other.acquire([b"parent's"]) == set()
    for one in (store, leases, other):
        one.close()


def test_a_fork_waits_for_a_thread_that_uses_sqlite(fork):
    is_inside = threading.Event()
    left = []

    def stay():
        with _store._fork_gate:
            is_inside.set()
            time.sleep(0.2)
            left.append(True)

    thread = threading.Thread(target=stay)
    thread.start()
    is_inside.wait()

    assert fork(lambda: bool(left)).result()
    thread.join()


def test_a_fork_does_not_wait_forever_for_a_thread(fork, monkeypatch):
    done = threading.Event()
    is_inside = threading.Event()
    monkeypatch.setattr(_store, "LOCK_SECONDS", 0.1)

    def stay():
        with _store._fork_gate:
            is_inside.set()
            done.wait()

    def use():
        with _store._fork_gate:
            return True

    thread = threading.Thread(target=stay)
    thread.start()
    is_inside.wait()
    assert fork(use).result()
    done.set()
    thread.join()
    assert use()


@pytest.mark.slow
def test_no_child_waits_for_a_lock_of_another_thread(fork, tmp_path):
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
            return len(list(store.read([b"key"])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    found = [fork(use).result() for _ in range(200)]
    stop.set()
    for thread in threads:
        thread.join()

    assert found == [1] * 200


def test_threads_do_not_wait_for_each_other(images, tmp_path):
    transformer = CNNFeatureTransformer("tiny", cache=tmp_path).fit(images)

    with _store._fork_gate:  # as another thread that waits for a locked file
        thread = threading.Thread(target=transformer.transform, args=[images])
        thread.start()
        thread.join(timeout=60)

        assert not thread.is_alive()
