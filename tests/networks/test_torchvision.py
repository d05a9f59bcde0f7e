"""Every ConvNet of torchvision, split into blocks and a head, is still that network."""

import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision.models as models

from skltl import list_backbones, list_layers
from skltl.inference import FrozenPrefix
from skltl.networks import (
    build_skeleton,
    get_backbone,
    load_state,
    resolve_layer,
    skeleton,
    state_of,
    truncate,
)
from skltl.networks._layers import MetaParameters
from skltl.networks._torchvision import FAMILIES, list_torchvision

UNSUPPORTED = ("maxvit", "swin", "vit")

# One network per family; the others are slow tests.
ONE_PER_FAMILY = (
    *("alexnet", "vgg11_bn", "resnet18", "densenet121", "squeezenet1_1"),
    *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small"),
    *("mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf"),
    "convnext_tiny",
)
NAMES = [
    pytest.param(name, marks=() if name in ONE_PER_FAMILY else pytest.mark.slow)
    for name in list_torchvision()
]

# Published parameter counts of the convolutional part (Keras, "no top").
N_CONVOLUTIONAL = {
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet50": 23_508_032,
    "mobilenet_v2": 2_223_872,
    "densenet121": 6_953_856,
    "efficientnet_b0": 4_007_548,
}


def random_state(state):
    """Fill a state dict with values of a sensible scale, which are drawn once."""
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    filled = OrderedDict()
    for key, empty in state.items():
        if key.endswith("num_batches_tracked"):
            filled[key] = torch.tensor(0)
            continue
        n_repeats = math.ceil(empty.numel() / len(drawn))
        values = drawn.repeat(n_repeats)[: empty.numel()].reshape(empty.shape)
        if values.ndim == 1:  # biases and means; scales and variances are near 1
            near_1 = not key.endswith(("bias", "mean"))
            filled[key] = 1 + values.abs() / 8 if near_1 else values / 8
        else:
            filled[key] = values * math.sqrt(2 / values[0].numel())
    return filled


def torchvision_model(name, state):
    """Build the network of torchvision with these weights."""
    is_google = name in ("googlenet", "inception_v3")
    options = {"init_weights": False, "aux_logits": False} if is_google else {}
    with MetaParameters():
        model = models.get_model(name, weights=None, **options)
    # MNASNet reads in the metadata which of its versions wrote a state dict.
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    """Name, network of skltl, and network of torchvision, with the same weights."""
    name = request.param
    network = build_skeleton(get_backbone(name))
    state = random_state(network.state())
    load_state({**network.blocks, **network.head}, state)
    return name, network, torchvision_model(name, state)


def test_all_convnets_are_listed():
    named = models.list_models(module=models)
    convnets = {name for name in named if not name.startswith(UNSUPPORTED)}

    assert len(convnets) > 60
    assert convnets <= set(list_backbones())


def test_every_family_is_tested_by_default():
    with MetaParameters(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        kinds = {type(models.get_model(name, weights=None)) for name in ONE_PER_FAMILY}

    assert kinds == FAMILIES.keys()


def test_blocks_and_head_compute_the_same_logits(built):
    name, network, model = built
    # The smallest size that no pooling reduces to nothing.
    size = 75 if name == "inception_v3" else 64
    batch = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))

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
        rest = {key: network.blocks[key] for key in blocks[blocks.index(block) + 1 :]}
        states = [state_of(part) for part in (kept, rest, network.head)]
        assert list(kept)[-1] == block, layer
        assert not states[0].keys() & (states[1].keys() | states[2].keys())
        assert set().union(*states) == model.state_dict().keys()
        assert sum(map(len, states)) == len(model.state_dict())
        sizes.append(sum(value.numel() for value in states[0].values()))

    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("name", "n_expected"), N_CONVOLUTIONAL.items())
def test_the_convolutional_part_has_the_published_size(name, n_expected):
    backbone = get_backbone(name)

    kept = truncate(skeleton(backbone).blocks, [resolve_layer(backbone, "last").block])

    n_parameters = sum(p.numel() for block in kept.values() for p in block.parameters())
    assert n_parameters == n_expected


@pytest.mark.parametrize("name", NAMES)
def test_main_layers_have_growing_strides_and_short_names(name):
    layers = list_layers(name)

    strides = [layer.stride for layer in layers if layer.stride is not None]
    assert strides == sorted(strides)
    assert strides[-1] in (16, 32)
    assert 4 <= len(layers) <= 9
    for layer in layers:
        assert layer.name.replace("_", "").isalnum()
        for alias in (layer.name, *layer.aliases, layer.path):
            assert resolve_layer(get_backbone(name), alias).block == layer.path


@pytest.mark.parametrize(
    "built",
    [*ONE_PER_FAMILY, pytest.param("efficientnet_v2_s", marks=pytest.mark.slow)],
    indirect=True,
)
def test_prepared_blocks_give_the_feature_maps_of_torchvision(built):
    """Folded, channels last, in segments: equal up to rounding at every layer."""
    _, network, model = built
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2, 96, 96, 3), generator=generator)
    mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.22)
    # The last layer of DenseNet is a function, not a module that can have a hook.
    wanted = [block for block in network.layers.values() if block != "relu"]
    runner = FrozenPrefix(network.blocks).runner(
        torch.device("cpu"), torch.float32, wanted
    )

    features = runner.features(pixels.to(torch.uint8), mean, std, "avg")

    outputs = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[block].register_forward_hook(partial(keep_output, outputs, block))
        for block in wanted
    ]
    with torch.inference_mode():
        model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    for hook in hooks:
        hook.remove()
    feature_maps = [outputs[block] for block in wanted]
    pooled = [one.mean((2, 3)) if one.ndim == 4 else one for one in feature_maps]
    by_hand = torch.cat(pooled, dim=1)
    scale = by_hand.abs().max()
    torch.testing.assert_close(features / scale, by_hand / scale, rtol=1e-4, atol=1e-5)


def keep_output(outputs, block, module, args, output):
    # A copy: the next module's in-place ReLU overwrites the output.
    outputs[block] = output.clone()
