"""Processes share a cache: nothing is wrong, lost or done twice, whoever is killed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skltl
from skltl import CNNFeatureTransformer, cache_info

SCRIPT = Path(__file__).with_name("cache_workers.py")


def run_workers(job, folder):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), job, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
def test_four_processes_at_once_share_values_and_work(tmp_path):
    found = run_workers("share", tmp_path)

    assert found["codes"] == [0, 0, 0, 0]  # each compared with values of no cache
    assert set(found["rows"].values()) == {3000}
    assert sum(found["crossed"]) == 3000
    assert min(found["crossed"]) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")
def test_killed_writers_leave_a_sound_cache(tmp_path):
    found = run_workers("kill", tmp_path)

    assert found["killed"] >= 30
    assert found["rows before the last"] > 0
    assert found["lost"] == 0
    assert found["faults"] == []
    assert found["equal"]


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_workers_of_a_search_share_the_cache(backend, images, tmp_path):
    pipeline = make_pipeline(
        CNNFeatureTransformer("tiny", image_size=32, cache=tmp_path),
        LogisticRegression(),
    )
    grid = {"cnnfeaturetransformer__layer": ["stem", "block1", "block2", "block3"]}
    labels = np.arange(9) % 2

    with parallel_config(backend):
        search = GridSearchCV(pipeline, grid, cv=3, n_jobs=2).fit(images, labels)
    alone = GridSearchCV(
        pipeline.set_params(cnnfeaturetransformer__cache=None), grid, cv=3
    ).fit(images, labels)

    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )
    assert {entry.n_images for entry in cache_info(tmp_path).entries} == {9}


def can_switch_users():
    """Tell whether other users can run the tests' code, and the test become them."""
    files = [SCRIPT, skltl.__file__, np.__file__]
    code = (
        "import os, sys; os.setgroups([]); os.setgid(54321); os.setuid(54321); "
        "[open(path).close() for path in sys.argv[1:]]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.fixture
def folder_of_all():
    """A folder to which other users find their way; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="skltl-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not can_switch_users(), reason="no right to become other users")
def test_two_users_of_a_group_fill_one_cache(folder_of_all):
    found = run_workers("users", folder_of_all)

    assert found["crossed and stored"] == [
        [10, 10],
        [20, 30],  # the second user's are stored beside those of the first,
        [0, 30],  # who reads them
        [30, 30],
        [0, 30],
    ]
    assert found["warnings"] == [0, 0, 0, 0, 0]
    assert found["modes"] == [0o664]


@pytest.mark.skipif(not can_switch_users(), reason="no right to become other users")
def test_who_may_only_read_a_file_still_fills_files_of_their_own(folder_of_all):
    found = run_workers("strangers", folder_of_all)

    assert found["crossed and stored"] == [
        [10, 10],
        [20, 10],  # no right to write to the first user's file
        [20, 30],
        [30, 30],  # another pooling is another file
        [0, 30],
    ]
    assert found["warnings"] == [0, 1, 0, 0, 0]
    assert found["modes"] == [0o644]
