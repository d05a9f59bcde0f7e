"""A network of the user's own is a backbone like any other."""

import copy
import pickle
from collections import OrderedDict

import joblib
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    list_backbones,
    list_layers,
    register_backbone,
)
from skltl.networks import _registry, get_backbone, resolve_layer


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Leave no backbone of a test behind."""
    monkeypatch.setattr(_registry, "_REGISTERED", {})


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return OrderedDict(
        stem=nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        ),
        block1=nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True)),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        hidden=nn.Linear(8, 5),
    )


@pytest.fixture
def backbone(blocks):
    return Backbone.from_blocks(
        "mine", blocks, nn.Linear(5, 2), preprocessing=Preprocessing(32)
    )


def test_layers_are_described(backbone):
    register_backbone(backbone)

    layers = list_layers("mine")

    assert "mine" in list_backbones()
    assert [layer.name for layer in layers] == [
        "stem",
        "block1",
        "pool",
        "flat",
        "hidden",
    ]
    assert [layer.channels for layer in layers] == [6, 8, 8, 8, 5]
    assert [layer.stride for layer in layers[:2]] == [2, 4]
    assert resolve_layer(backbone, "stem.1").block == "stem.1"


def test_features_are_those_of_the_modules(backbone, blocks, images):
    register_backbone(backbone)
    options = {"image_size": 40, "precision": "float32"}

    features = CNNFeatureTransformer("mine", layer="block1", **options).fit_transform(
        images
    )

    for block in blocks.values():
        block.eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    centre = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        by_hand = blocks["block1"](blocks["stem"]((centre - mean) / std)).mean((2, 3))
    np.testing.assert_allclose(features, by_hand, rtol=1e-4, atol=1e-6)


def test_the_users_modules_are_copied_and_not_changed(backbone, blocks, images):
    before = {key: value.clone() for key, value in blocks["stem"].state_dict().items()}

    CNNFeatureTransformer(backbone).fit_transform(images)

    assert blocks["stem"].training
    assert blocks["stem"][0].weight.requires_grad
    for key, value in blocks["stem"].state_dict().items():
        assert torch.equal(value, before[key])


def test_random_weights_are_not_the_users(backbone, images):
    def features(**parameters):
        transformer = CNNFeatureTransformer(backbone, **parameters)
        return transformer.fit_transform(images)

    seeded = features(weights=None, random_state=1)

    np.testing.assert_array_equal(seeded, features(weights=None, random_state=1))
    assert np.abs(seeded - features()).max() > 1e-3


def test_a_record_goes_to_worker_processes(backbone, images):
    transformer = CNNFeatureTransformer(backbone)

    parallel = joblib.Parallel(n_jobs=2)
    found = parallel(
        joblib.delayed(transformer.fit_transform)(images) for _ in range(2)
    )

    for features in found:
        np.testing.assert_allclose(
            features, transformer.fit_transform(images), rtol=1e-2
        )


def test_a_name_is_taken_once(backbone, blocks):
    register_backbone(backbone)
    register_backbone(backbone)  # the same again changes nothing
    preprocessing = Preprocessing(32)

    for name in ("mine", "resnet50", "tiny"):
        other = Backbone.from_blocks(name, blocks, preprocessing=preprocessing)
        with pytest.raises(ValueError, match=f"a backbone named '{name}' already"):
            register_backbone(other)


@pytest.mark.parametrize("name", ["two words", "a.b", "head", "last"])
def test_names_of_blocks_are_checked(name):
    with pytest.raises(ValueError, match="cannot name a block"):
        Backbone.from_blocks(
            "mine", {name: nn.Conv2d(3, 3, 1)}, preprocessing=Preprocessing(8)
        )


def test_a_batch_norm_is_folded_only_where_the_order_is_known(images):
    """In a module of the user's own, what is defined last need not run last."""

    class NormFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            nn.init.constant_(self.norm.bias, 2.0)

        def forward(self, batch):
            return self.conv(self.norm(batch).relu())

    module = NormFirst()
    backbone = Backbone.from_blocks(
        "odd",
        {"block": module},
        preprocessing=Preprocessing(40, mean=(0,) * 3, std=(1,) * 3),
    )

    features = CNNFeatureTransformer(backbone, precision="float32").fit_transform(
        images
    )

    batch = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        by_hand = module.eval()(batch).mean((2, 3))
    np.testing.assert_allclose(features, by_hand, rtol=1e-5)


def test_a_unit_that_inherits_but_runs_otherwise_is_not_folded(images):
    class PreActivation(BasicBlock):
        def forward(self, batch):
            return batch + self.conv2(self.bn1(self.conv1(self.bn2(batch).relu())))

    blocks = {"stem": nn.Conv2d(3, 8, 3), "unit": PreActivation(8, 8)}
    for name in ("bn1", "bn2"):
        nn.init.uniform_(getattr(blocks["unit"], name).bias)
    preprocessing = Preprocessing(40, mean=(0,) * 3, std=(1,) * 3)
    backbone = Backbone.from_blocks("odd", blocks, preprocessing=preprocessing)

    features = CNNFeatureTransformer(backbone, precision="float32").fit_transform(
        images
    )

    batch = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        by_hand = blocks["unit"].eval()(blocks["stem"](batch)).mean((2, 3))
    np.testing.assert_allclose(features, by_hand, rtol=1e-4, atol=1e-5)


def by_hand(blocks, images):
    """Run modules on the middle of the images, scaled to [0, 1] only."""
    batch = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        for block in blocks:
            batch = block.eval()(batch)
    return batch.mean((2, 3)).numpy()


def features_of(blocks, images):
    names = [f"block{number}" for number in range(len(blocks))]
    backbone = Backbone.from_blocks(
        "odd",
        dict(zip(names, copy.deepcopy(blocks), strict=True)),
        preprocessing=Preprocessing(40, mean=(0,) * 3, std=(1,) * 3),
    )
    transformer = CNNFeatureTransformer(backbone, precision="float32")
    return transformer.fit_transform(images)


def with_statistics(norm):
    for values in (norm.running_mean, norm.bias.data):
        values.uniform_(-1, 1)
    return norm


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, batch):
        return super().forward(batch).relu()


class StandardisedConv(nn.Conv2d):
    def forward(self, batch):
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(batch, weight, self.bias)


def shared_activation():
    relu = nn.ReLU()
    return [nn.Sequential(nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 8, 3), relu)]


def activation_between_convolution_and_norm():
    relu = nn.ReLU()
    first = nn.Sequential(nn.Conv2d(3, 6, 3), relu)
    norm = with_statistics(nn.BatchNorm2d(6))
    return [nn.Sequential(first, nn.Conv2d(6, 6, 3), relu, norm)]


def norm_with_activation():
    return [nn.Sequential(nn.Conv2d(3, 6, 3), with_statistics(NormAndActivation(6)))]


def standardised_convolution():
    norm = with_statistics(nn.BatchNorm2d(6))
    return [nn.Sequential(StandardisedConv(3, 6, 3), norm)]


def normalised_weights():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return [nn.Sequential(conv, with_statistics(nn.BatchNorm2d(6)))]


@pytest.mark.parametrize(
    "make",
    [
        shared_activation,
        activation_between_convolution_and_norm,
        norm_with_activation,
        standardised_convolution,
        normalised_weights,
    ],
)
def test_odd_networks_give_what_their_modules_give(images, make):
    torch.manual_seed(0)
    blocks = make()

    found = features_of(blocks, images)

    np.testing.assert_allclose(found, by_hand(blocks, images), rtol=1e-4, atol=1e-5)


def test_networks_in_half_precision_are_run_in_full(images):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 6, 3).bfloat16()]

    found = features_of(blocks, images)

    expected = by_hand([blocks[0].float()], images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Scale(nn.Module):
    """Its number is no parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, batch):
        return batch * self.factor


def test_two_networks_of_one_name_are_two(images):
    small, large = (features_of([Scale(factor)], images) for factor in (1, 100))

    np.testing.assert_allclose(large, 100 * small, rtol=1e-5)


def test_hooks_of_a_sequence_are_kept(images):
    sequence = nn.Sequential(nn.Conv2d(3, 4, 3))
    sequence.register_forward_hook(lambda module, args, output: output * 0)

    assert (features_of([sequence], images) == 0).all()


def test_a_saved_estimator_is_not_loaded_into_another_network(backbone, images):
    register_backbone(backbone)
    saved = pickle.dumps(CNNFeatureTransformer("mine", layer="block1").fit(images))
    blocks = {"stem": nn.Conv2d(3, 6, 3), "block1": nn.Conv2d(6, 8, 5)}
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))
    register_backbone(other, replace=True)

    with pytest.raises(ValueError, match="'mine' is another network here"):
        pickle.loads(saved)


class FirstOnly(nn.Module):
    def forward(self, batch):
        return batch[:1]


class Tokens(nn.Module):
    def forward(self, batch):
        return batch.flatten(2)


@pytest.mark.parametrize(
    ("module", "words"),
    [(FirstOnly(), "expected \\(8, 3\\)"), (Tokens(), "expected a map")],
)
def test_outputs_that_are_no_features_are_refused(images, module, words):
    with pytest.raises(ValueError, match=words):
        features_of([module], images)


def test_a_network_for_one_size_only_has_no_strides():
    unflatten = nn.Unflatten(1, (3, 8, 8))
    sequence = [nn.Flatten(), nn.Linear(192, 192), unflatten, nn.Conv2d(3, 4, 3)]
    backbone = Backbone.from_blocks(
        "odd", {"all": nn.Sequential(*sequence)}, preprocessing=Preprocessing(8)
    )

    (layer,) = list_layers(backbone)

    assert (layer.channels, layer.stride) == (4, None)


@pytest.mark.parametrize(
    ("blocks", "preprocessing", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), Preprocessing(8), "must be a dictionary"),
        ({"block": torch.relu}, Preprocessing(8), "'block' must be a torch module"),
        ({"block": nn.Conv2d(3, 3, 1)}, 224, "must be a Preprocessing"),
    ],
)
def test_arguments_of_a_record_are_checked(blocks, preprocessing, words):
    with pytest.raises(TypeError, match=words):
        Backbone.from_blocks("odd", blocks, preprocessing=preprocessing)


def test_an_own_backbone_may_be_replaced(backbone, blocks):
    register_backbone(backbone)
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(16))

    with pytest.raises(ValueError, match="replace=True"):
        register_backbone(other)
    register_backbone(other, replace=True)

    assert get_backbone("mine") is other


def test_a_record_that_is_also_registered_is_saved_with_the_estimator(backbone, images):
    register_backbone(backbone)
    saved = pickle.dumps(CNNFeatureTransformer(backbone).fit(images))
    _registry._REGISTERED.clear()

    assert pickle.loads(saved).transform(images).shape == (len(images), 8)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_norm_without_statistics_is_refused(kind):
    norm = kind(3, track_running_stats=False)

    with pytest.raises(ValueError, match="depend on the others in its batch"):
        Backbone.from_blocks("odd", {"norm": norm}, preprocessing=Preprocessing(8))


def test_random_weights_need_a_way_to_draw_them(images):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((3, 1, 1), 7.0))

        def forward(self, batch):
            return batch * self.scale

    backbone = Backbone.from_blocks(
        "odd", {"scale": Scale()}, preprocessing=Preprocessing(8)
    )

    with pytest.raises(ValueError, match="Scale in 'scale'.*reset_parameters"):
        CNNFeatureTransformer(backbone, weights=None).fit(images)


def test_a_copy_from_another_process_is_the_same_backbone(backbone, blocks):
    copied = pickle.loads(pickle.dumps(backbone))
    blocks["stem"][0].weight.data += 1
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))

    assert copied == backbone
    assert hash(copied) == hash(backbone)
    assert other != backbone


def test_weights_of_another_head_serve_its_blocks(backbone, blocks, tmp_path, images):
    state = nn.ModuleDict({**blocks, "head": nn.Linear(5, 7)}).state_dict()
    torch.save(state, tmp_path / "weights.pt")

    found = CNNFeatureTransformer(
        backbone, weights=tmp_path / "weights.pt"
    ).fit_transform(images)

    expected = CNNFeatureTransformer(backbone).fit_transform(images)
    np.testing.assert_array_equal(found, expected)


def test_a_saved_estimator_remembers_an_unregistered_network(backbone, images):
    fitted = CNNFeatureTransformer(backbone).fit(images)
    expected = fitted.transform(images)
    fitted.set_params(backbone="resnet18")

    loaded = pickle.loads(pickle.dumps(fitted))

    np.testing.assert_array_equal(loaded.transform(images), expected)


def test_a_batch_that_does_not_fit_the_memory_is_halved(images):
    """As on a GPU: here a block refuses more than two images at a time."""

    class SmallMemory(nn.Module):
        def forward(self, batch):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("no room for this batch")
            return batch

    backbone = Backbone.from_blocks(
        "small", {"block": SmallMemory()}, preprocessing=Preprocessing(8)
    )

    halved = CNNFeatureTransformer(backbone, batch_size=8).fit_transform(images)

    small = CNNFeatureTransformer(backbone, batch_size=2).fit_transform(images)
    np.testing.assert_array_equal(halved, small)


def test_a_single_image_that_does_not_fit_is_an_error(images):
    class NoMemory(nn.Module):
        def forward(self, batch):
            if (
                batch.device.type != "meta"
                and batch.shape[-1] == 8
                and batch.abs().sum() > 0
            ):
                raise torch.OutOfMemoryError("no room at all")
            return batch

    backbone = Backbone.from_blocks(
        "none", {"block": NoMemory()}, preprocessing=Preprocessing(8)
    )

    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        CNNFeatureTransformer(backbone).fit_transform(images)


def test_an_unregistered_name_says_what_to_do():
    with pytest.raises(ValueError, match="register_backbone"):
        get_backbone("mine")
