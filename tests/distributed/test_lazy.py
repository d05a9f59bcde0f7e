"""Dask collections become lazy features and predictions, equal to those of arrays."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomTreesEmbedding
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import skltl
from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    make_feature_pipeline,
)
from skltl._dask import Shipped
from skltl.distributed import apply
from skltl.exceptions import ImageReadError, NonFiniteFeaturesError

dask = pytest.importorskip("dask", reason="needs skltl[dask]")
da = pytest.importorskip("dask.array")
db = pytest.importorskip("dask.bag")
dd = pytest.importorskip("dask.dataframe")
cloudpickle = pytest.importorskip("cloudpickle")


@pytest.fixture(autouse=True)
def scheduler():
    """A scheduler that runs tasks in this thread, one after the other."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def paths(image_files):
    return np.array([str(path) for path in image_files], dtype=object)


@pytest.fixture
def transformer():
    return CNNFeatureTransformer("tiny", layer="block2")


@pytest.fixture
def features(transformer, paths):
    return clone(transformer).fit_transform(paths)


def frame_of(paths, name="path"):
    index = np.arange(len(paths)) * 10
    return dd.from_pandas(pd.DataFrame({name: paths}, index=index), npartitions=3)


COLLECTIONS = {
    "objects": lambda paths: da.from_array(paths, chunks=4),
    "strings": lambda paths: da.from_array(paths.astype(str), chunks=4),
    "column of an array": lambda paths: da.from_array(paths[:, None], chunks=(4, 1)),
    "series": lambda paths: frame_of(paths)["path"],
    "frame": frame_of,
    "bag": lambda paths: db.from_sequence(paths.tolist(), npartitions=3),
}


@pytest.fixture(params=COLLECTIONS)
def collection(request, paths):
    """The paths as a collection of each kind."""
    return COLLECTIONS[request.param](paths)


@pytest.fixture
def computed(monkeypatch):
    """A list that grows when Dask computes anything."""
    calls = []

    def get(*args, **kwargs):
        calls.append(args)
        return dask.local.get_sync(*args, **kwargs)

    with dask.config.set(scheduler=get):
        yield calls


def test_features_are_lazy_and_equal(transformer, collection, features, computed):
    lazy = transformer.fit(collection).transform(collection)

    assert not computed
    assert isinstance(lazy, da.Array)
    assert lazy.dtype == np.float32
    assert lazy.shape[1] == features.shape[1]
    assert_array_equal(lazy.compute(), features)
    assert computed


@pytest.mark.parametrize("kind", ["binary", "dictionary"])
def test_columns_of_arrow_are_images(transformer, paths, features, kind):
    arrow = pytest.importorskip("pyarrow")
    values, dtype = paths, arrow.dictionary(arrow.int32(), arrow.string())
    if kind == "binary":
        values, dtype = [Path(path).read_bytes() for path in paths], arrow.binary()
    series = pd.Series(values).astype(pd.ArrowDtype(dtype))

    lazy = transformer.fit_transform(dd.from_pandas(series, npartitions=2))

    assert_array_equal(lazy.compute(), features)


def test_chunks_are_those_of_the_array(transformer, paths):
    lazy = transformer.fit_transform(da.from_array(paths, chunks=(2, 5, 2)))

    assert lazy.chunks == ((2, 5, 2), (96,))


def test_images_may_be_chunked_in_any_way(transformer, images, features):
    X = da.from_array(images, chunks=(4, 17, 48, 1))

    lazy = transformer.fit_transform(X)

    assert lazy.chunks[0] == (4, 4, 1)
    assert_array_equal(lazy.compute(), features)


def test_rows_of_pixels_need_their_shape(images, features):
    rows = da.from_array(images.reshape(9, -1), chunks=(4, 1000))
    transformer = CNNFeatureTransformer("tiny", layer="block2", image_shape=(40, 48, 3))

    assert_array_equal(transformer.fit_transform(rows).compute(), features)
    assert transformer.n_features_in_ == 40 * 48 * 3
    with pytest.raises(ValueError, match="image_shape=.*as in"):
        CNNFeatureTransformer("tiny").fit(rows)
    with pytest.raises(ValueError, match="5759 features, but"):
        transformer.transform(rows[:, 1:])


def test_set_output_returns_lazy_data_frames(transformer, collection, features):
    transformer.set_output(transform="pandas")

    lazy = transformer.fit_transform(collection)

    assert isinstance(lazy, dd.DataFrame)
    names = transformer.get_feature_names_out()
    assert_array_equal(lazy.columns, names)
    found = lazy.compute()
    assert_array_equal(found, features)
    assert set(found.dtypes) == {np.dtype(np.float32)}
    if hasattr(collection, "index"):
        assert_array_equal(found.index, np.arange(9) * 10)
    with pytest.raises(ValueError, match="'polars'.*not available"):
        transformer.set_output(transform="polars").transform(collection)


def test_empty_blocks_have_no_features(transformer, paths, features):
    is_first = np.arange(9) < 2
    array = da.from_array(paths, chunks=3)[da.from_array(is_first, chunks=3)]
    frame = frame_of(paths)
    frame = frame[frame["path"] < paths[2]]
    bag = db.from_sequence(paths.tolist(), npartitions=3).filter(
        lambda path: path < paths[2]
    )

    for X in (array, frame, bag):
        lazy = transformer.fit_transform(X)
        assert lazy.blocks[-1].compute().shape == (0, 96)
        assert_array_equal(lazy.compute(), features[:2])
        frames = clone(transformer).set_output(transform="pandas").fit_transform(X)
        assert_array_equal(frames.compute(), features[:2])


def test_another_fit_does_not_change_what_is_not_computed_yet(
    transformer, paths, features
):
    X = da.from_array(paths, chunks=4)
    labels = np.arange(9) % 2
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block2")
    expected = pipeline.fit(paths, labels).predict_proba(paths)
    proba = apply(pipeline, X, "predict_proba")
    lazy = transformer.fit(X).transform(X)

    pipeline.fit(paths, np.arange(9) < 4)
    transformer.set_params(layer="block1").fit(X)

    assert_allclose(proba.compute(), expected, atol=1e-6)
    assert_array_equal(lazy.compute(), features)


def test_clones_and_pickles_are_lazy_too(transformer, paths, features):
    X = da.from_array(paths, chunks=4)

    for copied in (
        clone(transformer).fit(X),
        pickle.loads(pickle.dumps(transformer.fit(X))),
    ):
        assert_array_equal(copied.transform(X).compute(), features)


def test_pipelines_are_fitted_to_a_collection(paths):
    X, y = da.from_array(paths, chunks=4), np.arange(9) % 2
    pipeline = make_pipeline(
        CNNFeatureTransformer("tiny"), LogisticRegression(max_iter=1000)
    )

    found = clone(pipeline).fit(X, y).predict_proba(X)

    assert_array_equal(found, pipeline.fit(paths, y).predict_proba(paths))


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        ("predict", np.array(["no", "yes", "perhaps"])[np.arange(9) % 3]),
        ("predict_proba", np.arange(9) % 3),
        ("predict_log_proba", np.arange(9) % 2),
        ("decision_function", np.arange(9) % 2),
        ("decision_function", np.arange(9) % 3),
        ("predict", np.eye(3, dtype=int)[np.arange(9) % 3]),
    ],
)
def test_apply_runs_whole_pipelines(collection, paths, computed, method, labels):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block2")
    expected = getattr(pipeline.fit(paths, labels), method)(paths)

    lazy = apply(pipeline, collection, method)

    assert not computed
    assert lazy.dtype == expected.dtype
    assert lazy.shape[1:] == expected.shape[1:]
    found = lazy.compute()
    if expected.dtype.kind == "f":  # products depend on the number of rows
        assert_allclose(found, expected, atol=1e-6)
    else:
        assert_array_equal(found, expected)


def test_apply_runs_regressors_and_transforming_pipelines(paths, images):
    X = da.from_array(images, chunks=(4, 20, 48, 3))
    values = np.random.default_rng(0).normal(size=(9, 2))
    regressor = make_feature_pipeline("tiny", regressor="ridge").fit(paths, values)
    scaling = make_pipeline(CNNFeatureTransformer("tiny"), StandardScaler())
    scaling.fit(paths)

    assert_allclose(apply(regressor, X).compute(), regressor.predict(paths), atol=1e-6)
    lazy = apply(scaling, X, "transform")
    assert lazy.dtype == np.float32
    assert_array_equal(lazy.compute(), scaling.transform(paths))


@pytest.mark.parametrize("output", ["default", "pandas"])
def test_apply_returns_data_frames_if_the_pipeline_does(paths, output):
    pipeline = make_pipeline(CNNFeatureTransformer("tiny"), StandardScaler())
    pipeline.set_output(transform=output).fit(paths)
    frame = frame_of(paths)

    lazy = apply(pipeline, frame, "transform")

    assert isinstance(lazy, dd.DataFrame if output == "pandas" else da.Array)
    expected = pipeline.transform(frame.compute())
    assert_array_equal(lazy.compute(), expected)
    if output == "pandas":
        pd.testing.assert_frame_equal(lazy.compute(), expected)


def test_apply_runs_networks(paths):
    X, y = da.from_array(paths, chunks=4), np.array(["a", "b", "c"])[np.arange(9) % 3]
    options = {"head_epochs": 1, "finetune_epochs": 1, "random_state": 0}
    classifier = skltl.FineTunedCNNClassifier("tiny", **options).fit(paths, y)
    regressor = skltl.FineTunedCNNRegressor("tiny", **options).fit(paths, np.arange(9))
    pretrained = skltl.PretrainedCNNClassifier("tiny").fit(paths[:1])

    for estimator, method in (
        (classifier, "predict"),
        (classifier, "predict_proba"),
        (classifier, "transform"),
        (regressor, "predict"),
        (pretrained, "predict"),
    ):
        lazy = apply(estimator, X, method)
        expected = getattr(estimator, method)(paths)
        assert lazy.dtype == expected.dtype
        if expected.dtype.kind == "f":
            assert_allclose(lazy.compute(), expected, atol=1e-6)
        else:
            assert_array_equal(lazy.compute(), expected)
    assert_array_equal(classifier.transform(X).compute(), classifier.transform(paths))
    with pytest.raises(TypeError, match="Dask Array.*skltl.distributed.apply"):
        classifier.predict(X)


def test_apply_takes_tables_of_several_columns_and_the_result_for_no_rows(paths):
    table = pd.DataFrame({"path": paths, "distance": np.arange(9.0)})
    columns = ColumnTransformer(
        [("image", CNNFeatureTransformer("tiny"), "path")], remainder="passthrough"
    )
    model = make_pipeline(columns, StandardScaler(), LogisticRegression())
    model.fit(table, np.arange(9) % 2)
    X = dd.from_pandas(table, npartitions=2)

    with pytest.raises(ValueError, match="Pass an array of this shape.*as meta"):
        apply(model, X)
    lazy = apply(model, X, "predict_proba", meta=np.empty((0, 2)))

    assert_allclose(lazy.compute(), model.predict_proba(table), atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(., 2\).*expected \('n', 3\)"):
        apply(model, X, "predict_proba", meta=np.empty((0, 3))).compute()


def test_meta_must_be_like_the_results(paths):
    labels = np.array(["no", "yes", "perhaps"])[np.arange(9) % 3]
    pipeline = make_feature_pipeline("tiny", "softmax").fit(paths, labels)
    X, frame = da.from_array(paths, chunks=4), frame_of(paths)

    with pytest.raises(TypeError, match="meta is a tuple"):
        apply(pipeline, X, meta=(0,))
    with pytest.raises(ValueError, match="<U7, expected.*float64"):
        apply(pipeline, X, meta=np.empty(0)).compute()
    meta = pd.DataFrame(columns=pipeline.classes_, dtype=float)
    found = apply(pipeline, frame, "predict_proba", meta=meta).compute()
    assert_allclose(found, pipeline.predict_proba(paths), atol=1e-6)
    assert_array_equal(found.index, np.arange(9) * 10)
    assert_array_equal(found.columns, pipeline.classes_)


def test_apply_takes_dense_results_only(paths):
    trees = RandomTreesEmbedding(3, random_state=0)
    pipeline = make_pipeline(CNNFeatureTransformer("tiny"), trees).fit(paths)

    with pytest.raises(TypeError, match="Pipeline.transform returns a cs"):
        apply(pipeline, da.from_array(paths, chunks=4), "transform")


def test_apply_predicts_with_output_that_is_not_lazy(paths):
    pipeline = make_feature_pipeline("tiny", "softmax").set_output(transform="polars")
    pipeline.fit(paths, np.arange(9) % 2)
    X = da.from_array(paths, chunks=4)

    assert_array_equal(apply(pipeline, X).compute(), pipeline.predict(paths))


class ReadFrom:
    """A reader of images that are named by numbers."""

    def __init__(self, paths):
        self.paths = paths

    def __call__(self, number):
        return self.paths[int(number)]


@pytest.mark.parametrize("is_read", [False, True], ids=["", "reader"])
@pytest.mark.parametrize("name", ["fine-tuned", "pretrained", "strategy"])
def test_apply_runs_classifiers_of_images_with_and_without_a_reader(
    name, is_read, paths
):
    y = np.array(["a", "b", "c"])[np.arange(9) % 3]
    items = np.arange(9) if is_read else paths
    reader = ReadFrom(paths.tolist()) if is_read else None
    transformer = CNNFeatureTransformer("tiny", reader=reader)
    classifier = {
        "fine-tuned": skltl.FineTunedCNNClassifier(
            "tiny", head_epochs=1, finetune_epochs=0, reader=reader, random_state=0
        ),
        "pretrained": skltl.PretrainedCNNClassifier("tiny", reader=reader),
        "strategy": skltl.TransferClassifier(
            transformer, strategy="extract", random_state=0
        ),
    }[name].fit(list(items), y)
    X = da.from_array(items, chunks=4)

    assert_array_equal(apply(classifier, X).compute(), classifier.predict(list(items)))


def test_an_unreadable_image_is_named_by_its_position_in_the_collection(
    transformer, paths
):
    paths[7] = "missing.png"
    transformer.fit(paths)

    for chunks in (4, (2, 3, 4)):
        lazy = transformer.transform(da.from_array(paths, chunks=chunks))
        with pytest.raises(ImageReadError, match=r"Image 7 \('missing.png'\)") as info:
            lazy.compute()
        assert info.value.index == 7
    for X in (frame_of(paths), db.from_sequence(paths.tolist(), npartitions=3)):
        with pytest.raises(ImageReadError, match="missing.png.*image 1 of block 2"):
            transformer.transform(X).compute()


def test_an_unreadable_image_of_a_sample_is_named_by_both(paths):
    samples = np.empty(4, dtype=object)
    samples[:] = [list(paths[:2]) for _ in range(4)]
    samples[3] = [paths[0], "missing.png"]
    fitted = skltl.ImageSetTransformer(skltl.CNNFeatureTransformer("tiny"))
    meta = np.empty((0, len(fitted.fit(list(samples)).get_feature_names_out())))
    lazy = apply(fitted, da.from_array(samples, chunks=2), "transform", meta=meta)

    with pytest.raises(ImageReadError, match="missing.png") as info:
        lazy.compute()

    assert info.value.__notes__ == [
        "It is image 1 of sample 1.",
        "It is in block 1 of the Dask collection.",
    ]
    assert info.value.index == 3  # of the images in the block


def test_images_that_may_be_unreadable_have_features_of_nan(
    transformer, paths, features
):
    X = da.from_array(np.array([*paths[:7], "missing.png"], dtype=object), chunks=3)

    found = transformer.set_params(on_error="nan").fit_transform(X).compute()

    assert_array_equal(found[:7], features[:7])
    assert np.isnan(found[7]).all()


class Reciprocal(nn.Module):
    """A network whose outputs for black images are infinite."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, batch):
        return 1 / self.conv(batch)


def test_features_that_are_not_finite_are_named(images):
    backbone = Backbone.from_module(
        "reciprocal",
        Reciprocal(),
        preprocessing=Preprocessing(8, mean=(0, 0, 0), std=(1, 1, 1)),
    )
    images[5] = 0
    transformer = CNNFeatureTransformer(backbone, engine="torch")
    lazy = transformer.fit_transform(da.from_array(images, chunks=2))

    with pytest.raises(NonFiniteFeaturesError) as info:
        lazy.compute()

    assert info.value.index == 5


def test_lengths_and_types_are_checked_in_fit(transformer, paths):
    X = da.from_array(paths, chunks=4)

    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[9, 8\]"):
        transformer.fit(X, np.zeros(8))
    with pytest.raises(ValueError, match=r"\[9, 8\]"):
        transformer.fit(X, da.zeros(8))
    with pytest.raises(ValueError, match="columns '.*Pass the one"):
        transformer.fit(frame_of(paths).assign(other="x"))
    with pytest.raises(ValueError, match="shape"):
        transformer.fit(da.zeros(9))
    for single in (dask.delayed(paths), X[0], frame_of(paths)["path"].size):
        with pytest.raises(TypeError, match="expected an array, a data frame"):
            transformer.fit(single)
    images = da.zeros((9, 8, 8, 3))
    of_unknown_height = images[:, images[0, :, 0, 0] == 0]
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        transformer.fit(of_unknown_height)


REFUSING = {
    "find_bad_images": skltl.find_bad_images,
    "drop_bad": lambda X: skltl.drop_bad(X, np.zeros(9)),
    "find_duplicates": skltl.find_duplicates,
    "find_label_errors": lambda X: skltl.find_label_errors(
        X, np.arange(9) % 2, CNNFeatureTransformer("tiny")
    ),
    "find_outliers": lambda X: skltl.find_outliers(X, CNNFeatureTransformer("tiny")),
    "ImageNeighbors": lambda X: skltl.ImageNeighbors(CNNFeatureTransformer("tiny")).fit(
        X
    ),
    "ImageSetTransformer": lambda X: skltl.ImageSetTransformer().fit(X),
    "StrategyAdvisor": lambda X: skltl.StrategyAdvisor().fit(X, np.arange(9) % 2),
    "TransferClassifier": lambda X: skltl.TransferClassifier().fit(X, np.arange(9) % 2),
    "FineTunedCNNClassifier": lambda X: skltl.FineTunedCNNClassifier("tiny").fit(
        X, np.arange(9) % 2
    ),
    "FineTunedCNNRegressor": lambda X: skltl.FineTunedCNNRegressor("tiny").fit(
        X, np.arange(9)
    ),
    "PretrainedCNNClassifier": lambda X: skltl.PretrainedCNNClassifier("tiny").fit(X),
    "ImageGridDisplay": lambda X: skltl.ImageGridDisplay.from_images(X),
}


@pytest.mark.parametrize("name", REFUSING)
def test_everything_else_says_what_to_do_instead(name, collection, computed):
    with pytest.raises(TypeError, match="is a Dask .*X.compute().*distributed.apply"):
        REFUSING[name](collection)

    assert not computed


def test_apply_refuses_what_it_cannot_run(paths):
    X = da.from_array(paths, chunks=4)
    pipeline = make_feature_pipeline("tiny").fit(paths, np.arange(9) % 2)

    with pytest.raises(TypeError, match="estimator.predict.*from_array"):
        apply(pipeline, paths)
    with pytest.raises(ValueError, match="must be one of predict, "):
        apply(pipeline, X, "fit")
    with pytest.raises(AttributeError, match="Pipeline has no method 'predict_proba'"):
        apply(pipeline, X, "predict_proba")
    with pytest.raises(TypeError, match="expected an array"):
        apply(pipeline, X.sum())


def test_skltl_does_not_import_dask():
    code = (
        "import sys, numpy as np, skltl, skltl.distributed;"
        "skltl.CNNFeatureTransformer('tiny').fit_transform(np.zeros((2, 8, 8, 3)));"
        "print({name.split('.')[0] for name in sys.modules} & {'dask', 'ray'})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"


def test_a_graph_without_weights_is_small(image_files):
    X = da.from_array(np.array(image_files, str), chunks=3)
    transformer = CNNFeatureTransformer("tiny", store_weights=False).fit(X)
    lazy = transformer.transform(X)
    assert len(cloudpickle.dumps(lazy)) < 50_000
    shipped = pickle.loads(pickle.dumps(Shipped(transformer))).estimator
    expected = transformer.transform(image_files)
    assert_array_equal(shipped.transform(image_files), expected)
    assert_array_equal(lazy.compute(scheduler="synchronous"), expected)
