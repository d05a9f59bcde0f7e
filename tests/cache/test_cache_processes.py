"""Processes and threads that share a cache compute each image once."""

import os
import random
import re
import sqlite3
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skltl
from skltl import CNNFeatureTransformer, cache_info
from skltl.cache import _lookup, _store
from skltl.cache._store import Leases
from skltl.exceptions import CacheWarning

# Python 3.12 and later warn of forks while there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

# Users of a shared folder, who need no accounts.
USERS = (54_322, 54_323)


def random_images(n):
    return np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)


def extract(X, folder, **parameters):
    transformer = CNNFeatureTransformer(
        "tiny",
        layer=["block1", "block3"],
        image_size=16,
        engine="torch",
        cache=folder,
        n_jobs=1,
        **parameters,
    )
    return transformer.fit_transform(X)


def stored_keys(folder):
    """Return the keys in each database of features."""
    return {
        path: {key for (key,) in ask(path, "SELECT key FROM entries")}
        for path in folder.glob("skltl-features-*.sqlite")
        if ask(path, "SELECT count(*) FROM sqlite_master") != [(0,)]
    }


def ask(path, query):
    connection = sqlite3.connect(path, timeout=60)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_four_processes_share_the_images(fork, computed, tmp_path):
    X = random_images(1000)
    path, is_open = tmp_path / "expected.npy", tmp_path / "open"
    fork(lambda: np.save(path, extract(X, None))).result()
    expected = np.load(path)

    def work(seed):
        order = np.random.default_rng(seed).permutation(len(X))
        while not is_open.exists():
            time.sleep(0.001)
        found = extract(X[order], tmp_path / "cache")
        return bool((found == expected[order]).all()), sum(computed)

    children = [fork(work, seed) for seed in range(4)]
    is_open.touch()
    are_equal, counts = zip(*[child.result() for child in children], strict=True)

    assert all(are_equal)
    assert sum(counts) == 1000
    assert min(counts) > 0
    n_stored = [len(keys) for keys in stored_keys(tmp_path / "cache").values()]
    assert n_stored == [1000] * 5


def test_an_image_in_flight_elsewhere_is_waited_for(computed, tmp_path, monkeypatch):
    X = random_images(20)
    expected = extract(X, None)
    computed.clear()
    has_started, is_waited_for = threading.Event(), threading.Event()
    start = _lookup.CachedFeatures.add

    def slow_add(self, batch, rows):
        has_started.set()
        assert is_waited_for.wait(60)
        start(self, batch, rows)

    monkeypatch.setattr(_lookup.CachedFeatures, "add", slow_add)
    monkeypatch.setattr(_lookup, "POLL_SECONDS", 0.01)
    thread = threading.Thread(target=extract, args=(X, tmp_path))
    thread.start()
    assert has_started.wait(60)
    lookups = []
    copy_repeated = _lookup.CachedFeatures._copy_repeated

    def notice(self):
        lookups.append(len(self._skipped))
        is_waited_for.set()
        return copy_repeated(self)

    monkeypatch.setattr(_lookup.CachedFeatures, "_copy_repeated", notice)
    found = extract(X[4:16], tmp_path)
    thread.join()

    np.testing.assert_array_equal(found, expected[4:16])
    assert sum(computed) == 20
    assert 12 in lookups


def test_leases_of_a_dead_process_delay_the_others_briefly(
    computed, tmp_path, monkeypatch
):
    X = random_images(20)
    expected = extract(X, None)
    computed.clear()
    monkeypatch.setattr(_store, "LEASE_SECONDS", 0.5)
    dead = []
    acquire = Leases.acquire

    def acquire_after_another(self, keys):
        keys = list(keys)
        if not dead:
            dead.append(Leases(tmp_path, "other work"))
            dead[0]._prefix = self._prefix
            assert acquire(dead[0], keys) == set(keys)
        return acquire(self, keys)

    monkeypatch.setattr(Leases, "acquire", acquire_after_another)

    start = time.monotonic()
    found = extract(X, tmp_path)
    seconds = time.monotonic() - start
    dead[0].close()

    np.testing.assert_array_equal(found, expected)
    assert sum(computed) == 20
    assert seconds >= 0.4


def without_locks(connect):
    """Return `sqlite3.connect` as on a file system whose locks have no effect."""

    def connect_without(path, *args, **kwargs):
        assert re.match(r"file:.*\?mode=", path)
        return connect(f"{path}&vfs=unix-none", *args, **kwargs)

    return connect_without


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SQLite's system without locks is of Unix")
def test_features_are_right_where_locks_have_no_effect(fork, tmp_path, monkeypatch):
    """As on some network file systems. Databases may be damaged, which is noticed."""
    monkeypatch.setattr(_lookup, "SECONDS_UNSTORED", 0.0)  # writes all the time
    X, expected = random_images(400), tmp_path / "expected.npy"
    fork(lambda: np.save(expected, extract(X, None))).result()
    expected, cache = np.load(expected), tmp_path / "cache"

    def work(seed):
        monkeypatch.setattr(sqlite3, "connect", without_locks(sqlite3.connect))
        order = np.random.default_rng(seed).permutation(len(X))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            return [
                bool((extract(X[order], cache) == expected[order]).all())
                for _ in range(3)
            ]

    children = [fork(work, seed) for seed in range(3)]
    found = [child.result() for child in children]

    assert found == [[True] * 3] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        again = fork(lambda: bool((extract(X, cache) == expected).all())).result()
    assert again


@pytest.mark.slow
def test_killed_writers_leave_an_intact_cache(fork, tmp_path, monkeypatch):
    monkeypatch.setattr(_lookup, "SECONDS_UNSTORED", 0.0)  # writes all the time
    monkeypatch.setattr(_store, "LEASE_SECONDS", 1.0)  # the next one need not wait
    X, cache = random_images(10_000), tmp_path / "cache"
    rng = random.Random(0)
    n_killed, n_lost, faults, before = 0, 0, [], {}
    start = time.monotonic()
    fork(lambda: len(extract(X[:1], None))).result()
    seconds_to_load = time.monotonic() - start  # few after other tests

    for _ in range(40):
        child = fork(lambda: len(extract(X, cache)))
        time.sleep(seconds_to_load + rng.uniform(0, 0.5))
        committed = stored_keys(cache)
        n_killed += child.kill()
        after = stored_keys(cache)
        checks = [ask(path, "PRAGMA integrity_check") for path in after]
        faults += [found for found in checks if found != [("ok",)]]
        for keys in (before, committed):
            n_lost += sum(len(keys[path] - after[path]) for path in keys)
        before = after
    expected = tmp_path / "expected.npy"
    fork(lambda: np.save(expected, extract(X, None))).result()
    monkeypatch.setattr(_lookup, "SECONDS_UNSTORED", 2.0)
    found = tmp_path / "found.npy"
    fork(lambda: np.save(found, extract(X, cache))).result()

    assert n_killed >= 30
    assert max(len(keys) for keys in before.values()) > 0
    assert n_lost == 0
    assert faults == []
    np.testing.assert_array_equal(np.load(found), np.load(expected))


@pytest.mark.parametrize(
    "backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)]
)
def test_workers_of_a_search_share_the_cache(backend, images, computed, tmp_path):
    pipeline = make_pipeline(
        CNNFeatureTransformer("tiny", image_size=32, cache=tmp_path),
        LogisticRegression(),
    )
    grid = {"cnnfeaturetransformer__layer": ["stem", "block1", "block2", "block3"]}
    labels = np.arange(9) % 2

    with parallel_config(backend):
        search = GridSearchCV(pipeline, grid, cv=3, n_jobs=2).fit(images, labels)
    assert sum(computed) == (9 if backend == "threading" else 0)
    assert {entry.n_images for entry in cache_info(tmp_path).entries} == {9}

    pipeline.set_params(cnnfeaturetransformer__cache=None)
    alone = GridSearchCV(pipeline, grid, cv=3).fit(images, labels)
    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )


@pytest.fixture
def shared_folder(fork):
    """A folder of a group, in one that other users can enter, unlike pytest's own."""

    def read_code():
        for path in (skltl.__file__, np.__file__):
            Path(path).open().close()

    try:
        fork(read_code, user=USERS[0]).result()
    except AssertionError:
        pytest.skip("no permission to become other users who can read the code")
    with tempfile.TemporaryDirectory(prefix="skltl-test-") as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "cache"
        folder.mkdir()
        os.chown(folder, USERS[0], 54_321)
        folder.chmod(0o2775)
        yield folder


def extract_as_users(fork, computed, folder, umask):
    """Let two users alternate; return what they compute and store, and the warnings."""
    X = random_images(30)
    turns = [
        (USERS[0], 0, 10, "avg"),
        (USERS[1], 10, 30, "avg"),
        (USERS[0], 0, 30, "avg"),
        (USERS[1], 0, 30, "max"),
        (USERS[0], 0, 30, "max"),
    ]

    def work(start, stop, pooling):
        os.umask(umask)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            extract(X[start:stop], folder, pooling=pooling)
        entries = cache_info(folder).entries
        (n_stored,) = {one.n_images for one in entries if one.pooling == pooling}
        return sum(computed), n_stored, len(caught)

    found = [fork(work, *args, user=user).result() for user, *args in turns]
    return found, {path.stat().st_mode & 0o777 for path in folder.iterdir()}


def test_two_users_of_a_group_fill_one_cache(fork, computed, shared_folder):
    found, modes = extract_as_users(fork, computed, shared_folder, umask=0o002)

    assert found == [
        [10, 10, 0],
        [20, 30, 0],  # stored beside the features of the first user,
        [0, 30, 0],  # who reads them
        [30, 30, 0],
        [0, 30, 0],
    ]
    assert modes == {0o664}


def test_users_who_may_only_read_a_file_fill_files_of_their_own(
    fork, computed, shared_folder
):
    found, modes = extract_as_users(fork, computed, shared_folder, umask=0o022)

    assert found == [
        [10, 10, 0],
        [20, 10, 1],  # no permission to write to the first user's file
        [20, 30, 0],
        [30, 30, 0],  # another pooling is another file
        [0, 30, 0],
    ]
    assert modes == {0o644}
