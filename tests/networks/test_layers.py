"""Names of layers and backbones, and how they are resolved."""

import pytest

from skltl import list_backbones, list_layers
from skltl.exceptions import UnknownBackboneError, UnknownLayerError
from skltl.networks import (
    get_backbone,
    random_network,
    resolve_layer,
    truncate,
    truncated_backbone,
)


@pytest.mark.parametrize(
    ("backbone", "layer", "block"),
    [
        ("vgg16", "last", "features.30"),
        ("vgg16", "block1", "features.4"),
        ("vgg16", "block5", "features.30"),
        ("vgg16", "pool5", "features.30"),
        ("vgg16", "fc7", "classifier.4"),
        ("vgg16", -1, "classifier.4"),
        ("vgg16", -3, "features.30"),
        ("vgg16", "features.12", "features.12"),
        ("vgg16_bn", "block5", "features.43"),
        ("alexnet", "fc6", "classifier.2"),
        ("alexnet", "pool5", "features.12"),
        ("resnet50", "last", "layer4.2"),
        ("resnet50", "stem", "maxpool"),
        ("resnet50", "layer3", "layer3.5"),
        ("resnet50", "layer3.2", "layer3.2"),
        ("resnet50", "conv4_x", "layer3.5"),
        ("resnet50", "bn1", "bn1"),
        ("resnet50", -2, "layer3.5"),
        ("resnet50", "avgpool", "avgpool"),
        ("resnet50", 0, "maxpool"),
        ("squeezenet1_0", "last", "features.12"),
        ("squeezenet1_0", "fire7", "features.9"),
        ("mobilenet_v3_large", "last", "features.16.2"),
        ("mobilenet_v3_large", -1, "classifier.1"),
        ("regnet_y_400mf", "block4", "trunk_output.block4.block4-5"),
        ("convnext_tiny", "stage4", "features.7.2"),
        ("densenet121", "denseblock2", "features.denseblock2"),
        ("tiny", "last", "block4.1"),
    ],
)
def test_a_layer_resolves_to_a_block(backbone, layer, block):
    assert resolve_layer(get_backbone(backbone), layer).block == block


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("layer5", "'layer4'"),
        ("Layer3", "'layer3'"),
        ("layer3.9", r"'layer3\.\d'"),
        ("block3", "stem, layer1, layer2, layer3, layer4"),
        ("fc", "stem, layer1"),
        (5, "5 main layers: stem"),
        (-6, "5 main layers: stem"),
    ],
)
def test_an_unknown_layer_lists_similar_names(layer, words):
    with pytest.raises(UnknownLayerError, match=words):
        resolve_layer(get_backbone("resnet50"), layer)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet", "'resnet50'|'resnet18'"),
        ("VGG16", "'vgg16'"),
    ],
)
def test_an_unknown_backbone_lists_similar_names(name, words):
    with pytest.raises(UnknownBackboneError, match=words):
        get_backbone(name)


def test_tiny_is_listed_first():
    assert list_backbones()[0] == "tiny"


def test_main_layers_are_listed_with_their_shapes():
    described = {layer.name: layer for layer in list_layers("alexnet")}

    assert list(described) == [*(f"block{n}" for n in range(1, 6)), "fc6", "fc7"]
    assert described["fc7"].channels == described["fc7"].n_features == 4096
    assert described["fc7"].stride is None
    assert described["block5"].n_features == 256 * 6 * 6
    assert (described["block1"].channels, described["block1"].stride) == (64, 8)


def test_strides_are_those_of_the_layers_not_ratios_of_sizes():
    """8 x 8 positions of 240 x 240 pixels: padding hides the stride of 32."""
    strides = [layer.stride for layer in list_layers("efficientnet_b1")]

    assert strides == [2, 2, 4, 8, 16, 16, 32, 32, 32]


@pytest.mark.parametrize("layer", ["layer4", "layer4.1.conv1"])
def test_a_truncated_network_has_no_layers_beyond_its_end(layer):
    backbone = get_backbone("resnet18")
    blocks = random_network(backbone, 0, (64, 64)).blocks
    kept = truncate(blocks, ["layer2.0"])
    own = truncated_backbone(backbone, kept, backbone.preprocessing)

    assert resolve_layer(own, "layer1.1").block in kept
    with pytest.raises(UnknownLayerError, match=f"no layer '{layer}'"):
        resolve_layer(own, layer)
