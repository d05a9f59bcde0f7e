"""Features are those of torchvision's networks, for every kind of input."""

import multiprocessing
import os
from contextlib import contextmanager

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import torchvision.models as models
from PIL import Image
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.nn.modules.module import register_module_forward_pre_hook

from skltl import CNNFeatureTransformer, release_memory
from skltl.exceptions import ImageRangeWarning

slow = pytest.mark.slow

# Backbone, and the module of torchvision's network that computes its last feature map.
LAST_MODULES = [
    ("squeezenet1_0", "features"),
    ("efficientnet_b0", "features"),
    pytest.param("vgg16", "features", marks=slow),
    pytest.param("resnet50", "layer4", marks=slow),
    pytest.param("inception_v3", "Mixed_7c", marks=slow),
    pytest.param("convnext_tiny", "features", marks=slow),
]


@pytest.fixture
def photos():
    """Three images that are larger than a network's input, one of them upright."""
    rng = np.random.default_rng(0)
    sizes = [(400, 300), (300, 400), (333, 517)]
    small = [rng.integers(256, size=(8, 8, 3)).astype(np.uint8) for _ in sizes]
    return [
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(small, sizes, strict=True)
    ]


@pytest.mark.parametrize(("name", "module"), LAST_MODULES)
def test_features_equal_those_of_a_loop_written_by_hand(name, module, photos, tmp_path):
    # The initial weights of these networks take seconds to draw.
    options = {"init_weights": False} if name in ("inception_v3", "vgg16") else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = models.get_model(name, weights=None, **options).eval()
    transforms = models.get_model_weights(name).IMAGENET1K_V1.transforms()
    path = tmp_path / "weights.safetensors"
    state = {key: v for key, v in model.state_dict().items() if "AuxLogits" not in key}
    save_file(state, path)
    if name == "inception_v3":
        model.transform_input = True  # as torchvision does with trained weights

    pooled = []
    model.get_submodule(module).register_forward_hook(
        lambda *args: pooled.append(args[2].mean((2, 3)))
    )
    with torch.inference_mode():
        for photo in photos:
            model(transforms(photo)[None])
    by_hand = torch.cat(pooled).numpy()

    transformer = CNNFeatureTransformer(name, weights=path, precision="float32")
    features = transformer.fit_transform(photos)

    scale = np.abs(by_hand).max()
    np.testing.assert_allclose(features / scale, by_hand / scale, rtol=0, atol=1e-4)


def test_random_weights_of_a_seed_are_those_of_torch(photos):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = models.resnet18(weights=None).eval()
    transforms = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    model.fc = torch.nn.Identity()
    with torch.inference_mode():
        by_hand = model(torch.stack([transforms(photo) for photo in photos])).numpy()

    transformer = CNNFeatureTransformer(
        "resnet18", weights=None, random_state=5, precision="float32"
    )

    np.testing.assert_allclose(
        transformer.fit_transform(photos), by_hand, rtol=1e-4, atol=1e-4
    )


def test_a_fully_connected_layer_has_4096_features(photos):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = models.alexnet(weights=None).eval()
    transforms = models.AlexNet_Weights.IMAGENET1K_V1.transforms()
    model.classifier = model.classifier[:6]
    with torch.inference_mode():
        by_hand = model(torch.stack([transforms(photo) for photo in photos])).numpy()

    features = CNNFeatureTransformer(
        "alexnet", layer="fc7", weights=None, random_state=5, precision="float32"
    ).fit_transform(photos)

    assert features.shape == (3, 4096)
    np.testing.assert_allclose(features, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_of_an_image_do_not_depend_on_the_others(images, precision):
    transformer = CNNFeatureTransformer("tiny", precision=precision).fit(images)
    together = transformer.transform(images)
    order = np.random.default_rng(0).permutation(len(images))

    alone = np.concatenate([transformer.transform([image]) for image in images])

    assert together.dtype == alone.dtype == np.float32
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(transformer.transform(images[order]), together[order])
    np.testing.assert_array_equal(transformer.transform(images[:5]), together[:5])


@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_batch_size_only_changes_rounding(images, batch_size):
    def features(**parameters):
        transformer = CNNFeatureTransformer("tiny", precision="float32", **parameters)
        return transformer.fit_transform(images)

    np.testing.assert_allclose(
        features(batch_size=batch_size), features(), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_is_close_to_float32(images):
    precise, fast = (
        CNNFeatureTransformer("tiny", precision=precision).fit_transform(images)
        for precision in ("float32", "bfloat16")
    )

    assert np.abs(fast - precise).max() < 0.03 * np.abs(precise).max()
    assert not np.array_equal(fast, precise)


def test_features_of_several_layers_are_concatenated(images):
    layers = ["block3", "stem", "block1.0", -1]

    together = CNNFeatureTransformer("tiny", layer=layers).fit_transform(images)

    separate = [
        CNNFeatureTransformer("tiny", layer=layer).fit_transform(images)
        for layer in layers
    ]
    assert [features.shape[1] for features in separate] == [192, 32, 64, 288]
    np.testing.assert_array_equal(together, np.hstack(separate))


def test_inputs_are_not_modified(images):
    before = images.copy()
    images.flags.writeable = False

    CNNFeatureTransformer("tiny").fit_transform(images)

    np.testing.assert_array_equal(images, before)


def test_fit_decodes_no_image():
    transformer = CNNFeatureTransformer("tiny")

    assert transformer.fit(["missing.jpg"]) is transformer
    with pytest.raises(ValueError, match="Image 0 .'missing.jpg'."):
        transformer.transform(["missing.jpg"])


def test_feature_names_contain_backbone_layer_and_index(images):
    transformer = CNNFeatureTransformer("tiny", layer=["block1", "block4"]).fit(images)

    names = transformer.get_feature_names_out()

    assert names[0] == "tiny_block1_0"
    assert names[64] == "tiny_block4_0"
    assert names[-1] == "tiny_block4_287"
    assert len(names) == len(set(names)) == transformer.transform(images).shape[1]


@pytest.mark.parametrize(("pooling", "n"), [("avg", 96), ("avgmax", 192), (2, 384)])
@pytest.mark.parametrize(
    ("kind", "frame"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)]
)
def test_output_is_a_data_frame_on_request(image_files, pooling, n, kind, frame):
    transformer = CNNFeatureTransformer("tiny", layer="block2", pooling=pooling)

    table = transformer.set_output(transform=kind).fit_transform(image_files)

    assert isinstance(table, frame)
    assert table.shape == (len(image_files), n)
    assert list(table.columns) == list(transformer.get_feature_names_out())


def test_a_data_frame_of_paths_keeps_its_index(image_files):
    paths = pd.DataFrame({"path": [*map(str, image_files)]}, index=list("abcdefghi"))

    table = (
        CNNFeatureTransformer("tiny")
        .set_output(transform="pandas")
        .fit_transform(paths)
    )

    assert list(table.index) == list("abcdefghi")


def test_names_and_number_of_columns_are_checked():
    rows = pd.DataFrame(np.random.default_rng(0).random((3, 48))).add_prefix("pixel_")
    transformer = CNNFeatureTransformer("tiny", image_shape=(4, 4, 3)).fit(rows)

    assert transformer.n_features_in_ == 48
    assert transformer.feature_names_in_[0] == "pixel_0"
    with pytest.raises(ValueError, match="feature names"):
        transformer.transform(rows.iloc[:, :47])


def test_rows_have_the_features_of_the_images_in_them():
    rng = np.random.default_rng(0)
    images = rng.random((4, 8, 8, 3)).astype(np.float32)

    by_rows = CNNFeatureTransformer("tiny", image_shape=(8, 8, 3))
    by_images = CNNFeatureTransformer("tiny")

    np.testing.assert_array_equal(
        by_rows.fit_transform(images.reshape(4, -1)), by_images.fit_transform(images)
    )


def test_a_series_of_rows_is_refused_as_by_scikit_learn():
    rows = pd.Series([*np.zeros((2, 64))])

    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        CNNFeatureTransformer("tiny", image_shape=(8, 8)).fit(rows)


@pytest.mark.parametrize("kind", ["UInt8", "uint8[pyarrow]", "uint8"])
def test_a_data_frame_of_bytes_is_read_as_bytes(kind):
    rows = np.random.default_rng(0).integers(256, size=(3, 64)).astype(np.uint8)
    transformer = CNNFeatureTransformer("tiny", layer="stem", image_shape=(8, 8))

    from_table = transformer.fit_transform(pd.DataFrame(rows).astype(kind))

    np.testing.assert_array_equal(from_table, transformer.fit_transform(rows))


def test_autocast_does_not_override_the_precision(images):
    transformer = CNNFeatureTransformer("tiny", precision="float32").fit(images)
    expected = transformer.transform(images)

    with torch.autocast("cpu", torch.bfloat16):
        found = transformer.transform(images)

    np.testing.assert_array_equal(found, expected)


def test_the_range_warning_points_to_the_calling_line(images):
    transformer = CNNFeatureTransformer("tiny").fit(images)

    with pytest.warns(ImageRangeWarning) as record:
        transformer.transform(images.astype(float))

    assert record[0].filename == __file__


def test_X_is_checked_before_weights_are_read():
    with pytest.raises(TypeError, match="single path"):
        CNNFeatureTransformer("tiny", weights="missing.pt").fit("flower.jpg")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_does_not_hang(images):
    transformer = CNNFeatureTransformer("tiny", engine="torch").fit(images)
    expected = transformer.transform(images)

    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.map_async(transformer.transform, [images]).get(timeout=60)

    np.testing.assert_allclose(found[0], expected, rtol=0.02, atol=0.02)


def test_image_size_is_the_input_size_of_the_network(images):
    def n_features(**parameters):
        transformer = CNNFeatureTransformer(
            "tiny", layer="block4", pooling="flatten", **parameters
        )
        return transformer.fit_transform(images).shape[1]

    assert n_features() == 288 * 5 * 5
    assert n_features(image_size=128) == 288 * 8 * 8


def test_clones_share_one_network(images):
    first = CNNFeatureTransformer("tiny", layer="block2").fit(images)
    second = clone(first).fit(images[:1])
    deeper = CNNFeatureTransformer("tiny", layer="block4").fit(images)

    def weight(transformer):
        return transformer.network_.blocks["stem.0"].get_parameter("stem.0.weight")

    assert weight(first) is weight(second)
    assert clone(deeper).fit(images).network_ is deeper.network_


def test_setting_the_backbone_changes_the_network(images):
    """As a grid search over backbones does."""
    transformer = CNNFeatureTransformer("tiny").fit(images)

    transformer.set_params(backbone="squeezenet1_1", weights=None).fit(images)

    assert transformer.transform(images).shape == (len(images), 512)


def test_random_state_makes_random_weights_reproducible(images):
    def features(random_state):
        return CNNFeatureTransformer(
            "tiny", weights=None, random_state=random_state
        ).fit_transform(images)

    # Only the legacy functions show the state of NumPy's global generator.
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(features(3), features(np.int64(3)))
    assert np.abs(features(3) - features(4)).max() > 1e-3
    assert np.abs(features(None) - features(None)).max() > 1e-3
    after = np.random.get_state()[1]  # noqa: NPY002
    np.testing.assert_array_equal(after, before)


def test_an_unfitted_transformer_is_refused(images):
    with pytest.raises(NotFittedError):
        CNNFeatureTransformer("tiny").transform(images)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"backbone": "resnet51"}, "'resnet50'"),
        ({"layer": "block9"}, "'block[1-4]'"),
        ({"layer": []}, "at least one"),
        ({"layer": ["block4", "last"]}, "twice"),
        ({"layer": [None]}, "'layer'"),
        (
            {"backbone": "squeezenet1_1", "weights": None, "image_size": 8},
            "8 x 8",
        ),
        ({"layer": ["block1", 9]}, "5 main"),
        ({"weights": "imagnet"}, "'imagenet'"),
        ({"device": "cuda:99"}, "not available"),
        ({"device": "gpu"}, "'gpu'"),
        ({"pooling": "mean"}, "'pooling' parameter"),
        ({"pooling": 0}, "'pooling' parameter"),
        ({"pooling": 6}, "5 x 5"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"precision": "float16"}, "'precision' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"n_jobs": 0}, "n_jobs"),
    ],
)
def test_parameters_are_checked(images, parameters, words):
    transformer = CNNFeatureTransformer(**{"backbone": "tiny", **parameters})

    with pytest.raises(ValueError, match=words):
        transformer.fit(images).transform(images)


def test_verbose_shows_progress(images, capsys):
    CNNFeatureTransformer("tiny").fit_transform(images)
    assert capsys.readouterr().err == ""

    CNNFeatureTransformer("tiny", verbose=1).fit_transform(images)
    assert "9/9" in capsys.readouterr().err


def test_html_representation_shows_the_parameters():
    assert "squeezenet1_0" in CNNFeatureTransformer("squeezenet1_0")._repr_html_()


def test_threads_may_fit_and_transform_concurrently(images):
    expected = CNNFeatureTransformer("tiny").fit_transform(images)

    found = joblib.Parallel(n_jobs=4, backend="threading")(
        joblib.delayed(CNNFeatureTransformer("tiny").fit_transform)(images)
        for _ in range(8)
    )

    for features in found:
        np.testing.assert_array_equal(features, expected)


def test_a_pipeline_is_fitted_on_paths(image_files):
    labels = ["a", "b"] * 4 + ["a"]
    pipeline = Pipeline(
        [
            ("feat", CNNFeatureTransformer("tiny")),
            ("scale", StandardScaler()),
            ("svm", LinearSVC()),
        ]
    )

    assert pipeline.fit(image_files, labels).score(image_files, labels) == 1


@contextmanager
def batch_sizes():
    """Collect the batch sizes that any module of torch computes with."""
    sizes = set()
    handle = register_module_forward_pre_hook(
        lambda module, args: sizes.add(len(args[0]))
    )
    yield sizes
    handle.remove()


@pytest.mark.parametrize(
    ("backbone", "image_size", "precision", "expected"),
    [
        ("resnet18", None, "bfloat16", 8),
        ("resnet18", 896, "bfloat16", 1),
        ("squeezenet1_0", None, "bfloat16", 4),
        pytest.param("efficientnet_b0", None, "bfloat16", 8, marks=slow),
        pytest.param("vgg16", None, "bfloat16", 2, marks=slow),
        pytest.param("vgg16", None, "float32", 1, marks=slow),
        pytest.param("vgg16", 64, "bfloat16", 8, marks=slow),
    ],
)
def test_the_largest_feature_map_of_an_automatic_batch_fits_the_cpu_cache(
    backbone, image_size, precision, expected, images
):
    for layer in (0, 1):  # it does not depend on the layer
        fitted = CNNFeatureTransformer(
            backbone,
            layer=layer,
            weights=None,
            image_size=image_size,
            precision=precision,
            random_state=0,
            device="cpu",
            engine="torch",
        ).fit(images)

        with batch_sizes() as sizes:
            fitted.transform(images[:1])

        assert sizes == {expected}


@pytest.mark.parametrize("kind", [torch.float64, "meta"])
def test_random_weights_do_not_depend_on_defaults_of_torch(kind, images):
    def features(seed):
        transformer = CNNFeatureTransformer(
            "squeezenet1_1",
            weights=None,
            random_state=seed,
            image_size=32,
            layer="fire2",
        )
        return transformer.fit_transform(images)

    try:
        if kind == "meta":
            torch.set_default_device(kind)
        else:
            torch.set_default_dtype(kind)
        found = features(seed=77)
        assert torch.get_default_dtype() == (torch.float32 if kind == "meta" else kind)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    release_memory()  # the kept network would hide a difference

    np.testing.assert_array_equal(found, features(seed=77))


@pytest.mark.parametrize("with_cache", [False, True])
def test_batches_in_flight_are_returned_in_order(
    with_cache, images, tmp_path, monkeypatch
):
    items = [*images, *images[:3], *images[::-1]]
    settings = {"batch_size": 2, "engine": "torch"}
    if with_cache:
        settings["cache"] = tmp_path
    expected = CNNFeatureTransformer(
        "tiny", batch_size=2, engine="torch"
    ).fit_transform(items)

    monkeypatch.setattr("skltl.features._extraction.n_in_flight", lambda device: 3)
    found = CNNFeatureTransformer("tiny", **settings).fit_transform(items)

    np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_of_a_gpu_are_close_to_those_of_a_cpu(images):
    def features(device):
        transformer = CNNFeatureTransformer("tiny", device=device, precision="float32")
        return transformer.fit_transform(images)

    np.testing.assert_allclose(features("cuda"), features("cpu"), rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_in_flight_on_a_gpu_are_returned_in_order(batch_size, images):
    transformer = CNNFeatureTransformer("tiny", device="cuda", batch_size=batch_size)
    transformer.fit(images)
    many = np.concatenate([images] * 40)

    features = transformer.transform(many)

    separate = np.concatenate([transformer.transform([image]) for image in images])
    np.testing.assert_array_equal(features, np.concatenate([separate] * 40))
