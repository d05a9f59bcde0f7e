"""Each image is computed once, and a hit is bitwise equal to a miss."""

import os
import shutil
from collections import OrderedDict

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision.models.resnet import BasicBlock

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    cache_info,
    clear_cache,
    register_backbone,
)
from skltl.exceptions import ImageReadError

LAYERS = ["stem", "block1", "block2", "block3", "block4"]

# A ConvNet and a vision transformer, with the names of some of their layers.
VIT = {"backbone": "timm:test_vit", "weights": None, "random_state": 0}
NETWORKS = {
    "ConvNet": ({}, LAYERS),
    "transformer": (VIT, ["blocks.0", "blocks.2", "blocks.4", "norm"]),
}


@pytest.fixture
def settled_files(image_files, monkeypatch):
    """Files that are recognized by their state, although they are new."""
    monkeypatch.setattr("skltl.images._identity.CLOCK_TICK", 0.0)
    return image_files


def transformer(folder, **parameters):
    options = {"backbone": "tiny", "image_size": 32, "cache": folder, **parameters}
    return CNNFeatureTransformer(**options)


@pytest.mark.parametrize(
    "parameters",
    [
        {"layer": "block2"},
        {"layer": "block2", "precision": "bfloat16"},
        {"layer": ["block4", "stem"], "pooling": "avgmax"},
        {"layer": "block3", "pooling": 2},
        {"layer": "block1", "pooling": "flatten"},
        {"layer": ["block2.0", "block3"]},
        {"layer": "stem", "batch_size": 4},
        {**VIT, "layer": ["norm", "blocks.1"], "pooling": "cls+avg"},
        {**VIT, "pooling": "auto"},
        {**VIT, "layer": "blocks.2", "pooling": 2, "precision": "bfloat16"},
    ],
    ids=str,
)
def test_a_miss_and_a_hit_are_bitwise_equal_to_no_cache(
    parameters, images, tmp_path, computed
):
    expected = transformer(None, **parameters).fit_transform(images)
    computed.clear()

    miss = transformer(tmp_path, **parameters).fit_transform(images)
    n_missed = sum(computed)
    hit = transformer(tmp_path, **parameters).fit_transform(images[::-1])[::-1]

    np.testing.assert_array_equal(miss, expected)
    np.testing.assert_array_equal(hit, expected)
    assert n_missed == sum(computed) == len(images)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_search_over_all_layers_computes_each_image_once(
    network, images, tmp_path, computed
):
    labels = np.arange(9) % 2
    parameters, layers = NETWORKS[network]
    grid = {
        "cnnfeaturetransformer__layer": [*layers, layers[1::2]],
        "logisticregression__C": [0.1, 1],
    }
    scores = {}
    for cache in (None, tmp_path):
        computed.clear()
        pipeline = make_pipeline(transformer(cache, **parameters), LogisticRegression())
        search = GridSearchCV(pipeline, grid, cv=3).fit(images, labels)
        scores[cache] = search.cv_results_["mean_test_score"]

    assert sum(computed) == len(images)
    np.testing.assert_array_equal(scores[None], scores[tmp_path])


def test_feature_maps_and_inner_layers_are_stored_only_on_request(images, tmp_path):
    transformer(tmp_path, layer="block1", pooling="flatten").fit_transform(images)
    transformer(tmp_path, layer="block2.0").fit_transform(images)

    entries = cache_info(tmp_path).entries

    assert {(entry.layer, entry.pooling) for entry in entries} == {
        ("block1", "flatten"),
        ("block2.0.2", "avg"),  # the last block inside of it
    }


def test_layers_that_small_images_do_not_reach_are_not_stored(tmp_path):
    digits = np.random.default_rng(0).random((5, 64))
    blocks = {
        "stem": nn.Conv2d(3, 4, 3),
        "down": nn.MaxPool2d(4),
        "end": nn.MaxPool2d(4),
    }
    backbone = Backbone.from_blocks(
        "small", OrderedDict(blocks), preprocessing=Preprocessing(32)
    )

    CNNFeatureTransformer(
        backbone, layer="stem", image_shape=(8, 8), image_size=8, cache=tmp_path
    ).fit_transform(digits)

    assert [one.layer for one in cache_info(tmp_path).entries] == ["stem", "down"]


@pytest.mark.parametrize("kind", ["list", "pil", "floats", "tensor"])
def test_the_same_pixels_are_the_same_image(
    kind, images, image_files, tmp_path, computed
):
    transformer(tmp_path).fit_transform(image_files)
    forms = {
        "list": list(images),
        "pil": [Image.fromarray(image) for image in images],
        "tensor": torch.from_numpy(images).permute(0, 3, 1, 2),
        "floats": images / np.float32(255),
    }

    transformer(tmp_path).fit_transform(forms[kind])

    # Floats have other bits than the 8-bit pixels they came from.
    assert sum(computed) == len(images) * (1 + (kind == "floats"))


def test_a_repeated_image_is_computed_once(images, tmp_path, computed):
    twice = np.concatenate([images, images[::-1]])

    features = transformer(tmp_path).fit_transform(twice)

    assert sum(computed) == len(images)
    np.testing.assert_array_equal(features[:9], features[:8:-1])
    np.testing.assert_array_equal(features, transformer(None).fit_transform(twice))


def test_progress_shows_what_is_computed_and_what_is_cached(images, tmp_path, capsys):
    transformer(tmp_path).fit_transform(images[:4])

    transformer(tmp_path, verbose=1).fit_transform([*images, images[8], images[0]])

    shown = capsys.readouterr().err
    assert "11/11" in shown
    assert "5 computed, 5 cached, 1 repeated" in shown


def test_known_files_are_not_decoded_again(settled_files, tmp_path, decoded, computed):
    first = transformer(tmp_path, layer="block1").fit_transform(settled_files)
    n_decoded = len(decoded)
    again = transformer(tmp_path, layer="block1").fit_transform(settled_files)
    transformer(tmp_path, layer="block4").fit_transform(settled_files)

    np.testing.assert_array_equal(again, first)
    assert n_decoded == len(decoded) == len(settled_files)
    assert sum(computed) == len(settled_files)


def test_new_files_are_decoded_again_but_computed_once(
    image_files, tmp_path, decoded, computed
):
    transformer(tmp_path).fit_transform(image_files)
    transformer(tmp_path).fit_transform(image_files)

    assert len(decoded) == 2 * len(image_files)
    assert sum(computed) == len(image_files)


def test_a_replaced_file_gives_the_features_of_the_new_image(settled_files, tmp_path):
    uncached = transformer(None).fit(settled_files)
    cached = transformer(tmp_path).fit(settled_files)
    cached.transform(settled_files)
    stat = settled_files[0].stat()

    # Same size, same time of the last change.
    content = settled_files[3].read_bytes()
    content += bytes(max(0, stat.st_size - len(content)))
    settled_files[0].write_bytes(content)
    os.utime(settled_files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))

    found = cached.transform(settled_files)
    np.testing.assert_array_equal(found, uncached.transform(settled_files))
    np.testing.assert_array_equal(found[0], found[3])


def test_files_that_swap_names_swap_features(settled_files, tmp_path):
    cached = transformer(tmp_path).fit(settled_files)
    before = cached.transform(settled_files)

    spare = settled_files[0].with_name("spare.png")
    settled_files[0].rename(spare)
    settled_files[1].rename(settled_files[0])
    spare.rename(settled_files[1])

    after = cached.transform(settled_files)
    np.testing.assert_array_equal(after[[1, 0, *range(2, 9)]], before)


def test_a_copy_of_a_file_is_the_same_image(settled_files, tmp_path, computed):
    transformer(tmp_path).fit_transform(settled_files[:1])
    copy = shutil.copy2(settled_files[0], tmp_path / "copy.png")

    transformer(tmp_path).fit_transform([copy])

    assert sum(computed) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 40},
        {"pooling": "max"},
        {"batch_size": 4},
        {"precision": "float32"},
        {"weights": None, "random_state": 0},
    ],
    ids=str,
)
def test_other_parameters_have_another_fingerprint(other, images, tmp_path):
    first = {"precision": "bfloat16", "batch_size": 8}
    transformer(tmp_path, **first).fit_transform(images)

    found = transformer(tmp_path, **first).set_params(**other)
    expected = clone(found).set_params(cache=None)

    np.testing.assert_array_equal(
        found.fit_transform(images), expected.fit_transform(images)
    )
    assert len(cache_info(tmp_path).entries) == 2 * len(LAYERS)


def in_float64():
    torch.set_default_dtype(torch.float64)


def without_onednn():
    torch.backends.mkldnn.enabled = False


def in_reduced_precision():
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


@pytest.fixture
def default_torch():
    before = torch.backends.mkldnn.enabled, torch.backends.mkldnn.conv.fp32_precision
    yield
    torch.set_default_dtype(torch.float32)
    torch.backends.mkldnn.enabled, torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.usefixtures("default_torch")
@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (in_float64, "float32"),
        (without_onednn, "float32"),
        (without_onednn, "bfloat16"),
        (in_reduced_precision, "float32"),
    ],
)
def test_settings_of_torch_are_part_of_the_fingerprint(
    change, precision, images, tmp_path
):
    transformer(tmp_path, precision=precision).fit_transform(images)
    change()

    found = transformer(tmp_path, precision=precision).fit_transform(images)

    expected = transformer(None, precision=precision).fit_transform(images)
    np.testing.assert_array_equal(found, expected)


def test_another_version_of_pillow_has_another_fingerprint(
    images, tmp_path, computed, monkeypatch
):
    transformer(tmp_path).fit_transform(images)
    monkeypatch.setattr("PIL.__version__", "99.0")
    transformer(tmp_path).fit_transform(images)

    assert sum(computed) == 2 * len(images)


def test_a_truncated_file_is_not_known_when_pillow_must_refuse_it(
    settled_files, tmp_path, monkeypatch
):
    os.truncate(settled_files[0], settled_files[0].stat().st_size // 2)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
        transformer(tmp_path).fit_transform(settled_files)

    with pytest.raises(ImageReadError, match="Image 0"):
        transformer(tmp_path).fit_transform(settled_files)


def test_integers_of_numpy_have_the_same_fingerprint(images, tmp_path, computed):
    for integer in (int, np.int64):
        CNNFeatureTransformer(
            "tiny",
            image_size=integer(32),
            pooling=integer(2),
            batch_size=integer(4),
            cache=tmp_path,
        ).fit_transform(images)

    assert sum(computed) == len(images)


@pytest.mark.parametrize("cache", ["", "a\0b", "~nobody-of-this-name/x", "\ud800"])
def test_an_invalid_path_is_an_error(cache, images):
    with pytest.raises(ValueError, match="cache=.* is not a valid path"):
        transformer(cache).fit(images)


@pytest.mark.parametrize("function", [cache_info, clear_cache])
@pytest.mark.parametrize("cache", [False, None])
def test_contents_of_no_cache_are_an_error(
    function, cache, tmp_path, monkeypatch, images
):
    monkeypatch.setenv("SKLTL_CACHE", str(tmp_path))
    transformer(True).fit_transform(images)

    with pytest.raises(ValueError, match="means no cache"):
        function(cache)

    assert cache_info().n_bytes > 0


def custom_backbone(name, bias=0.0, slope=0.1):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, stride=2)
    with torch.no_grad():
        conv.weight.copy_(torch.rand(conv.weight.shape, generator=generator))
        conv.bias.fill_(bias)
    stem = nn.Sequential(conv, nn.LeakyReLU(slope))
    block = nn.Sequential(nn.Conv2d(8, 4, 1), nn.AvgPool2d(3, count_include_pad=True))
    with torch.no_grad():
        block[0].weight.fill_(0.5)
        block[0].bias.fill_(0)
    blocks = OrderedDict(stem=stem, block=block)
    return Backbone.from_blocks(name, blocks, preprocessing=Preprocessing(16))


def test_custom_networks_of_torch_modules_are_known_by_content(
    images, tmp_path, computed
):
    for name in ("first", "second"):
        CNNFeatureTransformer(custom_backbone(name), cache=tmp_path).fit_transform(
            images
        )
    assert sum(computed) == len(images)

    for other in ({"bias": 0.5}, {"slope": 0.2}):
        network = custom_backbone("first", **other)
        found = CNNFeatureTransformer(network, cache=tmp_path).fit_transform(images)
        expected = CNNFeatureTransformer(network).fit_transform(images)
        np.testing.assert_array_equal(found, expected)


def test_shared_modules_are_part_of_the_fingerprint(images, tmp_path):
    found = []
    for shared in ("conv1", "conv2"):
        torch.manual_seed(0)
        block = BasicBlock(4, 4, downsample=nn.Identity()).eval()
        block.downsample = nn.Sequential(getattr(block, shared))
        network = Backbone.from_blocks(
            "shared",
            OrderedDict(stem=nn.Conv2d(3, 4, 3), block=block),
            preprocessing=Preprocessing(16),
        )
        torch.manual_seed(1)
        nn.init.normal_(block.conv1.weight)
        cached = CNNFeatureTransformer(network, cache=tmp_path)
        found.append(cached.fit_transform(images))
        np.testing.assert_array_equal(
            found[-1], CNNFeatureTransformer(network).fit_transform(images)
        )
    assert not np.array_equal(*found)


class Times(nn.Module):
    """Custom code: what it computes is in no attribute that could be compared."""

    def __init__(self, factor):
        super().__init__()
        self.multiply = lambda batch: batch * factor

    def forward(self, batch):
        return self.multiply(batch)


def test_custom_code_is_known_by_its_backbone_only(images, tmp_path, computed):
    for factor in (1.0, 2.0):
        network = Backbone.from_blocks(
            "times",
            OrderedDict(a=nn.Conv2d(3, 3, 1), b=Times(factor)),
            preprocessing=Preprocessing(8),
        )
        cached = CNNFeatureTransformer(network, cache=tmp_path)
        found = cached.fit_transform(images)
        # Clones share the backbone.
        np.testing.assert_array_equal(clone(cached).fit_transform(images), found)
        np.testing.assert_array_equal(
            found, CNNFeatureTransformer(network).fit_transform(images)
        )


def test_layers_between_a_convolution_and_its_batch_norm_are_kept_apart(
    images, tmp_path
):
    """Where only the second is requested, the first is folded into it."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    network = Backbone.from_blocks(
        "separate",
        OrderedDict(conv=nn.Conv2d(3, 8, 3), norm=norm, end=nn.ReLU()),
        preprocessing=Preprocessing(16),
    )
    for layer in (["conv", "norm"], "norm", "end", "conv"):
        found = CNNFeatureTransformer(network, layer=layer, cache=tmp_path)
        expected = CNNFeatureTransformer(network, layer=layer)
        np.testing.assert_array_equal(
            found.fit_transform(images), expected.fit_transform(images)
        )


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)])
def test_features_of_irreproducible_weights_are_not_stored(
    random_state, images, tmp_path
):
    random = transformer(tmp_path, weights=None, random_state=random_state)

    first = random.fit_transform(images)
    again = random.transform(images)
    other = clone(random).fit(images).fit_transform(images)

    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert cache_info(tmp_path).entries == []


def test_a_saved_transformer_can_use_the_cache_up_to_its_layer(
    images, tmp_path, computed
):
    fitted = transformer(tmp_path / "cache", layer="block2").fit(images)
    joblib.dump(fitted, tmp_path / "file")
    joblib.dump(transformer(None, layer="block2").fit(images), tmp_path / "plain")
    loaded = joblib.load(tmp_path / "file").set_params(cache=tmp_path / "cache")

    first = loaded.transform(images)
    again = fitted.transform(images)

    np.testing.assert_array_equal(first, again)
    assert sum(computed) == len(images)
    sizes = [(tmp_path / name).stat().st_size for name in ("file", "plain")]
    assert sizes[0] - sizes[1] < 1000
    # Later blocks are not in the file.
    entries = cache_info(tmp_path / "cache").entries
    assert [entry.layer for entry in entries] == LAYERS[:3]


@pytest.mark.slow
def test_features_of_weights_with_an_invalid_head_can_be_cached(images, tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import alexnet

    torch.manual_seed(0)
    state = alexnet(weights=None).state_dict()
    state["classifier.1.bias"][:] = torch.nan
    save_file(state, tmp_path / "features_only.safetensors")
    cached = CNNFeatureTransformer(
        "alexnet", weights=tmp_path / "features_only.safetensors", cache=tmp_path
    )

    found = cached.fit_transform(images)

    np.testing.assert_array_equal(
        found, clone(cached).set_params(cache=None).fit_transform(images)
    )


def test_the_first_unreadable_image_is_named_and_the_others_are_stored(
    images, tmp_path, computed
):
    items = [*images[:4], "missing.png", *images[4:], "also missing.png"]
    items[2] = tmp_path / "image.png"
    Image.fromarray(images[2]).save(items[2])

    with pytest.raises(ImageReadError, match="Image 4 .'missing.png'."):
        transformer(tmp_path, batch_size=2).fit_transform(items)
    transformer(tmp_path, batch_size=2).fit_transform(images)

    assert sum(computed) == len(images)


def test_the_default_folder_is_set_by_the_environment(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SKLTL_CACHE", str(tmp_path / "own"))

    transformer(True).fit_transform(images)

    assert cache_info().folder == tmp_path / "own"
    assert cache_info().n_bytes > 0
    clear_cache()
    assert cache_info().entries == []
    assert cache_info().n_bytes == 0


def test_without_a_cache_nothing_is_written(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SKLTL_CACHE", str(tmp_path))

    for cache in (None, False):
        transformer(cache).fit_transform(images)

    assert list(tmp_path.iterdir()) == []


def test_clearing_keeps_other_files(images, tmp_path):
    transformer(tmp_path).fit_transform(images)
    others = [
        tmp_path / "holiday.sqlite",
        tmp_path / "skltl-results.sqlite",
        tmp_path / "skltl-notes.sqlite.txt",
        tmp_path / f"skltl-features-{'0' * 32}.sqlite.bak",
    ]
    for other in others:
        other.write_text("mine")

    clear_cache(tmp_path)

    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_cache_that_is_cleared_is_filled_again(images, tmp_path):
    cached = transformer(tmp_path).fit(images)
    expected = cached.transform(images)

    clear_cache(tmp_path)

    np.testing.assert_array_equal(cached.transform(images), expected)
    assert cache_info(tmp_path).entries[0].n_images == len(images)


def test_registered_names_are_not_part_of_the_fingerprint(images, tmp_path, computed):
    register_backbone(custom_backbone("own"), replace=True)

    CNNFeatureTransformer("own", cache=tmp_path).fit_transform(images)
    register_backbone(custom_backbone("own", bias=1.0), replace=True)
    CNNFeatureTransformer("own", cache=tmp_path).fit_transform(images)

    assert sum(computed) == 2 * len(images)


def test_other_weights_of_a_backbone_are_other_entries(images, tmp_path):
    others = [{}, *({"weights": None, "random_state": seed} for seed in (0, 1, 1))]
    for parameters in others:
        transformer(tmp_path, **parameters).fit_transform(images)

    entries = cache_info(tmp_path).entries

    assert len(entries) == 3 * len(LAYERS)
    for layer in LAYERS:
        networks = [entry.network for entry in entries if entry.layer == layer]
        assert len(set(networks)) == 3


def test_an_entry_describes_preprocessing_and_engine(images, tmp_path):
    torch.manual_seed(0)
    blocks = OrderedDict(stem=nn.Conv2d(3, 4, 3))
    changed = Preprocessing(16, 20, "bicubic", mean=(0.5, 0.25, 0), std=(1, 2, 0.125))
    for preprocessing in (Preprocessing(16), changed):
        backbone = Backbone.from_blocks("own", blocks, preprocessing=preprocessing)
        CNNFeatureTransformer(backbone, cache=tmp_path, engine="torch").fit_transform(
            images
        )

    entries = cache_info(tmp_path).entries

    assert {entry.preprocessing for entry in entries} == {
        "resize 16 bilinear, center crop 16, mean 0.485 0.456 0.406, "
        "std 0.229 0.224 0.225",
        "resize 20 bicubic, center crop 16, mean 0.5 0.25 0, std 1 2 0.125",
    }
    assert {entry.engine for entry in entries} == {"torch"}
    # The blocks are the same.
    assert len({entry.network for entry in entries}) == len(entries) / 2


def test_cache_info_prints_as_a_table(images, tmp_path):
    for seed in range(5):
        random = transformer(tmp_path, weights=None, random_state=seed)
        random.fit_transform(images)

    head, names, *rows, end = repr(cache_info(tmp_path)).splitlines()

    assert str(tmp_path) in head
    assert "MB of 20000.0 MB" in head
    assert names.split()[:3] == ["backbone", "layer", "pooling"]
    assert [row.split()[:2] for row in rows] == [
        ["tiny", layer] for layer in LAYERS[:4] for _ in range(5)
    ]
    assert end == "... and 5 more"
    assert max(map(len, [head, names, *rows])) <= 200


def test_the_table_escapes_names(images, tmp_path):
    network = custom_backbone("evil\x1b[31m\nname" + "x" * 1000)
    CNNFeatureTransformer(network, cache=tmp_path).fit_transform(images)

    text = repr(cache_info(tmp_path))

    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    assert max(map(len, text.splitlines())) <= 200
