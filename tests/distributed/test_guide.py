"""The code of the guide's page "Beyond one machine" does what the page says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guide_code import GUIDE, blocks_of, create_photographs, run
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from skltl import CNNFeatureTransformer, make_feature_pipeline

for package in ("dask", "distributed", "datasets", "ray", "zarr"):
    pytest.importorskip(package, reason="needs skltl[distributed]")

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

BLOCKS = blocks_of((GUIDE / "distributed.rst").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the page defines, in the folder of its images."""
    folder = create_photographs(tmp_path_factory.mktemp("guide")).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        names: dict = {}
        for block in BLOCKS:
            # Ray sets them here, and Dask's configuration does not overrule them.
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                patch.delenv(variable, raising=False)
            run([block], names)
        names["parquet"] = pd.read_parquet("features.parquet")
        yield names


@pytest.fixture(scope="module")
def features(found):
    return CNNFeatureTransformer("tiny", layer="block3").fit_transform(found["paths"])


def test_features_of_all_engines_are_those_of_a_plain_transform(found, features):
    tables = [found["by_ray"]["features"], found["by_datasets"]["features"]]
    for one in (
        found["lazy"].compute(scheduler="synchronous"),
        found["stored"][:],
        found["features_from_files"],
        found["parquet"].drop(columns="y").to_numpy(),
        *(np.stack([np.asarray(row, np.float32) for row in one]) for one in tables),
    ):
        assert_allclose(one, features, atol=1e-6)
    assert_array_equal(found["by_ray"]["id"], np.arange(len(features)))
    assert_array_equal(found["parquet"]["y"], found["y"])
    shown = np.stack(found["with_features"]["features"])
    assert_allclose(shown, features[:4], atol=1e-6)


def test_predictions_are_those_of_one_process(found):
    pipeline, paths = found["pipeline"], found["paths"]

    assert_array_equal(found["labels"], pipeline.predict(paths))
    assert_allclose(found["proba"], pipeline.predict_proba(paths), atol=1e-6)


def test_workers_have_the_threads_that_were_configured(found):
    assert found["n_threads"] == 2


def test_classifiers_are_fitted_to_stored_features(found, features):
    expected = LogisticRegression(max_iter=1000).fit(features, found["y"])

    assert_array_equal(found["logistic"].predict(features), expected.predict(features))
    assert found["sgd"].score(features, found["y"]) > 0.8


def test_a_store_continues_where_it_was_killed(found, features):
    assert found["missing"] == [0, 1, 2, 3, 4]
    (store_code,) = [one for one in BLOCKS if "zarr.open_array" in one]
    store_code = store_code.replace("features.zarr", "killed.zarr")
    slowly = (
        "from worker_code import read_slowly\n"
        "transformer.set_params(reader=read_slowly, n_jobs=1)\n"
        "lazy = transformer.transform(X)\n"
        "dask.config.set(scheduler='synchronous')\n"
    )
    program = "import dask\n" + BLOCKS[0] + slowly + store_code

    killed = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    while len(list(Path("killed.zarr").glob("c/*/*"))) < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    names = run([store_code], {**found})

    n_missing = len(names["missing"])
    assert 0 < n_missing < names["n_blocks"] == 5
    assert_allclose(names["stored"][:], features, atol=1e-6)


def test_the_search_has_the_scores_of_one_process(found):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3")
    expected = GridSearchCV(pipeline, found["grid"], cv=3)
    expected.fit(found["paths"], found["y"])

    scores = found["search"].cv_results_["mean_test_score"]
    assert_allclose(scores, expected.cv_results_["mean_test_score"])
