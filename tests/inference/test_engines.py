"""All engines compute the same features, up to the documented tolerance."""

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small_vit import small_vit_module
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
    cache_info,
)
from skltl.exceptions import EngineError, EngineWarning, NonFiniteFeaturesError
from skltl.inference import can_run

CPU = torch.device("cpu")

openvino = pytest.mark.skipif(
    not can_run("openvino", CPU), reason="OpenVINO is not installed"
)
engines = pytest.mark.parametrize(
    "engine",
    [
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param("openvino", marks=openvino),
    ],
)


NETWORKS = {
    "ConvNet": {"backbone": "tiny"},
    "transformer": {
        "backbone": "timm:test_vit", "weights": None, "random_state": 0
    },
}  # fmt: skip
LAYERS = {
    "ConvNet": ["block2", "stem", "last"],
    "transformer": ["blocks.4", "blocks.0", "last"],
}
both_networks = pytest.mark.parametrize("network", LAYERS)


def transformer(engine, network="ConvNet", **parameters):
    settings = {"precision": "float32", "image_size": 48, "device": "cpu"}
    settings |= NETWORKS[network]
    return CNNFeatureTransformer(engine=engine, **{**settings, **parameters})


# torch's compiler raises warnings about its own modules.
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@engines
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)]
)
@both_networks
def test_engines_agree_with_torch(network, engine, precision, tolerance, images):
    expected = transformer("torch", network).fit_transform(images)

    found = transformer(engine, network, precision=precision).fit_transform(images)

    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0 or engine == "compile"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@engines
@both_networks
def test_features_do_not_depend_on_the_position_in_the_batch(network, engine, images):
    fitted = transformer(engine, network, precision="bfloat16").fit(images)
    expected = fitted.transform(images)

    assert_array_equal(fitted.transform(images[4:5]), expected[4:5])
    assert_array_equal(fitted.transform(images[::-1]), expected[::-1])
    several = transformer(
        engine, network, precision="bfloat16", layer=LAYERS[network]
    ).fit_transform(images)
    assert_array_equal(several[:, -expected.shape[1] :], expected)


@openvino
@pytest.mark.parametrize(
    ("network", "pooling"),
    [
        *itertools.product(LAYERS, ["avg", "flatten", 2]),
        *itertools.product(["transformer"], ["cls", "cls+avg", "auto"]),
    ],
)
def test_openvino_keeps_the_order_of_the_requested_layers(network, pooling, images):
    layers = LAYERS[network]
    several = transformer("openvino", network, layer=layers, pooling=pooling)

    found = several.fit_transform(images)

    for engine, tolerance in (("openvino", 0), ("torch", 1e-5)):
        one_by_one = [
            transformer(engine, network, layer=layer, pooling=pooling).fit_transform(
                images
            )
            for layer in layers
        ]
        expected = np.concatenate(one_by_one, axis=1)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@openvino
@both_networks
def test_auto_is_openvino_on_a_cpu(network, images):
    assert transformer("auto", network).fit(images).engine_ == "openvino"
    assert transformer("torch", network).fit(images).engine_ == "torch"


def test_a_warning_is_raised_if_the_fitted_engine_cannot_run(images, monkeypatch):
    fitted = transformer("torch").fit(images)
    expected = fitted.transform(images)
    fitted.engine = "auto"
    fitted.engine_ = "openvino"  # as fitted on another machine
    monkeypatch.setattr("skltl.inference._openvino.find_spec", lambda name: None)

    with pytest.warns(EngineWarning, match="fitted with engine='openvino', which is"):
        found = pickle.loads(pickle.dumps(fitted)).transform(images)

    assert_array_equal(found, expected)
    with pytest.raises(EngineError, match=r"pip install 'skltl\[openvino\]'"):
        transformer("openvino").fit(images)


@openvino
@both_networks
def test_features_of_engines_are_cached_separately(network, images, tmp_path):
    first = transformer("torch", network, cache=tmp_path).fit_transform(images)
    n_bytes = cache_info(tmp_path).n_bytes

    second = transformer("openvino", network, cache=tmp_path).fit_transform(images)

    assert cache_info(tmp_path).n_bytes > n_bytes
    assert not np.array_equal(first, second)
    for engine, expected in (("torch", first), ("openvino", second)):
        found = transformer(engine, network, cache=tmp_path).fit_transform(images)
        assert_array_equal(found, expected)


@openvino
def test_classifiers_run_on_openvino(images):
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


@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=openvino)])
@both_networks
def test_an_image_that_overflows_is_named(network, engine, images):
    images = images / np.float32(255)
    spoiled = images.copy()
    spoiled[4] *= np.float32(1e38)
    made = transformer(engine, network, image_shape=None, on_error="nan").fit(images)
    expected = made.transform(images)

    with pytest.raises(NonFiniteFeaturesError, match="image 4 are NaN or infinite"):
        made.transform(spoiled)
    assert_allclose(made.transform(spoiled[:4]), expected[:4], rtol=1e-3, atol=1e-5)


@openvino
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked children")
def test_forked_children_do_not_wait_for_missing_threads():
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
def test_unusual_layers_run_on_torch(layer, images):
    blocks = {"one": layer}
    backbone = Backbone.from_blocks("one", blocks, preprocessing=Preprocessing(8))

    fitted = CNNFeatureTransformer(backbone, device="cpu").fit(images)

    assert fitted.engine_ == "torch"
    expected = CNNFeatureTransformer(backbone, device="cpu", engine="torch")
    assert_array_equal(fitted.transform(images), expected.fit_transform(images))


@openvino
@pytest.mark.parametrize(
    "name",
    [
        *(
            "densenet121",
            "mobilenet_v3_small",
            "convnext_tiny",
            "vit_b_32",
            "swin_v2_t",
        ),
        *("timm:test_vit", "timm:resnet10t", "timm:levit_128s"),
    ],
)
def test_usual_networks_run_on_openvino(name, images):
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
def test_code_of_the_user_runs_on_torch_unless_openvino_is_requested(images):
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


@openvino
@pytest.mark.parametrize("pooling", ["cls", "cls+avg", "auto"])
def test_openvino_pools_tokens(pooling):
    """The first of the main layers is the convolution, without a class token."""
    backbone = Backbone.from_module(
        "tokens",
        small_vit_module(),
        preprocessing=Preprocessing(32),
        head="heads",
        n_prefix_tokens=1,
    )
    images = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    settings = {"pooling": pooling, "precision": "float32", "device": "cpu"}

    torch_features, features = (
        CNNFeatureTransformer(backbone, engine=engine, **settings).fit_transform(images)
        for engine in ("torch", "openvino")
    )

    assert_allclose(features, torch_features, rtol=0, atol=1e-5)


@openvino
def test_unusual_functions_run_on_torch_unless_openvino_is_requested(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, batch):
            return self.conv(torch.special.bessel_j0(batch))  # unknown to OpenVINO

    backbone = Backbone.from_module("odd", Odd(), preprocessing=Preprocessing(8))

    settings = {"device": "cpu", "precision": "float32"}
    fitted = CNNFeatureTransformer(backbone, **settings).fit(images)

    assert fitted.engine_ == "torch"
    asked = CNNFeatureTransformer(backbone, engine="openvino", **settings)
    with pytest.raises(EngineError, match=r"engine='torch' runs all.*aten::special"):
        asked.fit(images).transform(images)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=openvino)])
def test_workers_of_a_search_share_the_cores(engine):
    code = """
import sys, threading, joblib, numpy as np
def threads(image, engine):
    import torch
    from skltl import CNNFeatureTransformer
    fitted = CNNFeatureTransformer("tiny", engine=engine, device="cpu")
    idents = set()
    class Watched(np.ndarray):
        def __getitem__(self, index):
            idents.add(threading.get_ident())
            return super().__getitem__(index)
    fitted.fit_transform(image.view(Watched))
    counts = [torch.get_num_threads()]
    if engine == "openvino":
        (runner,) = fitted.network_._runners.values()
        ((_, request),) = runner._engine._models.values()
        model = request.get_compiled_model()
        counts.append(model.get_property("INFERENCE_NUM_THREADS"))
    return {*counts, len(idents - {threading.get_ident()}) or 1}  # the caller alone
images = np.zeros((200, 48, 48, 3), dtype=np.uint8)
jobs = (joblib.delayed(threads)(images, sys.argv[1]) for _ in range(2))
share = max(joblib.cpu_count() // 2, 1)
found = joblib.Parallel(n_jobs=2)(jobs)
assert found == [{share}] * 2, found
"""
    subprocess.run([sys.executable, "-c", code, engine], check=True, timeout=120)


class Twice(nn.Module):
    """Code of the user, which is neither folded nor fused."""

    def forward(self, batch):
        return 2 * batch


@pytest.mark.parametrize("with_cache", [False, True])
def test_further_layers_do_not_change_the_features(with_cache, images, tmp_path):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1)]
    blocks = {"a": nn.Sequential(*first), "own": Twice(), "b": nn.Conv2d(64, 32, 1)}
    # So small that torch does not use oneDNN.
    backbone = Backbone.from_blocks("twice", blocks, preprocessing=Preprocessing(16))
    settings = {"device": "cpu", "precision": "float32", "engine": "torch"}
    transformer = CNNFeatureTransformer(backbone, batch_size=1, layer="b", **settings)
    alone = transformer.fit_transform(images)

    transformer.set_params(cache=tmp_path if with_cache else None)
    both = transformer.set_params(layer=["a", "b"]).fit_transform(images)

    assert_array_equal(both[:, 64:], alone)
    assert_array_equal(transformer.set_params(layer="b").fit_transform(images), alone)


@pytest.mark.slow
def test_bfloat16_is_emulated_where_the_processor_does_not_multiply_it():
    code = """
import numpy as np
from skltl import CNNFeatureTransformer
images = np.full((2, 48, 48, 3), 99, dtype=np.uint8)
exact, rounded = (
    CNNFeatureTransformer("tiny", precision=one, engine="torch", device="cpu")
    .fit_transform(images) for one in ("float32", "bfloat16")
)
assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
"""
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=True,
        timeout=120,
    )
