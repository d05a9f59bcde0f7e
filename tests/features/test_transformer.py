"""Features are what torchvision's network gives by hand, whatever the way to them."""

import multiprocessing
import os

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

from skltl import CNNFeatureTransformer
from skltl.exceptions import ImageRangeWarning
from skltl.inference import Runner
from skltl.inference import _frozen as _loading

# Name, cut point, torchvision's module there.
BY_HAND = [
    ("vgg16", "last", "features"),
    ("resnet50", "last", "layer4"),
    ("squeezenet1_0", "last", "features"),
    ("inception_v3", "last", "Mixed_7c"),
    ("efficientnet_b0", "last", "features"),
    ("convnext_tiny", "last", "features"),
]


@pytest.fixture
def photos():
    """Three images of the size of photographs, one of them upright."""
    rng = np.random.default_rng(0)
    sizes = [(400, 300), (300, 400), (333, 517)]
    small = [rng.integers(256, size=(8, 8, 3)).astype(np.uint8) for _ in sizes]
    return [
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(small, sizes, strict=True)
    ]


@pytest.mark.parametrize(("name", "layer", "module"), BY_HAND)
def test_equal_to_a_loop_written_by_hand(name, layer, module, photos, tmp_path):
    # These draw their weights from distributions that take seconds.
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

    seen = []
    model.get_submodule(module).register_forward_hook(
        lambda *args: seen.append(args[2].mean((2, 3)))
    )
    with torch.inference_mode():
        for photo in photos:
            model(transforms(photo)[None])
    by_hand = torch.cat(seen).numpy()

    transformer = CNNFeatureTransformer(
        name, layer=layer, weights=path, precision="float32"
    )
    features = transformer.fit_transform(photos)

    scale = np.abs(by_hand).max()
    np.testing.assert_allclose(features / scale, by_hand / scale, rtol=0, atol=1e-4)


def test_random_weights_from_a_seed_are_torchs(photos):
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


def test_fully_connected_layers_give_their_4096_numbers(photos):
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
def test_an_image_gets_the_same_bits_wherever_it_stands(images, precision):
    transformer = CNNFeatureTransformer("tiny", precision=precision).fit(images)
    together = transformer.transform(images)
    order = np.random.default_rng(0).permutation(len(images))

    alone = np.concatenate([transformer.transform([image]) for image in images])

    assert together.dtype == alone.dtype == np.float32
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(transformer.transform(images[order]), together[order])
    np.testing.assert_array_equal(transformer.transform(images[:5]), together[:5])


@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_batch_size_changes_rounding_only(images, batch_size):
    def features(**parameters):
        transformer = CNNFeatureTransformer("tiny", precision="float32", **parameters)
        return transformer.fit_transform(images)

    np.testing.assert_allclose(
        features(batch_size=batch_size), features(), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_is_near_float32(images):
    precise, fast = (
        CNNFeatureTransformer("tiny", precision=precision).fit_transform(images)
        for precision in ("float32", "bfloat16")
    )

    assert np.abs(fast - precise).max() < 0.03 * np.abs(precise).max()
    assert not np.array_equal(fast, precise)


def test_several_layers_in_one_pass_are_the_single_ones_side_by_side(images):
    layers = ["block3", "stem", "block1.0", -1]

    together = CNNFeatureTransformer("tiny", layer=layers).fit_transform(images)

    singly = [
        CNNFeatureTransformer("tiny", layer=layer).fit_transform(images)
        for layer in layers
    ]
    assert [features.shape[1] for features in singly] == [192, 32, 64, 288]
    np.testing.assert_array_equal(together, np.hstack(singly))


def test_inputs_are_left_as_they_were(images):
    before = images.copy()
    images.flags.writeable = False

    CNNFeatureTransformer("tiny").fit_transform(images)

    np.testing.assert_array_equal(images, before)


def test_fit_decodes_no_image():
    transformer = CNNFeatureTransformer("tiny")

    assert transformer.fit(["missing.jpg"]) is transformer
    with pytest.raises(ValueError, match="Image 0 .'missing.jpg'."):
        transformer.transform(["missing.jpg"])


def test_names_say_backbone_layer_and_number(images):
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
def test_output_as_a_data_frame(image_files, pooling, n, kind, frame):
    transformer = CNNFeatureTransformer("tiny", layer="block2", pooling=pooling)

    table = transformer.set_output(transform=kind).fit_transform(image_files)

    assert isinstance(table, frame)
    assert table.shape == (len(image_files), n)
    assert list(table.columns) == list(transformer.get_feature_names_out())


def test_a_column_of_a_table_keeps_its_index(image_files):
    paths = pd.DataFrame({"path": [*map(str, image_files)]}, index=list("abcdefghi"))

    table = (
        CNNFeatureTransformer("tiny")
        .set_output(transform="pandas")
        .fit_transform(paths)
    )

    assert list(table.index) == list("abcdefghi")


def test_rows_know_their_columns():
    rows = pd.DataFrame(np.random.default_rng(0).random((3, 48))).add_prefix("pixel_")
    transformer = CNNFeatureTransformer("tiny", image_shape=(4, 4, 3)).fit(rows)

    assert transformer.n_features_in_ == 48
    assert transformer.feature_names_in_[0] == "pixel_0"
    with pytest.raises(ValueError, match="feature names"):
        transformer.transform(rows.iloc[:, :47])


def test_rows_are_the_images_that_they_hold():
    rng = np.random.default_rng(0)
    images = rng.random((4, 8, 8, 3)).astype(np.float32)

    by_rows = CNNFeatureTransformer("tiny", image_shape=(8, 8, 3))
    by_images = CNNFeatureTransformer("tiny")

    np.testing.assert_array_equal(
        by_rows.fit_transform(images.reshape(4, -1)), by_images.fit_transform(images)
    )


@pytest.mark.parametrize("kind", ["UInt8", "uint8[pyarrow]", "uint8"])
def test_bytes_in_a_table_stay_bytes(kind):
    rows = np.random.default_rng(0).integers(256, size=(3, 64)).astype(np.uint8)
    transformer = CNNFeatureTransformer("tiny", layer="stem", image_shape=(8, 8))

    from_table = transformer.fit_transform(pd.DataFrame(rows).astype(kind))

    np.testing.assert_array_equal(from_table, transformer.fit_transform(rows))


def test_autocast_does_not_overrule_the_precision(images):
    transformer = CNNFeatureTransformer("tiny", precision="float32").fit(images)
    expected = transformer.transform(images)

    with torch.autocast("cpu", torch.bfloat16):
        found = transformer.transform(images)

    np.testing.assert_array_equal(found, expected)


def test_the_warning_about_the_range_points_at_the_users_line(images):
    transformer = CNNFeatureTransformer("tiny").fit(images)

    with pytest.warns(ImageRangeWarning) as record:
        transformer.transform(images.astype(float))

    assert record[0].filename == __file__


def test_x_is_looked_at_before_weights_are_fetched():
    with pytest.raises(TypeError, match="single path"):
        CNNFeatureTransformer("tiny", weights="missing.pt").fit("flower.jpg")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_does_not_hang(images):
    transformer = CNNFeatureTransformer("tiny", engine="torch").fit(images)
    expected = transformer.transform(images)

    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.map_async(transformer.transform, [images]).get(timeout=60)

    np.testing.assert_allclose(found[0], expected, rtol=0.02, atol=0.02)


def test_image_size_is_what_the_network_sees(images):
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
        return transformer.network_.blocks["stem.0"].weight

    assert weight(first) is weight(second)
    assert clone(deeper).fit(images).network_ is deeper.network_


def test_setting_the_backbone_changes_the_network(images):
    """As in a grid over backbones."""
    transformer = CNNFeatureTransformer("tiny").fit(images)

    transformer.set_params(backbone="squeezenet1_1", weights=None).fit(images)

    assert transformer.transform(images).shape == (len(images), 512)


def test_random_state_makes_random_weights_repeatable(images):
    def features(random_state):
        return CNNFeatureTransformer(
            "tiny", weights=None, random_state=random_state
        ).fit_transform(images)

    # The test is about numpy's global generator, which only the legacy functions show.
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(features(3), features(np.int64(3)))
    assert np.abs(features(3) - features(4)).max() > 1e-3
    assert np.abs(features(None) - features(None)).max() > 1e-3
    after = np.random.get_state()[1]  # noqa: NPY002
    np.testing.assert_array_equal(after, before)


def test_not_fitted(images):
    with pytest.raises(NotFittedError):
        CNNFeatureTransformer("tiny").transform(images)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"backbone": "resnet51"}, "'resnet50'"),
        ({"layer": "block9"}, "'block[1-4]'"),
        ({"layer": []}, "at least one layer"),
        ({"layer": ["block4", "last"]}, "none of them twice"),
        ({"layer": [None]}, "'layer'"),
        (
            {"backbone": "alexnet", "weights": None, "image_size": 16},
            "16 x 16 pixels cannot",
        ),
        ({"layer": ["block1", 9]}, "5 main layers"),
        ({"weights": "imagnet"}, "'imagenet'"),
        ({"device": "cuda:99"}, "not available"),
        ({"device": "gpu"}, "Unknown device"),
        ({"pooling": "mean"}, "'pooling' parameter"),
        ({"pooling": 0}, "'pooling' parameter"),
        ({"pooling": 6}, "finer than the map of 5 x 5"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"precision": "float16"}, "'precision' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"n_jobs": 0}, "n_jobs"),
    ],
)
def test_parameters_are_checked(images, parameters, words):
    with pytest.raises(ValueError, match=words):
        CNNFeatureTransformer(**{"backbone": "tiny", **parameters}).fit(
            images
        ).transform(images)


def test_progress_is_shown_when_asked_for(images, capsys):
    CNNFeatureTransformer("tiny").fit_transform(images)
    assert capsys.readouterr().err == ""

    CNNFeatureTransformer("tiny", verbose=1).fit_transform(images)
    assert "9/9" in capsys.readouterr().err


def test_html_shows_the_parameters():
    assert "squeezenet1_0" in CNNFeatureTransformer("squeezenet1_0")._repr_html_()


def test_threads_fit_and_transform_at_once(images):
    expected = CNNFeatureTransformer("tiny").fit_transform(images)

    found = joblib.Parallel(n_jobs=4, backend="threading")(
        joblib.delayed(CNNFeatureTransformer("tiny").fit_transform)(images)
        for _ in range(8)
    )

    for features in found:
        np.testing.assert_array_equal(features, expected)


def test_in_a_pipeline_of_paths(image_files):
    labels = ["a", "b"] * 4 + ["a"]
    pipeline = Pipeline(
        [
            ("feat", CNNFeatureTransformer("tiny")),
            ("scale", StandardScaler()),
            ("svm", LinearSVC()),
        ]
    )

    assert pipeline.fit(image_files, labels).score(image_files, labels) == 1


@pytest.mark.parametrize(
    ("backbone", "image_size", "precision", "expected"),
    [
        ("resnet18", None, "bfloat16", 8),
        ("squeezenet1_0", None, "bfloat16", 4),
        ("efficientnet_b0", None, "bfloat16", 8),
        ("vgg16", None, "bfloat16", 2),
        ("vgg16", None, "float32", 1),
        ("vgg16", 64, "bfloat16", 8),
        ("resnet18", 896, "bfloat16", 1),
    ],
)
def test_the_automatic_batch_keeps_the_largest_map_in_the_cache(
    backbone, image_size, precision, expected, images, monkeypatch
):
    widths = []
    run = Runner.features

    def watched(self, pixels, *others):
        widths.append(len(pixels))
        return run(self, pixels, *others)

    monkeypatch.setattr(Runner, "features", watched)
    settings = {"weights": None, "random_state": 0, "device": "cpu", "engine": "torch"}
    for layer in (0, 1):  # the same wherever the network is cut
        CNNFeatureTransformer(
            backbone,
            layer=layer,
            image_size=image_size,
            precision=precision,
            **settings,
        ).fit_transform(images[:1])

    assert widths == [expected, expected]


@pytest.mark.parametrize("kind", [torch.float64, "meta"])
def test_random_weights_do_not_depend_on_torchs_defaults(kind, images):
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
    _loading._networks.clear()  # what is kept would hide a difference
    _loading._prefixes.clear()

    np.testing.assert_array_equal(found, features(seed=77))


@pytest.mark.parametrize("with_cache", [False, True])
def test_batches_under_way_arrive_in_order(with_cache, images, tmp_path, monkeypatch):
    items = [*images, *images[:3], *images[::-1]]
    settings = {"batch_size": 2, "engine": "torch"}
    if with_cache:
        settings["cache"] = tmp_path
    expected = CNNFeatureTransformer(
        "tiny", batch_size=2, engine="torch"
    ).fit_transform(items)

    monkeypatch.setattr("skltl.features._extraction.n_under_way", lambda device: 3)
    found = CNNFeatureTransformer("tiny", **settings).fit_transform(items)

    np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_nearly_the_same(images):
    def features(device):
        transformer = CNNFeatureTransformer("tiny", device=device, precision="float32")
        return transformer.fit_transform(images)

    np.testing.assert_allclose(features("cuda"), features("cpu"), rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_under_way_to_a_gpu_are_not_mixed_up(batch_size, images):
    transformer = CNNFeatureTransformer("tiny", device="cuda", batch_size=batch_size)
    transformer.fit(images)
    many = np.concatenate([images] * 40)

    features = transformer.transform(many)

    one_by_one = np.concatenate(
        [transformer.transform(images[i : i + 1]) for i in range(9)]
    )
    np.testing.assert_array_equal(features, np.concatenate([one_by_one] * 40))
