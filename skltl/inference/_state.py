"""Persistence: fitted networks as plain data, for the pickles of estimators.

A state holds numpy arrays, names and text, except for a `Backbone` of the user. With
it go the versions that wrote it and the structure of the network, so that loading
into another network of the same name is noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from skltl.exceptions import WeightsError
from skltl.inference._frozen import FrozenPrefix, load_prefix
from skltl.networks import (
    Backbone,
    Block,
    ImageSize,
    Network,
    as_network,
    build_skeleton,
    get_backbone,
    layouts,
    resolve_weights,
    skeleton,
    state_of,
    structure,
    truncate,
    versions,
)

State = dict[str, Any]


def prefix_state(
    backbone: Backbone, prefix: FrozenPrefix, image_size: ImageSize, by_name: bool
) -> State:
    """Return a frozen prefix, and its backbone or the backbone's name, as a state.

    Weights equal to those of the network that a backbone owns are left out, since they
    are saved with the backbone.
    """
    blocks = prefix.blocks.values()
    weights = state_of(blocks)
    own = None if by_name else backbone.own_state
    if own is not None:
        weights = {
            key: value
            for key, value in weights.items()
            if key not in own or not _is_same(value, own[key])
        }
    return {
        "versions": versions(blocks),
        "backbone": backbone.name if by_name else backbone,
        "image_size": list(image_size),
        "last_block": list(prefix.blocks)[-1],
        "structure": structure(blocks) if own is None else None,
        "weights": {key: value.numpy() for key, value in weights.items()},
    }


def prefix_reference(
    backbone: Backbone,
    prefix: FrozenPrefix,
    image_size: ImageSize,
    weights: str | None,
    by_name: bool,
) -> State:
    """Return the name of the weights of a prefix, and their digest, as a state.

    The backbone itself is part of it, unless it is known `by_name`.
    """
    if weights is None or backbone.own_state is not None:
        raise ValueError(
            "store_weights=False requires weights with a name or in a file, and a "
            "backbone that does not hold them. Set store_weights=True to save "
            f"{'random weights' if weights is None else repr(backbone.name)}."
        )
    state = prefix_state(backbone, prefix, image_size, by_name)
    digest = digest_of(prefix.blocks.values())
    return {**state, "weights": None, "reference": [weights, digest]}


def _prefix_from_reference(state: State) -> tuple[Backbone, FrozenPrefix]:
    """Load the weights that a state names; refuse others."""
    backbone = get_backbone(state["backbone"])
    image_size, last = tuple(state["image_size"]), state["last_block"]
    name, digest = state["reference"]
    saved = (
        f"The estimator was saved with store_weights=False, with the weights {name!r} "
        f"of {backbone.name!r} by {_as_text(state['versions'])}"
    )
    try:
        weights = resolve_weights(backbone, name)
        if last not in skeleton(backbone, image_size).blocks:
            raise _another_network(backbone, f"it has no block {last!r}", state)
        prefix = load_prefix(backbone, weights, None, image_size, [last])
    except WeightsError as error:
        raise type(error)(f"{saved}. {error}") from error
    _check_structure(backbone, prefix.blocks.values(), state)
    if digest_of(prefix.blocks.values()) != digest:
        raise WeightsError(f"{saved}. The weights of this name are different here.")
    return backbone, prefix


def digest_of(blocks: Iterable[Block]) -> str:
    """Return a digest of the names, shapes and values of the weights of blocks."""
    digest = blake2b(digest_size=16)
    for key, tensor in sorted(state_of(blocks).items()):
        digest.update(f"{(key, str(tensor.dtype), tuple(tensor.shape))}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prefix_from_state(state: State) -> tuple[Backbone, FrozenPrefix]:
    """Build the backbone and the frozen prefix of a state; refuse another network."""
    if "reference" in state:
        return _prefix_from_reference(state)
    backbone = get_backbone(state["backbone"])
    image_size, last = tuple(state["image_size"]), state["last_block"]
    is_by_value = "structure" in state and state["structure"] is None
    own = backbone.own_state if is_by_value else None
    is_shared = own is not None and not state["weights"]
    network = _build(backbone, image_size, is_shared=is_shared)
    if last not in network.blocks:
        raise _another_network(backbone, f"it has no block {last!r}", state)
    blocks = truncate(network.blocks, [last])
    if state.get("structure") is not None:
        _check_structure(backbone, blocks.values(), state)
    _check_shapes(backbone, blocks, state, is_by_value)
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    weights = {**(own or {}), **weights}
    for block in blocks.values():
        block.load_state_dict(weights, strict=False, assign=True)
    return backbone, FrozenPrefix(blocks)


def from_format_2(state: State) -> State:
    """Return the state of an estimator from a development version of 0.2.0.

    Its blocks were modules with the same weights, named by module paths, and its heads
    were for feature maps only.
    """
    network = state["network_"]
    backbone = get_backbone(network["backbone"])
    size = state["preprocessing_"]["crop_size"]
    paths = skeleton(backbone, (size, size)).paths
    layers = [[name, paths[block]] for name, block in state["layers_"]]
    network = {
        "versions": network["versions"],
        "backbone": network["backbone"],
        "image_size": [size, size],
        "last_block": paths[network["blocks"][-1]],
        "weights": network["weights"],
    }
    changed = {"network_": network, "layers_": layers}
    if "layers" in state.get("head_", {}):
        (layout,) = layouts(backbone, (size, size), (layers[0][1],)).values()
        specs = [
            [*spec, asdict(layout)] if spec[0] == "pool" else spec
            for spec in state["head_"]["layers"]
        ]
        changed["head_"] = {**state["head_"], "layers": specs}
    return {**state, **changed}


def own_head_state(head: Block) -> State:
    """Return a network's own head as a state."""
    return {
        "versions": versions([head]),
        "structure": structure([head]),
        "weights": {key: value.numpy() for key, value in head.state_dict().items()},
    }


def own_head_from_state(
    backbone: Backbone, state: State, image_size: ImageSize, n_classes: int
) -> Block:
    """Build a network's own head from a state; refuse another one."""
    weights = {key: as_tensor(value) for key, value in state["weights"].items()}
    shapes = {key: value.shape for key, value in weights.items()}
    head = _build(backbone, image_size).head
    assert head is not None
    if shapes != {key: value.shape for key, value in head.state_dict().items()}:
        head = _build(backbone, image_size, n_classes).head
        assert head is not None
    _check_structure(backbone, [head], state)
    head.load_state_dict(weights, assign=True)
    return head.requires_grad_(False)


def _build(
    backbone: Backbone,
    image_size: ImageSize,
    n_classes: int | None = None,
    is_shared: bool = False,
) -> Network:
    """Build a network to load weights into, or return the one that a backbone owns."""
    if is_shared and backbone.own_network is not None:
        return skeleton(backbone, image_size)
    built = build_skeleton(backbone, image_size, n_classes)
    return as_network(backbone, built, image_size)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Copy an array to a tensor on the CPU, whatever the user's default device is."""
    return torch.tensor(array, device="cpu")


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal bit for bit: NaN is NaN, and 0 is not -0."""
    return one.shape == other.shape and (
        one.data_ptr() == other.data_ptr()
        or one.numpy().tobytes() == other.numpy().tobytes()
    )


def _check_structure(
    backbone: Backbone, blocks: Collection[Block], state: State
) -> None:
    """Refuse blocks with other layers or settings than those of a state.

    Another version of torch may know more settings of a layer, and call its functions
    otherwise: settings are compared as far as both versions have them.
    """
    there, here = state["structure"], structure(blocks)
    layers, layers_here = there["layers"], here["layers"]
    for (path, kind, _), (path_here, kind_here, _) in zip(
        layers, layers_here, strict=False
    ):
        if (path, kind) != (path_here, kind_here):
            difference = f"{path!r} was a {kind}, and {path_here!r} is a {kind_here}"
            raise _another_network(backbone, difference, state)
    if len(layers) != len(layers_here):
        difference = f"it had {len(layers)} layers, and has {len(layers_here)}"
        raise _another_network(backbone, difference, state)
    is_same_version = state["versions"] == versions(blocks)
    for (path, _, before), (_, _, now) in zip(layers, layers_here, strict=True):
        both = before.keys() & now.keys()
        for name in sorted(before.keys() | now.keys() if is_same_version else both):
            was, is_now = before.get(name), now.get(name)
            if was != is_now:
                difference = f"{name} of {path!r} was {was}, and is {is_now}"
                raise _another_network(backbone, difference, state)
    if is_same_version and there["functions"] != here["functions"]:
        difference = "its layers are connected otherwise"
        raise _another_network(backbone, difference, state)


def _check_shapes(
    backbone: Backbone, blocks: Mapping[str, Block], state: State, is_by_value: bool
) -> None:
    """Refuse blocks whose weights have other shapes than those of a state."""
    shapes = {key: tuple(one.shape) for key, one in state_of(blocks.values()).items()}
    saved = {key: array.shape for key, array in state["weights"].items()}
    if is_by_value:  # weights that the backbone owns were left out
        shapes = {key: shape for key, shape in shapes.items() if key in saved}
    for key in shapes | saved:
        if shapes.get(key) != saved.get(key):
            difference = f"{key!r} has another shape"
            raise _another_network(backbone, difference, state)


def _another_network(backbone: Backbone, difference: str, state: State) -> WeightsError:
    """Return the error for a state of another network."""
    return WeightsError(
        f"The backbone {backbone.name!r} is another network here than it was where the "
        f"estimator was saved: {difference}. Register the same one before loading. It "
        f"was saved with {_as_text(state['versions'])}; here are "
        f"{_as_text(versions())}."
    )


def _as_text(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())
