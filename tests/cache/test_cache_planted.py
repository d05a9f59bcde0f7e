"""Whatever somebody does to the files of a cache: right features, and nothing else."""

import json
import os
import random
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from skltl import CNNFeatureTransformer, cache_info, clear_cache
from skltl.exceptions import CacheWarning

SCRIPT = Path(__file__).with_name("cache_workers.py")
LAYERS = {"stem", "block1", "block2", "block3", "block4"}

pytestmark = pytest.mark.filterwarnings("ignore::skltl.exceptions.CacheWarning")


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


@pytest.fixture
def filled(X, tmp_path):
    """A cache with the features of the images."""
    extract(X, tmp_path / "cache")
    return tmp_path / "cache"


def databases(folder):
    return sorted(folder.glob("skltl-features-*.sqlite"))


def test_a_damaged_name_in_a_database_counts_as_damage(filled, X, expected):
    """SQLite puts the name into its message, and Python cannot decode that."""
    for path in databases(filled):
        content = bytearray(path.read_bytes())
        content[content.find(b"CREATE TABLE entries") + 6] = 0xFF
        path.write_bytes(content)

    assert cache_info(filled).entries == []
    np.testing.assert_array_equal(extract(X, filled), expected["block2"])
    assert {entry.n_images for entry in cache_info(filled).entries} == {len(X)}


def test_a_cache_with_a_damaged_name_can_be_cleared(filled):
    for path in databases(filled):
        content = bytearray(path.read_bytes())
        content[content.find(b"CREATE TABLE entries") + 6] = 0xFF
        path.write_bytes(content)

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


def cut(rng, content):
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
    cut,
    lengthen,
    write_noise,
    write_zeros,
    swap_pages,
]


def damage_and_use(folder, whole, X, expected, seed):
    """Damage one of a cache's files, do seven things with it, and check features."""
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
    [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)],
    ids=["60", "3000"],
)
def test_random_damage_raises_nothing_and_changes_no_feature(
    seeds, filled, X, expected, monkeypatch
):
    # Each file is tried anew, also after one that could not be read.
    monkeypatch.setattr("skltl.cache._store.PAUSE_SECONDS", 0.0)
    whole = {path.name: path.read_bytes() for path in filled.iterdir()}

    for seed in seeds:
        damage_and_use(filled, whole, X, expected, seed)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What came of databases with something planted; a hang is a missing case."""
    folder = tmp_path_factory.mktemp("planted")
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "planted", str(folder)],
            capture_output=True,
            check=False,
            timeout=120,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    found = map(json.loads, output.splitlines())
    return {one["case"]: one for one in found}


IS_EXECUTED = [
    "endless view",
    "endless about",
    "endless trigger",
    "deleting trigger",
    "endless index",
]
IS_ODD = [
    "giant about",
    "null about",
    "no about",
    "two abouts",
    "bytes about",
    "deep about",
    "deeper about",
    "typed about",
    "listed about",
    "true about",
    "more about",
]
IS_USED = ["giant values", "giant keys", "turned to WAL"]


@pytest.mark.parametrize("case", [*IS_EXECUTED, *IS_ODD, *IS_USED])
def test_what_is_planted_changes_nothing(case, planted):
    assert planted[case]["right"] == [True] * 6
    assert planted[case]["cleared"] == [True] * 3


@pytest.mark.parametrize("case", [*IS_EXECUTED, *IS_ODD])
def test_a_database_that_is_not_as_ours_are_is_not_listed(case, planted):
    assert set(planted[case]["listed"]) == LAYERS - {"block1"}


@pytest.mark.parametrize("case", [*IS_EXECUTED, "null about", "giant values"])
def test_a_planted_database_is_replaced_by_one_that_holds_all(case, planted):
    assert planted[case]["rows"] == dict.fromkeys(LAYERS, 12)


def make_link(target, name):
    name.unlink(missing_ok=True)
    name.symlink_to(target)


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("content", [None, b"", b"Dear diary"])
def test_links_lead_nowhere(content, suffix, filled, tmp_path, X, expected):
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
def test_what_is_no_regular_file_is_not_opened(kind, filled, X, expected):
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
    """Leave a journal as of a killed writer, which names another file.

    SQLite writes such a name for a transaction on several databases; whoever finds the
    journal then deletes the file of that name.
    """
    journal = Path(f"{path}-journal")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE entries SET checksum = zeroblob(8)")
        connection.executemany(
            "INSERT INTO leases VALUES (?, zeroblob(3000), 0)",
            [(bytes([number]),) for number in range(50)],  # more than the memory holds
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


def test_sqlite_deletes_what_a_journal_names(filled, tmp_path):
    """The danger is there: otherwise the next test would show nothing."""
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
    code = (
        "import os, sqlite3, sys; connection = sqlite3.connect(sys.argv[1]); "
        "connection.execute('PRAGMA journal_mode = WAL'); "
        "connection.execute('DELETE FROM entries'); connection.commit(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.parametrize("is_listed_first", [True, False])
def test_clearing_leaves_nothing_of_databases_in_wal_mode(is_listed_first, filled):
    for path in databases(filled):
        turn_to_wal(path)
    if is_listed_first:
        cache_info(filled)

    clear_cache(filled)

    assert list(filled.iterdir()) == []


def test_clearing_leaves_nothing_of_databases_that_are_gone(filled):
    for path in databases(filled):
        turn_to_wal(path)
        path.unlink()

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


def test_damage_again_and_again_leaves_few_files(filled, X):
    for number in range(6):
        for path in databases(filled):
            path.write_bytes(bytes([number]) * 5000)
        extract(X, filled)

    damaged = list(filled.glob("*.damaged"))
    assert len(damaged) == 2 * len(databases(filled))
    assert {path.read_bytes()[0] for path in damaged} == {4, 5}  # the last ones


def test_damaged_files_are_the_first_that_the_limit_deletes(filled, X, monkeypatch):
    for path in databases(filled):
        path.write_bytes(bytes(5000))
    extract(X, filled)
    n_bytes = cache_info(filled).n_bytes
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", str((n_bytes - 1) / 1e9))

    extract(255 - X, filled)

    assert len(list(filled.glob("*.damaged"))) < 5
    assert {entry.n_images for entry in cache_info(filled).entries} == {12}


@pytest.mark.filterwarnings("default::skltl.exceptions.CacheWarning")
def test_warnings_are_short_whatever_a_damaged_file_says(tmp_path, X):
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
def test_warnings_are_short_however_long_the_folders_name(tmp_path, X):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "/".join(["long" * 50] * 10)

    with pytest.warns(CacheWarning, match="cannot be written") as caught:
        extract(X, folder)

    assert all(len(str(one.message)) <= 500 for one in caught)


def test_a_name_that_is_no_folder_is_quoted_shortly():
    with pytest.raises(ValueError, match="is not a valid path") as caught:
        cache_info("\0" * 100_000)

    assert len(str(caught.value)) <= 500
