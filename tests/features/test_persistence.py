"""A saved transformer is plain, small, and gives the same features."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import skops.io

import skltl
from skltl import CNNFeatureTransformer, make_feature_pipeline


@pytest.fixture
def transformer(images):
    return CNNFeatureTransformer("tiny", layer=["stem", "block2"]).fit(images)


def test_joblib_gives_the_same_features(transformer, images, tmp_path):
    joblib.dump(transformer, tmp_path / "transformer.joblib")

    loaded = joblib.load(tmp_path / "transformer.joblib")

    np.testing.assert_array_equal(
        loaded.transform(images), transformer.transform(images)
    )
    assert loaded.get_params() == transformer.get_params()
    assert loaded.cut_points_ == transformer.cut_points_
    assert loaded.preprocessing_ == transformer.preprocessing_
    assert loaded.backbone_ is transformer.backbone_


def test_skops_needs_only_what_skltl_lists(images, tmp_path):
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block2", image_shape=(8, -1)
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


def test_skops_takes_weights_from_a_path(tmp_path, images):
    weights = Path(skltl.networks.__file__).with_name("tiny.safetensors")
    transformer = CNNFeatureTransformer("tiny", weights=weights).fit(images)
    skops.io.dump(transformer, tmp_path / "transformer.skops")

    loaded = skops.io.load(tmp_path / "transformer.skops", trusted=skltl.SKOPS_TRUSTED)

    np.testing.assert_array_equal(
        loaded.transform(images), transformer.transform(images)
    )


def test_an_unfitted_transformer_is_saved(tmp_path):
    loaded = pickle.loads(pickle.dumps(CNNFeatureTransformer("vgg16", layer="block4")))

    assert (
        loaded.get_params()
        == CNNFeatureTransformer("vgg16", layer="block4").get_params()
    )


def test_the_file_holds_no_torch_object(transformer):
    modules = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module, name):
            modules.add(module.partition(".")[0])
            return super().find_class(module, name)

    Noting(io.BytesIO(pickle.dumps(transformer))).load()

    assert modules == {"skltl", "numpy"}


def test_the_file_holds_only_the_blocks_up_to_the_cut(tmp_path):
    transformer = CNNFeatureTransformer(
        "vgg16", layer="block5", weights=None, random_state=0
    ).fit(["nowhere.jpg"])

    joblib.dump(transformer, tmp_path / "vgg16.joblib")

    # 14,714,688 numbers of 4 bytes, and little else; the whole network has 528 MB.
    size = (tmp_path / "vgg16.joblib").stat().st_size
    assert 14_714_688 * 4 < size < 60e6


def test_saving_changes_nothing(transformer, images):
    before = transformer.transform(images)

    pickle.dumps(transformer)

    np.testing.assert_array_equal(transformer.transform(images), before)


def test_a_fitted_transformer_keeps_its_weights_when_parameters_change(
    transformer, images
):
    """What was fitted is saved, not what the parameters would give now."""
    expected = transformer.transform(images)
    transformer.set_params(backbone="resnet18", weights=None, layer="layer1")

    loaded = pickle.loads(pickle.dumps(transformer))

    np.testing.assert_array_equal(loaded.transform(images), expected)


def test_another_process_gives_the_same_features(transformer, images, tmp_path):
    joblib.dump((transformer, images), tmp_path / "both.joblib")
    code = (
        "import joblib, numpy, sys, torch\n"
        f"torch.set_num_threads({__import__('torch').get_num_threads()})\n"
        f"transformer, images = joblib.load({str(tmp_path / 'both.joblib')!r})\n"
        f"numpy.save({str(tmp_path / 'out.npy')!r}, transformer.transform(images))\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)

    found = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(found, transformer.transform(images))
