"""A network is loaded once, prepared once, and nothing is kept that is not needed."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skltl import Backbone, Preprocessing
from skltl.exceptions import WeightsError
from skltl.inference import _frozen, load_prefix
from skltl.inference._frozen import build_segments
from skltl.networks import (
    get_backbone,
    layouts,
    random_network,
    resolve_layer,
    resolve_weights,
)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Start with empty caches."""
    for name in ("_networks", "_prefixes"):
        monkeypatch.setattr(_frozen, name, type(getattr(_frozen, name))())


@pytest.fixture(scope="module")
def backbone():
    """Three convolutions, of which "last" is the third, and two large linear layers."""
    torch.manual_seed(0)
    blocks = {f"conv{n}": nn.Conv2d(3, 3, 3) for n in range(3)}
    blocks |= {
        "flat": nn.Flatten(),
        "fc0": nn.Linear(300, 400),
        "fc1": nn.Linear(*[400] * 2),
    }
    return Backbone.from_blocks("convs", blocks, preprocessing=Preprocessing(16))


@pytest.fixture
def state(backbone):
    return {key: value + 1 for key, value in backbone.own_network.state().items()}


@pytest.fixture
def weights_file(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def load(backbone, layer, weights_file):
    block = resolve_layer(backbone, layer).block
    weights = resolve_weights(backbone, weights_file)
    return load_prefix(backbone, weights, None, (16, 16), [block])


def parameter(prefix, name):
    block, _, _ = name.partition(".")
    return prefix.blocks[block].get_parameter(name)


def n_weights(prefix):
    blocks = prefix.blocks.values()
    return sum(one.numel() for block in blocks for one in block.parameters())


def test_all_layers_share_the_weights_of_one_network(backbone, weights_file):
    prefixes = [load(backbone, f"conv{n}", weights_file) for n in range(3)]

    first = parameter(prefixes[0], "conv0.weight")
    assert all(parameter(one, "conv0.weight") is first for one in prefixes)
    assert [n_weights(one) for one in prefixes] == [84, 2 * 84, 3 * 84]


def test_fully_connected_layers_are_kept_only_if_requested(backbone, weights_file):
    shallow = load(backbone, "conv0", weights_file)
    kept = next(iter(_frozen._networks.values()))

    assert list(kept) == ["conv0", "conv1", "conv2"]
    assert n_weights(load(backbone, "fc1", weights_file)) > 200_000
    assert n_weights(shallow) == 84


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_modified_file_is_loaded_again(backbone, state, weights_file, keeps_time):
    loaded = load(backbone, "conv0", weights_file)
    before = parameter(loaded, "conv0.weight").clone()
    stat = weights_file.stat()
    save_file({key: 2 * value for key, value in state.items()}, weights_file)
    if keeps_time:
        os.utime(weights_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = parameter(load(backbone, "conv0", weights_file), "conv0.weight")

    assert torch.equal(after, 2 * before)


def test_loaded_weights_do_not_change_with_the_file(backbone, weights_file):
    weight = parameter(load(backbone, "conv0", weights_file), "conv0.weight")
    before = weight.clone()

    with weights_file.open("r+b") as file:  # in place, as `cp` does it
        file.write(bytes(weights_file.stat().st_size))

    assert torch.equal(weight, before)


def test_weights_in_use_must_be_finite(backbone, state, tmp_path):
    state["conv1.bias"][:] = torch.inf
    save_file(state, tmp_path / "weights.safetensors")

    with pytest.raises(WeightsError, match="'conv1.bias' holds NaN or infinity"):
        load(backbone, "conv0", tmp_path / "weights.safetensors")


def test_weights_not_in_use_need_not_be_finite(backbone, state, tmp_path):
    """As in torchvision's VGG-16 ``IMAGENET1K_FEATURES``, whose classifier is NaN."""
    state["fc0.bias"][:] = torch.nan
    save_file(state, tmp_path / "weights.safetensors")

    prefix = load(backbone, "last", tmp_path / "weights.safetensors")

    assert torch.equal(parameter(prefix, "conv2.bias"), state["conv2.bias"])
    with pytest.raises(WeightsError, match="'fc0.bias' holds NaN"):
        load(backbone, "fc0", tmp_path / "weights.safetensors")


def test_prepared_networks_have_no_batch_norm_left():
    backbone = get_backbone("resnet18")
    blocks = [resolve_layer(backbone, layer).block for layer in ("stem", "layer4")]
    loaded = load_prefix(backbone, None, 0, (64, 64), blocks)

    segments = build_segments(
        loaded.blocks, set(blocks), torch.device("cpu"), torch.bfloat16
    )

    assert list(segments) == blocks
    modules = [part for segment in segments.values() for part in segment.modules()]
    assert not [part for part in modules if isinstance(part, nn.BatchNorm2d)]
    convolutions = [part for part in modules if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 20
    for convolution in convolutions:
        weight = convolution.weight
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)
    parts = [part for block in loaded.blocks.values() for part in block.modules()]
    assert any(isinstance(part, nn.BatchNorm2d) for part in parts)


def test_concurrent_threads_load_one_network():
    backbone = get_backbone("tiny")
    block = resolve_layer(backbone, "last").block
    barrier = threading.Barrier(6)
    found = []

    def load():
        barrier.wait()
        loaded = load_prefix(backbone, None, 7, (32, 32), [block])
        wanted = layouts(backbone, (32, 32), (block,))
        runner = loaded.runner(torch.device("cpu"), torch.float32, wanted)
        found.append((loaded, runner))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 6
    assert len({id(loaded) for loaded, _ in found}) == 1
    assert len({id(runner) for _, runner in found}) == 1


def test_random_networks_without_a_seed_are_not_kept():
    backbone = get_backbone("tiny")

    first, second = (
        load_prefix(backbone, None, None, (32, 32), ["stem.2"]) for _ in range(2)
    )

    weights = [
        one.blocks["stem.0"].get_parameter("stem.0.weight") for one in (first, second)
    ]
    assert not torch.equal(*weights)
    assert not _frozen._networks
    assert not _frozen._prefixes


def test_random_networks_leave_the_global_generator_alone():
    before = torch.get_rng_state()

    random_network(get_backbone("tiny"), 3, (32, 32))

    assert torch.equal(torch.get_rng_state(), before)
