"""Two worker processes compute what one process does, even if one of them dies."""

import os
import pickle
import signal
import time
from threading import Thread

import joblib
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from worker_code import (
    FATAL,
    count_arrivals,
    n_arrivals,
    read_or_die,
    read_slowly,
    score_slowly,
)

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    cache_info,
    make_feature_pipeline,
    register_backbone,
)
from skltl.distributed import apply
from skltl.exceptions import ImageReadError

da = pytest.importorskip("dask.array", reason="needs skltl[dask]")
dd = pytest.importorskip("dask.dataframe")
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

LABELS = np.array(["a", "b"])[np.arange(40) % 2]


@pytest.fixture
def transformer():
    return CNNFeatureTransformer("tiny", layer="block2")


@pytest.fixture
def features(transformer, many_paths, one_thread):
    return transformer.fit_transform(many_paths)


@pytest.fixture
def X(many_paths):
    return da.from_array(many_paths, chunks=6)


def kill_a_worker(client, is_time=lambda: True):
    """Kill the process of a worker that runs a task, once it is time."""
    pids = client.run(os.getpid)
    while not is_time():
        time.sleep(0.02)
    while not (busy := [one for one, keys in client.processing().items() if keys]):
        time.sleep(0.02)
    os.kill(pids[busy[0]], signal.SIGKILL)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["2 x 1", "1 x 2"])
def test_features_predictions_and_order_are_those_of_one_process(
    start_cluster, shape, transformer, X, features, many_paths
):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block2")
    pipeline.fit(many_paths, LABELS)

    with start_cluster(*shape).as_current():
        lazy = transformer.fit(X).transform(X)
        proba = apply(pipeline, X, "predict_proba")
        labels = apply(pipeline, X)
        found = dask.compute(lazy, proba, labels)

    assert_array_equal(found[0], features)
    assert_allclose(found[1], pipeline.predict_proba(many_paths), atol=1e-6)
    assert_array_equal(found[2], pipeline.predict(many_paths))


def test_nothing_is_sent_before_it_is_computed(client, transformer, X):
    lazy = transformer.fit(X).transform(X)
    apply(transformer, X, "transform")

    n_tasks = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))

    assert n_tasks == 0
    assert lazy.compute().shape == (40, 96)


def test_each_worker_loads_an_estimator_once(client, transformer, many_paths):
    X = da.from_array(many_paths, chunks=1)
    client.run(count_arrivals)

    transformer.fit(X).transform(X).compute()

    assert set(client.run(n_arrivals).values()) == {1}


def bytes_of(lazy):
    """Return the size of a graph as it is sent."""
    (optimized,) = dask.optimize(lazy)
    return len(distributed.protocol.pickle.dumps(dict(optimized.__dask_graph__())))


def test_a_graph_has_the_weights_once_and_tasks_are_small():
    transformer = CNNFeatureTransformer("resnet18", weights=None, random_state=0)
    paths = np.array([f"{number:04}.png" for number in range(1000)])
    collections = {n: da.from_array(paths, chunks=1000 // n) for n in (10, 1000)}
    sizes = {}
    for layer in ("layer1", "last"):
        transformer.set_params(layer=layer).fit(paths)
        weights = len(pickle.dumps(transformer))
        for n, X in collections.items():
            graph = bytes_of(transformer.transform(X)) - weights
            sizes[layer, n] = graph

    assert weights > 40e6
    for n in collections:
        assert sizes["last", n] == pytest.approx(sizes["layer1", n], abs=10_000)
    per_task = (sizes["last", 1000] - sizes["last", 10]) / 990
    assert per_task < 1000
    assert sizes["last", 10] < 100_000


def test_a_backbone_that_only_this_process_knows_is_sent(
    client, X, many_paths, one_thread
):
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    backbone = Backbone.from_module("mine", module, preprocessing=Preprocessing(32))
    register_backbone(backbone)
    transformer = CNNFeatureTransformer("mine")

    found = transformer.fit(X).transform(X).compute()

    assert_array_equal(found, transformer.transform(many_paths))


def test_workers_share_a_cache_and_the_next_run_computes_nothing(
    client, X, features, tmp_path, many_paths
):
    transformer = CNNFeatureTransformer(
        "tiny", layer="block2", cache=tmp_path / "cache", reader=read_or_die
    )
    assert_array_equal(transformer.fit(X).transform(X).compute(), features)
    n_images = {entry.n_images for entry in cache_info(tmp_path / "cache").entries}

    # A reader that has another identity would compute them again.
    started = time.perf_counter()
    assert_array_equal(transformer.fit_transform(many_paths), features)

    assert n_images == {40}
    assert {one.n_images for one in cache_info(tmp_path / "cache").entries} == {40}
    assert time.perf_counter() - started < 30


def test_a_killed_worker_does_not_change_features(client, transformer, X, features):
    transformer.set_params(reader=read_slowly, n_jobs=1).fit(X)

    future = client.compute(transformer.transform(X))
    kill_a_worker(client)

    assert_array_equal(future.result(timeout=120), features)


def test_a_killed_worker_leaves_a_store_complete(
    client, transformer, X, features, tmp_path
):
    zarr = pytest.importorskip("zarr")
    transformer.set_params(reader=read_slowly, n_jobs=1).fit(X)
    shape = {"shape": (40, 96), "chunks": (6, 96)}
    stored = zarr.create_array(tmp_path / "features", **shape, dtype="float32")
    lazy = transformer.transform(X)

    future = client.compute(lazy.store(stored, lock=False, compute=False))
    files = lambda: list((tmp_path / "features" / "c").glob("*/*"))  # noqa: E731
    kill_a_worker(client, is_time=lambda: len(files()) >= 2)
    n_files = len(files())
    future.result(timeout=120)

    assert 2 <= n_files < len(files()) == 7
    assert_array_equal(stored[:], features)


def searching(cache):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block2", cache=cache)
    grid = {"softmax__C": [0.01, 0.1, 1], "feat__layer": ["block1", "block2"]}
    return GridSearchCV(pipeline, grid, cv=3, scoring=score_slowly, n_jobs=-1)


@pytest.mark.parametrize("is_killed", [False, True], ids=["", "killed"])
def test_a_search_has_the_scores_of_one_process(
    client, many_paths, tmp_path, is_killed, one_thread
):
    paths = np.asarray(many_paths)
    pids = set(client.run(os.getpid).values())
    expected = searching(tmp_path / "serial").set_params(n_jobs=None).fit(paths, LABELS)

    with joblib.parallel_config("dask", wait_for_workers_timeout=60):
        search = searching(tmp_path / "cache")
        if is_killed:
            killing = Thread(target=kill_a_worker, args=(client,))
            killing.start()
        search.fit(paths, LABELS)

    assert_allclose(
        search.cv_results_["mean_test_score"],
        expected.cv_results_["mean_test_score"],
        atol=1e-12,
    )
    assert search.best_params_ == expected.best_params_
    client.wait_for_workers(2)
    assert (pids == {*client.run(os.getpid).values()}) is not is_killed
    entries = cache_info(tmp_path / "cache").entries
    assert {entry.n_images for entry in entries} == {40}  # each image once


def test_an_unreadable_image_is_named(client, transformer, many_paths):
    X = np.array([*many_paths[:17], "missing.png", *many_paths[17:]], dtype=object)
    lazy = transformer.fit(X).transform(da.from_array(X, chunks=6))

    with pytest.raises(ImageReadError, match=r"Image 17 \('missing.png'\)") as info:
        lazy.compute()

    assert "block 2 of the Dask collection" in info.value.__notes__[0]


@pytest.mark.parametrize("kind", ["array", "frame"])
def test_an_image_that_ends_its_worker_is_named(client, transformer, many_paths, kind):
    pipeline = make_pipeline(transformer, LogisticRegression())
    pipeline.fit(many_paths, LABELS)
    transformer.set_params(reader=read_or_die)
    X = many_paths.copy()
    X[20] = FATAL
    if kind == "array":
        lazy = transformer.transform(da.from_array(X, chunks=6))
        place = "block 3 of"
    else:
        frame = dd.from_pandas(pd.DataFrame({"path": X}), npartitions=4)
        lazy = apply(pipeline, frame)
        place = "block 2 of"

    with pytest.raises(ImageReadError, match="ends the process .SIGKILL.") as info:
        lazy.compute()

    assert info.value.path == FATAL
    assert info.value.index == (20 if kind == "array" else 0)
    assert place in info.value.__notes__[0]
    client.wait_for_workers(2)
