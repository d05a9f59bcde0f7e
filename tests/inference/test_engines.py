"""Whatever runs the network gives the same features, within what is documented."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
    cache_info,
)
from skltl.exceptions import EngineError, EngineWarning
from skltl.inference import can_run

CPU = torch.device("cpu")

engines = pytest.mark.parametrize(
    "engine",
    [
        "compile",
        pytest.param(
            "openvino",
            marks=pytest.mark.skipif(
                not can_run("openvino", CPU), reason="OpenVINO is not installed"
            ),
        ),
    ],
)
openvino = pytest.mark.skipif(
    not can_run("openvino", CPU), reason="OpenVINO is not installed"
)


def transformer(engine, **parameters):
    settings = {"precision": "float32", "image_size": 48, "device": "cpu"}
    return CNNFeatureTransformer("tiny", engine=engine, **{**settings, **parameters})


# torch's compiler warns of its own parts.
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@engines
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_engines_agree_with_torch(engine, precision, tolerance, images):
    expected = transformer("torch").fit_transform(images)

    found = transformer(engine, precision=precision).fit_transform(images)

    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0 or engine == "compile"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@engines
def test_an_image_gets_the_same_bits_wherever_it_stands(engine, images):
    fitted = transformer(engine, precision="bfloat16").fit(images)
    expected = fitted.transform(images)

    assert_array_equal(fitted.transform(images[4:5]), expected[4:5])
    assert_array_equal(fitted.transform(images[::-1]), expected[::-1])
    several = transformer(
        engine, precision="bfloat16", layer=["stem", "block2", "last"]
    ).fit_transform(images)
    assert_array_equal(several[:, -expected.shape[1] :], expected)


@openvino
@pytest.mark.parametrize("pooling", ["avg", "flatten", 2])
def test_openvino_keeps_the_order_of_the_cuts_that_are_asked_for(pooling, images):
    layers = ["block2", "stem", "last"]
    several = transformer("openvino", layer=layers, pooling=pooling)

    found = several.fit_transform(images)

    for engine, tolerance in (("openvino", 0), ("torch", 1e-5)):
        one_by_one = [
            transformer(engine, layer=layer, pooling=pooling).fit_transform(images)
            for layer in layers
        ]
        expected = np.concatenate(one_by_one, axis=1)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@openvino
def test_auto_takes_openvino_on_a_cpu(images):
    assert transformer("auto").fit(images).engine_ == "openvino"
    assert transformer("torch").fit(images).engine_ == "torch"


def test_what_is_fitted_says_when_another_engine_runs(images, monkeypatch):
    fitted = transformer("torch").fit(images)
    expected = fitted.transform(images)
    fitted.engine = "auto"
    fitted.engine_ = "openvino"  # of another machine
    monkeypatch.setattr("skltl.inference._engines.find_spec", lambda name: None)

    with pytest.warns(EngineWarning, match="fitted with engine='openvino', which can"):
        found = pickle.loads(pickle.dumps(fitted)).transform(images)

    assert_array_equal(found, expected)
    with pytest.raises(EngineError, match=r"pip install 'skltl\[openvino\]'"):
        transformer("openvino").fit(images)


@openvino
def test_features_of_engines_are_kept_apart(images, tmp_path):
    first = transformer("torch", cache=tmp_path).fit_transform(images)
    n_bytes = cache_info(tmp_path).n_bytes

    second = transformer("openvino", cache=tmp_path).fit_transform(images)

    assert cache_info(tmp_path).n_bytes > n_bytes
    assert not np.array_equal(first, second)
    for engine, expected in (("torch", first), ("openvino", second)):
        found = transformer(engine, cache=tmp_path).fit_transform(images)
        assert_array_equal(found, expected)


@openvino
def test_classifiers_run_on_engines_too(images):
    labels = list("abc") * 3
    for kind in (
        lambda engine: PretrainedCNNClassifier("tiny", engine=engine),
        lambda engine: FineTunedCNNClassifier(
            "tiny", engine=engine, unfreeze=1, head_epochs=2, random_state=0,
            finetune_epochs=1, image_size=48,
        ),
    ):  # fmt: skip
        expected, found = (
            kind(engine).set_params(precision="float32").fit(images, labels)
            for engine in ("torch", "openvino")
        )
        assert_allclose(
            found.predict_proba(images), expected.predict_proba(images), atol=1e-3
        )


@openvino
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked children")
def test_forked_children_do_not_wait_for_threads_that_are_not_there():
    code = """
import os, sys, numpy as np, warnings
from skltl import CNNFeatureTransformer
images = np.zeros((2, 48, 48, 3), dtype=np.uint8)
fitted = CNNFeatureTransformer("tiny", device="cpu").fit(images)
assert fitted.engine_ == "openvino"
fitted.transform(images)
child = os.fork()
if child == 0:
    warnings.simplefilter("ignore")
    os._exit(0 if fitted.transform(images).shape[0] == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@openvino
@pytest.mark.parametrize(
    "layer",
    [
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink()),
    ],
    ids=["parametrized", "unusual"],
)
def test_what_openvino_may_not_know_is_run_by_torch(layer, images):
    blocks = {"one": layer}
    backbone = Backbone.from_blocks("one", blocks, preprocessing=Preprocessing(8))

    fitted = CNNFeatureTransformer(backbone, device="cpu").fit(images)

    assert fitted.engine_ == "torch"
    assert np.isfinite(fitted.transform(images)).all()


@openvino
@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v3_small", "convnext_tiny"])
def test_usual_networks_are_run_by_openvino(name, images):
    settings = {"weights": None, "random_state": 0, "image_size": 64, "device": "cpu"}
    fitted = CNNFeatureTransformer(name, **settings).fit(images)

    assert fitted.engine_ == "openvino"


@openvino
def test_the_users_default_device_does_not_matter(images):
    expected = transformer("openvino").fit_transform(images)

    with torch.device("meta"):
        found = transformer("openvino", batch_size=8).fit_transform(images)

    assert_array_equal(found, expected)


@openvino
def test_code_of_ones_own_is_run_by_torch_unless_openvino_is_asked_for(images):
    class Odd(nn.Module):
        def forward(self, batch):
            return torch.special.bessel_j0(batch.float())  # unknown to OpenVINO

    blocks = {"conv": nn.Conv2d(3, 4, 1), "odd": Odd()}
    backbone = Backbone.from_blocks("odd", blocks, preprocessing=Preprocessing(8))

    settings = {"device": "cpu", "precision": "float32"}
    fitted = CNNFeatureTransformer(backbone, **settings).fit(images)

    assert fitted.engine_ == "torch"
    assert np.isfinite(fitted.transform(images)).all()
    asked = CNNFeatureTransformer(backbone, engine="openvino", **settings)
    with pytest.raises(EngineError, match=r"engine='torch' runs all.*aten::special"):
        asked.fit(images).transform(images)


@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=openvino)])
def test_workers_of_a_search_share_the_cores(engine):
    code = """
import sys, threading, joblib, numpy as np
def threads(image, engine):
    import torch
    from skltl import CNNFeatureTransformer
    fitted = CNNFeatureTransformer("tiny", engine=engine, device="cpu")
    seen = set()
    class Watched(np.ndarray):
        def __getitem__(self, index):
            seen.add(threading.get_ident())
            return super().__getitem__(index)
    fitted.fit_transform(image.view(Watched))
    counts = [torch.get_num_threads()]
    if engine == "openvino":
        (runner,) = fitted.network_._runners.values()
        ((_, request),) = runner._engine._models.values()
        model = request.get_compiled_model()
        counts.append(model.get_property("INFERENCE_NUM_THREADS"))
    return {*counts, len(seen - {threading.get_ident()})}
images = np.zeros((200, 48, 48, 3), dtype=np.uint8)
jobs = (joblib.delayed(threads)(images, sys.argv[1]) for _ in range(2))
share = max(joblib.cpu_count() // 2, 1)
found = joblib.Parallel(n_jobs=2)(jobs)
assert found == [{share}] * 2, found
"""
    subprocess.run([sys.executable, "-c", code, engine], check=True, timeout=120)
