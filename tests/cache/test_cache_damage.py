"""Whatever happens to the files of a cache, features are correct."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest

from skltl import CNNFeatureTransformer, cache_info, clear_cache
from skltl.cache import _store
from skltl.cache._store import Leases
from skltl.exceptions import CacheWarning
from skltl.inference import ExtractionConfig


def transformer(folder, **parameters):
    return CNNFeatureTransformer(
        "tiny", layer="block2", image_size=32, cache=folder, **parameters
    )


@pytest.fixture
def expected(images):
    return transformer(None).fit_transform(images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a cache that `filled` fills once, and copies."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def filled(whole, images, tmp_path):
    """A copy of a cache with the features of the images."""
    if not any(whole.iterdir()):
        transformer(whole).fit_transform(images)
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def databases(folder):
    return sorted(folder.glob("skltl-*.sqlite"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def truncate_to_100_bytes(path):
    os.truncate(path, 100)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def overwrite_the_middle(path):
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(np.random.default_rng(0).bytes(path.stat().st_size - 2 * 4096))


def write_text(path):
    path.write_text("This is no database." * 100)


def drop_the_tables(path):
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE entries")
    connection.execute("DROP TABLE leases")
    connection.close()


def rename_a_column(path):
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE entries RENAME COLUMN value TO number")
    connection.execute("ALTER TABLE leases RENAME COLUMN expires TO number")
    connection.close()


def make_foreign(path):
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (name TEXT)")
    connection.commit()
    connection.close()


@pytest.mark.filterwarnings("ignore::skltl.exceptions.CacheWarning")
@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        truncate_to_100_bytes,
        empty,
        overwrite,
        overwrite_the_middle,
        write_text,
        make_foreign,
        drop_the_tables,
        rename_a_column,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_files_are_replaced(damage, filled, images, expected):
    for path in databases(filled):
        damage(path)

    first = transformer(filled).fit_transform(images)
    again = transformer(filled).fit_transform(images)

    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(again, expected)
    # The files that replaced them hold everything.
    assert {entry.n_images for entry in cache_info(filled).entries} == {len(images)}


@pytest.mark.parametrize("damage", [overwrite, make_foreign])
def test_a_damaged_file_is_renamed_with_a_warning(damage, filled, images):
    for path in databases(filled):
        if "files" not in path.name and "leases" not in path.name:
            damage(path)

    with pytest.warns(CacheWarning, match="damaged file .* renamed to") as caught:
        transformer(filled).fit_transform(images)

    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(list(filled.glob("*.damaged"))) == 5
    clear_cache(filled)
    assert list(filled.iterdir()) == []


def damage_entries(folder, statement):
    for path in folder.glob("skltl-features-*.sqlite"):
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET value = zeroblob(length(value))",
        "UPDATE entries SET value = substr(value, 5)",
        "UPDATE entries SET value = 'text'",
        "UPDATE entries SET value = 17",
        "UPDATE entries SET checksum = 'text'",
        "DELETE FROM entries WHERE rowid % 2",
    ],
)
def test_an_entry_with_another_checksum_is_a_miss(statement, filled, images, expected):
    damage_entries(filled, statement)

    np.testing.assert_array_equal(transformer(filled).fit_transform(images), expected)
    np.testing.assert_array_equal(transformer(filled).fit_transform(images), expected)


def test_an_entry_under_the_key_of_another_image_is_a_miss(filled, images, expected):
    """It is intact, but in the wrong place."""
    for path in filled.glob("skltl-features-*.sqlite"):
        connection = sqlite3.connect(path)
        rows = connection.execute("SELECT * FROM entries ORDER BY key").fetchall()
        connection.execute("DELETE FROM entries")
        moved = zip(rows, rows[1:] + rows[:1], strict=True)
        connection.executemany(
            "INSERT INTO entries VALUES (?, ?, ?)",
            [(key, value, checksum) for (key, _, _), (_, value, checksum) in moved],
        )
        connection.commit()
        connection.close()

    np.testing.assert_array_equal(transformer(filled).fit_transform(images), expected)


def test_features_of_another_format_are_not_read(filled, images, expected, monkeypatch):
    """An older or a newer one."""
    damage_entries(filled, "UPDATE entries SET value = zeroblob(length(value))")
    monkeypatch.setattr(sys.modules[ExtractionConfig.__module__], "FORMAT", 0)

    found = transformer(filled).fit_transform(images)

    np.testing.assert_array_equal(found, expected)
    assert len(cache_info(filled).entries) == 10


def test_a_folder_that_cannot_be_created_gives_one_warning(images, expected, tmp_path):
    (tmp_path / "file").write_text("")

    cached = transformer(tmp_path / "file" / "cache")
    with pytest.warns(
        CacheWarning, match="cannot be used .* not all of them are stored"
    ) as caught:
        first = cached.fit_transform(images)
    again = cached.fit_transform(images)  # a warning would be an error

    assert len(caught) == 1
    assert str(tmp_path / "file" / "cache") in str(caught[0].message)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(again, expected)


@pytest.fixture
def limit_files():
    """A function that limits the size of files, as a full disk does; None ends it."""
    resource = pytest.importorskip("resource")
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes or usual, most))

    yield limit
    limit(None)


@pytest.fixture
def noise():
    """More images than fit on the small disk."""
    return np.random.default_rng(0).integers(256, size=(300, 8, 8, 3), dtype=np.uint8)


@pytest.mark.usefixtures("fresh_process")
def test_a_full_disk_gives_one_warning(noise, tmp_path, limit_files, monkeypatch):
    expected = transformer(None).fit_transform(noise)

    limit_files(200_000)
    with pytest.warns(CacheWarning, match="cannot be used .* not all") as caught:
        first = transformer(tmp_path).fit_transform(noise)
    second = transformer(tmp_path).fit_transform(noise)  # a warning would be an error
    limit_files(None)

    assert len(caught) == 1
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    for path in databases(tmp_path):
        with closing(sqlite3.connect(path)) as connection:
            check = connection.execute("PRAGMA integrity_check").fetchall()
        assert check == [("ok",)]
    assert min(entry.n_images for entry in cache_info(tmp_path).entries) < 300
    # When there is space again, it is used, after a pause.
    monkeypatch.setattr(_store, "_unwritten", {})
    transformer(tmp_path).set_params(layer="block4").fit_transform(noise)
    assert {entry.n_images for entry in cache_info(tmp_path).entries} == {300}


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.filterwarnings("ignore::skltl.exceptions.CacheWarning")
def test_a_process_with_a_full_disk_leaves_no_leases(noise, tmp_path, limit_files):
    """Other processes would wait for them until they expire."""
    limit_files(40_000)
    transformer(tmp_path).fit_transform(noise)
    limit_files(None)

    path = tmp_path / "skltl-leases.sqlite"
    if path.exists():
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT * FROM leases").fetchall() == []


SCRIPT = """
import sys, warnings
import numpy as np
from skltl import CNNFeatureTransformer
from skltl.exceptions import CacheWarning

def extract(folder):
    return CNNFeatureTransformer("tiny", image_size=32, cache=folder).fit_transform(X)

X = np.random.default_rng(0).integers(256, size=(300, 8, 8, 3), dtype=np.uint8)
folder = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = extract(folder)
    second = extract(folder)
expected = extract(None)
assert (first == expected).all() and (second == expected).all()
assert all(issubclass(one.category, CacheWarning) for one in caught), caught
sys.stdout.write("; ".join(str(one.message) for one in caught))
"""


def run_script(folder, *wrapper):
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def mounted(tmp_path):
    """A function that returns a command prefix, under which a folder is mounted."""
    prefix = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("no permission to mount a file system")
    return lambda mount: [*prefix, "sh", "-c", f'{mount} && exec "$@"', "sh"]


@pytest.mark.slow
def test_a_file_system_without_space_gives_one_warning(tmp_path, mounted):
    wrapper = mounted(f"mount -t tmpfs -o size=256k none {tmp_path}")

    warned = run_script(tmp_path, *wrapper)

    assert warned.count("database or disk is full") == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_filled", [True, False])
def test_a_read_only_folder_is_read(tmp_path, mounted, is_filled):
    if is_filled:
        run_script(tmp_path)
    bind = f"mount --bind {tmp_path} {tmp_path}"
    wrapper = mounted(f"{bind} && mount -o remount,bind,ro {tmp_path}")

    warned = run_script(tmp_path, *wrapper)

    assert warned.count("not all of them are stored") == (not is_filled)


def test_the_limit_deletes_the_least_recently_used_first(images, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(256, size=(200, 8, 8, 3), dtype=np.uint8)
    transformer(tmp_path, pooling="max").fit_transform(noise)
    transformer(tmp_path).fit_transform(noise)
    for path in databases(tmp_path):
        os.utime(path, (0, 0))
    transformer(tmp_path, pooling="max").fit_transform(noise)  # read, not written
    limit = cache_info(tmp_path).n_bytes - 1
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", str(limit / 1e9))

    transformer(tmp_path, pooling="max").fit_transform(images)

    info = cache_info(tmp_path)
    assert info.max_bytes == limit
    assert info.n_bytes <= limit
    assert ("max", "block2") in {(entry.pooling, entry.layer) for entry in info.entries}
    assert len([entry for entry in info.entries if entry.pooling == "avg"]) < 5


def test_deleting_recently_used_features_gives_one_warning(
    images, tmp_path, monkeypatch, expected
):
    transformer(tmp_path).fit_transform(images)
    limit = cache_info(tmp_path).n_bytes * 1.2
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", str(limit / 1e9))

    transformer(tmp_path, pooling="max").fit_transform(images)  # exceeds the limit
    with pytest.warns(CacheWarning) as caught:
        transformer(tmp_path, pooling="max").fit_transform(255 - images)
    again = transformer(tmp_path).fit_transform(images)  # a warning would be an error

    np.testing.assert_array_equal(again, expected)
    assert len(caught) == 1
    for part in (str(tmp_path), f"{limit / 1e9:g} GB", "SKLTL_CACHE_LIMIT"):
        assert part in str(caught[0].message)


def test_databases_in_use_are_kept_but_not_written_to(
    images, tmp_path, monkeypatch, expected
):
    transformer(tmp_path).fit_transform(images[:4])
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", "0.00001")

    with pytest.warns(
        CacheWarning, match="limit of 1e-05 GB .* Raise SKLTL_CACHE_LIMIT"
    ):
        found = transformer(tmp_path).fit_transform(images)

    np.testing.assert_array_equal(found, expected)
    assert {entry.n_images for entry in cache_info(tmp_path).entries} == {4}


def test_an_invalid_limit_is_an_error(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", "20 GB")

    with pytest.raises(ValueError, match="SKLTL_CACHE_LIMIT='20 GB' .* gigabytes"):
        transformer(tmp_path).fit_transform(images)
    assert list(tmp_path.iterdir()) == []  # before any work


@pytest.mark.parametrize("text", ["inf", "", "1e400"])
def test_a_limit_may_be_infinite(text, images, tmp_path, monkeypatch):
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", text)

    transformer(tmp_path).fit_transform(images)

    assert len(cache_info(tmp_path).entries) == 5


def test_files_that_cannot_be_deleted_change_no_result(
    images, expected, tmp_path, monkeypatch
):
    """As in a folder of several users, who may delete only their own files."""
    transformer(tmp_path, pooling="max").fit_transform(images)
    monkeypatch.setenv("SKLTL_CACHE_LIMIT", "0.00001")

    def refuse(self, missing_ok=False):
        raise PermissionError(1, "Operation not permitted", str(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", refuse)
        with pytest.warns(CacheWarning, match="reached its limit"):
            found = transformer(tmp_path).fit_transform(images)
        with pytest.warns(CacheWarning, match="could not be deleted"):
            clear_cache(tmp_path)

    np.testing.assert_array_equal(found, expected)


def test_a_locked_file_is_waited_for_once(filled, images, expected, monkeypatch):
    monkeypatch.setattr("skltl.cache._store.LOCK_SECONDS", 0.2)
    other = np.concatenate([images, 255 - images])
    locks = [sqlite3.connect(path) for path in databases(filled)]
    for lock in locks:
        lock.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()

    with pytest.warns(
        CacheWarning, match="has a file locked by another program"
    ) as caught:
        found = transformer(filled).fit_transform(other)
    for _ in range(5):
        transformer(filled).fit_transform(other)
    seconds = time.monotonic() - start
    for lock in locks:
        lock.rollback()
        lock.close()

    np.testing.assert_array_equal(found[: len(images)], expected)
    assert len(caught) == 1
    assert seconds < 0.2 * (len(locks) + 1) + 10


@pytest.mark.usefixtures("fresh_process")
def test_each_cause_gives_a_warning(noise, tmp_path, limit_files, monkeypatch):
    """A lock that follows a full disk is not hidden by the first warning."""
    monkeypatch.setattr("skltl.cache._store.LOCK_SECONDS", 0.2)
    limit_files(200_000)
    with pytest.warns(CacheWarning, match="cannot be used"):
        transformer(tmp_path).fit_transform(noise)
    limit_files(None)

    path = max(databases(tmp_path), key=lambda path: path.stat().st_size)
    with closing(sqlite3.connect(path)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        with pytest.warns(CacheWarning, match="locked by another program") as caught:
            transformer(tmp_path).fit_transform(noise)

    assert len(caught) == 1


def test_leases_of_a_clock_that_is_ahead_are_ignored(tmp_path, monkeypatch):
    dead, alive = Leases(tmp_path, "work"), Leases(tmp_path, "work")
    in_an_hour = time.time() + 3600
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: in_an_hour)
        assert dead.acquire([b"image"]) == {b"image"}

    assert alive.acquire([b"image"]) == {b"image"}

    for leases in (dead, alive):
        leases.close()
