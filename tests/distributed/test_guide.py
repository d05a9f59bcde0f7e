"""The code of the guide's page "Beyond one machine" does what the page says."""

import numpy as np
import pandas as pd
import pytest
from guide_code import GUIDE, blocks_of, create_photographs, run
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from worker_code import FATAL, read_or_die

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
        names = run(BLOCKS, {})
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
    stored, lazy = found["stored"], found["lazy"]
    rows = found["blocks"][2]
    assert found["missing"] == found["blocks"]
    stored[rows] = np.nan  # as if this block had not been written
    stored[found["blocks"][0]] = 7  # this one is not computed again
    (store_code,) = [one for one in BLOCKS if "zarr.open_array" in one]

    names = run([store_code], found | {"lazy": lazy})

    assert names["missing"] == [rows]
    assert_allclose(stored[rows], features[rows], atol=1e-6)
    assert (stored[found["blocks"][0]] == 7).all()


def test_images_that_end_the_process_are_found(found):
    paths = [str(found["paths"][0]), FATAL, str(found["paths"][1])]
    transformer = CNNFeatureTransformer("tiny", reader=read_or_die).fit(paths)

    assert found["find_fatal_images"](transformer, paths) == [FATAL]


def test_the_search_has_the_scores_of_one_process(found):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3")
    expected = GridSearchCV(pipeline, found["grid"], cv=3)
    expected.fit(found["paths"], found["y"])

    scores = found["search"].cv_results_["mean_test_score"]
    assert_allclose(scores, expected.cv_results_["mean_test_score"])
