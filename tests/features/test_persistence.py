"""A saved transformer holds plain arrays, is small, and extracts the same features."""

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import skops.io
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torchvision.models import squeezenet1_1

import skltl
from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    PretrainedCNNClassifier,
    make_feature_pipeline,
)
from skltl._dask import Shipped
from skltl.exceptions import WeightsError, WeightsNotFoundError
from skltl.networks import get_backbone

NETWORKS = {
    "ConvNet": {"backbone": "tiny", "layer": ["stem", "block2"], "image_size": 16},
    "transformer": {
        "backbone": "timm:test_vit",
        "weights": None,
        "layer": ["blocks.0", "last"],
        "pooling": "cls+avg",
        "image_size": 32,
        "random_state": 0,
    },
}


@pytest.fixture(params=NETWORKS)
def transformer(request, images):
    return CNNFeatureTransformer(**NETWORKS[request.param]).fit(images)


def test_a_file_of_joblib_has_the_same_features(transformer, images, tmp_path):
    joblib.dump(transformer, tmp_path / "transformer.joblib")

    loaded = joblib.load(tmp_path / "transformer.joblib")

    np.testing.assert_array_equal(
        loaded.transform(images), transformer.transform(images)
    )
    assert loaded.get_params() == transformer.get_params()
    assert loaded.layers_ == transformer.layers_
    assert loaded.preprocessing_ == transformer.preprocessing_
    assert loaded.backbone_ is transformer.backbone_


def test_skltl_lists_all_types_that_skops_has_to_trust(tmp_path):
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block2", image_shape=(8, -1), image_size=16
    )
    rows = np.random.default_rng(0).random((6, 48))
    pipeline.fit(rows, list("ababab"))
    skops.io.dump(pipeline, tmp_path / "pipeline.skops")

    unknown = skops.io.get_untrusted_types(file=tmp_path / "pipeline.skops")
    loaded = skops.io.load(tmp_path / "pipeline.skops", trusted=skltl.SKOPS_TRUSTED)

    assert set(unknown) <= set(skltl.SKOPS_TRUSTED)
    np.testing.assert_array_equal(
        loaded.decision_function(rows), pipeline.decision_function(rows)
    )


def test_a_transformer_with_weights_from_a_file_is_saved_with_skops(tmp_path, images):
    weights = Path(skltl.networks.__file__).with_name("tiny.safetensors")
    transformer = CNNFeatureTransformer("tiny", weights=weights, image_size=16)
    transformer.fit(images)
    skops.io.dump(transformer, tmp_path / "transformer.skops")

    loaded = skops.io.load(tmp_path / "transformer.skops", trusted=skltl.SKOPS_TRUSTED)

    np.testing.assert_array_equal(
        loaded.transform(images), transformer.transform(images)
    )


def test_an_unfitted_transformer_can_be_saved():
    loaded = pickle.loads(pickle.dumps(CNNFeatureTransformer("vgg16", layer="block4")))

    assert (
        loaded.get_params()
        == CNNFeatureTransformer("vgg16", layer="block4").get_params()
    )


def test_a_pickle_contains_no_object_of_torch(transformer):
    modules = set()

    class RecordingUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            modules.add(module.partition(".")[0])
            return super().find_class(module, name)

    RecordingUnpickler(io.BytesIO(pickle.dumps(transformer))).load()

    assert modules == {"skltl", "numpy"}


def test_a_file_contains_only_the_blocks_up_to_the_layer(tmp_path):
    transformer = CNNFeatureTransformer(
        "squeezenet1_1", layer="fire4", weights=None, random_state=0
    ).fit(["nowhere.jpg"])
    blocks = squeezenet1_1(weights=None).features[:7]  # ends with "fire4"
    n_bytes = 4 * sum(weight.numel() for weight in blocks.parameters())

    joblib.dump(transformer, tmp_path / "squeezenet.joblib")

    size = (tmp_path / "squeezenet.joblib").stat().st_size
    assert n_bytes < size < n_bytes + 20_000


def test_saving_does_not_change_the_transformer(transformer, images):
    before = transformer.transform(images)

    pickle.dumps(transformer)

    np.testing.assert_array_equal(transformer.transform(images), before)


def test_a_saved_transformer_keeps_its_network_when_parameters_change(
    transformer, images
):
    """The fitted network is saved, not the one that the parameters now describe."""
    expected = transformer.transform(images)
    transformer.set_params(backbone="resnet18", weights=None, layer="layer1")

    loaded = pickle.loads(pickle.dumps(transformer))

    np.testing.assert_array_equal(loaded.transform(images), expected)


# Files without weights


@pytest.fixture
def weights_file(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = squeezenet1_1(weights=None).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_file_without_weights_is_small_and_loads_them_by_name(images):
    transformer = CNNFeatureTransformer("tiny", store_weights=False).fit(images)
    whole = pickle.dumps(transformer.set_params(store_weights=True))
    small = pickle.dumps(transformer.set_params(store_weights=False))
    loaded = pickle.loads(small)
    assert len(small) < 20_000 < len(whole)
    np.testing.assert_array_equal(
        loaded.transform(images), transformer.transform(images)
    )
    assert loaded.get_params() == transformer.get_params()
    whole_again = pickle.dumps(loaded.set_params(store_weights=True))
    assert abs(len(whole_again) - len(whole)) < 100


@pytest.mark.parametrize("class_map", [None, "learn"])
def test_a_pretrained_classifier_without_weights_has_its_last_layer(
    class_map, images, weights_file
):
    classifier = PretrainedCNNClassifier(
        "squeezenet1_1", weights=weights_file, class_map=class_map, store_weights=False
    ).fit(images, [0, 1, 2] * 3)
    saved = pickle.dumps(classifier)
    loaded = pickle.loads(saved)

    assert len(saved) < weights_file.stat().st_size / 2  # which is 41 % of it
    expected = classifier.predict_proba(images)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    state = load_file(weights_file)
    state["features.0.weight"] += 1
    save_file(state, weights_file)
    with pytest.raises(WeightsError, match=r"store_weights=False.*are different here"):
        pickle.loads(saved)
    assert len(pickle.dumps(loaded.set_params(store_weights=True))) > 2 * len(saved)


def test_a_file_of_a_release_without_the_parameter_is_saved_without_weights(
    images, weights_file
):
    fitted = PretrainedCNNClassifier("squeezenet1_1", weights=weights_file).fit(images)
    state = fitted.__getstate__()
    del state["store_weights"], state["_fitted_weights"]
    loaded = PretrainedCNNClassifier.__new__(PretrainedCNNClassifier)
    loaded.__setstate__(state)

    small = pickle.dumps(loaded.set_params(store_weights=False))

    assert len(small) < len(pickle.dumps(fitted)) / 2
    expected = fitted.predict_proba(images)
    np.testing.assert_array_equal(pickle.loads(small).predict_proba(images), expected)


@pytest.mark.parametrize("writer", ["joblib", "skops"])
def test_pipelines_without_weights_are_saved(writer, images, weights_file, tmp_path):
    pipeline = make_feature_pipeline(
        "squeezenet1_1", "softmax", weights=weights_file, store_weights=False
    ).fit(images, [0, 1, 2] * 3)
    expected = pipeline.predict_proba(images)
    path = tmp_path / "pipeline"
    if writer == "joblib":
        joblib.dump(pipeline, path)
        loaded = joblib.load(path)
    else:
        skops.io.dump(pipeline, path)
        loaded = skops.io.load(path, trusted=skltl.SKOPS_TRUSTED)
    np.testing.assert_array_equal(loaded.predict_proba(images), expected)
    assert path.stat().st_size < weights_file.stat().st_size / 10


def test_other_and_missing_weights_are_refused(images, weights_file):
    transformer = CNNFeatureTransformer(
        "squeezenet1_1", weights=weights_file, store_weights=False
    )
    saved = pickle.dumps(transformer.fit(images))
    state = load_file(weights_file)
    state["features.0.weight"] += 1
    save_file(state, weights_file)
    with pytest.raises(WeightsError, match=r"store_weights=False.*are different here"):
        pickle.loads(saved)
    weights_file.unlink()
    with pytest.raises(WeightsNotFoundError, match=r"store_weights=False.*safetensors"):
        pickle.loads(saved)


@pytest.mark.parametrize("is_registered", [False, True], ids=["", "registered"])
def test_a_backbone_that_others_do_not_know_is_saved_without_weights(
    images, tmp_path, is_registered
):
    backbone = replace(get_backbone("tiny"), name="of_this_process")
    if is_registered:
        skltl.register_backbone(backbone)
    transformer = CNNFeatureTransformer(
        backbone.name if is_registered else backbone, store_weights=False
    ).fit(images)
    # A file holds the name of a registered one, unlike what is sent to a worker.
    saved = pickle.dumps(Shipped(transformer) if is_registered else transformer)
    code = (
        "import pickle, sys, numpy as np;"
        "loaded = pickle.loads(sys.stdin.buffer.read());"
        "images = np.load(sys.argv[1]);"
        "loaded = getattr(loaded, 'estimator', loaded);"
        "np.save(sys.argv[2], loaded.transform(images))"
    )
    files = str(tmp_path / "images.npy"), str(tmp_path / "features.npy")
    np.save(files[0], images)

    command = [sys.executable, "-c", code, *files]
    subprocess.run(command, input=saved, check=True)

    np.testing.assert_array_equal(np.load(files[1]), transformer.transform(images))
    assert len(saved) < 20_000


def test_what_has_no_name_is_not_saved_without_weights(images):
    random = CNNFeatureTransformer(
        "tiny", weights=None, random_state=0, store_weights=False
    )
    with pytest.raises(ValueError, match="random weights"):
        pickle.dumps(random.fit(images))
    module = torch.nn.Conv2d(3, 4, 3)
    backbone = Backbone.from_module("own", module, preprocessing=Preprocessing(32))
    own = CNNFeatureTransformer(backbone, store_weights=False).fit(images)
    with pytest.raises(ValueError, match="'own'"):
        pickle.dumps(own)
    copied = copy.deepcopy(own)  # in memory, nothing is left out
    np.testing.assert_array_equal(copied.transform(images), own.transform(images))
    clone(own).fit(images)
