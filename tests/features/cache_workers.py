"""Processes that use one cache at once: run by ``test_cache_processes.py``.

``python cache_workers.py share|kill FOLDER`` forks its workers before torch has made
any threads, so that one starts within milliseconds. It writes what it found as JSON.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np

from skltl import CNNFeatureTransformer
from skltl.backbones import Runner
from skltl.features import _session, _shelf

N_PICTURES = 3000
N_PICTURES_TO_KILL = 10_000
N_WORKERS = 4
N_KILLS = 40


def pictures(n):
    return np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)


def extract(X, folder):
    transformer = CNNFeatureTransformer(
        "tiny",
        layer=["block1", "block3"],
        image_size=16,
        engine="torch",  # starts at once
        cache=folder,
        n_jobs=1,
    )
    return transformer.fit_transform(X)


def in_child(function, *arguments):
    """Run a function in a forked process; its number is returned at once."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*arguments)
        code = 0
    finally:
        os._exit(code)


def check_against(expected_file, folder, order, counts):
    """Extract in some order, compare with the values of no cache, count the work."""
    n_crossed = 0
    features = Runner.features

    def counted(self, pixels, *others):
        nonlocal n_crossed
        n_crossed += int(pixels.flatten(1).any(dim=1).sum())
        return features(self, pixels, *others)

    Runner.features = counted
    found = extract(pictures(N_PICTURES)[order], folder)
    np.testing.assert_array_equal(found, np.load(expected_file)[order])
    (counts / str(os.getpid())).write_text(str(n_crossed))


def share(folder):
    """Let workers extract the same pictures, in different orders, at once."""
    expected = folder / "expected.npy"
    child = in_child(lambda: np.save(expected, extract(pictures(N_PICTURES), None)))
    os.waitpid(child, 0)
    counts = folder / "counts"
    counts.mkdir()
    rng = np.random.default_rng(1)
    workers = [
        in_child(
            check_against,
            expected,
            folder / "cache",
            rng.permutation(N_PICTURES),
            counts,
        )
        for _ in range(N_WORKERS)
    ]
    codes = [os.waitpid(worker, 0)[1] for worker in workers]
    return {
        "codes": codes,
        "crossed": [int(path.read_text()) for path in counts.iterdir()],
        "rows": {path.name: len(keys) for path, keys in stored(folder).items()},
    }


def kill(folder):
    """Kill workers while they write, and look at what is left each time."""
    _session.SECONDS_UNSTORED = 0.0  # so that they write all the time
    _shelf.CLAIM_SECONDS = 1.0  # so that the next one need not wait
    rng = random.Random(0)
    n_alive, n_lost, faults, before = 0, 0, [], {}
    for _ in range(N_KILLS):
        worker = in_child(extract, pictures(N_PICTURES_TO_KILL), folder / "cache")
        time.sleep(rng.uniform(0.05, 0.5))
        committed = stored(folder)
        os.kill(worker, signal.SIGKILL)
        n_alive += os.waitpid(worker, 0)[1] == signal.SIGKILL
        after = stored(folder)
        faults += [fault for path in after for fault in damage(path)]
        for keys in (before, committed):
            n_lost += sum(len(keys[path] - after[path]) for path in keys)
        before = after
    found = folder / "found.npy"
    child = in_child(
        lambda: np.save(found, extract(pictures(N_PICTURES_TO_KILL), folder / "cache"))
    )
    os.waitpid(child, 0)
    expected = folder / "expected.npy"
    child = in_child(
        lambda: np.save(expected, extract(pictures(N_PICTURES_TO_KILL), None))
    )
    os.waitpid(child, 0)
    return {
        "killed": n_alive,
        "lost": n_lost,
        "faults": faults,
        "rows before the last": max(len(keys) for keys in before.values()),
        "equal": bool((np.load(found) == np.load(expected)).all()),
    }


def stored(folder):
    """Return the keys that each database of features holds."""
    return {
        path: {key for (key,) in ask(path, "SELECT key FROM rows")}
        for path in (folder / "cache").glob("skltl-features-*.sqlite")
        if ask(path, "SELECT count(*) FROM sqlite_master") != [(0,)]
    }


def damage(path):
    return [text for (text,) in ask(path, "PRAGMA integrity_check") if text != "ok"]


def ask(path, query):
    connection = sqlite3.connect(path, timeout=60)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


if __name__ == "__main__":
    job = {"share": share, "kill": kill}[sys.argv[1]]
    sys.stdout.write(json.dumps(job(Path(sys.argv[2]))))
