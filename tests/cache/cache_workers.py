"""Processes that use one cache at once, as several users, or with planted files.

``python cache_workers.py JOB FOLDER`` is run by the tests; it writes what it found as
JSON. Its workers are forked before torch has made any threads, so that one starts
within milliseconds.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from skltl import CNNFeatureTransformer, cache_info, clear_cache
from skltl.cache import _lookup, _store
from skltl.inference import Runner

N_IMAGES = 3000
N_IMAGES_TO_KILL = 10_000
N_WORKERS = 4
N_KILLS = 40

# The users of a shared folder need no accounts.
GROUP = 54_321
USERS = (54_322, 54_323)


def images(n):
    return np.random.default_rng(0).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)


def extract(X, folder, **parameters):
    transformer = CNNFeatureTransformer(
        "tiny",
        layer=["block1", "block3"],
        image_size=16,
        engine="torch",  # starts at once
        cache=folder,
        n_jobs=1,
        **parameters,
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
    found = extract(images(N_IMAGES)[order], folder)
    np.testing.assert_array_equal(found, np.load(expected_file)[order])
    (counts / str(os.getpid())).write_text(str(n_crossed))


def share(folder):
    """Let workers extract the same images, in different orders, at once."""
    expected = folder / "expected.npy"
    child = in_child(lambda: np.save(expected, extract(images(N_IMAGES), None)))
    os.waitpid(child, 0)
    counts = folder / "counts"
    counts.mkdir()
    rng = np.random.default_rng(1)
    workers = [
        in_child(
            check_against,
            expected,
            folder / "cache",
            rng.permutation(N_IMAGES),
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
    _lookup.SECONDS_UNSTORED = 0.0  # so that they write all the time
    _store.LEASE_SECONDS = 1.0  # so that the next one need not wait
    rng = random.Random(0)
    n_alive, n_lost, faults, before = 0, 0, [], {}
    for _ in range(N_KILLS):
        worker = in_child(extract, images(N_IMAGES_TO_KILL), folder / "cache")
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
        lambda: np.save(found, extract(images(N_IMAGES_TO_KILL), folder / "cache"))
    )
    os.waitpid(child, 0)
    expected = folder / "expected.npy"
    child = in_child(lambda: np.save(expected, extract(images(N_IMAGES_TO_KILL), None)))
    os.waitpid(child, 0)
    return {
        "killed": n_alive,
        "lost": n_lost,
        "faults": faults,
        "rows before the last": max(len(keys) for keys in before.values()),
        "equal": bool((np.load(found) == np.load(expected)).all()),
    }


def as_user(user, job, *arguments):
    """Run a function in a process of another user; return what it returns."""
    reader, writer = os.pipe()

    def work():
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(user)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = job(*arguments)
        texts = [str(one.message) for one in caught]
        os.write(writer, json.dumps([found, texts]).encode())

    code = os.waitpid(in_child(work), 0)[1]
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return json.loads(file.read()) if code == 0 else [f"code {code}", []]


def share_as_users(folder, umask):
    """Let two users of a group fill a folder and read it, in turns."""
    cache = folder / "cache"
    cache.mkdir()
    os.chown(cache, USERS[0], GROUP)
    cache.chmod(0o2775)
    os.umask(umask)
    X = images(30)

    def fill(start, stop, pooling="avg"):
        n_crossed = 0
        features = Runner.features

        def counted(self, pixels, *others):
            nonlocal n_crossed
            n_crossed += int(pixels.flatten(1).any(dim=1).sum())
            return features(self, pixels, *others)

        Runner.features = counted
        extract(X[start:stop], cache, pooling=pooling)
        entries = cache_info(cache).entries
        rows = {entry.n_images for entry in entries if entry.pooling == pooling}
        return [n_crossed, *rows]

    turns = [
        (USERS[0], 0, 10),
        (USERS[1], 10, 30),
        (USERS[0], 0, 30),
        (USERS[1], 0, 30, "max"),
        (USERS[0], 0, 30, "max"),
    ]
    found = [as_user(user, fill, *arguments) for user, *arguments in turns]
    return {
        "crossed and stored": [numbers for numbers, _ in found],
        "warnings": [len(texts) for _, texts in found],
        "modes": sorted({path.stat().st_mode & 0o777 for path in cache.iterdir()}),
    }


def users(folder):
    """Two users with the umask of a shared folder."""
    return share_as_users(folder, 0o002)


def strangers(folder):
    """Two users each of whom lets the other only read."""
    return share_as_users(folder, 0o022)


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "

AS_VIEW = ENDLESS + "SELECT CAST(x AS BLOB) AS key, x AS value, x AS checksum FROM c"

# What somebody with the right to write may have done to a database.
PLANTED = {
    "endless view": f"DROP TABLE entries; CREATE VIEW rows AS {AS_VIEW}",
    "endless about": f"DROP TABLE about; CREATE VIEW about AS {ENDLESS}"
    "SELECT x AS text FROM c",
    "endless trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN INSERT INTO about "
    f"SELECT x FROM ({ENDLESS}SELECT x FROM c); END",
    "deleting trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN "
    "DELETE FROM entries; END",
    "endless index": "CREATE INDEX i ON entries (abs(length(value)))",
    "giant values": "UPDATE entries SET value = zeroblob(5000000)",
    "giant keys": f"INSERT INTO entries {ENDLESS}"
    "SELECT zeroblob(5000000) || x, x, x FROM c LIMIT 5",
    "giant about": "UPDATE about SET text = zeroblob(5000000)",
    "null about": "DROP TABLE about; CREATE TABLE about (text TEXT); "
    "INSERT INTO about VALUES (NULL)",
    "no about": "DELETE FROM about",
    "two abouts": "INSERT INTO about SELECT text FROM about",
    "bytes about": "UPDATE about SET text = x'ff00fe'",
    "deep about": f"UPDATE about SET text = '{'[' * 4000}{']' * 4000}'",
    "deeper about": f"UPDATE about SET text = '{'[' * 100_000}{']' * 100_000}'",
    "typed about": "UPDATE about SET text = json_set(text, '$.depth', 'x')",
    "listed about": "UPDATE about SET text = json_set(text, '$.layer', json('[1]'))",
    "true about": "UPDATE about SET text = json_set(text, '$.depth', json('true'))",
    "more about": "UPDATE about SET text = json_set(text, '$.n_images', 7)",
    "turned to WAL": "PRAGMA journal_mode = WAL",
}


def plant(cache, statements):
    """Do something to the database of the first cut point that is asked for."""
    (path,) = (one.path for one in cache_info(cache).entries if one.layer == "block1")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(statements)
    connection.close()


def planted(folder):
    """Use, list and clear caches in which a database has something planted."""
    whole, spoilt, cache = folder / "whole", folder / "spoilt", folder / "cache"
    X = images(12)
    expected = extract(X, None)
    extract(X[:6], whole)
    for name, statements in PLANTED.items():
        shutil.copytree(whole, spoilt)
        plant(spoilt, statements)
        found = {"case": name, "right": [], "cleared": []}
        for first in (cache_info, clear_cache, lambda _: None):
            shutil.copytree(spoilt, cache)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                info = first(cache)
                if first is cache_info:
                    found["listed"] = [entry.layer for entry in info.entries]
                for _ in range(2):
                    found["right"].append(bool((extract(X, cache) == expected).all()))
            entries = cache_info(cache).entries
            found["rows"] = {entry.layer: entry.n_images for entry in entries}
            clear_cache(cache)
            found["cleared"].append(not any(cache.iterdir()))
            shutil.rmtree(cache)
        shutil.rmtree(spoilt)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    return {"case": "end"}


def stored(folder):
    """Return the keys that each database of features holds."""
    return {
        path: {key for (key,) in ask(path, "SELECT key FROM entries")}
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
    jobs = {"share": share, "kill": kill, "planted": planted}
    jobs |= {"users": users, "strangers": strangers}
    job = jobs[sys.argv[1]]
    sys.stdout.write(json.dumps(job(Path(sys.argv[2]))))
