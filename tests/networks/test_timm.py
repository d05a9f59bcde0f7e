"""Every network of timm, split into blocks and a head, is still that network."""

import json
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from every_network import ONE_PER_MODULE, TIMM, batch_for, build
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.torch import save_file

from skltl import CNNFeatureTransformer, list_backbones, list_layers
from skltl.exceptions import (
    LicenseWarning,
    UnknownBackboneError,
    WeightsError,
    WeightsNotFoundError,
)
from skltl.inference import FrozenPrefix, pool
from skltl.networks import _timm as timm_networks
from skltl.networks import (
    _weights,
    get_backbone,
    resolve_layer,
    resolve_weights,
    truncate,
)

# Of each kind one: token and average pooling, registers, windows, no normalization.
BY_DEFAULT = (
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"),
    *("convnext_atto", "efficientnet_b0", "lcnet_035", "nf_regnet_b0", "resnet10t"),
    *("levit_128s", "mobilevit_xxs", "xcit_nano_12_p16_224", "starnet_s050"),
    "swin_tiny_patch4_window7_224",
)
NAMES = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
    for name in TIMM
]
SMALL = "resnet10t"  # whose weights come with two sizes of images
SIZE = 64

# The only weights that are there twice, or that the forward pass does not use.
SHARED = {"coat_tiny", "efficientvim_m1"}


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    """Name, network of skltl, and network of timm, with the same weights."""
    return request.param, *build("timm:" + request.param)


@pytest.fixture(scope="module")
def ten_images():
    """Smooth images of ten shapes."""
    rng = np.random.default_rng(0)
    sizes = [(500, 375), (375, 500), (224, 224), (90, 60), (301, 37), (640, 480)]
    sizes += [(64, 200), (333, 333), (400, 300), (256, 512)]
    small = [(width // 8 + 1, height // 8 + 1) for width, height in sizes]
    return [
        Image.fromarray(rng.integers(256, size=(*few, 3), dtype=np.uint8)).resize(size)
        for few, size in zip(small, sizes, strict=True)
    ]


def test_at_most_two_modules_of_timm_are_not_tested():
    tested = {timm.model_entrypoint(name).__module__ for name in TIMM}

    assert len(tested) == len(set(ONE_PER_MODULE) & set(TIMM))
    assert len(tested) >= len(timm.list_modules()) - 2


def test_blocks_and_head_compute_the_same_output(built):
    name, network, module = built
    batch = batch_for("timm:" + name)

    with torch.inference_mode():
        expected = module(batch.clone())
        found = network.logits(batch.clone())

    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    assert torch.equal(found, expected)


def test_all_parameters_are_in_one_block(built):
    name, network, module = built

    keys = [key for part in network.parts for key in part.state_dict()]

    if name not in SHARED:
        assert sorted(keys) == sorted(module.state_dict())
    assert set(keys) <= module.state_dict().keys()


def test_automatic_pooling_is_that_of_the_network(built):
    name, network, module = built
    backbone = get_backbone("timm:" + name)
    last = resolve_layer(backbone, "last", pooling="auto").block
    reference = timm.create_model(name, num_classes=0).eval()
    missing, _ = reference.load_state_dict(module.state_dict(), strict=False)
    batch = batch_for("timm:" + name)

    with torch.inference_mode():
        expected = reference(batch.clone())
        for block_name, block in network.blocks.items():
            batch = block(batch)
            if block_name == last:
                break
        found = pool(batch, "auto", network.layouts[last])

    assert not missing
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_features_are_the_pooled_outputs_of_the_blocks(built):
    """Folded, channels last, in segments: equal up to rounding at every main layer."""
    name, network, _ = built
    size = get_backbone("timm:" + name).preprocessing.size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2, *size, 3), generator=generator).to(torch.uint8)
    mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.22)
    wanted = {block: network.layouts[block] for block in network.layers.values()}
    prefix = FrozenPrefix(truncate(network.blocks, list(wanted)))
    runner = prefix.runner(torch.device("cpu"), torch.float32, wanted)

    features = runner.features(pixels, mean, std, "avg")

    output = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    by_hand = []
    with torch.inference_mode():
        for block_name, block in network.blocks.items():
            output = block(output)
            if block_name in wanted:
                by_hand.append(pool(output.clone(), "avg", wanted[block_name]))
    sizes = [each.shape[1] for each in by_hand]
    for found, expected in zip(features.split(sizes, dim=1), by_hand, strict=True):
        assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_images_are_preprocessed_as_by_timm(name, ten_images):
    config = timm.get_pretrained_cfg(name).to_dict()
    options = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**options, is_training=False)
    preprocessing = get_backbone("timm:" + name).preprocessing
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)

    for image in ten_images:
        found = (preprocessing.crop(image) / 255 - mean) / std
        assert_allclose(found.transpose(2, 0, 1), transform(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 96, 96), (3, 64, 128)])
def test_other_modes_and_sizes_are_those_of_timm(mode, input_size, ten_images):
    config = {
        **timm.get_pretrained_cfg(SMALL).to_dict(),
        "input_size": input_size,
        "crop_mode": mode,
        "crop_pct": 0.9,
    }
    options = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**options, is_training=False)

    preprocessing = timm_networks._pretrained(timm, SMALL, "", config).preprocessing

    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    for image in ten_images:
        found = (preprocessing.crop(image) / 255 - mean) / std
        assert_allclose(found.transpose(2, 0, 1), transform(image), rtol=0, atol=1e-6)


def test_names_lead_to_their_weights():
    first = get_backbone("timm:resnet50.a1_in1k")
    default = get_backbone("timm:resnet50")
    tags = [one.name for one in first.weights]

    assert tags[0] == "a1_in1k"
    assert set(tags) == {one.name for one in default.weights}
    assert default.weights[0].name == timm.get_pretrained_cfg("resnet50").tag
    assert resolve_weights(first, "tv_in1k").name == "tv_in1k"
    assert first.weights[0].categories[207] == "golden retriever"


def test_names_are_listed_by_pattern_with_licenses():
    names = list_backbones("timm:*dinov3*")
    (info,) = list_backbones("timm:vit_small_patch16_dinov3.lvd1689m", details=True)

    assert info.name in names
    assert info.license == "dinov3-license"
    assert (info.weights, info.image_size) == ("lvd1689m", 256)
    assert not any(name.startswith("timm:") for name in list_backbones())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet10t", "Did you mean 'timm:resnet10t'"),
        ("timm:resnet10", "timm has no network 'resnet10'.*'resnet10t'"),
        ("timm:resnet10t.a7", "no weights 'a7' of 'resnet10t'.*Known: c3_in1k"),
        ("timm:local-dir:nowhere", "config.json of .*nowhere.* cannot be read"),
    ],
)
def test_unknown_names_lead_to_known_ones(name, words):
    with pytest.raises(UnknownBackboneError, match=words):
        get_backbone(name)


def test_without_timm_the_error_names_the_extra(monkeypatch, images):
    monkeypatch.setattr(timm_networks, "find_spec", lambda name: None)
    timm_networks.list_timm.cache_clear()

    for use in (
        lambda: CNNFeatureTransformer("timm:resnet14t").fit(images),
        lambda: list_backbones("timm:*vit*"),
    ):
        with pytest.raises(UnknownBackboneError, match=r"pip install 'skltl\[timm\]'"):
            use()
    with pytest.raises(UnknownBackboneError, match="Unknown backbone 'resnet10t'"):
        CNNFeatureTransformer("resnet10t").fit(images)


@pytest.fixture(scope="module")
def small_network():
    """A network of timm with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return timm.create_model(SMALL).eval()


def features_by_hand(module, images):
    """Run the network on images as the default weights expect them."""
    config = timm.get_pretrained_cfg(SMALL).to_dict()
    options = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE)}, config)
    transform = timm.data.create_transform(**options, is_training=False)
    batch = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        return module.forward_head(module.forward_features(batch), pre_logits=True)


def extract(images, backbone="timm:" + SMALL, **parameters):
    options = {"image_size": SIZE, "precision": "float32", "engine": "torch"}
    return CNNFeatureTransformer(backbone, **options, **parameters).fit_transform(
        images
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights_are_read_from_a_file(small_network, images, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(small_network.state_dict(), path)

    found = extract(images, weights=path)

    expected = features_by_hand(small_network, images)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_classes", [0, 7])
def test_a_file_may_have_other_classes_or_none(
    small_network, images, tmp_path, n_classes
):
    other = timm.create_model(SMALL, num_classes=n_classes)
    other.load_state_dict(
        {k: v for k, v in small_network.state_dict().items() if "fc" not in k},
        strict=False,
    )
    save_file(other.state_dict(), tmp_path / "weights.safetensors")

    found = extract(images, weights=tmp_path / "weights.safetensors")

    expected = features_by_hand(small_network, images)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_does_not_fit_is_refused(small_network, images, tmp_path):
    state = {k: v for k, v in small_network.state_dict().items() if "layer2" not in k}
    save_file(state, tmp_path / "weights.safetensors")

    with pytest.raises(WeightsError, match="Missing key.*layer2"):
        extract(images, weights=tmp_path / "weights.safetensors")


@pytest.fixture
def folder(small_network, tmp_path):
    """A folder with a network, as timm saves it for the Hub."""
    config = {"input_size": [3, SIZE, SIZE], "crop_pct": 1.0, "license": "mit"}
    timm.models.save_for_hf(
        small_network, tmp_path, model_config={"pretrained_cfg": config}
    )
    return tmp_path


def test_a_folder_is_a_backbone(small_network, folder, images):
    name = f"timm:local-dir:{folder}"

    found = extract(images, name)

    backbone = get_backbone(name)
    assert backbone.preprocessing.size == (SIZE, SIZE)
    assert backbone.weights[0].license == "mit"
    assert [layer.name for layer in list_layers(name)] == [
        *("act1", "layer1", "layer2", "layer3", "layer4")
    ]
    batch = np.stack([backbone.preprocessing.crop(image) for image in images])
    mean, std = backbone.preprocessing.mean, backbone.preprocessing.std
    tensor = torch.tensor((batch / 255 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = small_network.forward_features(tensor).mean((2, 3))
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_with_another_network_is_another_backbone(folder):
    name = f"timm:local-dir:{folder}"
    before = get_backbone(name)
    assert get_backbone(name) is before
    config = json.loads((folder / "config.json").read_text())

    config["architecture"] = "resnet18"
    (folder / "config.json").write_text(json.dumps(config))

    assert get_backbone(name) != before
    assert before != get_backbone("timm:" + SMALL)


def test_a_fitted_estimator_outlives_the_folder(folder, images):
    name = f"timm:local-dir:{folder}"
    fitted = CNNFeatureTransformer(name, image_size=SIZE).fit(images)
    features = fitted.transform(images)
    (folder / "config.json").rename(folder / "elsewhere.json")

    saved = pickle.dumps(fitted)

    assert_array_equal(fitted.transform(images), features)
    with pytest.raises(
        UnknownBackboneError, match=r"config\.json of .* cannot be read"
    ):
        pickle.loads(saved)
    (folder / "elsewhere.json").rename(folder / "config.json")
    assert_array_equal(pickle.loads(saved).transform(images), features)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder of the Hugging Face Hub, with no connection to it."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_hub(hub, repository, folder):
    """Put the files of a folder where the Hub's own library keeps downloads."""
    entry = hub / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("1234")


def test_weights_come_from_the_hub(small_network, hub, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(small_network.state_dict(), folder / "model.safetensors")
    put_in_hub(hub, "timm/resnet10t.c3_in1k", folder)

    found = extract(images, "timm:resnet10t.c3_in1k")

    expected = features_by_hand(small_network, images)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_repository_of_the_hub_is_a_backbone(hub, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    network = timm.create_model(SMALL, num_classes=5)
    timm.models.save_for_hf(network, folder, model_config={"pretrained_cfg": {}})
    put_in_hub(hub, "someone/flowers", folder)

    found = extract(images, "timm:hf-hub:someone/flowers")

    file = folder / "pytorch_model.bin"
    assert_array_equal(found, extract(images, weights=file))


def test_offline_the_error_says_what_to_download(hub, images):
    url = "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"
    with pytest.raises(WeightsNotFoundError, match=f"download\n  {url}"):
        extract(images)
    with pytest.raises(UnknownBackboneError, match="hf-hub:someone/birds.*Hub"):
        extract(images, "timm:hf-hub:someone/birds")


def test_weights_that_do_not_exist_are_an_error(images):
    with pytest.raises(WeightsNotFoundError, match="weights=None draws random ones"):
        extract(images, "timm:ghostnet_050")


def test_restricted_licenses_are_mentioned_once(hub, images, monkeypatch):
    monkeypatch.setattr(_weights, "_warned", set())
    name = "timm:convnextv2_atto.fcmae"
    message = "cc-by-nc-4.0, does not permit commercial use"

    with (
        pytest.warns(LicenseWarning, match=message) as caught,
        pytest.raises(WeightsNotFoundError),
    ):
        extract(images, name)

    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", LicenseWarning)
        with pytest.raises(WeightsNotFoundError):
            extract(images, name)
        extract(images, name, weights=None)


def test_position_embeddings_are_resized(images, tmp_path):
    name, size = "vit_tiny_patch16_224", 64
    network = timm.create_model(name).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    other = timm.create_model(
        name,
        img_size=size,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
    ).eval()

    found = extract(
        images,
        f"timm:{name}",
        weights=tmp_path / "weights.safetensors",
        pooling="cls",
    )

    preprocessing = get_backbone(f"timm:{name}").preprocessing.resized_to(size)
    batch = np.stack([preprocessing.crop(image) for image in images])
    tensor = torch.tensor((batch / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = other.forward_features(tensor)[:, 0]
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_a_network_cannot_take_are_an_error(images):
    transformer = CNNFeatureTransformer(
        "timm:vit_tiny_patch16_224", weights=None, image_size=(16, 8)
    )

    with pytest.raises(ValueError, match="16 x 8 pixels cannot pass through"):
        transformer.fit(images)
