"""Verification: the blocks of a network compute what the network computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skltl._parameters import settle_in_forked_child
from skltl._random import own_random_state, torch_defaults
from skltl.networks._backbone import Backbone
from skltl.networks._building import (
    as_network,
    reason_of,
    refusal,
    skeleton,
    trace_of,
    untraceable,
    usual_size,
)
from skltl.networks._network import ImageSize, Model, state_of
from skltl.networks._recording import FORWARD_ERRORS

# The sizes of images for which the blocks of a network have been compared with it.
_checked: WeakKeyDictionary[Backbone, set[ImageSize]] = WeakKeyDictionary()


def check(
    backbone: Backbone, model: Model, image_size: ImageSize, n_images: int = 1
) -> None:
    """Compare the blocks of a network with the network itself, once for each size.

    Where images vanish in the network, images of its usual size are used. The network
    is run, or a copy of it if the backbone owns it.
    """
    # Modules of a sequence are used as they are; a truncated network lacks weights.
    if model.is_sequence or model.last_block is not None:
        return
    if trace_of(backbone, image_size).error is not None:
        image_size = usual_size(backbone)
    if image_size in _checked.setdefault(backbone, set()):
        return
    settle_in_forked_child()
    if backbone.own_network is model:
        model = copy.deepcopy(model)
    network = as_network(backbone, model, image_size)
    generator = torch.Generator("cpu").manual_seed(0)
    options: Any = {"dtype": torch.float32, "device": "cpu", "generator": generator}
    batch = torch.randn(n_images, backbone.n_channels, *image_size, **options)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        try:
            expected = model.module.eval()(batch.clone())
        except FORWARD_ERRORS as error:  # old releases of torch trace what cannot run
            reason = refusal(backbone, image_size, reason_of(error))
            raise ValueError(reason) from error
        found = network.logits(batch.clone())
        alone = found[:1] if n_images == 1 else network.logits(batch[:1])
    if expected.dtype != torch.float32:
        raise untraceable(backbone, f"it returns values of the type {expected.dtype}")
    if not _is_same(found, expected):
        raise untraceable(backbone, "its blocks do not compute what it computes")
    scale = float(found.nan_to_num().abs().max())
    if not torch.allclose(alone, found[:1], rtol=0, atol=1e-3 * scale, equal_nan=True):
        raise untraceable(backbone, "what it computes depends on the other images")
    _checked[backbone].add(image_size)


def check_own(backbone: Backbone, layers: Iterable[str]) -> None:
    """Check the network that a backbone owns, and that it has some main layers."""
    model = backbone.own_network
    assert model is not None
    # Another number of images than in the trace.
    check(backbone, model, usual_size(backbone), n_images=5)
    network = skeleton(backbone, usual_size(backbone))
    if model.head and network.head is not None and not state_of([network.head]):
        raise ValueError(
            f"head={model.head[0]!r} has no weights that the forward pass uses, so it "
            "cannot return the logits."
        )
    for name in set(layers) - network.layers.keys():
        raise ValueError(
            f"layers: {backbone.name!r} cannot be truncated at "
            f"{model.layers[name]!r}. It can be truncated at "
            f"{', '.join(list(network.blocks)[-12:])}."
        )


def has_equal_gradients(backbone: Backbone) -> bool:
    """Return whether the blocks of an own network are trained as the network is.

    A backward pass of its own, or code without gradients, leaves no trace.
    """
    own, size = backbone.own_network, usual_size(backbone)
    assert own is not None
    if not skeleton(backbone, size).is_trainable:
        return False
    blocks = as_network(backbone, copy.deepcopy(own), size).parts
    shape = (2, backbone.n_channels, *size)
    try:
        expected = _gradients([copy.deepcopy(own.module)], shape)
    except FORWARD_ERRORS:  # it cannot be trained
        return False
    found = _gradients(blocks, shape)
    return all(
        torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6, equal_nan=True)
        for name, gradient in expected.items()
        if name in found
    )


def _gradients(parts: Sequence[nn.Module], shape: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradients of all weights for a random batch, in train mode."""
    for part in parts:
        part.train().requires_grad_(True)
    with own_random_state(0), torch_defaults(), torch.enable_grad():
        output = torch.randn(shape, dtype=torch.float32, device="cpu")
        for part in parts:
            output = part(output)
        torch.autograd.backward(output.square().mean())
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for part in parts
        for name, weight in part.named_parameters()
    }


def _is_same(one: Tensor, other: Any) -> bool:
    """Return whether tensors are equal; NaN is NaN."""
    is_tensor = isinstance(other, Tensor) and one.shape == other.shape
    return is_tensor and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
