"""Networks for images of one, two, four or more channels."""

import copy
import io
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision.models import resnet18

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    PredictionGridDisplay,
    Preprocessing,
    adapt_channels,
    cache_info,
    drop_bad,
    find_bad_images,
)
from skltl.exceptions import ImageReadError, WeightsError
from skltl.networks import load_network

EXACT = {"precision": "float32", "engine": "torch"}


@pytest.fixture
def multispectral():
    """Eight images of four channels, (8, 80, 80, 4): random rectangles."""
    rng = np.random.default_rng(0)
    images = np.full((8, 80, 80, 4), 40, dtype=np.uint8)
    for image in images:
        for channel in range(4):
            top, left = rng.integers(0, 40, 2)
            image[top : top + 40, left : left + 40, channel] = rng.integers(80, 255)
    return images


def features_of(backbone, X, **params):
    return CNNFeatureTransformer(backbone, **{**EXACT, **params}).fit_transform(X)


# Filters


@pytest.mark.parametrize("n_channels", [1, 2, 4, 7])
def test_repeated_filters_are_those_of_timm(n_channels):
    models = pytest.importorskip("timm.models")
    trained = load(adapt_channels("tiny", 3))
    adapted = load(adapt_channels("tiny", n_channels))

    expected = models.adapt_input_conv(n_channels, trained["stem.0.weight"])

    assert_allclose(adapted["stem.0.weight"], expected, rtol=1e-6)
    for name in trained.keys() - {"stem.0.weight"}:
        assert torch.equal(adapted[name], trained[name])


def test_averaged_filters_are_averages():
    trained = load(adapt_channels("tiny", 3))["stem.0.weight"].numpy()

    adapted = load(adapt_channels("tiny", 4, filters="average"))

    expected = np.repeat(trained.sum(axis=1, keepdims=True) / 4, 4, axis=1)
    assert_allclose(adapted["stem.0.weight"], expected, rtol=1e-6, atol=1e-8)


def load(backbone):
    network = load_network(backbone, backbone.weights[0], (80, 80))
    return network.state()


def test_the_same_image_twice_has_the_same_features(shared_images):
    """Six channels, red, green, blue and again: each response is the trained one."""
    twice = np.concatenate([shared_images] * 2, axis=3)

    assert_allclose(
        features_of(adapt_channels("tiny", 6), twice),
        features_of("tiny", shared_images),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gray_images_have_the_features_of_their_repeated_channel(tmp_path):
    """Where all channels are normalized alike, a third of the work is enough."""
    gray = np.random.default_rng(0).integers(0, 256, (3, 60, 50), dtype=np.uint8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()).eval()
    alike = Preprocessing(40, mean=(0.4,) * 3, std=(0.2,) * 3)
    rgb = Backbone.from_module("mine", net, preprocessing=alike)

    found = features_of(adapt_channels(rgb, 1), gray)

    assert_allclose(found, features_of(rgb, gray), rtol=1e-4, atol=1e-6)


def test_normalization_follows_the_filters():
    default = Preprocessing(8)

    repeated = adapt_channels("tiny", 4).preprocessing
    averaged = adapt_channels("tiny", 2, filters="average").preprocessing
    own = adapt_channels("tiny", 2, mean=(0.1, 0.2), std=(0.3, 0.4))

    assert repeated.mean == (*default.mean, default.mean[0])
    assert repeated.std == (*default.std, default.std[0])
    assert averaged.mean == pytest.approx((np.mean(default.mean),) * 2)
    assert own.preprocessing.std == own.weights[0].preprocessing.std == (0.3, 0.4)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("vit_b_16", "conv_proj"),
        ("swin_t", "features.0.0"),
        ("inception_v3", "Conv2d_1a_3x3.conv"),
        ("timm:nf_resnet50", "stem.conv"),  # which standardizes its weights
        ("timm:tf_efficientnet_b0", "conv_stem"),  # which pads its input first
        ("timm:vit_small_patch16_224", "patch_embed.proj"),
    ],
)
def test_the_first_convolution_of_any_network_is_adapted(name, path):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    backbone = adapt_channels(name, 5)

    assert backbone.build.adaptation.convolution == path
    module = backbone.build(None, (224, 224)).module.eval()
    assert module(torch.zeros(1, 5, 224, 224)).ndim == 2


def test_backbones_with_another_normalization_are_others():
    low, high = (adapt_channels("tiny", 4, mean=[mean] * 4) for mean in (0.1, 0.9))

    assert low != high
    assert low == adapt_channels("tiny", 4, mean=(0.1,) * 4)
    assert adapt_channels("tiny", 4, name="mine").name == "mine"


# What a network computes


def test_features_are_those_of_the_network_with_the_new_filters(multispectral):
    """By hand: the convolution replaced in torchvision's network."""
    trained = resnet18().eval()
    backbone = adapt_channels(own(trained), 4, mean=(0.5,) * 4, std=(0.2,) * 4)
    by_hand = copy.deepcopy(trained)
    by_hand.conv1 = nn.Conv2d(4, 64, 7, stride=2, padding=3, bias=False)
    by_hand.conv1.weight.data = trained.conv1.weight[:, [0, 1, 2, 0]] * 0.75
    by_hand.fc = nn.Identity()
    batch = torch.from_numpy(multispectral).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = by_hand((batch - 0.5) / 0.2)

    found = features_of(backbone, multispectral, layer="layer4")

    assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def own(module):
    return Backbone.from_module(
        "own", module, preprocessing=Preprocessing(80), head="fc"
    )


@pytest.mark.parametrize("filters_in_file", [3, 4])
def test_files_may_have_the_trained_or_the_new_filters(filters_in_file, tmp_path):
    adapted = adapt_channels("resnet18", 4)
    state = resnet18().state_dict()
    kernels = state["conv1.weight"]
    if filters_in_file == 4:
        state["conv1.weight"] = kernels = torch.randn(64, 4, 7, 7)
    save_file(state, tmp_path / "weights.safetensors")

    transformer = CNNFeatureTransformer(
        adapted, weights=tmp_path / "weights.safetensors"
    ).fit(np.zeros((1, 64, 64, 4)))

    (block, *_) = transformer.network_.blocks.values()
    (found,) = block.state_dict().values()
    expected = kernels if filters_in_file == 4 else kernels[:, [0, 1, 2, 0]] * 0.75
    assert_allclose(found, expected, rtol=1e-6)


def test_a_file_with_yet_another_number_of_channels_is_refused(tmp_path):
    state = resnet18().state_dict()
    state["conv1.weight"] = torch.randn(64, 5, 7, 7)
    torch.save(state, tmp_path / "weights.pt")
    transformer = CNNFeatureTransformer(
        adapt_channels("resnet18", 4), weights=tmp_path / "weights.pt"
    )

    with pytest.raises(WeightsError, match=r"conv1.weight \(64, 5, 7, 7\)"):
        transformer.fit(np.zeros((1, 64, 64, 4)))


def test_a_network_of_ones_own_may_take_any_number_of_channels(multispectral):
    net = nn.Sequential(nn.Conv2d(4, 6, 5, stride=2), nn.ReLU()).eval()
    preprocessing = Preprocessing(80, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5,) * 4)
    batch = torch.from_numpy(multispectral).permute(0, 3, 1, 2) / 255
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    with torch.no_grad():
        expected = net((batch - mean) / 0.5).mean(dim=(2, 3))
    blocks = {"conv": net[0], "relu": net[1]}

    for backbone in (
        Backbone.from_module("mine", net, preprocessing=preprocessing),
        Backbone.from_blocks("mine", blocks, preprocessing=preprocessing),
    ):
        assert_allclose(features_of(backbone, multispectral), expected, rtol=1e-4)


# Estimators


def test_searches_fine_tuning_and_saved_files(multispectral, tmp_path):
    backbone, y = adapt_channels("tiny", 4), [0, 1] * 4
    pipeline = make_pipeline(
        CNNFeatureTransformer(backbone, cache=tmp_path), LogisticRegression()
    )
    grid = {"cnnfeaturetransformer__layer": ["block2", "block4"]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(multispectral, y)
    classifier = FineTunedCNNClassifier(
        backbone, head_epochs=2, finetune_epochs=2, unfreeze="all", random_state=0
    ).fit(multispectral, y)
    joblib.dump((search, classifier), tmp_path / "saved.joblib")
    np.save(tmp_path / "images.npy", multispectral)
    code = (
        "import joblib, numpy as np; search, classifier = joblib.load('saved.joblib')\n"
        "X = np.load('images.npy')\n"
        "np.save('found.npy', [search.predict_proba(X), classifier.predict_proba(X)])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

    expected = [model.predict_proba(multispectral) for model in (search, classifier)]
    assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)
    (first, *_) = classifier.network_.blocks.values()
    trained = next(iter(load(backbone).values()))
    assert not torch.equal(first.state_dict()["stem.0.weight"], trained)


@pytest.mark.filterwarnings("ignore:augment=.*cannot be pickled")
def test_fine_tuning_augments_all_channels(multispectral):
    seen = []

    def augment(image):
        seen.append(tuple(image.shape))
        return image

    FineTunedCNNClassifier(
        adapt_channels("tiny", 4),
        image_size=32,
        head_epochs=1,
        finetune_epochs=0,
        augment=augment,
    ).fit(multispectral, [0, 1] * 4)

    assert set(seen) == {(4, 32, 32)}


def test_a_cache_keeps_numbers_of_channels_apart(images, tmp_path):
    """The same files for a network of gray images, and for one of color images."""
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    folder = tmp_path / "cache"
    gray = adapt_channels("tiny", 1)

    for backbone in ("tiny", gray, "tiny", gray):
        params = {"layer": "block3", "image_size": 32}
        found = features_of(backbone, paths, cache=folder, **params)
        assert_array_equal(found, features_of(backbone, paths, **params))
    assert len({entry.backbone for entry in cache_info(folder).entries}) == 2


def test_displays_show_the_first_channels(multispectral):
    pytest.importorskip("matplotlib").use("agg")
    backbone, y = adapt_channels("tiny", 4), np.array([0, 1] * 4)
    pipeline = make_pipeline(
        CNNFeatureTransformer(backbone, layer="block4"), LogisticRegression()
    ).fit(multispectral, y)

    grid = PredictionGridDisplay.from_estimator(pipeline, multispectral, y, n_images=2)
    cam = GradCAMDisplay.from_estimator(pipeline, multispectral[:2])

    shown = grid.ims_[0].get_array()
    assert any(np.array_equal(shown, image[..., :3]) for image in multispectral)
    assert_array_equal(cam.ims_[0].get_array(), multispectral[0, ..., :3])


# Images


def test_bands_of_files_are_channels(multispectral, tmp_path):
    """Alpha is a channel: no pixel is composited on white."""
    png, tiff = tmp_path / "image.png", tmp_path / "image.tif"
    image = Image.fromarray(multispectral[0])
    image.save(png)
    image.save(tiff)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    backbone = adapt_channels("tiny", 4)
    tensor = torch.from_numpy(multispectral[0]).permute(2, 0, 1)
    expected = features_of(backbone, multispectral[:1])

    for item in (png, tiff, buffer.getvalue(), image, tensor, multispectral[0]):
        assert_array_equal(features_of(backbone, [item]), expected)
    assert_allclose(
        features_of(backbone, multispectral[:1] / 255), expected, rtol=1e-4, atol=1e-5
    )


def test_two_channels_are_gray_and_alpha(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 60, 2), dtype=np.uint8)
    Image.fromarray(pixels, "LA").save(tmp_path / "image.png")
    backbone = adapt_channels("tiny", 2)

    found = features_of(backbone, [tmp_path / "image.png"])

    assert_array_equal(found, features_of(backbone, pixels[None]))


@pytest.mark.parametrize("mode", ["center", "squash", "pad"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_channels_are_resized_one_by_one(mode, dtype):
    """As if each of them were a gray image."""
    rng = np.random.default_rng(0)
    image = (rng.random((50, 31, 5)) * 255).astype(dtype)
    mean = (0.1, 0.2, 0.3, 0.4, 0.5)
    preprocessing = Preprocessing(24, mean=mean, std=(1,) * 5, mode=mode)

    crop = preprocessing.crop(image)

    assert crop.shape == (24, 24, 5)
    assert crop.dtype == dtype
    for channel, value in enumerate(mean):
        alone = Preprocessing(24, mean=(value,), std=(1,), mode=mode)
        gray = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        assert_array_equal(crop[..., channel], alone.crop(gray)[..., 0])


def test_images_become_gray_for_a_single_channel(shared_images, tmp_path):
    """With the weights of ITU-R BT.601, whatever holds the image."""
    rgb = shared_images[0]
    Image.fromarray(rgb).save(tmp_path / "image.png")
    expected = Image.fromarray(rgb).convert("L")
    backbone = adapt_channels("tiny", 1)
    reference = features_of(backbone, [expected])

    for item in (tmp_path / "image.png", rgb, np.asarray(expected)):
        assert_array_equal(features_of(backbone, [item]), reference)
    by_hand = (rgb / 255) @ [0.299, 0.587, 0.114]
    floats = features_of(backbone, [rgb / 255])
    assert_allclose(floats, features_of(backbone, [by_hand]), rtol=1e-4, atol=1e-6)


def test_multiplied_colors_are_refused(tmp_path):
    """Pillow divides the colors of such files by alpha."""
    path = tmp_path / "image.tif"
    pixels = np.full((9, 9, 4), (20, 40, 60, 100), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    # The tag ExtraSamples: 2 for alpha, 1 for alpha that the colors are multiplied by.
    tag = bytes.fromhex("5201 0300 01000000")
    content = path.read_bytes()
    assert tag + b"\2" in content
    path.write_bytes(content.replace(tag + b"\2", tag + b"\1"))
    transformer = CNNFeatureTransformer(adapt_channels("tiny", 4))

    with pytest.raises(ImageReadError, match="multiplied by its alpha channel"):
        transformer.fit_transform([path])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((2, 9, 9)), r"X has shape \(2, 9, 9\), and the network takes images"),
        (np.zeros((9, 9, 4)), r"shape \(n, h, w, 4\), X\[None\] if it is a single"),
        (np.zeros((2, 9, 9, 3)), "expected 4 of them, as the network takes"),
        ([np.zeros((9, 9))], "Image 0 .* expected 4 of them"),
        ([np.zeros((9, 9, 3))], "Image 0 .* expected 4 of them"),
        (
            [Image.new("RGB", (9, 9))],
            "Image 0 .* color mode is RGB, and the net.* 4",
        ),
        ([Image.new("CMYK", (9, 9))], "color mode is CMYK, and the network takes 4"),
        ([Image.new("L", (9, 9))], "color mode is L, and the network takes 4"),
    ],
)
def test_images_of_another_number_of_channels_are_refused(X, message):
    transformer = CNNFeatureTransformer(adapt_channels("tiny", 4))

    with pytest.raises(ValueError, match=message):
        transformer.fit_transform(X)


def test_bad_images_are_found_for_the_channels_of_the_network(multispectral):
    X = [*multispectral[:2], multispectral[2, ..., :3], multispectral[3]]
    transformer = CNNFeatureTransformer(adapt_channels("tiny", 4), on_error="nan")

    (bad,) = find_bad_images(X, n_channels=4)
    with pytest.warns(UserWarning, match="1 of 4 images"):
        kept, y = drop_bad(X, [0, 1, 2, 3], n_channels=4)
    features = transformer.fit_transform(X)

    assert bad.index == 2
    assert len(kept) == 3
    assert y == [0, 1, 3]
    assert transformer.bad_images_ == [bad]
    assert_array_equal(np.isnan(features).all(axis=1), [False, False, True, False])


def test_rows_and_readers_have_the_channels_of_the_network(multispectral):
    backbone = adapt_channels("tiny", 4)
    expected = features_of(backbone, multispectral)
    rows = multispectral.reshape(len(multispectral), -1)

    assert_array_equal(features_of(backbone, rows, image_shape=(80, 80, 4)), expected)
    keys, bands_first = [1, 0], multispectral.transpose(0, 3, 1, 2)
    for images in (multispectral, bands_first, torch.from_numpy(bands_first)):
        found = features_of(backbone, keys, reader=_Reader(images))
        assert_array_equal(found, expected[keys])


class _Reader:
    """A reader of the bands of an array."""

    def __init__(self, images):
        self.images = images

    def __call__(self, key):
        return self.images[key]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_channels": 0}, "n_channels == 0, must be >= 1"),
        ({"filters": "sum"}, "Unknown filters 'sum'. Known: repeat, average"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values and std 4"),
        ({"mean": 0.5}, "mean has 1 values and std 4"),
        ({"name": "timm:mine"}, "names that begin with 'timm:' are timm's"),
        (
            {"mean": [0.5] * 5, "std": [0.5] * 5},
            "mean and std have 5 values, for 4 channels",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt_channels("tiny", **{"n_channels": 4, **arguments})


def test_a_network_that_does_not_begin_with_a_convolution_is_refused():
    net = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3)).eval()
    backbone = Backbone.from_module("mine", net, preprocessing=Preprocessing(16))

    with pytest.raises(ValueError, match="'mine' does not begin with a single convol"):
        adapt_channels(backbone, 4)


def test_an_image_error_names_the_item(multispectral):
    transformer = CNNFeatureTransformer(adapt_channels("tiny", 4))
    X = [Image.fromarray(multispectral[0]), Image.new("RGB", (9, 9))]

    with pytest.raises(ImageReadError, match="Image 1 could not be read: its color"):
        transformer.fit_transform(X)


def test_adapting_again_begins_with_the_trained_filters():
    twice = adapt_channels(adapt_channels("tiny", 2), 6)

    assert twice == adapt_channels("tiny", 6)


def test_own_weights_files_may_have_the_trained_filters(multispectral, tmp_path):
    backbone = adapt_channels(own(resnet18()), 4)
    state = resnet18().state_dict()
    save_file(state, tmp_path / "weights.safetensors")

    transformer = CNNFeatureTransformer(
        backbone, weights=tmp_path / "weights.safetensors"
    ).fit(multispectral)

    (block, *_) = transformer.network_.blocks.values()
    (found,) = block.state_dict().values()
    expected = state["conv1.weight"][:, [0, 1, 2, 0]] * 0.75
    assert_allclose(found, expected, rtol=1e-6)


def test_pickles_have_no_paths_of_this_machine(multispectral):
    fitted = CNNFeatureTransformer(adapt_channels("tiny", 4)).fit(multispectral)

    saved = pickle.dumps(fitted)

    assert b"tiny.safetensors" not in saved
    assert pickle.loads(saved).backbone == fitted.backbone


def test_skops_saves_an_adapted_network(multispectral):
    pytest.importorskip("skops", "0.13", reason="older ones save no paths")
    io = pytest.importorskip("skops.io")
    fitted = CNNFeatureTransformer(adapt_channels("tiny", 4)).fit(multispectral)
    saved = io.dumps(fitted)

    loaded = io.loads(saved, trusted=io.get_untrusted_types(data=saved))

    assert_array_equal(loaded.transform(multispectral), fitted.transform(multispectral))


@pytest.mark.parametrize("kind", ["twice", "parametrized", "grouped"])
def test_first_layers_that_cannot_be_adapted_are_named(kind):
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3 if kind == "grouped" else 1)
    if kind == "parametrized":
        conv = nn.utils.parametrizations.weight_norm(conv)
    layers = [conv, nn.ReLU(), conv] if kind == "twice" else [conv, nn.ReLU()]
    backbone = Backbone.from_module(
        "mine", nn.Sequential(*layers), preprocessing=Preprocessing(16)
    )

    with pytest.raises(ValueError, match="'mine' does not begin with a single convol"):
        adapt_channels(backbone, 4)
