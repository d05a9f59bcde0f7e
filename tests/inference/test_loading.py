"""A network is loaded once, prepared once, and nothing more is kept than is of use."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from skltl.exceptions import WeightsError
from skltl.inference import _frozen as _loading
from skltl.inference import load_prefix
from skltl.networks import get_backbone, random_network, resolve_layer, resolve_weights


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Begin with empty memories."""
    monkeypatch.setattr(_loading, "_networks", type(_loading._networks)())
    monkeypatch.setattr(_loading, "_prefixes", type(_loading._prefixes)())


@pytest.fixture
def weights_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(models.alexnet(weights=None).state_dict(), path)
    return path


def prefix(layer, weights_file):
    backbone = get_backbone("alexnet")
    block = resolve_layer(backbone, layer).block
    return load_prefix(backbone, resolve_weights(backbone, weights_file), None, [block])


def numbers_of(prefix):
    return sum(
        p.numel() for block in prefix.blocks.values() for p in block.parameters()
    )


def test_all_cuts_share_the_numbers_of_one_network(weights_file):
    prefixes = [prefix(f"block{number}", weights_file) for number in range(1, 6)]

    first = prefixes[0].blocks["features.0"].weight
    assert all(one.blocks["features.0"].weight is first for one in prefixes)
    assert numbers_of(prefixes[0]) == first.numel() + 64


def test_fully_connected_layers_are_kept_only_where_they_are_asked_for(weights_file):
    shallow = prefix("block2", weights_file)
    kept = next(iter(_loading._networks.values()))

    assert "classifier.1" not in kept
    assert numbers_of(prefix("fc7", weights_file)) > 50e6
    assert numbers_of(shallow) < 1e6


def test_a_file_that_has_changed_is_loaded_again(weights_file):
    before = prefix("block1", weights_file).blocks["features.0"].weight.clone()
    torch.manual_seed(1)
    save_file(models.alexnet(weights=None).state_dict(), weights_file)

    after = prefix("block1", weights_file).blocks["features.0"].weight

    assert not torch.equal(before, after)


def test_a_file_copied_over_with_the_old_time_is_loaded_again(weights_file):
    before = prefix("block1", weights_file).blocks["features.0"].weight.clone()
    stat = weights_file.stat()
    torch.manual_seed(1)
    save_file(models.alexnet(weights=None).state_dict(), weights_file)
    os.utime(weights_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = prefix("block1", weights_file).blocks["features.0"].weight

    assert not torch.equal(before, after)


def test_what_is_loaded_does_not_change_with_the_file(weights_file):
    weight = prefix("block1", weights_file).blocks["features.0"].weight
    before = weight.clone()

    with weights_file.open("r+b") as file:  # in place, as `cp` does it
        file.write(bytes(weights_file.stat().st_size))

    assert torch.equal(weight, before)


def test_numbers_in_use_must_be_finite(weights_file):
    torch.manual_seed(0)
    state = models.alexnet(weights=None).state_dict()
    state["features.3.bias"][:] = torch.inf
    save_file(state, weights_file)

    with pytest.raises(WeightsError, match="'features.3.bias' holds NaN or infinity"):
        prefix("block1", weights_file)


def test_numbers_not_in_use_may_be_anything(weights_file):
    """As in torchvision's VGG-16 ``IMAGENET1K_FEATURES``, whose classifier is NaN."""
    torch.manual_seed(0)
    state = models.alexnet(weights=None).state_dict()
    state["classifier.1.bias"][:] = torch.nan
    save_file(state, weights_file)

    assert torch.isfinite(prefix("last", weights_file).blocks["features.0"].bias).all()
    with pytest.raises(WeightsError, match="'classifier.1.bias' holds NaN"):
        prefix("fc6", weights_file)


def test_prepared_networks_have_no_batch_norm_left():
    backbone = get_backbone("resnet18")
    blocks = [resolve_layer(backbone, layer).block for layer in ("stem", "layer4")]
    loaded = load_prefix(backbone, None, 0, blocks)

    runner = loaded.runner(torch.device("cpu"), torch.bfloat16, blocks)

    segments = runner._engine._segments.values()
    modules = [part for segment in segments for part in segment.modules()]
    assert not [part for part in modules if isinstance(part, nn.BatchNorm2d)]
    convolutions = [part for part in modules if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 20
    for convolution in convolutions:
        weight = convolution.weight
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_threads_that_begin_together_load_one_network():
    backbone = get_backbone("squeezenet1_1")
    block = resolve_layer(backbone, "last").block
    barrier = threading.Barrier(6)
    found = []

    def load():
        barrier.wait()
        loaded = load_prefix(backbone, None, 7, [block])
        runner = loaded.runner(torch.device("cpu"), torch.float32, [block])
        found.append((loaded, runner))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 6
    assert len({id(loaded) for loaded, _ in found}) == 1
    assert len({id(runner) for _, runner in found}) == 1


def test_networks_that_cannot_be_asked_for_again_are_not_kept():
    backbone = get_backbone("tiny")

    first, second = (load_prefix(backbone, None, None, ["stem.2"]) for _ in range(2))

    weights = [one.blocks["stem.0"].weight for one in (first, second)]
    assert not torch.equal(*weights)
    assert not _loading._networks
    assert not _loading._prefixes


def test_random_networks_do_not_touch_the_global_generator():
    before = torch.get_rng_state()

    random_network(get_backbone("tiny"), 3)

    assert torch.equal(torch.get_rng_state(), before)
