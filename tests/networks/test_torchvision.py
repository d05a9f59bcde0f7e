"""Every network of torchvision, split into blocks and a head, is still that network."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torchvision.models as models
from torch import nn

from skltl import CNNFeatureTransformer, list_backbones, list_layers
from skltl.exceptions import UnknownLayerError
from skltl.inference import FrozenPrefix
from skltl.networks import (
    as_network,
    build_skeleton,
    get_backbone,
    resolve_layer,
    skeleton,
    state_of,
    truncate,
)
from skltl.networks._torchvision import FAMILIES, list_torchvision

# One network per family; the others are slow tests.
ONE_PER_FAMILY = (
    *("alexnet", "vgg11_bn", "resnet18", "densenet121", "squeezenet1_1"),
    *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small"),
    *("mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf"),
    *("convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"),
)
TRANSFORMERS = ("vit_b_32", "swin_t", "swin_v2_t", "maxvit_t")
NAMES = [
    pytest.param(name, marks=() if name in ONE_PER_FAMILY else pytest.mark.slow)
    for name in list_torchvision()
]

# Published parameter counts of the part before the head (Keras, "no top"; for the
# transformers, those of their papers without the classifier).
N_BEFORE_HEAD = {
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet50": 23_508_032,
    "mobilenet_v2": 2_223_872,
    "densenet121": 6_953_856,
    "efficientnet_b0": 4_007_548,
    "vit_b_16": 85_798_656,
    "swin_t": 27_519_354,
}

# The smallest size that no pooling reduces to nothing, and that transformers accept.
SIZES = {"inception_v3": 75, "maxvit_t": 224}


def size_of(name):
    side = SIZES.get(name, 224 if name.startswith("maxvit") else 64)
    if name == "vit_h_14":
        side = 70
    return side, side


def random_state(state):
    """Fill a state dict with values of a sensible scale, which are drawn once."""
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    filled = OrderedDict()
    for key, empty in state.items():
        if not empty.is_floating_point():  # counters and tables of indices
            filled[key] = empty if not empty.is_meta else torch.tensor(0)
            continue
        n_repeats = math.ceil(empty.numel() / len(drawn))
        values = drawn.repeat(n_repeats)[: empty.numel()].reshape(empty.shape)
        if values.ndim == 1:  # biases and means; scales and variances are near 1
            near_1 = not key.endswith(("bias", "mean"))
            filled[key] = 1 + values.abs() / 8 if near_1 else values / 8
        else:  # with larger values deep networks and attention would magnify rounding
            gain = 1 if values.ndim == 4 else 0.02
            filled[key] = values * math.sqrt(gain / values[0].numel())
    return filled


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    """Name, network of skltl, and network of torchvision, with the same weights."""
    name = request.param
    backbone, size = get_backbone(name), size_of(name)
    model = build_skeleton(backbone, size)
    model.load(random_state(model.state()))
    return name, as_network(backbone, model, size), model.module.eval()


def test_all_networks_are_listed():
    named = models.list_models(module=models)

    assert len(named) == 80
    assert set(named) <= set(list_backbones())


def test_every_family_is_tested_by_default():
    kinds = {
        type(build_skeleton(get_backbone(name), size_of(name)).module)
        for name in ONE_PER_FAMILY
    }

    assert kinds == FAMILIES.keys()


def test_blocks_and_head_compute_the_same_logits(built):
    name, network, model = built
    batch = torch.randn(
        2, 3, *size_of(name), generator=torch.Generator().manual_seed(1)
    )

    with torch.inference_mode():
        expected = model(batch.clone())
        logits = network.logits(batch.clone())

    assert torch.isfinite(expected).all()
    assert logits.std() > 0
    assert torch.equal(logits, expected)


def test_truncated_blocks_and_the_rest_share_no_weights(built):
    _, network, model = built
    blocks = list(network.blocks)
    sizes = []

    for layer, block in network.layers.items():
        kept = truncate(network.blocks, [block])
        rest = [network.blocks[key] for key in blocks[blocks.index(block) + 1 :]]
        states = [state_of(part) for part in (kept.values(), rest, [network.head])]
        assert list(kept)[-1] == block, layer
        assert not states[0].keys() & (states[1].keys() | states[2].keys())
        assert set().union(*states) == model.state_dict().keys()
        assert sum(map(len, states)) == len(model.state_dict())
        sizes.append(sum(value.numel() for value in states[0].values()))

    assert sizes == sorted(set(sizes))


def test_the_network_is_trainable(built):
    """Dropout, stochastic depth and batch-norms are those of the network."""
    _, network, model = built
    stochastic = (nn.Dropout, nn.modules.batchnorm._BatchNorm)
    kinds = {type(part) for part in model.modules() if isinstance(part, stochastic)}

    parts = {type(part) for block in network.parts for part in block.modules()}

    assert network.is_trainable
    assert kinds <= parts


@pytest.mark.parametrize(("name", "n_expected"), N_BEFORE_HEAD.items())
def test_the_part_before_the_head_has_the_published_size(name, n_expected):
    backbone = get_backbone(name)
    network = skeleton(backbone, backbone.preprocessing.size)

    kept = truncate(network.blocks, [resolve_layer(backbone, "last").block])

    n_parameters = sum(p.numel() for block in kept.values() for p in block.parameters())
    assert n_parameters == n_expected


@pytest.mark.parametrize("name", NAMES)
def test_main_layers_have_growing_strides_and_short_names(name):
    layers = list_layers(name)

    strides = [layer.stride for layer in layers if layer.stride is not None]
    assert strides == sorted(strides)
    assert strides[-1] in (14, 16, 32)
    assert 4 <= len(layers) <= (33 if name.startswith("vit") else 9)
    backbone = get_backbone(name)
    for layer in layers:
        assert layer.name.replace("_", "").isalnum()
        for alias in (layer.name, *layer.aliases, layer.path):
            assert resolve_layer(backbone, alias).block == layer.path
    for alias in skeleton(backbone, backbone.preprocessing.size).aliases:
        assert resolve_layer(backbone, alias).block


@pytest.mark.parametrize(
    "built",
    [*ONE_PER_FAMILY, pytest.param("efficientnet_v2_s", marks=pytest.mark.slow)],
    indirect=True,
)
def test_prepared_blocks_give_the_outputs_of_torchvision(built):
    """Folded, channels last, in segments: as near to the true values as torch is."""
    name, network, model = built
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2, *size_of(name), 3), generator=generator)
    mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.22)
    # The last layer of DenseNet is a function, not a module that can have a hook.
    ends = [block for block in network.layers.values() if block != "relu"]
    wanted = {block: network.layouts[block] for block in ends}
    runner = FrozenPrefix(network.blocks).runner(
        torch.device("cpu"), torch.float32, wanted
    )

    features = runner.features(pixels.to(torch.uint8), mean, std, "flatten")

    batch = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    of_torch = outputs_of(model, batch, ends)
    exact = outputs_of(copy.deepcopy(model).double(), batch.double(), ends)
    sizes = [output.shape[1] for output in exact]
    for part, by_torch, by_hand in zip(
        features.split(sizes, dim=1), of_torch, exact, strict=True
    ):
        scale = by_hand.abs().max()
        rounding = (by_torch - by_hand).abs().max() / scale
        error = (part - by_hand).abs().max() / scale
        assert error < 4 * rounding + 1e-6
        assert rounding < 1e-4


def outputs_of(model, batch, paths):
    """Outputs of the submodules at these paths, flattened."""
    outputs = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(keep_output(outputs, path))
        for path in paths
    ]
    with torch.inference_mode():
        model(batch)
    for hook in hooks:
        hook.remove()
    return [outputs[path].flatten(1) for path in paths]


def keep_output(outputs, block):
    def hook(module, args, output):
        # A copy: the next module's in-place ReLU overwrites the output.
        outputs[block] = output.clone()

    return hook


@pytest.mark.parametrize(
    ("layer", "nearest"),
    [
        ("layer3.0.conv2", "'layer2.1' and 'layer3.0.add'"),
        ("layer1.0.bn1", "'maxpool' and 'layer1.0.add'"),
    ],
)
def test_a_module_inside_of_a_residual_connection_names_the_nearest(layer, nearest):
    with pytest.raises(UnknownLayerError, match=nearest):
        resolve_layer(get_backbone("resnet18"), layer)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_b_32", 100, "multiples of 32 pixels and equal"),
        ("maxvit_t", 256, "multiples of 224 pixels"),
    ],
)
def test_sizes_that_a_transformer_cannot_take_name_those_it_can(
    name, size, words, images
):
    transformer = CNNFeatureTransformer(name, weights=None, image_size=size)

    with pytest.raises(ValueError, match=words):
        transformer.fit(images)
