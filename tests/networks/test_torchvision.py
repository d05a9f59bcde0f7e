"""Every ConvNet of torchvision, taken apart, is still the network that it was."""

import math
from collections import OrderedDict

import pytest
import torch
import torchvision.models as models

from skltl import list_backbones, list_layers
from skltl.inference import FrozenPrefix
from skltl.inference._pooling import pool
from skltl.networks import get_backbone, resolve_layer
from skltl.networks._backbone import cut, load_state, state_of
from skltl.networks._layers import WithoutNumbers, build_skeleton
from skltl.networks._torchvision import list_torchvision

NOT_CONVNETS = ("maxvit", "swin", "vit")  # attention, at least in part

# Published numbers of parameters of the convolutional part (Keras, "no top").
N_CONVOLUTIONAL = {
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet50": 23_508_032,
    "mobilenet_v2": 2_223_872,
    "densenet121": 6_953_856,
    "efficientnet_b0": 4_007_548,
}


def numbers_for(state):
    """Give every tensor numbers of a sensible size, at the speed of copying memory."""
    drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    filled = OrderedDict()
    for key, empty in state.items():
        if key.endswith("num_batches_tracked"):
            filled[key] = torch.tensor(0)
            continue
        n_repeats = math.ceil(empty.numel() / len(drawn))
        values = drawn.repeat(n_repeats)[: empty.numel()].reshape(empty.shape)
        if values.ndim == 1:  # biases; scales and variances, which are near 1
            near_1 = not key.endswith(("bias", "mean"))
            filled[key] = 1 + values.abs() / 8 if near_1 else values / 8
        else:
            filled[key] = values * math.sqrt(2 / values[0].numel())
    return filled


def torchvision_model(name, state):
    """Build torchvision's own network, with these numbers in it."""
    google = {"init_weights": False, "aux_logits": False}
    options = google if name in ("googlenet", "inception_v3") else {}
    with WithoutNumbers():
        model = models.get_model(name, weights=None, **options)
    # MNASNet asks which version of itself wrote a state dict.
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state, assign=True)
    return model.eval()


def n_numbers(state):
    return sum(value.numel() for value in state.values())


def test_every_convnet_is_there():
    named = {
        name
        for name in models.list_models(module=models)
        if not name.startswith(NOT_CONVNETS)
    }

    assert len(named) > 60
    assert named <= set(list_backbones())


@pytest.mark.parametrize("name", list_torchvision())
def test_blocks_and_head_are_the_whole_network(name):
    network = build_skeleton(get_backbone(name))
    state = numbers_for(network.state())
    load_state({**network.blocks, **network.head}, state)
    # The smallest that no pooling shrinks to nothing.
    size = 75 if name == "inception_v3" else 64
    batch = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))

    model = torchvision_model(name, state)
    with torch.inference_mode():
        expected = model(batch.clone())
        logits = network.logits(batch.clone())

    assert torch.isfinite(expected).all()
    assert logits.std() > 0
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", list_torchvision())
def test_a_cut_leaves_nothing_of_what_comes_after(name):
    network = build_skeleton(get_backbone(name))
    with WithoutNumbers():
        options = (
            {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        )
        whole = models.get_model(name, weights=None, **options).state_dict()
    blocks = list(network.blocks)
    sizes = []

    for name_of_cut, block in network.cut_points.items():
        kept = cut(network.blocks, [block])
        rest = {key: network.blocks[key] for key in blocks[blocks.index(block) + 1 :]}
        parts = [state_of(part) for part in (kept, rest, network.head)]
        assert list(kept)[-1] == block, name_of_cut
        assert not parts[0].keys() & (parts[1].keys() | parts[2].keys())
        auxiliary = {key for key in whole if key.lower().startswith("aux")}
        assert set().union(*parts) == whole.keys() - auxiliary
        sizes.append(n_numbers(parts[0]))
        assert sum(map(n_numbers, parts)) == n_numbers(network.state())

    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("name", "n_expected"), N_CONVOLUTIONAL.items())
def test_the_convolutional_part_has_the_published_size(name, n_expected):
    backbone = get_backbone(name)
    network = build_skeleton(backbone)

    kept = cut(network.blocks, [resolve_layer(backbone, "last").block])

    n_parameters = sum(p.numel() for block in kept.values() for p in block.parameters())
    assert n_parameters == n_expected


@pytest.mark.parametrize("name", list_torchvision())
def test_main_cut_points_have_growing_strides_and_short_names(name):
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
    "name",
    [
        *("alexnet", "vgg11_bn", "resnet18", "densenet121", "squeezenet1_1"),
        *("googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small"),
        *("mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "efficientnet_v2_s"),
        *("regnet_y_400mf", "convnext_tiny"),
    ],
)
def test_prepared_blocks_give_what_torchvision_gives_at_every_cut(name):
    """Folding, capturing and pooling against hooks on torchvision's own network."""
    backbone = get_backbone(name)
    network = build_skeleton(backbone)
    state = numbers_for(network.state())
    load_state({**network.blocks, **network.head}, state)
    model = torchvision_model(name, state)
    pixels = torch.randint(
        256, (2, 96, 96, 3), generator=torch.Generator().manual_seed(1)
    )
    mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.22)
    # DenseNet's last cut lies behind a function, not a module, that a hook could be on.
    wanted = [block for block in network.cut_points.values() if block != "relu"]

    runner = FrozenPrefix(network.blocks).runner(
        torch.device("cpu"), torch.float32, wanted
    )
    features = runner.features(
        pixels.to(torch.uint8), mean, std, lambda feature_map: pool(feature_map, "avg")
    )

    seen = {}
    modules = dict(model.named_modules())
    for block in wanted:
        modules[block].register_forward_hook(
            # A copy: the next module's in-place ReLU overwrites the output.
            lambda module, args, output, block=block: seen.update(
                {block: output.clone()}
            )
        )
    with torch.inference_mode():
        model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    maps = [seen[block] for block in wanted]
    by_hand = torch.cat([m.mean((2, 3)) if m.ndim == 4 else m for m in maps], dim=1)
    scale = by_hand.abs().max()
    torch.testing.assert_close(features / scale, by_hand / scale, rtol=1e-4, atol=1e-5)
