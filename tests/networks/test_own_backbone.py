"""A network of the user is a backbone like any other."""

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

# Images are scaled to [0, 1] only.
ONLY_SCALED = Preprocessing(40, mean=(0,) * 3, std=(1,) * 3)


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    """Start without registered backbones, and leave none behind."""
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


def one_block(module, size=8):
    return Backbone.from_blocks(
        "one", {"block": module}, preprocessing=Preprocessing(size)
    )


def by_hand(blocks, images):
    """Run modules on the center of the images, scaled to [0, 1]."""
    batch = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        for block in blocks:
            batch = block.eval()(batch)
    return batch.mean((2, 3)).numpy()


def features_of(blocks, images):
    """Extract features with copies of modules as the blocks of a backbone."""
    named = {f"block{number}": block for number, block in enumerate(blocks)}
    backbone = Backbone.from_blocks(
        "odd", copy.deepcopy(named), preprocessing=ONLY_SCALED
    )
    transformer = CNNFeatureTransformer(backbone, precision="float32", engine="torch")
    return transformer.fit_transform(images)


def test_layers_are_listed(backbone):
    register_backbone(backbone)

    layers = list_layers("mine")

    assert "mine" in list_backbones()
    names = ["stem", "block1", "pool", "flat", "hidden"]
    assert [layer.name for layer in layers] == names
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
    center = torch.tensor(images[:, :, 4:44]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = blocks["block1"](blocks["stem"]((center - mean) / std)).mean((2, 3))
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)


def test_the_users_modules_are_not_modified(backbone, blocks, images):
    before = {key: value.clone() for key, value in blocks["stem"].state_dict().items()}

    CNNFeatureTransformer(backbone).fit_transform(images)

    assert blocks["stem"].training
    assert blocks["stem"][0].weight.requires_grad
    for key, value in blocks["stem"].state_dict().items():
        assert torch.equal(value, before[key])


def test_random_weights_differ_from_the_users(backbone, images):
    def features(**parameters):
        transformer = CNNFeatureTransformer(backbone, **parameters)
        return transformer.fit_transform(images)

    seeded = features(weights=None, random_state=1)

    np.testing.assert_array_equal(seeded, features(weights=None, random_state=1))
    assert np.abs(seeded - features()).max() > 1e-3


@pytest.mark.slow
def test_worker_processes_receive_the_backbone(backbone, images):
    transformer = CNNFeatureTransformer(backbone)

    found = joblib.Parallel(n_jobs=2)(
        joblib.delayed(transformer.fit_transform)(images) for _ in range(2)
    )

    for features in found:
        np.testing.assert_allclose(
            features, transformer.fit_transform(images), rtol=1e-2
        )


def test_a_name_can_be_registered_once(backbone, blocks):
    register_backbone(backbone)
    register_backbone(backbone)  # the same backbone again changes nothing

    for name in ("mine", "resnet50", "tiny"):
        other = Backbone.from_blocks(name, blocks, preprocessing=Preprocessing(32))
        with pytest.raises(ValueError, match=f"a backbone named '{name}' already"):
            register_backbone(other)


def test_a_registered_backbone_can_be_replaced(backbone, blocks):
    register_backbone(backbone)
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(16))

    with pytest.raises(ValueError, match="replace=True"):
        register_backbone(other)
    register_backbone(other, replace=True)

    assert get_backbone("mine") is other


def test_an_unknown_name_refers_to_register_backbone():
    with pytest.raises(ValueError, match="register_backbone"):
        get_backbone("mine")


@pytest.mark.parametrize("name", ["two words", "a.b", "head", "last"])
def test_block_names_are_validated(name):
    with pytest.raises(ValueError, match="cannot name a block"):
        Backbone.from_blocks(
            "mine", {name: nn.Conv2d(3, 3, 1)}, preprocessing=Preprocessing(8)
        )


def test_an_image_size_instead_of_a_preprocessing_is_refused():
    with pytest.raises(TypeError, match="must be a Preprocessing, got 224"):
        Backbone.from_blocks("odd", {"block": nn.Conv2d(3, 3, 1)}, preprocessing=224)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_batch_norm_without_running_statistics_is_refused(kind):
    with pytest.raises(ValueError, match="depend on the others in its batch"):
        one_block(kind(3, track_running_stats=False))


class NormFirst(nn.Module):
    """The module that is defined last is not the one that runs last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.bias, 2.0)

    def forward(self, batch):
        return self.conv(self.norm(batch).relu())


class PreActivation(BasicBlock):
    """A subclass that runs the modules in another order."""

    def __init__(self):
        super().__init__(8, 8)
        nn.init.uniform_(self.bn1.bias)
        nn.init.uniform_(self.bn2.bias)

    def forward(self, batch):
        return batch + self.conv2(self.bn1(self.conv1(self.bn2(batch).relu())))


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, batch):
        return super().forward(batch).relu()


class StandardizedConv(nn.Conv2d):
    def forward(self, batch):
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(batch, weight, self.bias)


def with_statistics(norm):
    for values in (norm.running_mean, norm.bias.data):
        values.uniform_(-1, 1)
    return norm


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


def standardized_convolution():
    norm = with_statistics(nn.BatchNorm2d(6))
    return [nn.Sequential(StandardizedConv(3, 6, 3), norm)]


def normalized_weights():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return [nn.Sequential(conv, with_statistics(nn.BatchNorm2d(6)))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [NormFirst()],
        lambda: [nn.Conv2d(3, 8, 3), PreActivation()],
        shared_activation,
        activation_between_convolution_and_norm,
        norm_with_activation,
        standardized_convolution,
        normalized_weights,
    ],
    ids=[
        *("norm first", "pre-activation", "shared activation", "activation between"),
        *("norm with activation", "standardized convolution", "normalized weights"),
    ],
)
def test_a_batch_norm_is_folded_only_where_that_is_exact(images, make):
    torch.manual_seed(0)
    blocks = make()

    found = features_of(blocks, images)

    np.testing.assert_allclose(found, by_hand(blocks, images), rtol=1e-4, atol=1e-5)


def test_networks_in_half_precision_run_in_float32(images):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 6, 3).bfloat16()]

    found = features_of(blocks, images)

    expected = by_hand([blocks[0].float()], images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Scale(nn.Module):
    """Multiply by a value that is not a parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, batch):
        return batch * self.factor


def test_two_networks_of_one_name_are_distinct(images):
    small, large = (features_of([Scale(factor)], images) for factor in (1, 100))

    np.testing.assert_allclose(large, 100 * small, rtol=1e-5)


def test_hooks_of_a_sequential_module_are_kept(images):
    sequence = nn.Sequential(nn.Conv2d(3, 4, 3))
    sequence.register_forward_hook(lambda module, args, output: output * 0)

    assert (features_of([sequence], images) == 0).all()


class GrowingConvolution(nn.Module):
    """Change the weights with each call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.n_calls = 0

    def forward(self, batch):
        self.n_calls += 1
        self.conv.weight.data.fill_(self.n_calls)
        return self.conv(batch)


def test_weights_that_a_module_changes_are_used(images):
    preprocessing = Preprocessing(16, mean=(0, 0, 0), std=(1, 1, 1))
    blocks = {"one": GrowingConvolution()}
    backbone = Backbone.from_blocks("growing", blocks, preprocessing=preprocessing)
    settings = {"device": "cpu", "precision": "float32"}
    fitted = CNNFeatureTransformer(backbone, **settings).fit(images)

    first, second = fitted.transform(images), fitted.transform(images)

    assert (second / first).mean() > 1.1  # by two calls of one batch each, at least


class FirstOnly(nn.Module):
    def forward(self, batch):
        return batch[:1]


class Tokens(nn.Module):
    def forward(self, batch):
        return batch.flatten(2)


@pytest.mark.parametrize(
    ("module", "words"),
    [(FirstOnly(), "shape .* for two images"), (Tokens(), "expected a feature map")],
)
def test_outputs_of_other_shapes_are_refused(images, module, words):
    with pytest.raises(ValueError, match=words):
        features_of([module], images)


def test_a_network_for_one_image_size_has_no_strides():
    unflatten = nn.Unflatten(1, (3, 8, 8))
    sequence = [nn.Flatten(), nn.Linear(192, 192), unflatten, nn.Conv2d(3, 4, 3)]

    (layer,) = list_layers(one_block(nn.Sequential(*sequence)))

    assert (layer.channels, layer.stride) == (4, None)


def test_random_weights_need_reset_parameters(images):
    class LearnedScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((3, 1, 1), 7.0))

        def forward(self, batch):
            return batch * self.scale

    with pytest.raises(ValueError, match="LearnedScale 'block'.*reset_parameters"):
        CNNFeatureTransformer(one_block(LearnedScale()), weights=None).fit(images)


def test_a_saved_estimator_is_not_loaded_into_another_network(backbone, images):
    register_backbone(backbone)
    saved = pickle.dumps(CNNFeatureTransformer("mine", layer="block1").fit(images))
    blocks = {"stem": nn.Conv2d(3, 6, 3), "block1": nn.Conv2d(6, 8, 5)}
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))
    register_backbone(other, replace=True)

    with pytest.raises(ValueError, match="'mine' is another network here"):
        pickle.loads(saved)


def test_a_backbone_given_as_an_object_is_saved_with_the_estimator(backbone, images):
    register_backbone(backbone)
    fitted = CNNFeatureTransformer(backbone).fit(images)
    saved = pickle.dumps(fitted)
    _registry._REGISTERED.clear()

    loaded = pickle.loads(saved)

    np.testing.assert_array_equal(loaded.transform(images), fitted.transform(images))


def test_the_fitted_backbone_is_saved_whatever_is_set_afterwards(backbone, images):
    fitted = CNNFeatureTransformer(backbone).fit(images)
    expected = fitted.transform(images)
    fitted.set_params(backbone="resnet18")

    loaded = pickle.loads(pickle.dumps(fitted))

    np.testing.assert_array_equal(loaded.transform(images), expected)


def test_a_copy_from_another_process_is_the_same_backbone(backbone, blocks):
    copied = pickle.loads(pickle.dumps(backbone))
    blocks["stem"][0].weight.data += 1
    other = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(32))

    assert copied == backbone
    assert hash(copied) == hash(backbone)
    assert other != backbone


def test_weights_with_another_head_fit_the_blocks(backbone, blocks, tmp_path, images):
    state = nn.ModuleDict({**blocks, "head": nn.Linear(5, 7)}).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    transformer = CNNFeatureTransformer(backbone, weights=tmp_path / "weights.pt")

    found = transformer.fit_transform(images)

    expected = CNNFeatureTransformer(backbone).fit_transform(images)
    np.testing.assert_array_equal(found, expected)


def test_the_batch_size_is_halved_when_memory_runs_out(images):
    """As on a GPU: here a block refuses more than two images at a time."""

    class SmallMemory(nn.Module):
        def forward(self, batch):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("no room for this batch")
            return batch

    backbone = one_block(SmallMemory())

    halved = CNNFeatureTransformer(backbone, batch_size=8).fit_transform(images)

    small = CNNFeatureTransformer(backbone, batch_size=2).fit_transform(images)
    np.testing.assert_array_equal(halved, small)


def test_a_single_image_that_exceeds_the_memory_is_an_error(images):
    class NoMemory(nn.Module):
        def forward(self, batch):
            if batch.shape[-1] == 8 and batch.abs().sum() > 0:
                raise torch.OutOfMemoryError("no room at all")
            return batch

    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        CNNFeatureTransformer(one_block(NoMemory())).fit_transform(images)


def in_a_row(*blocks, size=32):
    named = {f"block{number}": block for number, block in enumerate(blocks)}
    return Backbone.from_blocks("mine", named, preprocessing=Preprocessing(size))


class Pair(nn.Module):
    def forward(self, batch):
        return batch, batch


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (nn.Conv2d(5, 4, 3), "to have 5 channels, but got 4"),
        (Pair(), "a block returns a tuple, and not one tensor"),
        (nn.Flatten(0), "a block returns a tensor of shape"),
        (nn.Flatten(0, 1), "a block returns a tensor of shape"),
    ],
)
def test_blocks_that_do_not_fit_together_are_refused(images, block, words):
    backbone = in_a_row(nn.Conv2d(3, 4, 3), block)

    with pytest.raises(ValueError, match=f"cannot pass through 'mine'.*{words}"):
        CNNFeatureTransformer(backbone).fit(images)


class OnlyLarge(nn.Module):
    def forward(self, batch):
        if batch.shape[-1] < 16:
            raise AssertionError
        return batch


def test_images_that_are_too_small_keep_the_names_of_the_layers(images):
    backbone = in_a_row(nn.Conv2d(3, 4, 3), OnlyLarge())
    transformer = CNNFeatureTransformer(backbone, image_size=12)

    assert transformer.set_params(layer="block0").fit_transform(images).shape[1] == 4
    with pytest.raises(ValueError, match="12 x 12 .*AssertionError"):
        transformer.set_params(layer="block1").fit(images)


@pytest.mark.parametrize("name", ["forward", "train", "append"])
def test_a_block_is_not_named_like_a_method(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot name a block"):
        Backbone.from_blocks(
            "mine", {name: nn.Conv2d(3, 4, 3)}, preprocessing=Preprocessing(32)
        )
