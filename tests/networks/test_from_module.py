"""A network of the user, of any architecture, becomes a backbone."""

import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small_vit import N_BLOCKS, small_vit, small_vit_module
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from skltl import Backbone, CNNFeatureTransformer, Preprocessing, list_layers
from skltl.exceptions import UnknownLayerError
from skltl.networks import load_network, resolve_layer

# Images are cropped, and scaled to [0, 1] only.
PREPROCESSING = Preprocessing(32, 40, mean=(0,) * 3, std=(1,) * 3)


class ConvNet(nn.Module):
    """A small residual network, in the style of PyTorch's tutorials."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 5)

    def features(self, batch):
        first = self.norm1(self.conv1(batch)).relu()
        second = first + torch.sigmoid(self.conv2(first))
        return torch.relu_(self.conv3(second))

    def forward(self, batch):
        pooled = torch.flatten(self.features(batch).mean((2, 3)), 1)
        return self.fc(self.dropout(pooled))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = ConvNet()
    with torch.no_grad():
        network.norm1.running_mean.normal_()
        network.norm1.running_var.uniform_(0.5, 2)
    return network


@pytest.fixture
def backbone(network):
    return Backbone.from_module("own", network, preprocessing=PREPROCESSING, head="fc")


def extract(images, backbone, **parameters):
    options = {"precision": "float32", "engine": "torch", "device": "cpu"}
    return CNNFeatureTransformer(backbone, **options, **parameters).fit_transform(
        images
    )


def batch_of(images, preprocessing=PREPROCESSING):
    """Return the images as the network sees them."""
    crops = np.stack([preprocessing.crop(image) for image in images])
    mean, std = preprocessing.mean, preprocessing.std
    scaled = (crops / 255 - np.array(mean)) / np.array(std)
    return torch.tensor(scaled, dtype=torch.float32).permute(0, 3, 1, 2)


def test_features_are_those_of_the_network(network, backbone, images):
    network.eval()
    batch = batch_of(images)
    with torch.inference_mode():
        normalized = network.norm1(network.conv1(batch))
        expected = {
            "norm1": normalized.mean((2, 3)),
            "last": network.features(batch).mean((2, 3)),
        }

    for layer in ("norm1", "last"):
        found = extract(images, backbone, layer=layer)
        assert_allclose(found, expected[layer], rtol=1e-5, atol=1e-6)


def test_the_head_returns_the_logits(network, backbone, images):
    batch = batch_of(images)

    found = load_network(backbone, backbone.weights[0], (32, 32)).logits(batch)

    with torch.inference_mode():
        assert torch.equal(found, network.eval()(batch))


def test_children_are_the_main_layers_by_default(backbone):
    layers = list_layers(backbone)

    assert [layer.name for layer in layers] == ["conv1", "norm1", "relu_1"]
    assert [layer.channels for layer in layers] == [8, 8, 12]
    assert [layer.stride for layer in layers] == [2, 2, 4]


def test_main_layers_can_be_named(network):
    layers = {"shallow": "norm1", "deep": "conv3"}

    backbone = Backbone.from_module(
        "own", network, preprocessing=PREPROCESSING, head="fc", layers=layers
    )

    assert [layer.name for layer in list_layers(backbone)][:1] == ["shallow"]
    assert resolve_layer(backbone, "shallow").block == "norm1"


def test_a_layer_of_a_residual_connection_names_the_nearest(backbone):
    with pytest.raises(UnknownLayerError, match=r"'relu' and 'add'"):
        resolve_layer(backbone, "conv2")


def test_the_backbone_holds_a_copy(network, images):
    network.train()
    backbone = Backbone.from_module(
        "own", network, preprocessing=PREPROCESSING, head="fc"
    )
    expected = extract(images, backbone)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()

    assert_array_equal(extract(images, backbone), expected)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_network_without_a_head_ends_at_its_features(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    backbone = Backbone.from_module("own", network, preprocessing=PREPROCESSING)

    found = extract(images, backbone)

    with torch.inference_mode():
        expected = network(batch_of(images)).mean((2, 3))
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_network_is_the_network(network, backbone, images):
    compiled = Backbone.from_module(
        "own", torch.compile(network), preprocessing=PREPROCESSING, head="fc"
    )

    assert_array_equal(extract(images, compiled), extract(images, backbone))


def test_a_network_on_half_precision_runs_in_float32(network, images):
    half = Backbone.from_module(
        "half", network.half(), preprocessing=PREPROCESSING, head="fc"
    )

    found = extract(images, half)

    with torch.inference_mode():
        expected = network.float().eval().features(batch_of(images)).mean((2, 3))
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_network_of_torchvision_with_other_layers_is_a_network(images):
    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    network.maxpool = nn.Identity()
    backbone = Backbone.from_module(
        "own", network, preprocessing=PREPROCESSING, head="fc"
    )

    found = extract(images, backbone, layer="layer2")

    network.eval()
    with torch.inference_mode():
        hidden = network.relu(network.bn1(network.conv1(batch_of(images))))
        expected = network.layer2(network.layer1(hidden)).mean((2, 3))
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Tokens


def tokens_by_hand(images, n_blocks=N_BLOCKS):
    """Return the tokens of the small transformer, normalized after the last block."""
    network = small_vit_module().eval()
    batch = batch_of(images, small_vit().preprocessing)
    with torch.inference_mode():
        patches = network._process_input(batch)
        class_token = network.class_token.expand(len(patches), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        tokens = tokens + network.encoder.pos_embedding
        for block in list(network.encoder.layers)[:n_blocks]:
            tokens = block(tokens)
        return network.encoder.ln(tokens) if n_blocks == N_BLOCKS else tokens


@pytest.mark.parametrize("n_blocks", [1, N_BLOCKS])
def test_the_class_token_is_left_out_of_averages(images, n_blocks):
    tokens = tokens_by_hand(images, n_blocks)
    class_token, average = tokens[:, 0], tokens[:, 1:].mean(1)
    largest = tokens[:, 1:].amax(1)
    expected = {
        "avg": average,
        "max": largest,
        "cls": class_token,
        "cls+avg": torch.cat([class_token, average], dim=1),
        "auto": class_token if n_blocks == N_BLOCKS else average,
    }

    for pooling, by_hand in expected.items():
        found = extract(images, small_vit(), layer=f"block{n_blocks}", pooling=pooling)
        assert_allclose(found, by_hand, rtol=1e-4, atol=1e-5, err_msg=pooling)


def test_the_class_token_needs_prefix_tokens(backbone, images):
    with pytest.raises(
        ValueError, match="needs a class token, which layer .* does not have"
    ):
        extract(images, backbone, pooling="cls")


# Other processes


def test_worker_processes_receive_the_backbone(images):
    backbone = small_vit()

    (found,) = joblib.Parallel(n_jobs=2)(
        joblib.delayed(CNNFeatureTransformer(backbone, n_jobs=1).fit_transform)(part)
        for part in [images]
    )

    expected = CNNFeatureTransformer(backbone, n_jobs=1).fit_transform(images)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_copy_from_another_process_is_the_same_backbone():
    backbone = small_vit()

    copied = pickle.loads(pickle.dumps(backbone))

    assert copied == backbone
    assert copied != small_vit()
    assert list_layers(copied) == list_layers(backbone)


# Refusals


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch):
        if batch.mean() > 0:
            batch = -batch
        return self.conv(batch)


class ReturningTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch):
        hidden = self.conv(batch)
        return {"features": hidden, "image": batch}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Branching(), "'own' cannot be traced: .*values of pixels.*from_blocks"),
        (ReturningTwo(), "returns a dict, and not one tensor"),
        (nn.BatchNorm2d(3, track_running_stats=False), "running statistics"),
        (nn.Linear(3, 4), "'own' cannot be traced"),
        (nn.Identity(), "no layer at which it can be truncated"),
    ],
)
def test_networks_that_cannot_be_traced_are_refused(module, words):
    with pytest.raises(ValueError, match=words):
        Backbone.from_module("own", module, preprocessing=PREPROCESSING)


def test_a_network_of_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(nn.Conv2d(3, 4, 3))

    with pytest.raises(ValueError, match="a module of TorchScript"):
        Backbone.from_module("own", scripted, preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match="a module of TorchScript"):
        Backbone.from_blocks("own", {"one": scripted}, preprocessing=PREPROCESSING)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"head": "classifier"}, "head='classifier' is not the path .* fc"),
        ({"layers": {"deep": "conv2"}}, "cannot be truncated at 'conv2'"),
        ({"layers": {"deep": "conv9"}}, "cannot be truncated at 'conv9'"),
        ({"layers": {"last": "conv1"}}, "'last' cannot name a layer"),
    ],
)
def test_unknown_paths_are_refused(network, parameters, words):
    with pytest.raises(ValueError, match=words):
        Backbone.from_module(
            "own", network, **{"preprocessing": PREPROCESSING, **parameters}
        )


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"module": lambda batch: batch}, "module must be a torch module"),
        ({"preprocessing": 32}, "preprocessing must be a Preprocessing"),
        ({"layers": ["conv1"]}, "layers must be a dictionary"),
        ({"head": nn.Linear(2, 3)}, "head must be an instance of str"),
        ({"n_prefix_tokens": "1"}, "n_prefix_tokens must be an instance of int"),
        ({"name": 3}, "name must be an instance of str"),
    ],
)
def test_parameters_of_other_types_are_refused(network, parameters, words):
    arguments = {"name": "own", "module": network, "preprocessing": PREPROCESSING}

    with pytest.raises(TypeError, match=words):
        Backbone.from_module(**{**arguments, **parameters})
