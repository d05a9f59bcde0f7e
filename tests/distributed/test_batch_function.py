"""A batch function adds results to tables of every kind, in any process."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.ensemble import RandomTreesEmbedding
from sklearn.pipeline import make_pipeline

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    TransferClassifier,
    cache_info,
    make_feature_pipeline,
)
from skltl.distributed import BatchFunction


@pytest.fixture
def paths(image_files):
    return [str(path) for path in image_files]


@pytest.fixture
def transformer(paths):
    return CNNFeatureTransformer("tiny", layer="block2").fit(paths)


@pytest.fixture
def features(transformer, paths):
    return transformer.transform(paths)


TABLES = {
    "lists": dict,
    "arrays": lambda columns: {name: np.array(one) for name, one in columns.items()},
    "pandas": pd.DataFrame,
    "pyarrow": pa.table,
}


def features_in(table):
    column = table["features"]
    rows = column.to_pylist() if isinstance(table, pa.Table) else column
    return np.array([np.asarray(row, dtype=np.float32) for row in rows])


@pytest.mark.parametrize("kind", TABLES)
def test_tables_have_one_column_more(transformer, paths, features, kind):
    batch = TABLES[kind]({"id": list(range(9)), "path": paths})

    found = BatchFunction(transformer)(batch)

    assert type(found) is type(batch)
    assert list(getattr(found, "column_names", found)) == ["id", "path", "features"]
    assert "features" not in list(getattr(batch, "column_names", batch))
    assert_array_equal(features_in(found), features)


def test_the_type_of_the_column_is_that_of_the_engine(transformer, paths):
    function = BatchFunction(transformer)

    table = function(pa.table({"path": paths}))
    frame = function(pd.DataFrame({"path": paths}, index=range(5, 14)))

    assert table.schema.field("features").type == pa.list_(pa.float32(), 96)
    assert frame["features"].iloc[0].dtype == np.float32
    assert_array_equal(frame.index, range(5, 14))
    assert function({"path": paths})["features"].shape == (9, 96)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_predictions_are_columns_of_labels_and_lists(paths, kind, method):
    labels = np.array(["no", "yes"])[np.arange(9) % 2]
    pipeline = make_feature_pipeline("tiny", "softmax").fit(paths, labels)
    batch = TABLES[kind]({"image": paths, "found": list(range(9))})

    table = BatchFunction(pipeline, method, column="image", output="found")(batch)

    found = table["found"]
    found = found.to_pylist() if isinstance(table, pa.Table) else list(found)
    assert list(getattr(table, "column_names", table)) == ["image", "found"]
    expected = getattr(pipeline, method)(paths)
    if method == "predict":
        assert_array_equal(found, expected)
    else:
        assert_allclose(np.array(found), expected, atol=1e-6)


@pytest.mark.parametrize("kind", TABLES)
def test_empty_batches_have_no_features(transformer, kind):
    batch = TABLES[kind]({"path": []})

    found = BatchFunction(transformer)(batch)

    assert len(found["features"]) == 0


@pytest.mark.parametrize("dtype", [str, object])
def test_empty_tables_have_the_types_of_others(paths, dtype):
    labels = np.array(["no", "yes"])[np.arange(9) % 2].astype(dtype)
    pipeline = make_feature_pipeline("tiny", "softmax").fit(paths, labels)
    function, table = BatchFunction(pipeline, "predict"), pa.table({"path": paths})

    assert function(table[:0]).schema == function(table).schema


def test_empty_data_frames_have_the_types_of_others(transformer, paths):
    function, table = BatchFunction(transformer), pd.DataFrame({"path": paths})

    assert_array_equal(function(table[:0]).dtypes, function(table).dtypes)


@pytest.mark.parametrize("output", ["pandas", "polars"])
def test_empty_batches_do_not_depend_on_the_output(transformer, output):
    function = BatchFunction(transformer.set_output(transform=output))

    assert function({"path": []})["features"].shape == (0, 96)


def test_empty_batches_of_rows_have_no_predictions(images):
    rows = images.reshape(9, -1)
    options = {"image_shape": (40, 48, 3), "head_epochs": 1, "finetune_epochs": 0}
    classifier = FineTunedCNNClassifier("tiny", **options).fit(rows, np.arange(9) % 2)
    function = BatchFunction(classifier, "predict_proba", column="row")

    assert function({"row": rows[:0]})["features"].shape == (0, 2)


@pytest.mark.parametrize("is_missing", [False, True], ids=["dictionary", "null"])
def test_arrow_columns_of_other_encodings(transformer, paths, features, is_missing):
    function = BatchFunction(transformer.set_params(on_error="nan"))
    column = pa.nulls(9) if is_missing else pa.array(paths).dictionary_encode()

    found = features_in(function(pa.table({"path": column})))

    assert_array_equal(found, np.full((9, 96), np.nan) if is_missing else features)


def test_results_must_be_an_array_with_a_row_for_each_image(transformer, paths):
    trees = RandomTreesEmbedding(3, random_state=0)
    pipeline = make_pipeline(CNNFeatureTransformer("tiny"), trees).fit(paths)

    with pytest.raises(TypeError, match="Pipeline.transform returns a cs"):
        BatchFunction(pipeline)({"path": paths})
    with pytest.raises(TypeError, match=r"Transformer.get_params returns a dict"):
        BatchFunction(transformer, "get_params")({"path": paths})


def test_images_of_all_kinds_are_accepted(transformer, images, paths, features):
    function = BatchFunction(transformer, column="image")
    encoded = [Path(path).read_bytes() for path in paths]

    for column in (images, [*images], encoded):
        assert_array_equal(function({"image": column})["features"], features)
    assert_array_equal(features_in(function(pa.table({"image": encoded}))), features)


def test_pickles_are_equal_and_keep_the_cache(transformer, paths, features, tmp_path):
    transformer.set_params(cache=tmp_path / "cache")
    function = BatchFunction(transformer)
    pickled = pickle.dumps(function)
    code = (
        "import pickle, sys, numpy as np;"
        "function = pickle.loads(sys.stdin.buffer.read());"
        f"found = function({{'path': {paths}}})['features'];"
        f"np.save(r'{tmp_path / 'found.npy'}', found)"
    )

    subprocess.run([sys.executable, "-c", code], input=pickled, check=True)

    assert_array_equal(np.load(tmp_path / "found.npy"), features)
    assert {one.n_images for one in cache_info(tmp_path / "cache").entries} == {9}
    assert pickled == pickle.dumps(function)
    again = BatchFunction(pickle.loads(pickled))
    assert again.estimator.cache == str(tmp_path / "cache")
    assert pickle.loads(pickle.dumps(transformer)).cache is None  # unlike a file


def test_pickles_of_a_strategy_keep_the_cache_that_was_set_since(paths, tmp_path):
    classifier = TransferClassifier(CNNFeatureTransformer("tiny"), strategy="extract")
    classifier.fit(paths, np.arange(9) % 2)
    classifier.set_params(transformer__cache=tmp_path)

    sent = pickle.loads(pickle.dumps(BatchFunction(classifier, "predict"))).estimator

    assert str(sent.transformer.cache) == str(tmp_path)
    sent.predict(paths)
    assert {one.n_images for one in cache_info(tmp_path).entries} == {9}
    assert pickle.loads(pickle.dumps(classifier)).transformer.cache is None


def test_another_fit_does_not_change_the_function(transformer, paths, features):
    function = BatchFunction(transformer)

    transformer.set_params(layer="block1").fit(paths)

    assert_array_equal(function({"path": paths})["features"], features)


def test_errors_say_what_was_expected(transformer, paths):
    function = BatchFunction(transformer, column="image")

    with pytest.raises(KeyError, match="no column 'image', only 'path'"):
        function({"path": paths})
    with pytest.raises(TypeError, match="dict of columns.*got a builtins.list"):
        function(paths)
    with pytest.raises(AttributeError, match=r"has no method 'predict'\. Pass another"):
        BatchFunction(transformer, "predict")
    with pytest.raises(ValueError, match="not fitted"):
        BatchFunction(CNNFeatureTransformer("tiny"))
