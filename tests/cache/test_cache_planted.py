"""Whatever others write into a cache folder, features are correct."""

import os
import random
import shutil
import sqlite3
import struct
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from skltl import CNNFeatureTransformer, cache_info, clear_cache
from skltl.exceptions import CacheWarning

LAYERS = {"stem", "block1", "block2", "block3", "block4"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::skltl.exceptions.CacheWarning"),
    # Python 3.12 and later warn of forks while there are threads.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def extract(X, folder, layer="block2"):
    transformer = CNNFeatureTransformer(
        "tiny", layer=layer, image_size=16, cache=folder, engine="torch", n_jobs=1
    )
    return transformer.fit_transform(X)


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(X):
    return {layer: extract(X, None, layer) for layer in ("block1", "block2", "block3")}


@pytest.fixture(scope="module")
def negatives(X):
    """Images that are not in the cache, and their features."""
    return 255 - X, extract(255 - X, None, "block1")


@pytest.fixture(scope="module")
def whole(X, tmp_path_factory):
    """A cache with the features of the images, which tests must not change."""
    folder = tmp_path_factory.mktemp("whole")
    extract(X, folder)
    return folder


@pytest.fixture
def filled(whole, tmp_path):
    """A copy of that cache."""
    return shutil.copytree(whole, tmp_path / "cache")


def databases(folder):
    return sorted(folder.glob("skltl-features-*.sqlite"))


@pytest.mark.parametrize("use", ["read", "clear"])
def test_a_damaged_name_in_a_database_counts_as_damage(use, filled, X, expected):
    """SQLite quotes the name in its message, which Python then cannot decode."""
    for path in databases(filled):
        content = bytearray(path.read_bytes())
        content[content.find(b"CREATE TABLE entries") + 6] = 0xFF
        path.write_bytes(content)

    if use == "read":
        assert cache_info(filled).entries == []
        np.testing.assert_array_equal(extract(X, filled), expected["block2"])
        assert {entry.n_images for entry in cache_info(filled).entries} == {len(X)}
    clear_cache(filled)

    assert list(filled.iterdir()) == []


def flip_bits(rng, content):
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def damage_the_header(rng, content):
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(512)] = rng.randrange(256)


def damage_the_names(rng, content):
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(3400, 4096)] = rng.randrange(128, 256)


def truncate(rng, content):
    del content[rng.randrange(len(content)) :]


def lengthen(rng, content):
    content += rng.randbytes(rng.randint(1, 9000))


def write_noise(rng, content):
    start = rng.randrange(len(content))
    part = slice(start, start + rng.randint(1, 5000))
    content[part] = rng.randbytes(len(content[part]))


def write_zeros(rng, content):
    start = rng.randrange(len(content))
    part = slice(start, start + rng.randint(1, 5000))
    content[part] = bytes(len(content[part]))


def swap_pages(rng, content):
    one, other = (4096 * rng.randrange(len(content) // 4096) for _ in range(2))
    first, second = slice(one, one + 4096), slice(other, other + 4096)
    content[first], content[second] = content[second], content[first]


DAMAGES = [
    flip_bits,
    damage_the_header,
    damage_the_names,
    truncate,
    lengthen,
    write_noise,
    write_zeros,
    swap_pages,
]


def damage_and_use(folder, whole, X, expected, seed):
    """Damage a file of a cache, use the cache in seven ways, and check features."""
    rng = random.Random(seed)
    for path in folder.iterdir():
        path.unlink()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    name = rng.choice(sorted(whole))
    content = bytearray(whole[name])
    rng.choice(DAMAGES)(rng, content)
    (folder / name).write_bytes(content)

    def check(layer):
        found = extract(X, folder, layer)
        np.testing.assert_array_equal(found, expected[layer], err_msg=f"seed {seed}")

    uses = [
        lambda: cache_info(folder),
        lambda: check("block1"),
        lambda: check("block3"),
        lambda: cache_info(folder),
        lambda: check("block1"),
        lambda: clear_cache(folder),
        lambda: check("block3"),
    ]
    first = rng.choice([0, 1, 5])
    for use in uses[first:] + uses[:first]:
        use()


@pytest.mark.parametrize(
    "seeds",
    [range(16), pytest.param(range(16, 3000), marks=pytest.mark.slow)],
    ids=["16", "3000"],
)
def test_random_damage_raises_nothing_and_changes_no_feature(
    seeds, filled, X, expected, monkeypatch
):
    # Each file is tried again, also after one that could not be read.
    monkeypatch.setattr("skltl.cache._store.PAUSE_SECONDS", 0.0)
    whole = {path.name: path.read_bytes() for path in filled.iterdir()}

    for seed in seeds:
        damage_and_use(filled, whole, X, expected, seed)


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
AS_VIEW = ENDLESS + "SELECT CAST(x AS BLOB) AS key, x AS value, x AS checksum FROM c"

# What somebody with write permission may have done to a database.
IS_EXECUTED = {
    "endless view": f"DROP TABLE entries; CREATE VIEW entries AS {AS_VIEW}",
    "endless about": f"DROP TABLE about; CREATE VIEW about AS {ENDLESS}"
    "SELECT x AS text FROM c",
    "endless trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN "
    f"INSERT INTO about SELECT x FROM ({ENDLESS}SELECT x FROM c); END",
    "deleting trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN "
    "DELETE FROM entries; END",
    "endless index": "CREATE INDEX i ON entries (abs(length(value)))",
}
IS_MISDESCRIBED = {
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
}
IS_USED = {
    "giant values": "UPDATE entries SET value = zeroblob(5000000)",
    "giant keys": f"INSERT INTO entries {ENDLESS}"
    "SELECT zeroblob(5000000) || x, x, x FROM c LIMIT 5",
    "turned to WAL": "PRAGMA journal_mode = WAL",
}
PLANTED = {**IS_EXECUTED, **IS_MISDESCRIBED, **IS_USED}
IS_REPLACED = {*IS_EXECUTED, "null about", "giant values"}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_database_is_ignored_or_replaced(
    case, fork, filled, X, expected, negatives, tmp_path
):
    more = np.concatenate([X, negatives[0]])
    features = np.concatenate([expected["block1"], negatives[1]])
    (path,) = (one.path for one in cache_info(filled).entries if one.layer == "block1")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(PLANTED[case])
    connection.close()

    def use(first):
        """Use a copy of the cache, in three ways."""
        cache = shutil.copytree(filled, tmp_path / f"copy for {first}")
        if first == "cache_info":
            listed = {entry.layer for entry in cache_info(cache).entries}
            assert case in IS_USED or listed == LAYERS - {"block1"}
        if first == "clear_cache":
            clear_cache(cache)
            assert not any(cache.iterdir())
        for _ in range(2):
            np.testing.assert_array_equal(extract(more, cache, "block1"), features)
        n_images = {one.layer: one.n_images for one in cache_info(cache).entries}
        if case in IS_REPLACED or first == "clear_cache":
            assert n_images == dict.fromkeys(LAYERS, len(more))
        clear_cache(cache)
        assert not any(cache.iterdir())

    def use_all():
        warnings.simplefilter("ignore")
        for first in ("cache_info", "clear_cache", "extract"):
            use(first)
        return True

    assert fork(use_all).result()  # a child that hangs is ended


def make_link(target, name):
    name.unlink(missing_ok=True)
    name.symlink_to(target)


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("content", [None, b"", b"Dear diary"])
def test_links_are_not_followed(content, suffix, filled, tmp_path, X, expected):
    target = tmp_path / "precious"
    if content is not None:
        target.write_bytes(content)
        os.utime(target, (1e9, 1e9))
    for path in [*databases(filled), filled / "skltl-leases.sqlite"]:
        make_link(target, Path(f"{path}{suffix}"))

    cache_info(filled)
    np.testing.assert_array_equal(extract(X, filled), expected["block2"])
    clear_cache(filled)

    assert target.exists() == (content is not None)
    if content is not None:
        assert target.read_bytes() == content
        assert target.stat().st_mtime == 1e9
    assert list(filled.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_only_regular_files_are_opened(kind, filled, X, expected):
    for path in databases(filled):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(path)

    assert cache_info(filled).entries == []
    np.testing.assert_array_equal(extract(X, filled), expected["block2"])
    assert {entry.n_images for entry in cache_info(filled).entries} == {len(X)}


def plant_journal(path, victim):
    """Leave the journal of a killed writer, which names another file.

    SQLite writes such a name for a transaction on several databases, and deletes the
    named file when it finds the journal.
    """
    journal = Path(f"{path}-journal")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE entries SET checksum = zeroblob(8)")
        connection.executemany(
            "INSERT INTO leases VALUES (?, zeroblob(3000), 0)",
            [(bytes([number]),) for number in range(50)],  # more than its cache holds
        )
        pages, before = path.read_bytes(), journal.read_bytes()
        connection.execute("ROLLBACK")
    name = os.fsencode(victim)
    checksum = sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF
    lock_page = 0x40000000 // 4096 + 1
    end = struct.pack(">I", lock_page) + name
    end += struct.pack(">II", len(name), checksum) + before[:8]
    path.write_bytes(pages)
    journal.write_bytes(before + end)


def test_sqlite_deletes_the_file_that_a_journal_names(filled, tmp_path):
    """The danger is real: otherwise the next test would prove nothing."""
    victim = tmp_path / "precious"
    victim.write_text("Dear diary")
    path = databases(filled)[0]
    plant_journal(path, victim)

    with closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT * FROM entries").fetchall()

    assert not victim.exists()


@pytest.mark.parametrize("use", ["extract", "cache_info", "clear_cache"])
def test_a_journal_deletes_no_other_file(use, filled, tmp_path, X, expected):
    victim = tmp_path / "precious"
    victim.write_text("Dear diary")
    for path in [*databases(filled), filled / "skltl-leases.sqlite"]:
        plant_journal(path, victim)

    if use == "extract":
        np.testing.assert_array_equal(extract(X, filled), expected["block2"])
    elif use == "cache_info":
        cache_info(filled)
    clear_cache(filled)

    assert victim.read_text() == "Dear diary"
    assert list(filled.iterdir()) == []


def turn_to_wal(path):
    """Leave the files of a writer that was killed in WAL mode."""
    copies = {}
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("DELETE FROM entries")
        for suffix in ("", "-wal", "-shm"):
            copies[suffix] = Path(f"{path}{suffix}").read_bytes()
    for suffix, content in copies.items():
        Path(f"{path}{suffix}").write_bytes(content)


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize("is_listed_first", [True, False])
def test_databases_in_wal_mode_can_be_cleared(is_listed_first, is_gone, filled):
    for path in databases(filled):
        turn_to_wal(path)
        assert Path(f"{path}-wal").stat().st_size > 0
        if is_gone:
            path.unlink()
    if is_listed_first:
        cache_info(filled)

    clear_cache(filled)

    assert list(filled.iterdir()) == []


def test_a_database_in_wal_mode_is_turned_back(filled, X, expected):
    for path in databases(filled):
        turn_to_wal(path)

    np.testing.assert_array_equal(extract(X, filled), expected["block2"])

    for path in databases(filled):
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not list(filled.glob("*-wal"))


def test_repeated_damage_leaves_few_files(filled, X):
    for number in range(4):
        for path in databases(filled):
            path.write_bytes(bytes([number]) * 5000)
        extract(X, filled)

    damaged = list(filled.glob("*.damaged"))
    assert len(damaged) == 2 * len(databases(filled))
    assert {path.read_bytes()[0] for path in damaged} == {2, 3}  # the last ones


def test_the_limit_deletes_damaged_files_first(filled, X, monkeypatch):
    for path in databases(filled):
        path.write_bytes(bytes(5000))
    extract(X, filled)
    n_bytes = cache_info(filled).n_bytes
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", str((n_bytes - 1) / 1e9))

    extract(255 - X, filled)

    assert len(list(filled.glob("*.damaged"))) < 5
    assert {entry.n_images for entry in cache_info(filled).entries} == {12}


@pytest.mark.filterwarnings("default::skltl.exceptions.CacheWarning")
def test_warnings_quote_a_damaged_file_shortly(tmp_path, X):
    folder = tmp_path / ("long" * 25) / ("name" * 25)
    extract(X, folder)
    for path in databases(folder):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_master SET sql = ? WHERE name = 'entries'",
                ("CREATE TABLE entries (" + "x" * 9000,),
            )

    with pytest.warns(CacheWarning, match="damaged file") as caught:
        extract(X, folder)

    assert all(len(str(one.message)) <= 500 for one in caught)


@pytest.mark.filterwarnings("default::skltl.exceptions.CacheWarning")
def test_warnings_quote_a_folder_shortly(tmp_path, X):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "/".join(["long" * 50] * 10)

    with pytest.warns(CacheWarning, match="cannot be used") as caught:
        extract(X, folder)

    assert all(len(str(one.message)) <= 500 for one in caught)


def test_errors_quote_an_invalid_path_shortly():
    with pytest.raises(ValueError, match="is not a valid path") as caught:
        cache_info("\0" * 100_000)

    assert len(str(caught.value)) <= 500
